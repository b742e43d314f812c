"""The verbs report and grid."""

from __future__ import annotations

from typing import Any

import click

from analysis.cli import HELP, asking, example, filter_options, lenient_option, partial_option
from analysis.errors import QueryError


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
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    help="Default: norm_diff for pairwise, norm for runs. Given again: more metrics, with their correlation.",
)
@click.option("--axis", type=click.Choice(["layer", "token"]), default="layer", show_default=True,
              help="Statistics per layer or per token.")  # fmt: skip
@click.option("--top-n", type=click.IntRange(1, 100_000), default=5, show_default=True, help="Hotspots per prompt.")
@click.option(
    "--token-id",
    "token_ids",
    type=int,
    multiple=True,
    metavar="ID",
    help="Also the lens logit of this tracked token. May be given again.",
)
@click.option(
    "--logit-source",
    type=click.Choice(["base", "sft", "diff"]),
    default="diff",
    show_default=True,
    help="Whose logit, for comparisons; diff is base - sft.",
)
@click.option("--min-logit", type=click.FloatRange(0), default=0.5, show_default=True,
              help="A change of a tracked logit counts from this size on.")  # fmt: skip
@click.option("--export", metavar="FILE", help="Write rows to FILE.csv, .json (one object a line) or .parquet.")
@click.option("--export-rows", type=click.Choice(["cells", "hotspots", "statistics", "changes"]), default="cells",
              show_default=True, help="Which rows: every cell, or those of the sections.")  # fmt: skip
@click.option("--limit", type=click.IntRange(0), help="Sections at most; 0 for all. Default: 6, and all with --json.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a section.")
@filter_options
@partial_option
@lenient_option
def report(
    out: str,
    record_type: Any,
    metrics: tuple[str, ...],
    axis: Any,
    top_n: int,
    token_ids: tuple[int, ...],
    logit_source: str,
    min_logit: float,
    export: str | None,
    export_rows: Any,
    limit: int | None,
    as_json: bool,
    pair: str | None,
    capture: str | None,
    prompt: int | None,
    variant: str | None,
    comparison: str | None,
    run_: str | None,
    include_partial: bool,
    lenient: bool,
) -> None:
    """Summarise metrics of OUT: over all prompts, then a section per prompt and comparison (or pass).

    A section has the prompt's length, statistics per layer or token, the cells of largest absolute value, and the logits of
    tracked tokens.
    """
    from analysis.export import check_export, export_report
    from analysis.report import ask, make_report
    from analysis.report_text import overview_lines, section_lines
    from analysis.select import Filters
    from analysis.tables import json_line, terminal_width

    filters = Filters(pair, capture, prompt, variant, _label(record_type, comparison, run_))
    if export:
        check_export(export, export_rows, record_type)
    with asking(out, include_partial, lenient) as con:
        question = ask(con, record_type, metrics, axis=axis, top_n=top_n, token_ids=token_ids,
                       logit_source=logit_source, min_logit=min_logit, filters=filters)  # fmt: skip
        if export:  # before the text, whose reader may leave early, as `head` does
            click.echo(f"wrote {export_report(con, question, export, export_rows)}", err=True)
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


def _label(record_type: str, comparison: str | None, run_: str | None) -> str | None:
    if record_type == "runs" and comparison:
        raise QueryError("--comparison is for --record-type pairwise; passes are chosen by --run")
    if record_type == "pairwise" and run_:
        raise QueryError("--run is for --record-type runs; comparisons are chosen by --comparison")
    return comparison or run_


@click.command(
    context_settings=HELP,
    epilog=example(
        "pairscope grid out/demo --metric norm_diff --comparison BB-SS",
        "pairscope grid out/demo --metric norm_diff --png six.png --all --log",
    ),
)
@click.argument("out")
@click.option("--metric", help="Default: kl_divergence, or norm with --run.")
@click.option("--token-id", type=int, metavar="ID", help="Instead of a metric, the lens logit of this tracked token.")
@click.option("--logit-source", type=click.Choice(["base", "sft", "diff"]), default="diff", show_default=True,
              help="Whose logit, for comparisons.")  # fmt: skip
