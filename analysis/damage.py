"""Files of a run directory that cannot be read: which they are, and why."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from analysis.errors import QueryError
from analysis.views import BY_NAME
from capture.errors import StoreError
from capture.layout import CaptureDir, RunDir
from capture.schema import arrow_schema

_AGAIN = "capture the pair again with --force, or read the rest with --lenient"


def broken(run: RunDir, capture: CaptureDir, table: str, *, contents: bool = False) -> dict[str, str]:
    """The files of one table of one capture that cannot be read: path -> why.

    contents: also compare every byte with the marker's checksum; without it only the footers and columns are looked at.
    """
    import pyarrow as pa
    from pyarrow import parquet

    known = {f"{capture.path}/{f['name']}": f.get("sha256") for f in capture.marker["files"]}
    expected = {f.name: _plain(f.type) for f in arrow_schema(table)}
    found: dict[str, str] = {}
    for file in capture.files(table):
        try:
            stored = parquet.read_schema(file, filesystem=run.fs)
            if contents and known.get(file) and _sha256(run, file) != known[file]:
                found[file] = f"'{file}' is not what was written: its bytes have another checksum; {_AGAIN}"
        except (OSError, pa.ArrowException) as error:
            found[file] = f"'{file}' is complete by its marker but cannot be read: {error}; {_AGAIN}"
            continue
        for name, kind in expected.items():
            if name not in stored.names:
                found[file] = f"'{file}' lacks the column '{name}' of table '{table}'; {_AGAIN}"
            elif _plain(stored.field(name).type) != kind:
                found[file] = f"'{file}': column '{name}' is {stored.field(name).type} where {kind} should be; {_AGAIN}"
            else:
                continue
            break
    return found


def _plain(kind: Any) -> str:
    """An Arrow type without how it is stored."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return f"list<{kind.value_type}>" if pa.types.is_list(kind) else str(kind).removeprefix("large_")


def _sha256(run: RunDir, file: str) -> str:
    sha = hashlib.sha256()
    with run.fs.open_input_stream(file) as stream:
        while block := stream.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()


@contextmanager
def naming_damage(run: RunDir, include_partial: bool = False) -> Iterator[None]:
    """Turn DuckDB's error over a damaged file, which may come in the middle of an answer, into one that names the file."""
    import duckdb

    try:
        yield
    except (duckdb.Error, QueryError) as error:
        cause = error if isinstance(error, duckdb.Error) else error.__cause__
        if isinstance(cause, duckdb.Error) and not isinstance(cause, duckdb.BinderException | duckdb.ParserException):
            for capture in run.captures(include_partial, {}):
                for table in BY_NAME:
                    for why in broken(run, capture, table, contents=True).values():
                        raise StoreError(why) from error
        raise
