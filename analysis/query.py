"""The `sql` verb: one read-only query, its answer, and errors that help."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import click

from analysis.errors import QueryError, near
from analysis.macros import MACROS
from analysis.metrics import RECORD_TYPES, metrics
from analysis.tables import TERMINAL_ROWS, csv_lines, json_line, shortest_float32, show_table
from analysis.views import BY_VIEW, VIEWS
from capture.printable import escape

if TYPE_CHECKING:
    import duckdb

_CHUNK = 10_000
Found = TypeVar("Found")


def check_query(con: duckdb.DuckDBPyConnection, query: str) -> None:
    """Raise a QueryError unless this is one statement that only reads."""
    import duckdb

    if not query.isascii() and query.encode(errors="ignore").decode() != query:
        raise QueryError("the query is not text in UTF-8")  # as bytes of another encoding on the command line are
    try:
        statements = con.extract_statements(query)
    except duckdb.Error as error:
        raise QueryError(explain(error, query)) from error
    if len(statements) != 1:
        raise QueryError(f"expected one query, got {len(statements)}")
    kind = statements[0].type
    if kind == duckdb.StatementType.EXPLAIN:  # EXPLAIN ANALYZE runs what it explains
        # options in parentheses hold words alone: a whole query that is left out there would not be looked at
        options = r"(\s*\(\s*(ANALYZE|FORMAT)\b([\s\w,]|'\w*')*\))?"
        inner = re.sub(rf"(?is)^\s*EXPLAIN(\s+ANALYZE)?{options}\s+", "", statements[0].query)
        if inner != statements[0].query and not re.match(r"(?i)EXPLAIN\b", inner):
            check_query(con, inner)
            return
        raise QueryError("EXPLAIN is of one query")
    if kind.name == "MULTI":
        raise QueryError("name the columns of a PIVOT, as in PIVOT ... ON layer IN (0, 1, 2) USING first(value)")
    if kind != duckdb.StatementType.SELECT:
        raise QueryError(
            f"'{kind.name}' is not a query: a run directory is only read here. Use SELECT, DESCRIBE, SUMMARIZE or EXPLAIN, and "
            "--csv, --json or 'pairscope catalog' to take data elsewhere"
        )
    _check_parts(con, query)


# the parts of a query that read; a WITH may also hold COPY, DELETE, INSERT and UPDATE, which are other nodes
_READING_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
# the table functions that read; others set things, write logs, or run SQL that they are given as text
_READING_FUNCTIONS = re.compile(
    r"(read|parquet|duckdb|pragma)_\w+|json_each|json_tree|sniff_csv|glob|query_table|range|generate_series|unnest|repeat|"
    r"repeat_row|histogram|histogram_values|summary"
)


def _check_parts(con: duckdb.DuckDBPyConnection, query: str) -> None:
    """Raise a QueryError if a part of a SELECT, however deep, can do more than read, or if that cannot be told."""
    (tree,) = con.cursor().execute("SELECT json_serialize_sql(?)", [query]).fetchall()[0]
    # looked through as text, since sums of many terms nest deeper than a JSON parser goes: inside a string every quote has a
    # backslash before it, so these patterns find keys alone
    if not tree.startswith('{"error":false'):
        raise QueryError("this is not a query that can be told to read only")
    for node in re.findall(r'"type":"(\w+_NODE)"', tree):
        if node not in _READING_NODES:
            raise QueryError(
                f"'{node.split('_')[0]}' in WITH is not a query: a run directory is only read here. --csv, --json or "
                "'pairscope catalog' take data elsewhere"
            )
    functions = re.findall(r'"type":"TABLE_FUNCTION".*?"function_name":"([^"]*)"', tree)
    if len(functions) != tree.count('"type":"TABLE_FUNCTION"'):
        raise QueryError("this is not a query that can be told to read only")
    macros = [m.name for m in MACROS]
    for name in functions:
        if name.lower() in macros or _READING_FUNCTIONS.fullmatch(name.lower()):
            continue
        known = con.cursor().execute("SELECT 1 FROM duckdb_functions() WHERE function_name = ? LIMIT 1", [name])
        if known.fetchall():
            raise QueryError(f"'{name}' is not a query: this table function can do more than read a run directory")
        raise QueryError(f"no table function '{name}' here. {near(name, macros)}")


def answer(
    con: duckdb.DuckDBPyConnection, query: str, *, shortest: bool = True
) -> tuple[list[str], Iterator[list[Any]]]:
    """The columns and rows of a query that only reads; `shortest` gives float32 values as the float of fewest digits.

    Raises QueryError with DuckDB's message and the near names, at once or at the row that fails.
    """
    import duckdb

    check_query(con, query)
    try:
        # asked of the relation, which binds only: a cursor's description tells FLOAT from DOUBLE in new versions alone
        types = _hearing_ctrl_c(con, lambda: [str(kind) for kind in con.sql(query).types])
        cursor = _hearing_ctrl_c(con, lambda: con.execute(query))
        columns = [d[0] for d in cursor.description]
    except duckdb.Error as error:
        raise QueryError(explain(error, query)) from error
    floats = [i for i, kind in enumerate(types) if shortest and kind in ("FLOAT", "FLOAT[]")]

    def rows() -> Iterator[list[Any]]:
        try:
            while chunk := _hearing_ctrl_c(con, lambda: cursor.fetchmany(_CHUNK)):
                for row in chunk:
                    values = list(row)
                    for i in floats:
                        values[i] = shortest_float32(values[i])
                    yield values
        except duckdb.Error as error:
            raise QueryError(explain(error, query)) from error

    return columns, rows()


def _hearing_ctrl_c(con: duckdb.DuckDBPyConnection, work: Callable[[], Found]) -> Found:
    """What `work` on the connection gives. It runs in a thread of its own, since Python hears Ctrl-C in its main thread alone, and
    not while DuckDB computes there. KeyboardInterrupt, or SystemExit after SIGTERM, is raised when the query has stopped.
    """
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            return working.result()
        except (KeyboardInterrupt, SystemExit):  # or told to end: the pool waits for a query that nobody stops
            con.interrupt()
            while wait([working], 0.1).not_done:  # a query that only begins forgets an interruption from before
                con.interrupt()
            raise


def explain(error: Exception, query: str = "") -> str:
    """DuckDB's message, and for an unknown column, table or metric where it is or what is near."""
    message = str(error).strip()
    if (found := re.search(r'Referenced column "([^"]+)" not found', message)) and f"'{found[1]}'" in query:
        return _no_metric(found[1])  # a macro's argument, not a column in the query itself
    if found := re.search(
        r'column(?: named)? "?([^"\s]+)"? (?:not found|does not)|have a column named "([^"]+)"', message
    ):
        name = (found[1] or found[2]).rsplit(".", 1)[-1]
        homes = [view.name for view in VIEWS if name in {c.name for c in view.columns}]
        if homes:
            return f"{message}\n'{name}' is a column of: {', '.join(homes)}."
        asked = [view for view in VIEWS if re.search(rf"\b{view.name}\b", query, re.IGNORECASE)]
        return f"{message}\n{near(name, sorted({c.name for view in asked or VIEWS for c in view.columns}))}"
    if "disabled by configuration" in message:
        return f"{message}\nOnly files of the run directory can be read; --any-file allows others."
    if (found := re.search(r"Table with name (\S+) does not exist", message)) and "Did you mean" not in message:
        return f"{message}\n{near(found[1], sorted(BY_VIEW))}"
    return message


