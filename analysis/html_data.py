"""What the page of a run directory carries: pairs, prompts, and each prompt's cells as arrays."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from analysis.errors import QueryError, near
from analysis.html_pack import Packer
from analysis.run import of_one_capture
from analysis.select import is_imported
from capture.schema import BY_NAME, Column

if TYPE_CHECKING:
    import duckdb

_CELL = "pair = ? AND capture = ? AND prompt_idx = ? AND variant = ?"
_SINGULAR = 64  # singular values of a layer that the page shows
FACTS = ("base_model", "base_revision", "sft_model", "sft_revision", "tokenizer", "dtype", "lens_norm", "twin_layer", "mode", "device",
         "gpu", "n_layers", "n_prompts", "n_tokens", "seconds", "written", "complete")  # fmt: skip


def scalars(table: str) -> tuple[Column, ...]:
    """The columns of `runs` or `pairwise` that are one number per cell."""
    return tuple(c for c in BY_NAME[table].columns if c.type in ("float32", "bool"))


@dataclass(frozen=True)
class Prompt:
    """One prompt in one variant of one capture."""

    prompt_idx: int
    variant: str
    text: str


@dataclass
class PairData:
    """One pair's capture: what is the same for all its prompts. con: a connection to ask about it; stored: text by token id;
    facts: a row of `captures`."""

    con: duckdb.DuckDBPyConnection
    name: str
    capture: str
    facts: dict[str, Any]
    capture_json: str | None
    tracked: list[dict[str, Any]]
    stored: dict[int, str]
    prompts: list[Prompt]
    total: int
    has_lists: bool = True  # top-k lists, which a lens makes
    runs: list[str] = field(default_factory=list)
    comparisons: list[str] = field(default_factory=list)

    @property
    def noise_floor(self) -> dict[str, dict[str, list[float]]]:
        """Largest change by batching alone, per pass, column and layer; empty where none was measured."""
        try:
            said = json.loads(self.capture_json or "{}").get("noise_floor") or {}
            found = said.get("by_run_and_layer") or {}
        except (ValueError, AttributeError):
            return {}
        return found if isinstance(found, dict) else {}


def choose_pairs(con: duckdb.DuckDBPyConnection, entries: tuple[str, ...] = ()) -> list[PairData]:
    """The newest capture of each pair, or of those named; QueryError for one that is not there."""
    rows = con.execute(
        f"SELECT pair, capture, path, json, {', '.join(FACTS)} FROM captures WHERE (pair, capture) IN (SELECT (pair, capture) FROM "
        "prompts) ORDER BY pair, newest DESC, written DESC NULLS LAST, capture"
    ).fetchall()
    newest: dict[str, tuple[Any, ...]] = {}
    for row in rows:
        newest.setdefault(row[0], row)
    if not newest:
        raise QueryError("the run directory holds no complete capture; 'pairscope status OUT' says how far it is")
    for name in entries:
        if name not in newest:
            raise QueryError(f"no pair '{name}' here. {near(name, newest)}")
    return [_pair(con, newest[name]) for name in (dict.fromkeys(entries) or newest)]


def _pair(con: duckdb.DuckDBPyConnection, row: tuple[Any, ...]) -> PairData:
    name, capture, path, text, *facts = row
    con = of_one_capture(con, path)  # or each of several hundred pairs would be looked for among the files of all
    key = [name, capture]
    here = "WHERE pair = ? AND capture = ?"
    prompts = con.execute(
        f"SELECT prompt_idx, variant, text FROM prompts {here} ORDER BY prompt_idx, variant <> 'identity', variant", key
    ).fetchall()
    tracked = con.execute(f"SELECT token_id, label FROM tracked_tokens {here} ORDER BY slot", key).fetchall()
    # the last of several texts of an id is kept: always the same one, the vocabulary's where it has one
    stored = con.execute(
        f"SELECT token_id, token FROM (SELECT token_id, token, 0 AS place FROM tokens {here} UNION "
        f"SELECT token_id, token, 1 FROM vocabulary {here}) ORDER BY place, token",
        [*key, *key],
    ).fetchall()
    data = PairData(
        con=con,
        name=name,
        capture=capture,
        facts=dict(zip(FACTS, facts, strict=True)),
        capture_json=text,
        tracked=[{"token_id": i, "label": label} for i, label in tracked],
        stored=dict(stored),
        prompts=[Prompt(*p) for p in prompts],
        total=len(prompts),
        has_lists=any(
            con.execute(f"SELECT 1 FROM {table} {here} LIMIT 1", key).fetchall()
            for table in ("runs_topk", "pairwise_topk")
        ),
    )
    first = [*key, data.prompts[0].prompt_idx, data.prompts[0].variant]
    for labels, column, view in ((data.runs, "run", "runs"), (data.comparisons, "comparison", "pairwise")):
        there, values = (here, key) if is_imported(con, name, capture) else (f"WHERE {_CELL}", first)
        found = con.execute(f"SELECT DISTINCT {column} FROM {view} {there} ORDER BY 1", values).fetchall()
        labels += [label for (label,) in found]
    return data


def parse_prompts(text: str) -> list[tuple[int, int]]:
    """`0,3,5:9` as ranges (first, stop): 0, 3 and 5 to 8."""
    ranges = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?::(\d+))?\s*", part)
        if not found or (found[2] and int(found[2]) <= int(found[1])):
            raise QueryError(f"--prompts '{text}' is not a list of prompt indices such as 0,3,5:9")
        ranges.append((int(found[1]), int(found[2] or int(found[1]) + 1)))
    return ranges


def keep_prompts(pair: PairData, ranges: list[tuple[int, int]]) -> list[str]:
    """Keep those prompts only; QueryError where a pair has none of them. Returns the parts of the list that it has none of."""
    last = pair.prompts[-1].prompt_idx
    known = {p.prompt_idx for p in pair.prompts}
    pair.prompts = [p for p in pair.prompts if any(a <= p.prompt_idx < b for a, b in ranges)]
    if not pair.prompts:
        raise QueryError(f"pair '{pair.name}' has none of these prompts. There are 0 to {last}.")
    missing = [(a, b) for a, b in ranges if not any(a <= i < b for i in known)]
    return [f"{a}" if b == a + 1 else f"{a}:{b}" for a, b in missing]


def keep_top_prompts(pair: PairData, n: int) -> None:
    """Keep the n prompts of largest mean KL of BB-SS (of norm_diff where there is no lens), the largest first.

    A pair without comparisons, as one pass alone gives, keeps its first n prompts.
    """
    label = "BB-SS" if "BB-SS" in pair.comparisons else pair.comparisons[0] if pair.comparisons else ""
    rows = pair.con.execute(
        "SELECT prompt_idx, variant, avg(kl_divergence) FILTER (isfinite(kl_divergence)) AS kl, avg(norm_diff) AS size "
        "FROM pairwise WHERE pair = ? AND capture = ? AND comparison = ? GROUP BY ALL "
        "ORDER BY kl DESC NULLS LAST, size DESC, prompt_idx, variant",
        [pair.name, pair.capture, label],
    ).fetchall()
    by_key = {(p.prompt_idx, p.variant): p for p in pair.prompts}
    pair.prompts = ([by_key[i, v] for i, v, *_ in rows if (i, v) in by_key] or pair.prompts)[:n]


@dataclass
class Sheet:
    """One prompt's cells, packed. index: what the page reads first; block and lists: base64, lists may be left out."""

    index: dict[str, Any]
    block: str
    lists: str | None = None
    ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


