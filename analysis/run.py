"""Open a run directory: a DuckDB connection in which every table of every complete capture is a view."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from analysis.captures import captures_table, manifest_table
from analysis.damage import broken
from analysis.errors import QueryError
from analysis.macros import MACROS, comment_sql, create_macros
from analysis.tables import discard, is_stream
from analysis.views import (
    CAPTURES,
    MANIFEST_VIEW,
    SQL_VIEWS,
    STORED_VIEWS,
    VIEWS,
    as_pattern,
    comments_sql,
    quote,
    stored_sql,
    view_sql,
)
from capture.errors import StoreError
from capture.layout import CaptureDir, RunDir
from capture.schema import BY_NAME

if TYPE_CHECKING:
    import duckdb

_PATTERN = "run_directory_pattern()"  # a catalog's macro: views.as_pattern of run_directory(), which its client may set
_FILES = "_files"  # which files of which capture the views hold; for of_one_capture


def open_run_dir(out: str) -> RunDir:
    """The run directory at `out`, or an error if nothing of a run is there."""
    run = RunDir(out)
    if not run.exists(run.root):
        raise QueryError(f"there is no run directory '{out}'; 'pairscope sweep CONFIG --out {out}' would make it")
    if not run.exists(f"{run.root}/captures") and not run.exists(f"{run.root}/manifest"):
        raise QueryError(f"'{out}' is no run directory: it has neither captures/ nor manifest/")
    return run


def open_run(
    out: str,
    include_partial: bool = False,
    *,
    lenient: bool = False,
    left_out: Callable[[str], Any] | None = None,
    sandbox: bool = False,
    all_captures: bool = False,
) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB connection with the views and macros over the run directory `out`.

    out: a path or a URI that pyarrow.fs opens. Only complete captures are seen; `include_partial` adds the others, for
    which `captures.complete` is false. The views see the captures that are complete now, not those that finish later.
    Of a pair that was captured more than once, with other prompts or settings, the views hold the newest capture alone, or
    a mean would be one over things that have nothing in common; `all_captures` adds the older ones. `captures` has all.

    lenient: leave out captures of another schema version and files that are damaged (every byte is compared with the
    checksums) and call `left_out` with a sentence for each. sandbox: no file outside `out` can be reached, and nothing set.
    The connection is DuckDB's own: what is executed on it is not checked, as `analysis.open` and the verb `sql` do.

    Raises QueryError where there is no run directory, StoreError for another schema version or a broken file.
    """
    import duckdb

    run = open_run_dir(out)
    con = duckdb.connect()
    # an in-memory database would spill to .tmp in the working directory
    con.execute(f"SET temp_directory = {quote(spill_directory())}")
    _set_up(con)
    files = create_views(
        con, run, include_partial, lenient=lenient, left_out=left_out or (lambda why: None), all_captures=all_captures
    )
    if run.is_local and not sandbox:
        con.execute(f"CREATE TEMP TABLE {_FILES} (name VARCHAR, path VARCHAR, file VARCHAR)")
        con.register("_arrow", _files_table(files))
        con.execute(f"INSERT INTO {_FILES} FROM _arrow")
        con.unregister("_arrow")
    if sandbox:
        # what a name of a file is compared with is the pattern itself, and each file that it matches
        reachable = dict.fromkeys((run.root, as_pattern(run.root), *_linked(con))) if run.is_local else {}
        con.execute(f"SET allowed_directories = [{', '.join(map(quote, reachable))}]::VARCHAR[]")
        con.execute("SET enable_external_access = false")
        con.execute("SET python_enable_replacements = false")  # a name in SQL is no variable of the caller
        con.execute("SET lock_configuration = true")
    return con


def _set_up(con: duckdb.DuckDBPyConnection) -> None:
    """What holds for one connection, and not for another of the same database."""
    con.execute("SET enable_progress_bar = false")  # it would stand among the rows on stdout
    con.execute("SET parquet_metadata_cache = true")  # half of a grid's time is reading footers