def _no_metric(name: str) -> str:
    """Why a macro does not find a metric: there is none of the name, or it is one of passes where comparisons are asked, or the
    other way round."""
    of = [record_type for record_type in RECORD_TYPES if name.lower() in metrics(record_type)]
    if of == ["runs"]:
        return (
            f"'{name}' is a metric of passes, and this asks for one of comparisons: record := 'runs', run_grid and "
            "decomposition are of passes"
        )
    if of == ["pairwise"]:
        return (
            f"'{name}' is a metric of comparisons, and this asks for one of passes: record := 'pairwise', pairwise_grid and "
            "edges are of comparisons"
        )
    return f"no metric '{name}'. {near(name, sorted({*metrics('pairwise'), *metrics('runs')}))}"


def print_answer(con: duckdb.DuckDBPyConnection, query: str, as_json: bool, as_csv: bool) -> None:
    """Run a query and print its rows."""
    columns, rows = answer(con, query, shortest=as_json or as_csv)  # a table shows six digits anyway
    if as_json:
        names = keys(columns)
        for row in rows:
            click.echo(json_line(dict(zip(names, row, strict=True))))
    elif as_csv:
        for text in csv_lines(columns, rows):
            click.echo(escape(text, keep="\n\t") if sys.stdout.isatty() else text, nl=False)
    elif sys.stdout.isatty():
        first = list(islice(rows, TERMINAL_ROWS + 1))
        show_table(columns, first[:TERMINAL_ROWS], more=len(first) > TERMINAL_ROWS)
    else:
        show_table(columns, list(rows))


