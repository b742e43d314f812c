"""The verbs import-json and export-json."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from analysis.cli import HELP, asking, example, lenient_option
from analysis.errors import QueryError
from capture.errors import StoreError
from capture.printable import escape


@click.command(
    "import-json",
    context_settings=HELP,
    epilog=example(
        "pairscope import-json results/multi_pass_20251127_032925_gpt2_to_gpt2.json --out out/imported",
        "pairscope import-json results/*.json --out out/imported",
    ),
)
@click.argument("files", nargs=-1, required=True)
@click.option("--out", required=True, metavar="DIR", help="Run directory to add captures to; made where it is missing.")
@click.option("--pair", metavar="NAME", help="Name of the pair, for one file. Default: from the file's name.")
@click.option("--force", is_flag=True, help="Read a file again that was imported already.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a file.")
@click.pass_context
def import_json(
    ctx: click.Context, files: tuple[str, ...], out: str, pair: str | None, force: bool, as_json: bool
) -> None:
    """Read FILES of residual comparisons (format_version 2, or the older single comparison) into a run directory.

    Each file becomes a capture. A file of any size is read in little memory; one that was imported already is passed over.
    Of a file that breaks off in the middle everything before that place is kept, and the exit code is 1.
    """
    from dataclasses import asdict

    from analysis.json_import import import_json as read
    from analysis.tables import json_line
    from capture.errors import PairscopeError

    if pair and len(files) > 1:
        raise QueryError("--pair names the pair of one file; without it each file's name does")
    failed = False
    for file in files:
        try:
            found = read(file, out, pair=pair, force=force, progress=_progress(escape(file), "MB", 1e6))
        except PairscopeError as error:
            if len(files) == 1:
                raise
            click.echo(f"{type(error).__name__}: {escape(str(error))}", err=True)
            failed = True
            continue
        if as_json:
            click.echo(json_line(asdict(found)))
        else:
            said = "is there already" if found.state == "there" else f"{found.records} records, {found.cells} cells"
            click.echo(f"{escape(file)}: pair {found.pair}, capture {found.capture}: {said}")
        if found.broken:
            click.echo(f"'{escape(file)}' is not whole: {escape(found.broken)}; what comes before was kept", err=True)
            failed = True
    if failed:
        ctx.exit(1)


@click.command(
    "export-json",
    context_settings=HELP,
    epilog=example(
        "pairscope export-json out/demo --pair pydoc -o pydoc.json",
        "pairscope export-json out/demo --pair pydoc --prompt 0 --single BB-SS -o bb_ss.json",
    ),
)
@click.argument("out")
@click.option(
    "-o", "--output", required=True, metavar="FILE", help="A file, - for stdout; for several captures a directory."
)
@click.option("--pair", help="One pair.")
@click.option("--capture", metavar="ID", help="One capture, by id or the start of it.")
@click.option("--prompt", type=int, metavar="N", help="One prompt, by index from 0.")
@click.option("--variant", help="One prompt variant.")
@click.option("--single", metavar="BB-SS", help="The older format, with this comparison alone.")
@lenient_option
def export_json(
    out: str,
    output: str,
    pair: str | None,
    capture: str | None,
    prompt: int | None,
    variant: str | None,
    single: str | None,
    lenient: bool,
) -> None:
    """Write captures of OUT as files of residual comparisons (format_version 2), a file per capture.

    The format knows layers 0 to L-1, the last after the final norm: the state before block 0 and the last block's raw output
    are left out, as are next_token_logprob, kl_reverse and top1_agree. An imported capture gives back what its file said.
    """
    from analysis.json_export import export_json as write
    from analysis.metrics import find_metric
    from analysis.select import Filters, check_filters
    from analysis.tables import is_stream

    filters = Filters(pair, capture, prompt, variant)
    with asking(out, False, lenient) as con:
        check_filters(con, filters, find_metric("pairwise", "norm_diff"))
        where, values = filters.where("''")
        found = con.execute(f"SELECT DISTINCT pair, capture FROM prompts {where} ORDER BY 1, 2", values).fetchall()
        target = Path(output).expanduser()
        stream = is_stream(output)
        several = len(found) > 1 or (os.path.isdir(target) and not stream)
        if several and (os.path.isfile(target) or stream):
            raise QueryError(
                f"'{output}' is {'one stream' if stream else 'a file'}, and {len(found)} captures are asked for: name a directory, or --pair"
            )
        if several:
            try:
                target.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"cannot make the directory '{output}': {error.strerror or error}") from error
        for i, (name, one) in enumerate(found):
            what = f"{name} ({i + 1} of {len(found)})" if several else name
            file = target / f"{name}-{one}.json" if several else target
            path = write(con, name, one, file, filters=filters, single=single, told=_progress(what, "records", 1))
            click.echo(f"wrote {'the capture to stdout' if output == '-' else path}", err=True)


def _progress(what: str, unit: str, each: float) -> Callable[[int, int], Any]:
    """A line that is written over on a terminal; nothing elsewhere, where the end is said."""
    if not sys.stderr.isatty():
        return lambda done, all_: None

    def show(done: int, all_: int) -> None:
        end = "\n" if done >= all_ else ""
        click.echo(f"\r{what}: {done / each:.0f} of {all_ / each:.0f} {unit}", err=True, nl=False)
        click.echo(end, err=True, nl=False)

    return show
