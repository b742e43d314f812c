"""What an export reads: names of passes and comparisons, cells in order, and what an import kept beside the tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis.json_file import HERE
from analysis.json_import import sides_of, unique, unique_sides
from analysis.views import quote

if TYPE_CHECKING:
    import duckdb

_CHUNK = 2000  # rows fetched at a time
_RUN_COLUMNS = {"norm": "norm", "norm_delta": "norm_delta", "cosine_prev": "cosine_distance_prev", "entropy": "entropy"}
_PAIR_COLUMNS = {"norm_diff": "norm_diff", "cosine_sim": "cosine_distance", "kl_div": "kl_divergence"}
_CELL = "pair = ? AND capture = ? AND prompt_idx = ? AND variant = ?"


@dataclass(frozen=True)
class Names:
    """One capture: its passes as (name, model, embeddings, unembedding), comparisons, tracked ids and last layer L."""

    pair: str
    capture: str
    passes: tuple[tuple[str, str, str, str], ...]
    comparisons: tuple[str, ...]
    tracked_ids: tuple[int, ...]
    last: int | None
    imported: bool
    lens_norm: str | None

    @classmethod
    def of(cls, con: duckdb.DuckDBPyConnection, pair: str, capture: str) -> Names:
        """Read them from the tables and capture.json."""
        key = [pair, capture]
        text, n_layers, norm = con.execute(
            "SELECT json, n_layers, lens_norm FROM captures WHERE pair = ? AND capture = ?", key
        ).fetchall()[0]
        said = json.loads(text or "{}")
        first = con.execute("SELECT min(prompt_idx) FROM prompts WHERE pair = ? AND capture = ?", key).fetchall()[0][0]
        runs = con.execute(
            "SELECT DISTINCT run FROM runs WHERE pair = ? AND capture = ? AND prompt_idx = ? ORDER BY 1", [*key, first]
        ).fetchall()
        pairs = con.execute(
            "SELECT DISTINCT comparison FROM pairwise WHERE pair = ? AND capture = ? AND prompt_idx = ? ORDER BY 1",
            [*key, first],
        ).fetchall()
        tracked = con.execute(
            "SELECT token_id FROM tracked_tokens WHERE pair = ? AND capture = ? ORDER BY slot", key
        ).fetchall()
        known = {p.get("name"): p for p in (said.get("config") or {}).get("passes") or []}
        return cls(
            pair,
            capture,
            tuple(_pass(run, known.get(run) or {}) for (run,) in runs),
            tuple(said.get("comparisons") or (c for (c,) in pairs)),
            tuple(i for (i,) in tracked),
            n_layers,
            "imported" in said,
            norm,
        )

    def tracked(self, logits: list[float] | None) -> dict[int, float]:
        """Logits by slot as logits by token id; those that are no number are left out."""
        pairs = zip(self.tracked_ids, logits or (), strict=False)
        return {i: v for i, v in pairs if v is not None and math.isfinite(v)}

    def sides(self, comparison: str) -> tuple[str, str]:
        """The two passes of a comparison. An imported pass may have a hyphen in its own name, so both must be passes."""
        cuts = [(comparison[:i], comparison[i + 1 :]) for i, letter in enumerate(comparison) if letter == "-"]
        known = {name for name, *_ in self.passes}
        return next((two for two in cuts if known.issuperset(two)), cuts[0])

    def record_header(self, prompt: dict[str, Any], tokens: list[str], single: str | None) -> dict[str, Any]:
        """The keys of a record that is made here, in the format's order."""
        metadata = self._metadata(prompt)
        if single:
            base, sft = self.sides(single)
            return {"prompt": prompt["text"], "tokens": tokens, "metadata": metadata,
                    "swap_options": self._swap_options(base, sft), "layers": HERE}  # fmt: skip
        return {"format_version": 2, "prompt": prompt["text"], "tokens": tokens,
                "metadata": metadata | {"multi_pass": True}, "runs": HERE, "pairwise": HERE}  # fmt: skip

    def parts(self, kind: str, prompt: dict[str, Any], tokens: list[str]) -> list[tuple[str, dict[str, Any]]]:
        """The passes or comparisons of a record that is made here, with their keys."""
        metadata = self._metadata(prompt)
        if kind == "run":
            return [
                (f"run {i}", {"name": name, "model": model, "embedding_source": embeddings,
                              "unembedding_source": unembedding, "layers": HERE, "metadata": metadata | {"run_name": name}})
                for i, (name, model, embeddings, unembedding) in enumerate(self.passes)
            ]  # fmt: skip
        found = []
        for i, name in enumerate(self.comparisons):
            base, sft = self.sides(name)
            runs = {"base_run": base, "sft_run": sft}
            found.append((f"pairwise {i}", {
                "name": name, **runs, "prompt": prompt["text"], "tokens": tokens,
                "metadata": metadata | runs | {"pair_name": name},
                "swap_options": self._swap_options(base, sft), "layers": HERE,
            }))  # fmt: skip
        return found

    def _metadata(self, prompt: dict[str, Any]) -> dict[str, Any]:
        # last_layer: as the format numbers it; where a capture has some layers alone, the highest in the file may be another
        return {"prompt_idx": prompt["prompt_idx"], "variant_name": prompt["variant"], "pair": self.pair,
                "capture": self.capture, "lens_norm": self.lens_norm,
                "last_layer": None if self.last is None else self.last - 1}  # fmt: skip

    def _swap_options(self, base: str, sft: str) -> dict[str, Any]:
        known = {name: (embeddings, unembedding) for name, _, embeddings, unembedding in self.passes}
        found = {}
        for side, run in (("base", base), ("sft", sft)):
            embeddings, unembedding = known.get(run, (side, side))
            found[side] = {"embedding_source": embeddings, "unembedding_source": unembedding}
        return found


