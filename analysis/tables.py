"""Rows out: as a table for people, as JSON lines, as CSV, or into a file."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import os
import shutil
import sys
import uuid
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

import click

from analysis.errors import QueryError
from capture.errors import StoreError
from capture.printable import escape, safe_json

if TYPE_CHECKING:
    import duckdb

TERMINAL_ROWS = 40
_MAX_CELL = 60
_MIN_CELL = 16  # a text that is cut to less tells nothing


def cell(value: Any) -> str:
    """A value for people: six significant digits, lists in brackets, NULL for none."""
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ", ".join(cell(v) for v in value) + "]"
    if isinstance(value, datetime.datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    return escape(str(value))


def shortest_float32(value: Any) -> Any:
    """A float32, or a list of them, as the float of fewest digits that means it: 0.1 and not 0.10000000149011612."""
    import numpy as np

    if isinstance(value, list):
        return [shortest_float32(v) for v in value]
    return float(str(np.float32(value))) if isinstance(value, float) else value


def jsonable(value: Any) -> Any:
    """What JSON can say: NaN and infinities become null, times ISO 8601, anything else strange its text."""
    if isinstance(value, Decimal):  # what SQL makes of 1.5 * layer; a text would be no number to who reads it
        value = float(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    return str(value)


def json_line(row: Mapping[str, Any]) -> str:
    return safe_json(json.dumps(jsonable(row), ensure_ascii=False))


def csv_lines(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """CSV with a header; none is an empty field, lists are JSON. Unlike JSON it has words for nan and inf, as DuckDB's own CSV."""
    buffer = io.StringIO()
    # a field is quoted where it has a character of the line's end: a carriage return of its own would end its row
    ends = SimpleNamespace(write=lambda line: buffer.write(line.removesuffix("\r\n") + "\n"))
    writer = csv.writer(ends, lineterminator="\r\n")
    writer.writerow(columns)
    for row in rows:
        plain = [v if isinstance(v, Decimal | float) else jsonable(v) for v in row]
        writer.writerow([json.dumps(v) if isinstance(v, list | dict | bool) else v for v in plain])
        if buffer.tell() > 1 << 16:
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue()


def width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def fit(text: str, columns: int) -> str:
    """The text cut to so many terminal columns, with an ellipsis where it was longer."""
    if width(text) <= columns:
        return text
    # sought by halves: a letter less at a time takes a minute where a prompt of 64,000 is cut to a line
    fitting = bisect_right(range(len(text)), columns - 1, key=lambda n: width(text[:n])) - 1
    return text[: max(fitting, 0)] + "…"


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, indent: str = "") -> Iterator[str]:
    """Aligned lines: numbers to the right, texts to the left; the header first."""
    numeric = [_is_numeric(rows, i) for i in range(len(columns))]
    texts = [[cell(v) for v in row] for row in rows]
    widths = [max([width(escape(c)), *(width(t[i]) for t in texts)]) for i, c in enumerate(columns)]
    for line in [[escape(c) for c in columns], *texts]:
        padded = [
            " " * (w - width(t)) + t if right else t + " " * (w - width(t))
            for t, w, right in zip(line, widths, numeric, strict=True)
        ]
        yield (indent + "  ".join(padded)).rstrip()


def _is_numeric(rows: Sequence[Sequence[Any]], column: int) -> bool:
    values = [row[column] for row in rows if row[column] is not None]
    return bool(values) and all(isinstance(v, int | float | Decimal) for v in values)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, more: bool = False) -> None:
    """Print a table: whole and plain when piped; on a terminal cut to its width, with a note on what was left out.

    more: the rows are only the first ones.
    """
    if not sys.stdout.isatty():
        for line in plain_table(columns, rows):
            click.echo(line)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    texts = [[fit(cell(v), _MAX_CELL) for v in row] for row in rows]
    widths = [max([width(c), *(width(t[i]) for t in texts)]) + 2 for i, c in enumerate(columns)]
    shown, notes = list(range(len(columns))), []
    if more:
        notes.append(f"the first {len(rows)} rows")
    if sum(widths) > console.width:  # first what says nothing goes, then what stands last
        same = [i for i in shown if len(texts) > 1 and len({t[i] for t in texts}) == 1]
        if same and len(same) < len(columns):
            notes.append("in each row " + ", ".join(f"{columns[i]} {texts[0][i]}" for i in same))
            shown = [i for i in shown if i not in same]
        while len(shown) > 1 and (over := sum(widths[i] for i in shown) - console.width) > 0:
            room = widths[last := shown[-1]] - over - 2
            if room >= _MIN_CELL and not _is_numeric(rows, last):  # a prompt, say: its beginning is better than nothing
                texts = [[*t[:last], fit(t[last], room), *t[last + 1 :]] for t in texts]
                break
            shown.pop()
        left = [c for i, c in enumerate(columns) if i not in shown and i not in same]
        notes += [f"without {', '.join(left)}"] if left else []
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i in shown:
        table.add_column(Text(columns[i]), justify="right" if _is_numeric(rows, i) else "left", no_wrap=True)
    for row_texts in texts:
        table.add_row(*(Text(row_texts[i]) for i in shown))
    console.print(table)
    if notes:
        console.print(Text(f"({'; '.join(notes)}; for all: --csv, --json or a pipe)", style="dim"))