@click.option("--positions", metavar="A:B", help="Tokens from A up to, not with, B.")
@click.option("-o", "--output", metavar="FILE", help="Write FILE.csv, .json, .parquet (a row per cell) or a figure.")
@click.option("--png", metavar="FILE", help="Draw a figure into FILE.png, .pdf or .svg.")
@click.option("--log", is_flag=True, help="A logarithmic colour scale, for --png.")
@click.option("--all", "every", is_flag=True, help="All comparisons (or passes) on one colour scale, for --png.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a cell.")
@filter_options
@partial_option
@lenient_option
def grid(
    out: str,
    metric: str | None,
    token_id: int | None,
    logit_source: str,
    positions: str | None,
    output: str | None,
    png: str | None,
    log: bool,
    every: bool,
    as_json: bool,
    pair: str | None,
    capture: str | None,
    prompt: int | None,
    variant: str | None,
    comparison: str | None,
    run_: str | None,
    include_partial: bool,
    lenient: bool,
) -> None:
    """Show one layer x token grid of OUT: drawn in the terminal, or as a file.

    By default KL of BB-SS, for the first prompt of the first pair. A metric that only passes have shows pass BB.
    """
    from analysis.draw import FIGURES, draw, write_png
    from analysis.grids import build_grid, build_stack, check_tracked
    from analysis.metrics import choose_metric
    from analysis.select import Filters
    from analysis.tables import export_rows, json_line

    start, stop = _positions(positions)
    figures = list(dict.fromkeys(f for f in (png, output) if f and (f == png or f.endswith(FIGURES))))
    if (log or every) and not figures:
        raise QueryError("--log and --all are for a figure: add --png FILE")
    if every and (comparison or run_):
        raise QueryError("--all takes every comparison (or pass): leave out --comparison and --run")
    chosen = choose_metric(metric, comparison=comparison, run=run_, token_id=token_id, source=logit_source)
    filters = Filters(pair, capture, prompt, variant, comparison or run_)
    with asking(out, include_partial, lenient) as con:
        if token_id is not None:
            check_tracked(con, token_id, filters)
        shown = build_grid(con, chosen, filters).at(start, stop)
        drawn = build_stack(con, chosen, filters).at(start, stop) if every else shown
        captures = dict(con.execute("SELECT capture, newest FROM captures WHERE pair = ?", [shown.pair]).fetchall())
        several = len(captures)
    for figure in figures:
        click.echo(f"wrote {write_png(drawn, figure, log=log)}", err=True)
    if output and output not in figures:
        click.echo(f"wrote {export_rows(list(shown.rows()), output, *FIGURES)}", err=True)
    if as_json:
        for row in shown.rows():
            click.echo(json_line(row))
    elif not output and not figures:
        from rich.console import Console

        console = Console(highlight=False, soft_wrap=True)
        console.print(draw(shown, console.width))
        if below := int(shown.below_floor.sum()):
            click.echo(f"{below} of {shown.values.size} cells are not above the noise floor of this capture")
        if several > 1 and capture is None:  # the config was changed between two runs of one output
            of = f"the newest of {several} of this pair"
            if token_id is not None:
                of = f"of the {several} of this pair the newest that tracks token {token_id}"
            elif not captures[shown.capture]:
                of = f"of the {several} of this pair the newest that has what is asked for"
            click.echo(f"capture {shown.capture}, {of}; --capture chooses another")


def _positions(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    start, colon, stop = text.partition(":")
    try:
        return (int(start) if start else None), (int(stop) if stop else None if colon else int(start) + 1)
    except ValueError:
        raise QueryError(f"--positions '{text}' is not A:B, two token positions such as 0:12") from None
