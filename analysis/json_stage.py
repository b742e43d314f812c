"""What is read of a JSON file, on its way to the tables: Parquet files of cells in the file's own order and numbering.

Which pass a cell belongs to, and which layer is the last, may stand behind the cells in a file; so cells are put down as they
come, and DuckDB sorts them afterwards, on disk where they do not fit in memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from analysis.json_cells import (
    ALL_PAIR_NUMBERS,
    PAIR_NUMBERS,
    RUN_NUMBERS,
    SIDE_NUMBERS,
    kept_all,
    pair_cell,
    plain,
    rest_of,
    run_cell,
    topk,
    tracked_pair,
    tracked_run,
)
from analysis.json_file import Cell, Record

BATCH = 4096
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_WHERE: list[tuple[str, Any]] = [
    ("record", pa.int32()), ("part", pa.int32()), ("layer", pa.int16()), ("position", pa.int32()),
]  # fmt: skip
_IDS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
_SCHEMAS: dict[str, Any] = {
    "run": pa.schema(
        _WHERE + [(n, pa.float32()) for n in RUN_NUMBERS]
        + [("ids", _IDS), ("logits", _FLOATS), ("tracked_ids", _IDS), ("tracked", _FLOATS)]
    ),
    "pairwise": pa.schema(
        _WHERE + [(n, pa.float32()) for n in (*PAIR_NUMBERS, *SIDE_NUMBERS)]
        + [("increased_ids", _IDS), ("increased", _FLOATS), ("decreased_ids", _IDS), ("decreased", _FLOATS)]
        + [("tracked_ids", _IDS), ("tracked_base", _FLOATS), ("tracked_sft", _FLOATS)]
    ),
    "rest": pa.schema([("record", pa.int32()), ("part_name", pa.string()), ("layer", pa.int16()),
                       ("position", pa.int32()), ("json", pa.string())]),
}  # fmt: skip


def _json(content: dict[str, Any]) -> str:
    """JSON with letters as they are; halves of surrogate pairs, which a column of texts cannot hold, as escapes."""
    text = _ENCODE(content)
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


class Stage:
    """The staging directory: `run`, `pairwise` and `rest`, each a Parquet file. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in _SCHEMAS}
        self.tracked_ids: dict[int, None] = {}
        self.last_layer = -1
        self.counts = dict.fromkeys(_SCHEMAS, 0)
        self._writers = {
            name: parquet.ParquetWriter(self.path(name), schema, compression="zstd")
            for name, schema in _SCHEMAS.items()
        }

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.parquet"

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exception: object) -> None:
        for name in _SCHEMAS:
            self._flush(name)
            self._writers[name].close()

    def cell(self, cell: Cell) -> None:
        """Put down one cell, and what of it the tables do not hold."""
        self.last_layer = max(self.last_layer, cell.layer)
        where = {
            "record": cell.record.number, "part": cell.part.number, "layer": cell.layer, "position": cell.position,
        }  # fmt: skip
        tokens = cell.record.header.get("tokens")
        token = None
        if isinstance(tokens, list) and cell.position < len(tokens):
            token = plain(str(tokens[cell.position]))  # as the tables have it
        add = self._run if cell.part.kind == "run" else self._pair
        row, written = add(cell.content, token)
        self._add(cell.part.kind, where | row)
        if (rest := rest_of(cell.content, written)) is not None:
            self.rest(cell.record, cell.part.name, rest, cell.layer, cell.position)

    def _run(self, content: dict[str, Any], token: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        numbers = kept_all(content, RUN_NUMBERS)
        ids, logits = topk(content, "top_k_logits")
        tracked_ids, tracked = tracked_run(content)
        self.tracked_ids.update(dict.fromkeys(tracked_ids))
        written = run_cell(token, numbers, (ids, logits), dict(zip(tracked_ids, tracked, strict=True)))  # type: ignore[arg-type]
        lists = {"ids": ids, "logits": logits, "tracked_ids": tracked_ids, "tracked": tracked}
        return numbers | lists, written

    def _pair(self, content: dict[str, Any], token: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        numbers = kept_all(content, ALL_PAIR_NUMBERS)
        sides: dict[str, dict[str, float | None]] = {"base": {}, "sft": {}}
        for key, (side, name) in SIDE_NUMBERS.items():
            sides[side][name] = numbers[key]
        up, down = topk(content, "top_k_increased"), topk(content, "top_k_decreased")
        ids, base, sft = tracked_pair(content)
        self.tracked_ids.update(dict.fromkeys(ids))
        tracked: Any = dict(zip(ids, zip(base, sft, strict=True), strict=True))
        written = pair_cell(token, numbers, sides, up, down, tracked)
        lists = {"increased_ids": up[0], "increased": up[1], "decreased_ids": down[0], "decreased": down[1],
                 "tracked_ids": ids, "tracked_base": base, "tracked_sft": sft}  # fmt: skip
        return numbers | lists, written

    def rest(
        self, record: Record, part: str, content: dict[str, Any], layer: int | None = None, position: int | None = None
    ) -> None:
        """Put down what the tables do not hold of a record, a part or a cell."""
        self._add("rest", {"record": record.number, "part_name": part, "layer": layer, "position": position,
                           "json": _json(content)})  # fmt: skip

    def _add(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name].append(row)
        self.counts[name] += 1
        if len(self.rows[name]) >= BATCH:
            self._flush(name)

    def _flush(self, name: str) -> None:
        if self.rows[name]:
            self._writers[name].write_table(pa.Table.from_pylist(self.rows[name], schema=_SCHEMAS[name]))
            self.rows[name] = []