def read_sheet(pair: PairData, prompt: Prompt) -> Sheet:
    """The scalars of one prompt: those of passes as float32, which differences are made of, those of comparisons as float16."""
    key = [pair.name, pair.capture, prompt.prompt_idx, prompt.variant]
    found = pair.con.execute(f"SELECT position, token, is_special, token_id FROM tokens WHERE {_CELL}", key).fetchall()
    texts = {position: rest for position, *rest in found}
    slots = {f"logit {t['token_id']}": f"tracked_logits[{i + 1}]" for i, t in enumerate(pair.tracked)}
    columns = {c.name: f"{c.name}::FLOAT" for c in scalars("runs")} | {k: f"{v}::FLOAT" for k, v in slots.items()}
    runs = _cells(pair.con, "runs", "run", columns, key)
    pairwise = _cells(
        pair.con, "pairwise", "comparison", {c.name: f"{c.name}::FLOAT" for c in scalars("pairwise")}, key
    )
    layers = np.unique(np.concatenate([runs["layer"], pairwise["layer"]])).astype(int)
    # a damaged table may be left out, that of the tokens too
    last = max([*texts, *(int(cells["position"].max(initial=-1)) for cells in (runs, pairwise))])
    tokens = [texts.get(position, ("", False, -1)) for position in range(last + 1)]
    shape = (len(layers), len(tokens))
    packer = Packer()
    for cells, labels, add in ((runs, pair.runs, packer.exact), (pairwise, pair.comparisons, packer.half)):
        for label in labels:
            mine = cells["label"] == label
            at = (np.searchsorted(layers, cells["layer"][mine]), cells["position"][mine])
            for name, column in cells.items():
                if name in ("label", "layer", "position"):
                    continue
                values = np.full(shape, np.nan, np.float32)
                values[at] = column[mine]
                add(f"{label} {name}", values)
    index = {
        "prompt": prompt.prompt_idx,
        "variant": prompt.variant,
        "text": prompt.text,
        "tokens": [t for t, *_ in tokens],
        "ids": [i for *_, i in tokens],
        "special": [i for i, (_, special, _) in enumerate(tokens) if special],
        "layers": layers.tolist(),
        "arrays": packer.places,
    }
    return Sheet(index, packer.block())


