"""What must hold after any fault, in one place: used by every test of this folder and by the soak."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capture.layout import MARKER, SPANS, RunDir
from capture.manifest import as_it_is
from capture.schema import BY_NAME

Files = dict[tuple[str, str], Any]  # (entry, capture) -> the marker's files


def complete(out: Path) -> Files:
    """The captures that say that they are complete."""
    return {(c.pair, c.capture): c.marker["files"] for c in RunDir(str(out)).captures()}


def wrong(
    out: Path,
    *,
    as_undisturbed: Mapping[str, Path] | None = None,
    reported: Files | None = None,
    attempts: int | None = None,
    settled: bool = True,
) -> list[str]:
    """What does not hold in a run directory, a line for each; empty where all does.

    as_undisturbed: entry -> directory of the capture of an undisturbed run; each must be there with equal tables.
    reported: captures that were complete before, which they must be still. attempts: rows of the manifest, as many as were
    begun. settled: nobody is at work, so that no temporary file may be left and no row may say `running`.
    """
    found = [line for c in RunDir(str(out)).captures() for line in _damage(Path(c.path), c.marker)]
    now = complete(out)
    for (pair, capture), files in (reported or {}).items():
        if (pair, capture) not in now:
            found.append(f"{pair}: capture {capture} was reported complete and is gone")
        elif _rows_of_tables(now[pair, capture]) != _rows_of_tables(files):
            found.append(f"{pair}: capture {capture} has other rows than were reported")
    for entry, undisturbed in (as_undisturbed or {}).items():
        mine = [Path(c.path) for c in RunDir(str(out)).captures() if c.pair == entry]
        if len(mine) != 1:
            found.append(f"{entry}: {len(mine)} complete captures where there must be one")
        else:
            found += [f"{entry}: {line}" for line in unequal(mine[0], undisturbed)]
    rows = [as_it_is(row) for row in RunDir(str(out)).manifest_rows()]
    if attempts is not None and len(rows) != attempts:
        found.append(f"{len(rows)} rows in the manifest for {attempts} attempts")
    found += [f"a row without an entry, a log or a state: {row}" for row in rows if not _is_told(row)]
    if settled:
        found += [f"the attempt {row['attempt']} says running" for row in rows if row["state"] == "running"]
        found += [f"left behind: {path}" for path in leftovers(out)]
    return found


def _is_told(row: Mapping[str, Any]) -> bool:
    ended = row.get("state") in ("running", "complete", "interrupted") or (
        row.get("state") == "failed" and bool(row.get("error_class"))
    )
    return bool(row.get("entry") and row.get("log") and row.get("started")) and ended


def _damage(path: Path, marker: Mapping[str, Any]) -> Iterable[str]:
    """Files that are not what the marker says, and rows that are there twice."""
    keys: dict[str, list[pa.Table]] = {}
    names = {f["name"] for f in marker["files"]}
    for extra in sorted(p.name for p in path.glob("*.parquet") if p.name not in names):
        yield f"{path.name}: '{extra}' is not in the marker"
    for file in marker["files"]:
        where = path / file["name"]
        if not where.exists():
            yield f"{where} is gone"
            continue
        data = where.read_bytes()
        if (len(data), hashlib.sha256(data).hexdigest()) != (file["bytes"], file["sha256"]):
            yield f"{where} is not what its marker says"
            continue
        columns = [c.name for c in BY_NAME[file["table"]].keys]
        table = pq.read_table(where, columns=columns, partitioning=None)
        if table.num_rows != file["rows"]:
            yield f"{where} has {table.num_rows} rows, its marker says {file['rows']}"
        keys.setdefault(file["table"], []).append(table.cast(_plain(table.schema)))
    for name, tables in keys.items():
        both = pa.concat_tables(tables)
        if both.group_by(both.column_names).aggregate([]).num_rows != both.num_rows:
            yield f"{path}: a row of {name} is there twice"


def unequal(mine: Path, other: Path) -> list[str]:
    """In what two captures' tables differ: nothing where all rows are equal bit for bit."""
    a, b = (_tables(path) for path in (mine, other))
    names = {tuple(sorted(set(t["pair"].to_pylist()))) for t in a.values() if t.num_rows}
    found = [] if names <= {(mine.parent.name.removeprefix("pair="),)} else [f"its rows are of {names}"]
    a, b = ({n: t.drop_columns(["pair", "capture"]) for n, t in tables.items()} for tables in (a, b))
    found += [f"{name} is in one only" for name in sorted(a.keys() ^ b.keys())]
    for name in sorted(a.keys() & b.keys()):
        keys = [(c.name, "ascending") for c in BY_NAME[name].keys if c.name in a[name].column_names]
        x, y = (_ordered(t, keys) for t in (a[name], b[name]))
        if not _same_bits(x, y):
            found.append(f"{name} has other rows than an undisturbed run")
    return found


def _ordered(table: pa.Table, keys: list[tuple[str, str]]) -> pa.Table:
    plain = table.cast(_plain(table.schema))
    return plain.sort_by(keys).combine_chunks() if keys else plain.combine_chunks()


def _same_bits(x: pa.Table, y: pa.Table) -> bool:
    if x.schema != y.schema or x.num_rows != y.num_rows:
        return False
    return x.equals(y) or x.to_pydict().__repr__() == y.to_pydict().__repr__()  # NaN is not equal to itself


def _tables(path: Path) -> dict[str, pa.Table]:
    (marker,) = [m for m in [RunDir(str(path)).marker(str(path))] if m is not None]
    parts: dict[str, list[pa.Table]] = {}
    for file in marker["files"]:
        table = pq.read_table(path / file["name"], partitioning=None)
        parts.setdefault(file["table"], []).append(table.cast(_plain(table.schema)))
    return {name: pa.concat_tables(tables) for name, tables in parts.items()}


def _plain(schema: pa.Schema) -> pa.Schema:
    """Dictionary-encoded columns as plain strings: rows are compared, not their encoding."""
    fields = [pa.field(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in schema]
    return pa.schema(fields)


def _rows_of_tables(files: Any) -> dict[str, int]:
    """Rows of each table, in however many files: a walk that is cut by the clock is cut elsewhere the next time."""
    found: dict[str, int] = {}
    for file in files:
        found[file["table"]] = found.get(file["table"], 0) + file["rows"]
    return found


def leftovers(out: Path) -> list[str]:
    """Temporary files, stages, probes, uploads under way, spans of complete captures, capture directories without anything."""
    found = []
    for path in out.rglob("*"):
        name = path.name
        temporary = name.endswith((".tmp", ".upload")) or name.startswith((".tmp-", ".writable"))
        spans = name == SPANS and path.is_dir() and (path.parent / MARKER).exists()
        empty = path.is_dir() and path.parent.name.startswith("pair=") and not any(path.iterdir())
        if temporary or spans or empty:
            found.append(str(path.relative_to(out)))
    return found


def tagged(tag: str) -> dict[int, str]:
    """Processes of this machine, but for this one, that were started with this text in their environment: pid -> command."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if tag.encode() not in (place / "environ").read_bytes() or int(place.name) == os.getpid():
                continue
            if (place / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found