def terminal_width() -> int:
    return shutil.get_terminal_size((80, 24)).columns


COPY_FORMATS = {".csv": "FORMAT csv, HEADER", ".json": "FORMAT json", ".parquet": "FORMAT parquet, COMPRESSION zstd"}


def copy_path(file: str) -> Path:
    """Where copy_query would write; QueryError for a name of another ending, StoreError where there is no such directory."""
    path = Path(file).expanduser().absolute()
    if path.suffix not in COPY_FORMATS:
        raise QueryError(f"cannot write '{file}': the name must end in {', '.join(COPY_FORMATS)}")
    if not path.parent.is_dir():
        raise StoreError(f"cannot write '{path}': there is no directory '{path.parent}'")
    return path


def discard(tmp: Path) -> None:
    """Remove what is half written, if it is there. A file system that did not take it may refuse that too, and is told of already."""
    with suppress(OSError):
        tmp.unlink(missing_ok=True)


def is_stream(file: str | Path) -> bool:
    """Whether a finished file cannot be put in this place: `-`, a pipe, a device, or a name of the system's, as /dev/stdout."""
    if str(file) == "-":
        return True
    path = os.path.expanduser(file)
    folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    there = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    return there or folder == "/dev" or folder.startswith("/proc/")


@contextmanager
def written(file: str | Path) -> Iterator[IO[bytes]]:
    """A stream of bytes that become `file`, whole or not at all; they go as they come into `-`, which is stdout, and into what is no
    file: one put in the place of /dev/null would stay there."""
    if str(file) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(file).expanduser().absolute()
    if is_stream(file):
        with path.open("wb") as stream:
            yield stream
        return
    tmp = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with tmp.open("wb") as stream:
            yield stream
        os.replace(tmp, path)
    finally:
        discard(tmp)


def copy_query(con: duckdb.DuckDBPyConnection, sql: str, values: list[Any], file: str) -> Path:
    """Write a query's rows to FILE.csv, FILE.json (one object a line) or FILE.parquet, whole or not at all."""
    import duckdb

    path = copy_path(file)
    tmp = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    target = str(tmp).replace("'", "''")
    try:
        if path.suffix == ".json":
            sql = _finite(con, sql, values)
        con.execute(f"COPY (\n{sql}\n) TO '{target}' ({COPY_FORMATS[path.suffix]})", values)
        os.replace(tmp, path)
    except (duckdb.IOException, OSError) as error:
        raise StoreError(f"cannot write '{path}': {str(error).splitlines()[0]}") from error
    finally:
        discard(tmp)
    return path


def _finite(con: duckdb.DuckDBPyConnection, sql: str, values: list[Any]) -> str:
    """The query with null for what is no finite number: JSON has no word for it, and DuckDB writes NaN and Infinity."""
    columns = con.execute(f"DESCRIBE SELECT * FROM (\n{sql}\n)", values).fetchall()
    names = ['"' + name.replace('"', '""') + '"' for name, kind, *_ in columns if kind in ("FLOAT", "DOUBLE")]
    finite = ", ".join(f"CASE WHEN isfinite({name}) THEN {name} END AS {name}" for name in names)
    return f"SELECT *{f' REPLACE ({finite})' if names else ''} FROM (\n{sql}\n)"


def export_rows(rows: list[dict[str, Any]], destination: str | Path, *others: str) -> Path:
    """Write rows at hand to a .csv, .json (one object a line) or .parquet file, whole or not at all.

    A column is in the order of its first row, and one of doubles where no row has a value of it. `others` are further endings that the caller knows, for the error.
    """
    import duckdb
    import pyarrow as pa

    if Path(destination).suffix not in COPY_FORMATS:
        raise QueryError(f"cannot write '{destination}': the name must end in {', '.join((*COPY_FORMATS, *others))}")
    names = list(dict.fromkeys(k for row in rows for k in row))
    if not names:
        raise QueryError(f"there are no rows to write to '{destination}'")
    columns = {k: pa.array([row.get(k) for row in rows]) for k in names}
    typed = {k: c.cast(pa.float64()) if pa.types.is_null(c.type) else c for k, c in columns.items()}
    with duckdb.connect() as con:
        con.register("_rows", pa.table(typed))
        return copy_query(con, "SELECT * FROM _rows", [], str(destination))