def of_one_capture(con: duckdb.DuckDBPyConnection, path: str) -> duckdb.DuckDBPyConnection:
    """A connection whose stored views hold the capture at `path` (of the table captures) alone, of what `con` has of it.

    Who asks much of every capture in turn opens one each: a query over all of them looks at every file of every capture, each
    time. The same connection where the files are not on this machine, or it is a sandbox.
    """
    if not con.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = ?", [_FILES]).fetchall():
        return con
    files: dict[str, list[str]] = {view.name: [] for view in STORED_VIEWS}
    for name, file in con.execute(f"SELECT name, file FROM {_FILES} WHERE path = ? ORDER BY ALL", [path]).fetchall():
        files[name].append(file)
    one = con.cursor()
    _set_up(one)
    for name, mine in files.items():
        one.execute(f"CREATE TEMP VIEW {name} AS\n{stored_sql(name, mine)}")  # found before that of all captures
    return one


def _linked(con: duckdb.DuckDBPyConnection) -> list[str]:
    """Where complete captures lie that are reached by a link, on a larger disk say: DuckDB asks where a file really is. Not those
    without a marker: a link in a run directory that somebody gave us may lead anywhere."""
    paths = [path for (path,) in con.execute("SELECT path FROM captures WHERE complete").fetchall()]
    return [real for path in paths if (real := os.path.realpath(path)) != path]


def spill_directory() -> str:
    """Where DuckDB puts what does not fit in memory."""
    return f"{tempfile.gettempdir()}/pairscope-{os.getpid()}"


def write_catalog(
    out: str, file: str | None = None, include_partial: bool = False, *, all_captures: bool = False
) -> Path:
    """Write a .duckdb file of views and macros over `out`, docs included, that any DuckDB client can open.

    file: default OUT/catalog.duckdb; a run directory in a store has no default. An existing file is replaced at once. Like
    open_run it is a picture of now, of each pair's newest capture or of all. It holds paths below one directory; where that was moved, the client says
    SET VARIABLE run_directory = '...', or the catalog is written again: it holds no data.

    Raises QueryError where DuckDB's own reader of a store is missing, StoreError where the file cannot be written.
    """
    import duckdb

    run = open_run_dir(out)
    if not run.is_local and file is None:
        raise QueryError(f"'{out}' is not on this machine: say with -o where the catalog goes")
    path = Path(file or f"{run.root}/catalog.duckdb").expanduser().absolute()
    if is_stream(file or path):
        raise QueryError(f"cannot write the catalog into '{file}': it is a database, which needs a file of its own")
    root = run.root if run.is_local else f"{out.split('://', 1)[0]}://{run.root}"
    tmp = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with duckdb.connect(str(tmp)) as con:
            if not run.is_local:
                _load_httpfs(con, out)
            con.begin()  # one write to disk, not one for each comment
            con.execute(f"CREATE MACRO run_directory() AS coalesce(getvariable('run_directory'), {quote(root)})")
            con.execute(rf"CREATE MACRO {_PATTERN} AS regexp_replace(run_directory(), '([\[*?])', '[\1]', 'g')")
            create_views(con, run, include_partial, relocatable=True, all_captures=all_captures)
            for view in VIEWS:
                for statement in comments_sql(view):
                    con.execute(statement)
            for macro in MACROS:
                con.execute(comment_sql(macro))
            con.commit()
        os.replace(tmp, path)
    except (OSError, duckdb.Error) as error:  # of a path with a question mark DuckDB makes a wrong one for its log
        raise StoreError(f"cannot write the catalog '{path}': {str(error).splitlines()[0]}") from error
    finally:
        discard(tmp)
        discard(Path(f"{tmp}.wal"))
    return path


def _load_httpfs(con: duckdb.DuckDBPyConnection, out: str) -> None:
    """A client of a catalog over a store reads it with DuckDB's extension httpfs; it is used if it is there, not fetched."""
    import duckdb

    try:
        con.execute("LOAD httpfs")
    except duckdb.Error as error:
        raise QueryError(
            f"a catalog over '{out}' needs DuckDB's extension httpfs, which is not installed: run INSTALL httpfs in DuckDB "
            f"once, or ask with 'pairscope sql {out}', which does without"
        ) from error


