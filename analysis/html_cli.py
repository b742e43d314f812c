"""The `html` verb."""

from __future__ import annotations

import math
import sys

import click

from analysis.cli import HELP, asking, example, lenient_option, partial_option
from capture.printable import escape


class ListsNames(click.Command):
    """Lets `--entries` take several names: `--entries a b` reads as `--entries a --entries b`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        listing = False
        for arg in args:
            if arg == "--entries":
                listing = True
                continue
            listing = listing and not arg.startswith("-")
            spread += ["--entries", arg] if listing else [arg]
        if "--entries" in args and "--entries" not in spread:
            ctx.fail("--entries needs at least one name.")
        return super().parse_args(ctx, spread)


@click.command(
    cls=ListsNames,
    context_settings=HELP,
    epilog=example("pairscope html out/demo", "pairscope html out/demo -o page.html --top-prompts 5 --entries pydoc"),
)
@click.argument("out")
@click.option("-o", "--output", metavar="FILE", default="page.html", show_default=True, help="The page; - for stdout.")
@click.option("--entries", multiple=True, metavar="NAME...", help="Only these pairs.")
@click.option("--prompts", metavar="LIST", help="Only these prompts, such as 0,3,5:9 (5 to 8).")
@click.option("--top-prompts", type=click.IntRange(1), metavar="N",
              help="Only the N prompts of each pair with the largest mean KL of BB-SS, largest first.")  # fmt: skip
@click.option(
    "--top-k", type=click.IntRange(0), default=5, show_default=True, help="Length of the token lists; 0 for none."
)
@click.option("--max-mb", type=click.FloatRange(min=0, min_open=True), default=40.0, show_default=True,
              help="Size of the file at most. Grids of all prompts go first, then token lists.")  # fmt: skip
@partial_option
@lenient_option
def html(
    out: str,
    output: str,
    entries: tuple[str, ...],
    prompts: str | None,
    top_prompts: int | None,
    top_k: int,
    max_mb: float,
    include_partial: bool,
    lenient: bool,
) -> None:
    """Write one HTML file that shows the run directory OUT; it needs no network and can be mailed.

    The newest capture of each pair. Grids of all metrics, comparisons and passes, token lists, profiles, hotspots, and the SQL behind each. What does not fit
    into --max-mb is left out, and the page and this command say so.
    """
    from analysis.html_page import write_page

    if not math.isfinite(max_mb):  # click's range lets nan and inf through
        raise click.BadParameter(f"{max_mb} is no size.", param_hint="'--max-mb'")

    tty = sys.stderr.isatty()

    def show(line: str) -> None:
        if tty:
            click.echo(f"\r\x1b[K{line}", err=True, nl=False)

    with asking(out, include_partial, lenient) as con:
        try:
            done = write_page(con, output, entries=entries, prompts=prompts, top_prompts=top_prompts, top_k=top_k, max_mb=max_mb,
                              progress=show)  # fmt: skip
        finally:
            show("")
    of = "" if done.prompts == done.total else f" of {done.total}"
    pairs = "1 pair" if done.pairs == 1 else f"{done.pairs} pairs"
    place = "the page to stdout" if output == "-" else done.path
    click.echo(f"wrote {place}: {done.bytes / 1e6:.1f} MB, {pairs}, prompts {done.prompts}{of}", err=True)
    for name, parts in done.not_there.items():
        click.echo(f"  pair '{escape(name)}' has no prompt {', '.join(parts)}", err=True)
    if done.lists_cut:
        click.echo(
            f"  token lists of {done.lists} prompts only; --max-mb makes room, a smaller --top-k takes less", err=True
        )
    if top_k and done.no_lists:
        click.echo(f"  no token lists of {_names(done.no_lists)}: captured without them", err=True)
    if done.texts_missing:
        whose = "this capture has" if len(done.texts_missing) == 1 else "these captures have"
        click.echo(
            f"  tokens of the lists show as ids for {_names(done.texts_missing)}: {whose} no texts of them", err=True
        )


def _names(names: tuple[str, ...]) -> str:
    """The first of them, as a page may be of hundreds of pairs."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return escape(", ".join(names[:5])) + more
