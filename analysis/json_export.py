"""A capture as a file of residual comparisons: `format_version: 2`, or the older single comparison; written as a stream.

The format has no layer -1 and no raw state of the last block: its layers are 0 to L-1, and L-1 is the state after the final
norm, our layer L. Its norm_delta there is from the output of block L-2; cosine_prev from there is not known and null.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import QueryError, near_label
from analysis.json_cells import PAIR_NUMBERS, RUN_NUMBERS, pair_cell, run_cell, with_rest
from analysis.json_file import HERE
from analysis.json_import import sides_of
from analysis.json_rows import Names, hold, let_go, pair_rows, rests, run_rows
from analysis.select import EVERYTHING, Filters
from analysis.tables import written
from capture.errors import StoreError

if TYPE_CHECKING:
    import duckdb


_TOKENS = 512  # of the prompts whose rows are read at once


def export_json(
    con: duckdb.DuckDBPyConnection,
    pair: str,
    capture: str,
    file: str | Path,
    *,
    filters: Filters = EVERYTHING,
    single: str | None = None,
    told: Callable[[int, int], Any] = lambda done, all_: None,
) -> Path:
    """Write one capture to `file`, whole or not at all; `-` is stdout. Memory does not grow with the capture.

    filters: which prompts and variants. single: a comparison such as BB-SS, to write the older format with it alone. A
    capture that came from a file becomes that file again, in its own format where `single` is not another. told(done, all) is called after each record.
    Raises QueryError, StoreError.
    """
    names = Names.of(con, pair, capture)
    if single and single not in names.comparisons:
        raise QueryError(f"no comparison '{single}' here. {near_label(single, names.comparisons)}")
    prompts = _prompts(con, pair, capture, filters)
    path = Path(file) if str(file) == "-" else Path(file).expanduser().absolute()
    done = 0
    try:
        with written(path) as stream:
            # half of a surrogate pair, which UTF-8 cannot hold, stands in a string, and there its escape means the same
            write = lambda text: stream.write(text.encode(errors="backslashreplace"))  # noqa: E731
            write("[")
            for some in _batches(prompts):
                hold(con, names, [prompt["prompt_idx"] for prompt in some])
                for prompt in some:
                    write(",\n" if done else "\n")
                    for text in _record(con, names, prompt, single):
                        write(text)
                    done += 1
                    told(done, len(prompts))
            write("\n]\n")
    except BrokenPipeError:  # the reader went, as `head` does
        raise
    except OSError as error:
        raise StoreError(f"cannot write '{path}': {error.strerror or error}") from error
    finally:
        let_go(con)
    return path


def _batches(prompts: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The prompts in their order, few enough at a time that their cells take some tens of megabytes."""
    some: list[dict[str, Any]] = []
    for prompt in prompts:
        if some and sum(p["n_tokens"] for p in (*some, prompt)) > _TOKENS:
            yield some
            some = []
        some.append(prompt)
    if some:
        yield some


def _prompts(con: duckdb.DuckDBPyConnection, pair: str, capture: str, filters: Filters) -> list[dict[str, Any]]:
    where, values = Filters(pair, capture, filters.prompt, filters.variant).where("''")
    rows = con.execute(
        f"SELECT prompt_idx, variant, text, n_tokens FROM prompts {where} ORDER BY prompt_idx, variant", values
    ).fetchall()
    found = [{"prompt_idx": p, "variant": v, "text": t, "n_tokens": n} for p, v, t, n in rows]
    order = {
        (p, v): json.loads(text)["number"]
        for p, v, text in con.execute(
            "SELECT prompt_idx, variant, json FROM imported WHERE pair = ? AND capture = ? AND part = 'record'",
            [pair, capture],
        ).fetchall()
    }
    return sorted(found, key=lambda p: order.get((p["prompt_idx"], p["variant"]), 0))


