"""Files of a run directory that cannot be read: which they are, and why."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from analysis.errors import QueryError
from analysis.views import BY_NAME
from capture.errors import StoreError
from capture.layout import CaptureDir, RunDir

_AGAIN = "capture the pair again with --force, or read the rest with --lenient"


def broken(run: RunDir, capture: CaptureDir, table: str, *, contents: bool = False) -> dict[str, str]:
    """The files of one table of one capture that cannot be read: path -> why.

    contents: also compare every byte with the marker's checksum; without it only the footers and columns are looked at.
    """
    import pyarrow as pa
    from pyarrow import parquet

    known = {f"{capture.path}/{f['name']}": f.get("sha256") for f in capture.marker["files"]}
    expected = [c.name for c in BY_NAME[table].all_columns]
    found: dict[str, str] = {}
    for file in capture.files(table):
        try:
            names = parquet.read_schema(file, filesystem=run.fs).names
            if contents and known.get(file) and _sha256(run, file) != known[file]:
                found[file] = f"'{file}' is not what was written: its bytes have another checksum; {_AGAIN}"
        except (OSError, pa.ArrowException) as error:
            found[file] = f"'{file}' is complete by its marker but cannot be read: {error}; {_AGAIN}"
            continue
        missing = [c for c in expected if c not in names]
        if missing:
            found[file] = f"'{file}' lacks the column '{missing[0]}' of table '{table}'; {_AGAIN}"
    return found


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