def read_lists(pair: PairData, sheet: Sheet, k: int) -> None:
    """Add the first k of each top-k list to a sheet: ids and logits of passes, ids and shifts of comparisons."""
    key = [pair.name, pair.capture, sheet.index["prompt"], sheet.index["variant"]]
    longest = pair.con.execute(
        f"SELECT max(len(ids)) FROM (SELECT ids FROM runs_topk WHERE {_CELL} UNION ALL SELECT increased_ids FROM pairwise_topk "
        f"WHERE {_CELL} UNION ALL SELECT decreased_ids FROM pairwise_topk WHERE {_CELL})",
        key * 3,
    ).fetchall()[0][0]
    k = min(k, longest or 0)  # each place is a column of its own
    layers = np.array(sheet.index["layers"])
    shape = (len(layers), len(sheet.index["tokens"]), k)
    if not k:
        return
    packer = Packer()
    used: list[Any] = [np.zeros(0, np.int64)]
    for table, label_sql, labels, lists in (
        ("runs_topk", "run", pair.runs, {"top": ("ids", "logits")}),
        ("pairwise_topk", "base_run || '-' || sft_run", pair.comparisons,
         {"up": ("increased_ids", "increased"), "down": ("decreased_ids", "decreased")}),
    ):  # fmt: skip
        columns = {f"{c}{i}": f"{c}[{i + 1}]" for pairs in lists.values() for c in pairs for i in range(k)}
        cells = _cells(pair.con, table, label_sql, columns, key)
        for label in labels:
            mine = cells["label"] == label
            if not mine.any():
                continue
            at = (np.searchsorted(layers, cells["layer"][mine]), cells["position"][mine])
            for name, (id_column, value_column) in lists.items():
                ids, values = np.full(shape, -1, np.int64), np.full(shape, np.nan, np.float32)
                for i in range(k):
                    ids[(*at, i)] = cells[f"{id_column}{i}"][mine]
                    values[(*at, i)] = cells[f"{value_column}{i}"][mine]
                ids[np.isnan(values)] = -1  # where a state overflowed, as the views topk and topk_shift have it
                packer.ids(f"{label} {name} ids", ids & 0xFFFFFFFF)
                packer.half(f"{label} {name}", values)
                used.append(np.unique(ids[ids >= 0]))
    if packer.places:
        sheet.index["lists"] = packer.places
        sheet.index["k"] = k
        sheet.lists, sheet.ids = packer.block(), np.unique(np.concatenate(used))


def _cells(
    con: duckdb.DuckDBPyConnection, view: str, label: str, columns: dict[str, str], key: list[Any]
) -> dict[str, NDArray[Any]]:
    """One prompt's rows of a view by column: label, layer, position and `columns`; no number is NaN, no id is -1."""
    select = ", ".join(f'{sql} AS "{name}"' for name, sql in columns.items())
    found = con.execute(
        f"SELECT {label} AS label, layer, position, {select} FROM {view} WHERE {_CELL}", key
    ).fetchnumpy()
    return {
        name: np.ma.filled(values, np.nan if values.dtype.kind == "f" else -1)
        if isinstance(values, np.ma.MaskedArray)
        else values
        for name, values in found.items()
    }


def read_spectrum(pair: PairData) -> tuple[dict[str, Any], str] | None:
    """The spectra of a pair, where it has any: what the page reads first, and the block."""
    rows = pair.con.execute(
        "SELECT variant, base_run || '-' || sft_run, layer, singular_values, effective_rank, participation_ratio, "
        "mean_shift_share FROM spectrum WHERE pair = ? AND capture = ?",
        [pair.name, pair.capture],
    ).fetchall()
    if not rows:
        return None
    layers = sorted({row[2] for row in rows})
    k = max(1, min(_SINGULAR, max(len(row[3] or ()) for row in rows)))
    packer = Packer()
    for variant, label in sorted({row[:2] for row in rows}):
        values = np.full((len(layers), k), np.nan, np.float32)
        measures = np.full((3, len(layers)), np.nan, np.float32)
        for row in (r for r in rows if r[:2] == (variant, label)):
            at = layers.index(row[2])
            found = np.array(row[3] or (), np.float32)[:k]
            values[at, : len(found)] = found
            measures[:, at] = [np.nan if v is None else v for v in row[4:]]
        packer.exact(f"{variant} {label} singular_values", values)
        for name, column in zip(("effective_rank", "participation_ratio", "mean_shift_share"), measures, strict=True):
            packer.exact(f"{variant} {label} {name}", column)
    return {"layers": layers, "k": k, "arrays": packer.places}, packer.block()