def _record(con: duckdb.DuckDBPyConnection, names: Names, prompt: dict[str, Any], single: str | None) -> Iterator[str]:
    key = [names.pair, names.capture, prompt["prompt_idx"], prompt["variant"]]
    tokens = con.execute(
        "SELECT position, token FROM held_tokens WHERE pair = ? AND capture = ? AND prompt_idx = ? AND variant = ? "
        "ORDER BY position",
        key,
    ).fetchall()
    texts = dict(tokens)
    kept = rests(con, key)
    headers = {part: json.loads(text)["header"] for part, text in kept.headers.items()}
    header = headers.get("record")
    if header is None or (single and "layers" not in header):  # a file of all passes has other keys
        header = names.record_header(prompt, list(texts.values()), single)
    yield "{"
    for i, (name, value) in enumerate(header.items()):
        yield f"{',' if i else ''}{json.dumps(name)}:"
        if value != HERE:
            yield json.dumps(value, ensure_ascii=False)
        elif name == "layers":
            base, sft = names.sides(single) if single else sides_of(header)
            mine = (part for part, sides in kept.pair_sides.items() if sides == (base, sft))
            yield from _layers(_pair_cells(con, names, key, base, sft, texts, kept.cells(next(mine, "pairwise 0"))))
        else:
            yield "[\n"
            kind = "run" if name == "runs" else "pairwise"
            parts = [(p, h) for p, h in headers.items() if p.startswith(f"{kind} ")]
            if not headers:  # of an imported record they are those of its file, be it none
                parts = names.parts(kind, prompt, list(texts.values()))
            for j, (part, said) in enumerate(parts):
                yield (",\n" if j else "") + "{"
                for k, (inner, content) in enumerate(said.items()):
                    yield f"{',' if k else ''}{json.dumps(inner)}:"
                    if content != HERE:
                        yield json.dumps(content, ensure_ascii=False)
                    elif kind == "run":
                        run = kept.run(part, said)
                        yield from _layers(_run_cells(con, names, key, run, texts, kept.cells(part)))
                    else:
                        base, sft = kept.sides(part, said)
                        yield from _layers(_pair_cells(con, names, key, base, sft, texts, kept.cells(part)))
                yield "}"
            yield "\n]"
    yield "}"


def _layers(cells: Iterator[tuple[int, int, dict[str, Any]]]) -> Iterator[str]:
    yield "{"
    for i, (layer, group) in enumerate(groupby(cells, key=lambda c: c[0])):
        yield f'{"," if i else ""}\n"{layer}":{{'
        for j, (_, position, cell) in enumerate(group):
            yield f'{"," if j else ""}\n"{position}":' + json.dumps(cell, ensure_ascii=False, separators=(",", ":"))
        yield "}"
    yield "}"


def _run_cells(
    con: duckdb.DuckDBPyConnection, names: Names, key: list[Any], run: str, texts: dict[int, str], kept: dict[Any, Any]
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    for layer, position, ours, row in run_rows(con, names, key, run):
        numbers = {n: row[n] for n in RUN_NUMBERS}
        tracked = names.tracked(row["tracked"])
        cell = run_cell(texts.get(position, ""), numbers, (row["ids"], row["logits"]), tracked)
        for rest in kept.get((ours, position), ()):
            cell = with_rest(cell, rest)
        yield layer, position, cell


def _pair_cells(
    con: duckdb.DuckDBPyConnection,
    names: Names,
    key: list[Any],
    base: str,
    sft: str,
    texts: dict[int, str],
    kept: dict[Any, Any],
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    for layer, position, ours, row in pair_rows(con, names, key, base, sft):
        numbers = {n: row[n] for n in PAIR_NUMBERS}
        sides = {side: {n: row[f"{side}_{n}"] for n in RUN_NUMBERS} for side in ("base", "sft")}
        left, right = names.tracked(row["base_tracked"]), names.tracked(row["sft_tracked"])
        tracked = {i: (left[i], right[i]) for i in left if i in right}
        increased = (row["increased_ids"], row["increased"])
        cell = pair_cell(
            texts.get(position, ""), numbers, sides, increased, (row["decreased_ids"], row["decreased"]), tracked
        )
        for rest in kept.get((ours, position), ()):
            cell = with_rest(cell, rest)
        yield layer, position, cell
