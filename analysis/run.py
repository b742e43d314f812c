"""Open a run directory: a DuckDB connection in which every table of every complete capture is a view."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.captures import captures_table, manifest_table
from analysis.errors import QueryError
from analysis.views import (
    BY_NAME,
    CAPTURES,
    MANIFEST_VIEW,
    SQL_VIEWS,
    STORED_VIEWS,
    VIEWS,
    comments_sql,
    quote,
    stored_sql,
    view_sql,
)
from capture.errors import StoreError
from capture.layout import CaptureDir, RunDir

if TYPE_CHECKING:
    import duckdb


def open_run_dir(out: str) -> RunDir:
    """The run directory at `out`, or an error if nothing of a run is there."""
    run = RunDir(out)
    if not run.exists(run.root):
        raise QueryError(f"there is no run directory '{out}'; 'pairscope sweep CONFIG --out {out}' would make it")
    if not run.exists(f"{run.root}/captures") and not run.exists(f"{run.root}/manifest"):
        raise QueryError(f"'{out}' is no run directory: it has neither captures/ nor manifest/")
    return run


def open_run(out: str, include_partial: bool = False) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB connection with the views of analysis.views over the run directory `out`.

    out: a path or a URI that pyarrow.fs opens. Only complete captures are seen; `include_partial` adds the others, for
    which `captures.complete` is false. The views see the captures that are complete now, not those that finish later.

    Raises QueryError where there is no run directory, StoreError for another schema version or a broken file.
    """
    import duckdb

    run = open_run_dir(out)
    con = duckdb.connect()
    # an in-memory database would spill to .tmp in the working directory
    con.execute(f"SET temp_directory = {quote(f'{tempfile.gettempdir()}/pairscope-{os.getpid()}')}")
    create_views(con, run, include_partial)
    return con


def write_catalog(out: str, file: str | None = None, include_partial: bool = False) -> Path:
    """Write a .duckdb file with the views over `out`, by absolute paths; any DuckDB client can open it and sees the docs.

    file: default OUT/catalog.duckdb. An existing file is replaced at once. Like open_run it is a picture of now.
    """
    import duckdb

    run = open_run_dir(out)
    if not run.is_local:
        raise QueryError(
            f"a catalog needs a local run directory, and '{out}' is not one; 'pairscope sql {out}' reads it"
        )
    path = Path(file or f"{run.root}/catalog.duckdb").expanduser().absolute()
    tmp = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with duckdb.connect(str(tmp)) as con:
            con.begin()  # one write to disk, not one for each comment
            create_views(con, run, include_partial)
            for view in VIEWS:
                for statement in comments_sql(view):
                    con.execute(statement)
            con.commit()
        os.replace(tmp, path)
    except (OSError, duckdb.IOException) as error:
        raise StoreError(f"cannot write the catalog '{path}': {str(error).splitlines()[0]}") from error
    finally:
        tmp.unlink(missing_ok=True)
        Path(f"{tmp}.wal").unlink(missing_ok=True)
    return path


def create_views(con: duckdb.DuckDBPyConnection, run: RunDir, include_partial: bool = False) -> None:
    """Create the two small tables, the views over stored tables and those built on them."""
    captures = list(run.captures(include_partial))
    for view, table in ((CAPTURES, captures_table(run, captures)), (MANIFEST_VIEW, manifest_table(run))):
        con.register("_arrow", table)
        con.execute(f"CREATE TABLE {view.name} AS SELECT * FROM _arrow")
        con.unregister("_arrow")
    for view in STORED_VIEWS:
        _create_stored(con, run, captures, view.name)
    for view in SQL_VIEWS:
        con.execute(f"CREATE VIEW {view.name} AS\n{view_sql(view.name)}")


def _create_stored(con: duckdb.DuckDBPyConnection, run: RunDir, captures: list[CaptureDir], name: str) -> None:
    import duckdb

    files = [f for c in captures for f in c.files(name)]
    source = None
    if files and not run.is_local:  # DuckDB's own reader of object stores is an extension that may not be there
        source = f"_files_{name}"
        con.register(source, _dataset(run, name, files))
    try:
        con.execute(f"CREATE VIEW {name} AS\n{stored_sql(name, files, source=source)}")
    except duckdb.Error as error:
        raise StoreError(_broken_file(run, name, files) or f"cannot read table '{name}': {error}") from error


def _dataset(run: RunDir, name: str, files: list[str]) -> Any:
    import pyarrow as pa
    from pyarrow import dataset

    from capture.schema import arrow_schema

    # plain strings: DuckDB pushes filters into the dataset, and those do not compare with dictionaries
    schema = pa.schema(
        [pa.field(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in arrow_schema(name)]
    )
    return dataset.dataset(files, schema=schema, format="parquet", filesystem=run.fs)


def _broken_file(run: RunDir, name: str, files: list[str]) -> str | None:
    """Which file of a table cannot be read, and why."""
    import pyarrow as pa
    from pyarrow import parquet

    expected = [c.name for c in BY_NAME[name].all_columns]
    for file in files:
        try:
            found = parquet.read_schema(file, filesystem=run.fs).names
        except (OSError, pa.ArrowException) as error:
            return (
                f"'{file}' is complete by its marker but cannot be read: {error}; capture the pair again with --force"
            )
        missing = [c for c in expected if c not in found]
        if missing:
            return f"'{file}' lacks the column '{missing[0]}' of table '{name}'; capture the pair again with --force"
    return None
