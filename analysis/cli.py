"""The verbs status, sql and catalog, and what all verbs that ask share. DuckDB is imported when one runs, not for --help."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from analysis.errors import QueryError
from capture.printable import escape

HELP = {"help_option_names": ["-h", "--help"]}


def example(*lines: str) -> str:
    """The end of a verb's --help: something to paste."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def partial_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--include-partial",
        is_flag=True,
        help="Also show captures without a valid marker (captures.complete is false).",
    )(command)


def lenient_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--lenient",
        is_flag=True,
        help="Leave out damaged files and other schema versions, and say so; every byte is checked first.",
    )(command)


def all_captures_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--all-captures",
        is_flag=True,
        help="Also the older captures of a pair that was captured more than once; without it, the newest alone.",
    )(command)


@contextmanager
def asking(
    out: str, include_partial: bool, lenient: bool, *, sandbox: bool = False, all_captures: bool = True
) -> Iterator[Any]:
    """The connection of a verb; what is left out is said on stderr, and a file that turns out damaged is named.

    all_captures: for verbs that tell the captures of a pair apart by themselves. A verb that is told to end removes what it
    has half written, as after Ctrl-C.
    """
    from analysis.damage import naming_damage
    from analysis.run import open_run, open_run_dir

    def left_out(why: str) -> None:
        click.echo(f"left out: {escape(why)}", err=True)

    con = open_run(out, include_partial, lenient=lenient, left_out=left_out, sandbox=sandbox, all_captures=all_captures)
    with naming_damage(open_run_dir(out), include_partial), _ending_in_order():
        yield con


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM raises here, so that temporary files are removed on the way out; within a query DuckDB makes an error of its
    own of that, and of Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told: list[int] = []

    def end(number: int, frame: object) -> None:
        told.append(number)
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except RuntimeError as error:
        if str(error) != "Query interrupted":
            raise
        if told:
            sys.exit(128 + told[0])
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGTERM, before)


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--pair, --capture, --prompt, --variant, --comparison, --run."""
    for option in (
        click.option("--run", "run_", metavar="BB", help="One pass."),
        click.option("--comparison", metavar="BB-SS", help="One comparison."),
        click.option("--variant", help="One prompt variant."),
        click.option("--prompt", type=int, metavar="N", help="One prompt, by index from 0."),
        click.option("--capture", metavar="ID", help="One capture, by id or the start of it."),
        click.option("--pair", help="One pair."),
    ):
        command = option(command)
    return command


@click.command(context_settings=HELP, epilog=example("pairscope status out/demo", "pairscope status out/demo --json"))
@click.argument("out")
@click.option("--all", "every_attempt", is_flag=True, help="Every attempt, not only the last of each entry.")
@click.option("--memory", is_flag=True, help="Device memory instead: planned, and the peak of every stage.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row.")
@click.pass_context
def status(ctx: click.Context, out: str, every_attempt: bool, memory: bool, as_json: bool) -> None:
    """Show every entry of the run directory OUT, its state and its error.

    Exit code 1 if the last attempt at some entry failed.
    """
    from analysis.run import open_run_dir
    from analysis.status import captured_again, failed, memory_lines, status_rows, table_lines
    from analysis.tables import json_line, terminal_width

    run = open_run_dir(out)
    rows = status_rows(run, every_attempt)
    if not rows:
        raise QueryError(
            f"'{out}' holds no attempt and no capture yet; 'pairscope sweep CONFIG --out {out}' makes some"
        )
    if as_json:
        for row in rows:
            click.echo(json_line(row))
    elif memory:
        for line in memory_lines(rows):
            click.echo(line)
    else:
        for line in table_lines(rows, terminal_width() if sys.stdout.isatty() else None):
            click.echo(line)
        for line in captured_again(run):
            click.echo(line)
    if names := failed(rows):
        click.echo(f"failed: {', '.join(escape(n) for n in names)}", err=True)
        ctx.exit(1)


class TakesSql(click.Command):
    """Lets a query begin with a comment: `-- of the last layer` and a line of SQL is no option, which has no space in its name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        queries = [] if "--" in args else [arg for arg in args if re.match(r"--[^=\s]*\s", arg)]
        others = [arg for arg in args if arg not in queries]
        return super().parse_args(ctx, [*others, "--", *queries] if queries else args)


@click.command(
    cls=TakesSql,
    context_settings=HELP,
    epilog=example(
        "pairscope sql out/demo \"SELECT pair, layer, avg(kl_divergence) AS kl FROM pairwise WHERE comparison = 'BB-SS' GROUP BY ALL ORDER BY ALL\"",
        "pairscope sql out/demo",
        "pairscope sql out/demo --csv - < query.sql > rows.csv",
    ),
)
@click.argument("out")
@click.argument("query", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row.")
@click.option("--csv", "as_csv", is_flag=True, help="CSV with a header.")
@click.option("--any-file", is_flag=True, help="Let the query read files outside OUT too.")
@all_captures_option
@partial_option
@lenient_option
def sql(
    out: str,
    query: str | None,
    as_json: bool,
    as_csv: bool,
    any_file: bool,
    all_captures: bool,
    include_partial: bool,
    lenient: bool,
) -> None:
    """Ask the run directory OUT in SQL (DuckDB's). QUERY - reads it from stdin; without one, views and macros are listed.

    The answer is a table: whole when piped, its first rows on a terminal. Nothing can be written, and no file outside OUT
    can be read. Of a pair that was captured more than once the tables hold the newest capture.
    """
    from analysis.query import captures_note, print_answer, print_views

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    with asking(out, include_partial, lenient, sandbox=not any_file, all_captures=all_captures) as con:
        if query is None:
            print_views(out, as_json, as_csv)
            return
        query = _from_stdin() if query == "-" else query
        print_answer(con, query, as_json, as_csv)
        for line in captures_note(con, query, all_captures):
            click.echo(line, err=True)


def _from_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise QueryError("the query is not text in UTF-8") from None


@click.command(
    context_settings=HELP,
    epilog=example("pairscope catalog out/demo", "python -c \"import duckdb; print(duckdb.connect('out/demo/catalog.duckdb')"
                   ".sql('FROM captures'))\""),
)  # fmt: skip
@click.argument("out")
@click.option("-o", "--output", metavar="FILE", help="Default: OUT/catalog.duckdb.")
@all_captures_option
@partial_option
def catalog(out: str, output: str | None, all_captures: bool, include_partial: bool) -> None:
    """Write a .duckdb file of views and macros over the run directory OUT, for any DuckDB client.

    It holds no data and knows the captures that are complete now: write it again when more are. Where OUT was moved, say
    SET VARIABLE run_directory = '/new/place' in the client, or write it again.
    """
    from analysis.run import write_catalog

    click.echo(write_catalog(out, output, include_partial, all_captures=all_captures))