def create_views(
    con: duckdb.DuckDBPyConnection,
    run: RunDir,
    include_partial: bool = False,
    *,
    lenient: bool = False,
    left_out: Callable[[str], Any] = lambda why: None,
    relocatable: bool = False,
    all_captures: bool = False,
) -> dict[str, list[tuple[str, str]]]:
    """Create the two small tables, the views over stored tables, those built on them, and the macros. Returns the files of each
    stored view, each with the directory of its capture.

    relocatable: files are named below the pattern of run_directory(); the macros of both must be there. all_captures: not the
    newest of a pair alone.
    """
    import duckdb

    refused: dict[tuple[str, str], str] | None = {} if lenient else None
    captures = list(run.captures(include_partial, refused))
    for why in (refused or {}).values():
        left_out(why)
    known = captures_table(run, captures)
    for view, table in ((CAPTURES, known), (MANIFEST_VIEW, manifest_table(run))):
        con.register("_arrow", table)
        con.execute(f"CREATE TABLE {view.name} AS SELECT * FROM _arrow")
        con.unregister("_arrow")
    if not all_captures:
        newest = known.column("newest").to_pylist()
        captures = [c for c, new in zip(captures, newest, strict=True) if new or c.marker.get("partial")]
    files: dict[str, list[tuple[str, str]]] = {}
    for view in STORED_VIEWS:
        mine = files[view.name] = []
        for capture in captures:
            damaged = broken(run, capture, view.name, contents=True) if lenient else {}
            mine += [(capture.path, f) for f in capture.files(view.name) if f not in damaged]
            for why in damaged.values():
                left_out(why)
        _create_stored(con, run, captures, view.name, [file for _, file in mine], relocatable)
    for view in SQL_VIEWS:
        try:
            con.execute(f"CREATE VIEW {view.name} AS\n{view_sql(view.name)}")
        except duckdb.Error as error:  # a stored column is of another type
            _name_the_broken(run, captures, view.name, error)
    create_macros(con)
    return files


def _files_table(files: dict[str, list[tuple[str, str]]]) -> Any:
    import pyarrow as pa

    rows = [{"name": name, "path": path, "file": file} for name, mine in files.items() for path, file in mine]
    return pa.Table.from_pylist(rows, pa.schema([(column, pa.string()) for column in ("name", "path", "file")]))


def _create_stored(
    con: duckdb.DuckDBPyConnection,
    run: RunDir,
    captures: list[CaptureDir],
    name: str,
    files: list[str],
    relocatable: bool,
) -> None:
    import duckdb

    source = None
    if relocatable:
        sql = stored_sql(name, [f.removeprefix(run.root) for f in files], root=_PATTERN)
    else:
        if files and not run.is_local:  # DuckDB's own reader of object stores is an extension that may not be there
            source = f"_files_{name}"
            con.register(source, _dataset(run, name, files))
        sql = stored_sql(name, files, source=source)
    try:
        con.execute(f"CREATE VIEW {name} AS\n{sql}")
    except duckdb.Error as error:
        _name_the_broken(run, captures, name, error)


def _name_the_broken(run: RunDir, captures: list[CaptureDir], name: str, error: Exception) -> NoReturn:
    """Raise a StoreError for the file that a view cannot be made over."""
    for capture in captures:
        for table in [name] if name in BY_NAME else BY_NAME:
            for why in broken(run, capture, table).values():
                raise StoreError(why) from error
    raise StoreError(f"cannot read table '{name}': {error}") from error


def _dataset(run: RunDir, name: str, files: list[str]) -> Any:
    import pyarrow as pa
    from pyarrow import dataset

    from capture.schema import arrow_schema

    # plain strings: DuckDB pushes filters into the dataset, and those do not compare with dictionaries
    schema = pa.schema(
        [pa.field(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in arrow_schema(name)]
    )
    return dataset.dataset(files, schema=schema, format="parquet", filesystem=run.fs)