def keys(columns: list[str]) -> list[str]:
    """The columns as keys of an object, which has each once: two of a join may have one name, and the second is then name_1, as in
    DuckDB's own data frames."""
    found: list[str] = []
    for name in columns:
        names = (f"{name}_{n}" if n else name for n in range(len(columns)))
        found.append(next(one for one in names if one not in found and (one == name or one not in columns)))
    return found


def captures_note(con: duckdb.DuckDBPyConnection, query: str, all_captures: bool) -> Iterator[str]:
    """Lines on the pairs that were captured more than once, where the query asks a table that this matters to."""
    (tree,) = con.cursor().execute("SELECT json_serialize_sql(?)", [query]).fetchall()[0]
    asked = {name.lower() for name in re.findall(r'"(?:table|function)_name":"([^"]*)"', tree)}
    if not asked & ({*BY_VIEW, *(m.name for m in MACROS if m.is_table)} - {"captures", "manifest"}):
        return
    rows = con.execute(
        "SELECT pair, count(*), count(*) FILTER (? OR newest OR NOT complete) FROM captures GROUP BY pair "
        "HAVING count(*) > 1 ORDER BY pair",
        [all_captures],
    ).fetchall()
    if several := [f"'{pair}' ({shown})" for pair, _, shown in rows if shown > 1]:
        yield f"note: several captures in the tables, of pair {_some(several)}: group by capture too, or choose one"
    if older := [f"'{pair}' ({n})" for pair, n, shown in rows if shown < n]:
        yield f"note: the newest of several captures, of pair {_some(older)}; --all-captures adds the others"


def _some(names: list[str]) -> str:
    return escape(", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""))


def print_views(out: str, as_json: bool, as_csv: bool) -> None:
    """List the views with their columns and docs."""
    rows = [
        {"view": view.name, "column": c.name, "type": c.type, "unit": c.unit, "doc": c.doc}
        for view in VIEWS
        for c in view.columns
    ]
    rows += [{"view": m.signature, "column": "", "type": "macro", "unit": "", "doc": m.doc} for m in MACROS]
    if as_json:
        for row in rows:
            click.echo(json_line(row))
        return
    if as_csv:
        for text in csv_lines(list(rows[0]), [list(row.values()) for row in rows]):
            click.echo(text, nl=False)
        return
    for view in VIEWS:
        click.echo(f"{view.name}: {view.doc}; one row per {view.grain}")
        longest = max(len(c.name) for c in view.columns)
        for c in view.columns:
            unit = f" [{c.unit}]" if c.unit else ""
            click.echo(f"  {c.name.ljust(longest)}  {c.doc}{unit}")
        click.echo()
    click.echo("macros:")
    for macro in MACROS:
        click.echo(f"  {macro.signature}")
        for line in macro.doc.splitlines():
            click.echo(f"      {line}")
    click.echo()
    click.echo(
        f"Ask: pairscope sql {shlex.quote(out)} \"SELECT pair, layer, avg(kl_divergence) AS kl FROM pairwise WHERE comparison = 'BB-SS' GROUP BY ALL ORDER BY ALL\""
    )
