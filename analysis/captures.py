"""The two small tables that come from JSON, not Parquet: one row per capture, one row per attempt."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from analysis.views import CAPTURES, MANIFEST_VIEW, View
from capture.errors import StoreError
from capture.layout import MARKER, CaptureDir, RunDir
from capture.manifest import as_it_is

if TYPE_CHECKING:
    import pyarrow

# column of `captures` -> where capture.json says it
_WHERE = {
    "base_model": "models.base.model",
    "sft_model": "models.sft.model",
    "base_revision": "models.base.revision",
    "sft_revision": "models.sft.revision",
    "tokenizer": "tokenizer.name",
    "dtype": "dtype",
    "quantization": "quantization",
    "lens_norm": "lens.norm",
    "mode": "mode",
    "device": "device",
    "gpu": "gpu",
    "n_layers": "n_layers",
    "n_prompts": "n_prompts",
    "n_tokens": "n_tokens",
    "peak_memory_bytes": "peak_memory_bytes",
}


def captures_table(run: RunDir, captures: list[CaptureDir]) -> pyarrow.Table:
    """One row per capture, columns of views.CAPTURES. A capture.json that is missing or broken leaves nulls."""
    rows = [_capture_row(run, c) for c in captures]
    newest = {row["pair"]: row["capture"] for row in sorted(rows, key=_age)}
    return _table(CAPTURES, [row | {"newest": newest[row["pair"]] == row["capture"]} for row in rows])


def _age(row: dict[str, Any]) -> tuple[bool, float, str]:
    """What orders the captures of a pair, the newest last: one that is not complete comes before all that are."""
    return row["complete"], row["written"].timestamp() if row.get("written") else 0.0, row["capture"]


def manifest_table(run: RunDir) -> pyarrow.Table:
    """One row per attempt, columns of schema.MANIFEST; keys that a row lacks are null, others are left out."""
    return _table(MANIFEST_VIEW, [as_it_is(row) for row in run.manifest_rows()])


def _capture_row(run: RunDir, capture: CaptureDir) -> dict[str, Any]:
    complete = not capture.marker.get("partial", False)
    row: dict[str, Any] = {
        "pair": capture.pair,
        "capture": capture.capture,
        "complete": complete,
        "path": capture.path,
        "bytes": sum(f["bytes"] for f in capture.marker["files"]) if complete else None,
    }
    if complete:
        row["written"] = _written(capture) or run.fs.get_file_info(f"{capture.path}/{MARKER}").mtime
    try:
        text = run.read_bytes(f"{capture.path}/capture.json").decode()
        said = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return row
    if not isinstance(said, dict):
        return row
    row["json"] = text
    row |= {column: _dig(said, place) for column, place in _WHERE.items()}
    row["twin_layer"] = _twin_layer(said)
    if isinstance(seconds := said.get("seconds"), Mapping):
        row["seconds"] = float(
            sum(v for v in seconds.values() if isinstance(v, float) or (isinstance(v, int) and abs(v) < 1 << 53))
        )
    return row


def _written(capture: CaptureDir) -> datetime.datetime | None:
    """When the capture was complete, as its marker says: the file's own time is that of the last copy, in what order they came."""
    try:
        time = datetime.datetime.fromisoformat(str(capture.marker.get("finished")))
        return time.astimezone(datetime.UTC) if time.tzinfo else time.replace(tzinfo=datetime.UTC)
    except (ValueError, OverflowError):
        return None


def _twin_layer(said: Mapping[str, Any]) -> int | None:
    """Layer L, if the lens read it and L-1 through the final norm: both are then one distribution."""
    last, layers = said.get("n_layers"), _dig(said, "lens.layers")
    if type(last) is not int or not isinstance(layers, list) or _dig(said, "lens.norm") != "final":
        return None
    return last if last in layers and last - 1 in layers else None


def _dig(said: Any, path: str) -> Any:
    for key in path.split("."):
        said = said.get(key) if isinstance(said, Mapping) else None
    return said


def _table(view: View, rows: list[dict[str, Any]]) -> pyarrow.Table:
    import pyarrow as pa

    types = {"string": pa.string(), "category": pa.string(), "bool": pa.bool_(), "int64": pa.int64(),
             "float64": pa.float64(), "timestamp": pa.timestamp("us")}  # fmt: skip
    columns = {}
    for column in view.columns:
        try:
            values = [_value(column.type, row.get(column.name)) for row in rows]
            columns[column.name] = pa.array(values, type=types[column.type])
        except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
            raise StoreError(f"a row of '{view.name}' has a wrong value of '{column.name}': {error}") from error
    return pa.table(columns)


def _value(kind: str, value: Any) -> Any:
    if value is None:
        return None
    if kind in ("string", "category"):
        return value if isinstance(value, str) else json.dumps(value)
    if kind == "timestamp":
        time = datetime.datetime.fromisoformat(value) if isinstance(value, str) else value
        if not isinstance(time, datetime.datetime):
            raise TypeError(f"{value!r} is no time")
        return time.astimezone(datetime.UTC).replace(tzinfo=None) if time.tzinfo else time
    return value