def _pass(name: str, said: dict[str, Any]) -> tuple[str, str, str, str]:
    """As the config says; else by the name's letters, embeddings first and blocks second."""
    letters = {"B": "base", "S": "sft"}
    model = said.get("model") or letters.get(name[1:2], "base")
    embeddings = said.get("embedding_source") or letters.get(name[:1], model)
    return name, model, embeddings, said.get("unembedding_source") or model


@dataclass(frozen=True)
class Rests:
    """What an import kept of one record: headers by part, and rests of cells by part and then (layer, position)."""

    headers: dict[str, str]
    by_part: dict[str, dict[tuple[int, int], list[dict[str, Any]]]]
    run_names: dict[str, str]
    pair_sides: dict[str, tuple[str, str]]

    def cells(self, part: str) -> dict[tuple[int, int], list[dict[str, Any]]]:
        return self.by_part.get(part, {})

    def run(self, part: str, header: dict[str, Any]) -> str:
        return self.run_names.get(part, str(header.get("name")))

    def sides(self, part: str, header: dict[str, Any]) -> tuple[str, str]:
        return self.pair_sides.get(part) or sides_of(header)


def rests(con: duckdb.DuckDBPyConnection, key: list[Any]) -> Rests:
    """Read what an import kept of one record; nothing for a capture of our own."""
    rows = con.execute(f"SELECT part, layer, position, json FROM held_imported WHERE {_CELL}", key).fetchall()
    headers: dict[str, str] = {}
    cells: dict[str, dict[tuple[int, int], list[dict[str, Any]]]] = {}
    for part, layer, position, text in rows:
        if layer is None:
            headers[part] = text
        else:
            cells.setdefault(part, {}).setdefault((layer, position), []).append(json.loads(text))
    for by_cell in cells.values():
        for found in by_cell.values():
            found.sort(key=lambda rest: "under" not in rest)  # what is under comes first
    ordered = dict(sorted(headers.items(), key=lambda h: (len(h[0]), h[0])))  # run 9 before run 10
    return Rests(ordered, cells, _run_names(ordered), _pair_sides(ordered))


def hold(con: duckdb.DuckDBPyConnection, names: Names, prompts: list[int]) -> None:
    """Read the cells of some prompts, joined, into temporary tables: held_run_cells and held_pair_cells. `let_go` drops them.

    Of this connection: a cursor of it does not see a run directory in a store. held_run_cells: norm, norm_delta, cosine_prev (a
    distance), entropy, tracked, ids, logits. held_pair_cells: norm_diff, cosine_sim (a distance), kl_div, those of both passes
    after base_ and sft_, and the top-k lists. A record has ten parts: to join for each of them took nearly all of an export's
    time. held_tokens, held_imported and held_runs are of the views of those names.
    """
    some = ", ".join(str(int(p)) for p in sorted(set(prompts)))
    here = f"pair = {quote(names.pair)} AND capture = {quote(names.capture)} AND prompt_idx IN ({some})"

    def table(name: str, sql: str) -> None:
        con.execute(f"CREATE OR REPLACE TEMP TABLE held_{name} AS {sql}")

    for name in ("tokens", "imported", "runs"):
        table(name, f"SELECT * FROM {name} WHERE {here}")
    cell = "prompt_idx, variant, run, layer, position"
    table(
        "run_cells",
        f"SELECT {', '.join(f'r.{c}' for c in cell.split(', '))}, {_side(names)}, k.ids, k.logits\nFROM held_runs AS r\n"
        f"LEFT JOIN (SELECT {cell}, ids, logits FROM runs_topk WHERE {here}) AS k USING ({cell})\n{_before(names)}",
    )
    cell = "prompt_idx, variant, base_run, sft_run, layer, position"
    lists = "increased_ids, increased, decreased_ids, decreased"
    own = [f"p.{column} AS {name}" for name, column in _PAIR_COLUMNS.items()]
    sides = [f"{side[0]}.{name} AS {side}_{name}" for side in ("base", "sft") for name in (*_RUN_COLUMNS, "tracked")]
    joins = "".join(
        f"LEFT JOIN held_run_cells AS {side[0]} ON {side[0]}.prompt_idx = p.prompt_idx AND {side[0]}.variant = p.variant "
        f"AND {side[0]}.run = p.{side}_run AND {side[0]}.layer = p.layer AND {side[0]}.position = p.position\n"
        for side in ("base", "sft")
    )
    table(
        "pair_cells",
        f"SELECT {', '.join(f'p.{c}' for c in cell.split(', '))}, {', '.join([*own, *sides])}, {lists}\n"
        f"FROM (SELECT * FROM pairwise WHERE {here}) AS p\n"
        f"LEFT JOIN (SELECT {cell}, {lists} FROM pairwise_topk WHERE {here}) AS k USING ({cell})\n{joins}",
    )


