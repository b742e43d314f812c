"""The verbs that ask: status, sql, catalog, report, grid. DuckDB is imported when one of them runs, not for --help."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from analysis.errors import QueryError

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
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row.")
@click.pass_context
def status(ctx: click.Context, out: str, every_attempt: bool, as_json: bool) -> None:
    """Show every entry of the run directory OUT, its state and its error.

    Exit code 1 if the last attempt at some entry failed.
    """
    from analysis.run import open_run_dir
    from analysis.status import failed, status_rows, table_lines
    from analysis.tables import escape, json_line, terminal_width

    rows = status_rows(open_run_dir(out), every_attempt)
    if not rows:
        raise QueryError(
            f"'{out}' holds no attempt and no capture yet; 'pairscope sweep CONFIG --out {out}' makes some"
        )
    if as_json:
        for row in rows:
            click.echo(json_line(row))
    else:
        for line in table_lines(rows, terminal_width() if sys.stdout.isatty() else None):
            click.echo(line)
    if names := failed(rows):
        click.echo(f"failed: {', '.join(escape(n) for n in names)}", err=True)
        ctx.exit(1)


@click.command(
    context_settings=HELP,
    epilog=example(
        'pairscope sql out/demo "SELECT layer, avg(kl_divergence) FROM pairwise GROUP BY layer ORDER BY layer"',
        "pairscope sql out/demo",
        "pairscope sql out/demo --csv - < query.sql > rows.csv",
    ),
)
@click.argument("out")
@click.argument("query", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row.")
@click.option("--csv", "as_csv", is_flag=True, help="CSV with a header.")
@partial_option
def sql(out: str, query: str | None, as_json: bool, as_csv: bool, include_partial: bool) -> None:
    """Ask the run directory OUT in SQL (DuckDB's). QUERY - reads it from stdin; without one, the views are listed.

    The answer is a table: whole when piped, its first rows on a terminal. Nothing can be written.
    """
    from analysis.query import print_answer, print_views
    from analysis.run import open_run

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    con = open_run(out, include_partial)
    if query is None:
        print_views(out, as_json, as_csv)
        return
    print_answer(con, sys.stdin.read() if query == "-" else query, as_json, as_csv)


@click.command(
    context_settings=HELP,
    epilog=example("pairscope catalog out/demo", "python -c \"import duckdb; print(duckdb.connect('out/demo/catalog.duckdb')"
                   ".sql('FROM captures'))\""),
)  # fmt: skip
@click.argument("out")
@click.option("-o", "--output", metavar="FILE", help="Default: OUT/catalog.duckdb.")
@partial_option
def catalog(out: str, output: str | None, include_partial: bool) -> None:
    """Write a .duckdb file of views over the run directory OUT, for any DuckDB client.

    It holds absolute paths, not data, and knows the captures that are complete now: write it again when more are.
    """
    from analysis.run import write_catalog

    click.echo(write_catalog(out, output, include_partial))


@click.command(
    context_settings=HELP,
    epilog=example(
        "pairscope report out/demo --metric norm_diff --comparison BB-SS --prompt 0",
        "pairscope report out/demo --record-type runs --metric entropy --axis token --export entropy.csv",
    ),
)
@click.argument("out")
@click.option("--record-type", type=click.Choice(["runs", "pairwise"]), default="pairwise", show_default=True,
              help="Of passes, or of comparisons.")  # fmt: skip
@click.option("--metric", help="Default: kl_divergence for pairwise, norm for runs.")
@click.option("--metric2", help="A second metric, and its correlation with the first.")
@click.option("--axis", type=click.Choice(["layer", "token"]), default="layer", show_default=True,
              help="Statistics per layer or per token.")  # fmt: skip
@click.option("--top-n", type=click.IntRange(1), default=5, show_default=True, help="Hotspots per prompt.")
@click.option("--token-id", type=int, metavar="ID", help="Also the lens logit of this tracked token.")
@click.option("--logit-source", type=click.Choice(["base", "sft", "diff"]), default="diff", show_default=True,
              help="Whose logit, for comparisons.")  # fmt: skip
@click.option("--export", metavar="FILE", help="Write all cells to FILE.csv, .json (one object a line) or .parquet.")
@click.option("--limit", type=click.IntRange(0), help="Sections at most; 0 for all. Default: 6, and all with --json.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a section.")
@filter_options
@partial_option
def report(
    out: str,
    record_type: Any,
    metric: str | None,
    metric2: str | None,
    axis: Any,
    top_n: int,
    token_id: int | None,
    logit_source: str,
    export: str | None,
    limit: int | None,
    as_json: bool,
    pair: str | None,
    capture: str | None,
    prompt: int | None,
    variant: str | None,
    comparison: str | None,
    run_: str | None,
    include_partial: bool,
) -> None:
    """Summarise metrics of OUT: over all prompts, then a section per prompt and comparison (or pass).

    A section has the prompt's length, statistics per layer or token, the cells of largest absolute value, and the logits of
    tracked tokens.
    """
    from analysis.report import ask, export_cells, make_report
    from analysis.report_text import overview_lines, section_lines
    from analysis.run import open_run
    from analysis.select import Filters
    from analysis.tables import json_line, terminal_width

    filters = Filters(pair, capture, prompt, variant, _label(record_type, comparison, run_))
    con = open_run(out, include_partial)
    question = ask(con, record_type, metric, metric2, axis=axis, top_n=top_n, token_id=token_id,
                   logit_source=logit_source, filters=filters)  # fmt: skip
    if as_json:
        for section in make_report(con, question, limit or None):
            click.echo(json_line(section.row(record_type)))
    else:
        for line in overview_lines(con, question):
            click.echo(line)
        most = 6 if limit is None else limit or None
        for made, section in enumerate(make_report(con, question, None if most is None else most + 1)):
            if made == most:
                click.echo(f"(sections 1 to {most}; --limit 0 shows all, --pair, --prompt and the like choose)")
                break
            for line in section_lines(section, axis, terminal_width()):
                click.echo(line)
    if export:
        click.echo(f"wrote {export_cells(con, question, export)}", err=True)


def _label(record_type: str, comparison: str | None, run_: str | None) -> str | None:
    if record_type == "runs" and comparison:
        raise QueryError("--comparison is for --record-type pairwise; passes are chosen by --run")
    if record_type == "pairwise" and run_:
        raise QueryError("--run is for --record-type runs; comparisons are chosen by --comparison")
    return comparison or run_


@click.command(
    context_settings=HELP,
    epilog=example(
        "pairscope grid out/demo --metric norm_diff --comparison BB-SS", "pairscope grid out/demo -o kl.png"
    ),
)
@click.argument("out")
@click.option("--metric", help="Default: kl_divergence, or norm with --run.")
@click.option("--token-id", type=int, metavar="ID", help="Instead of a metric, the lens logit of this tracked token.")
@click.option("--logit-source", type=click.Choice(["base", "sft", "diff"]), default="diff", show_default=True,
              help="Whose logit, for comparisons.")  # fmt: skip
@click.option("--positions", metavar="A:B", help="Tokens from A up to, not with, B.")
@click.option("-o", "--output", metavar="FILE", help="Write FILE.csv, .json, .parquet (a row per cell) or .png.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a cell.")
@filter_options
@partial_option
def grid(
    out: str,
    metric: str | None,
    token_id: int | None,
    logit_source: str,
    positions: str | None,
    output: str | None,
    as_json: bool,
    pair: str | None,
    capture: str | None,
    prompt: int | None,
    variant: str | None,
    comparison: str | None,
    run_: str | None,
    include_partial: bool,
) -> None:
    """Show one layer x token grid of OUT: drawn in the terminal, or as a file.

    By default KL of BB-SS, for the first prompt of the first pair. A metric that only passes have shows pass BB.
    """
    from analysis.draw import draw, write_png
    from analysis.grids import build_grid, check_tracked
    from analysis.metrics import RecordType, find_metric, logit_metric, metrics
    from analysis.run import open_run
    from analysis.select import Filters
    from analysis.tables import json_line, write_rows

    if comparison and run_:
        raise QueryError("--comparison and --run exclude each other")
    if metric and token_id is not None:
        raise QueryError("--metric and --token-id exclude each other")
    start, stop = _positions(positions)
    only_runs = metric is not None and metric in metrics("runs") and metric not in metrics("pairwise")
    record_type: RecordType = "runs" if run_ or (only_runs and not comparison) else "pairwise"
    if token_id is not None:
        chosen = logit_metric(record_type, token_id, logit_source)
    else:
        chosen = find_metric(record_type, metric or ("norm" if run_ else "kl_divergence"))
    con = open_run(out, include_partial)
    filters = Filters(pair, capture, prompt, variant, comparison or run_)
    if token_id is not None:
        check_tracked(con, token_id, filters)
    shown = build_grid(con, chosen, filters).at(start, stop)
    if output:
        path = (
            write_png(shown, output) if output.endswith(".png") else write_rows(con, list(shown.rows()), output, ".png")
        )
        click.echo(f"wrote {path}", err=True)
    if as_json:
        for row in shown.rows():
            click.echo(json_line(row))
    elif not output:
        from rich.console import Console

        console = Console(highlight=False, soft_wrap=True)
        console.print(draw(shown, console.width))


def _positions(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    start, colon, stop = text.partition(":")
    try:
        return (int(start) if start else None), (int(stop) if stop else None if colon else int(start) + 1)
    except ValueError:
        raise QueryError(f"--positions '{text}' is not A:B, two token positions such as 0:12") from None