def let_go(con: duckdb.DuckDBPyConnection) -> None:
    """Drop what `hold` has read."""
    for name in ("tokens", "imported", "runs", "run_cells", "pair_cells"):
        con.execute(f"DROP TABLE IF EXISTS temp.held_{name}")


def _run_names(headers: dict[str, str]) -> dict[str, str]:
    """The names that an import gave to passes: their own, or made unique."""
    names: dict[str, str] = {}
    for part, text in headers.items():
        if part.startswith("run "):
            said = json.loads(text)["header"].get("name")
            names[part] = unique(str(said or f"run{part.split(' ')[1]}"), names.values())
    return names


def _pair_sides(headers: dict[str, str]) -> dict[str, tuple[str, str]]:
    """The passes that an import gave to comparisons: as they name them, or made unique."""
    sides: dict[str, tuple[str, str]] = {}
    for part, text in headers.items():
        if part.startswith("pairwise "):
            sides[part] = unique_sides(json.loads(text)["header"], sides.values())
    return sides


def _rows(
    con: duckdb.DuckDBPyConnection, names: Names, sql: str, values: list[Any]
) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """Rows with their layer as the format numbers it, position, our layer, and the columns; layers without place are left out.

    They are to be taken to their end before the connection is asked again: what it holds no other cursor sees.
    """
    cursor = con.execute(sql, values)
    columns = [d[0] for d in cursor.description]
    while chunk := cursor.fetchmany(_CHUNK):
        for values_ in chunk:
            row = dict(zip(columns, values_, strict=True))
            ours, position = row.pop("layer"), row.pop("position")
            layer = ours
            if names.last is not None:
                if ours == names.last:
                    layer = ours - 1
                elif ours == -1 or ours == names.last - 1:
                    continue
            for name, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):  # JSON has no word for it
                    row[name] = None
            yield layer, position, ours, row


def _side(names: Names) -> str:
    """The columns of a pass. At the last layer of our own captures the format's layer before is block L-2's output."""
    picked = []
    for name, column in _RUN_COLUMNS.items():
        sql = f"r.{column}"
        if not names.imported and names.last is not None and name == "norm_delta":
            sql = f"CASE WHEN r.layer = {names.last} THEN r.norm::DOUBLE - before.norm ELSE {sql} END"
        if not names.imported and names.last is not None and name == "cosine_prev":
            sql = f"CASE WHEN r.layer <> {names.last} THEN {sql} END"
        picked.append(f"{sql} AS {name}")
    return ", ".join([*picked, "r.tracked_logits AS tracked"])


def _before(names: Names) -> str:
    if names.imported or names.last is None:
        return ""
    return (
        f"LEFT JOIN held_runs AS before ON r.layer = {names.last} AND before.layer = {names.last - 2} AND before.run = r.run "
        "AND before.prompt_idx = r.prompt_idx AND before.variant = r.variant AND before.position = r.position\n"
    )


def run_rows(
    con: duckdb.DuckDBPyConnection, names: Names, key: list[Any], run: str
) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """The cells of a pass of one prompt that `hold` has read."""
    sql = (
        "SELECT * EXCLUDE (prompt_idx, variant, run) FROM held_run_cells WHERE prompt_idx = ? AND variant = ? AND run = ? "
        "ORDER BY layer, position"
    )
    return _rows(con, names, sql, [*key[2:], run])


def pair_rows(
    con: duckdb.DuckDBPyConnection, names: Names, key: list[Any], base: str, sft: str
) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """The cells of a comparison of one prompt that `hold` has read."""
    sql = (
        "SELECT * EXCLUDE (prompt_idx, variant, base_run, sft_run) FROM held_pair_cells WHERE prompt_idx = ? AND variant = ? "
        "AND base_run = ? AND sft_run = ? ORDER BY layer, position"
    )
    return _rows(con, names, sql, [*key[2:], base, sft])
