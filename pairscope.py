"""The `pairscope` command: one group, one verb per job. A verb's module is imported only when it is asked for."""

from __future__ import annotations

import codecs
import importlib
import io
import os
import sys

import click

from capture.cli import HELP

# verb -> (module:function, one line for --help). Kept here so that `pairscope --help` imports nothing heavy.
VERBS: dict[str, tuple[str, str]] = {
    "capture": ("capture.cli:capture", "Capture one pair in this process, without Ray."),
    "sweep": ("cluster.cli:sweep", "Capture all pairs of a config through Ray; skips what is complete."),
    "plan": ("cluster.plan_cli:plan", "Memory, GPUs, hours and dollars of each pair and of the sweep; rents nothing."),
    "collect": ("cluster.collect_cli:collect", "Bring finished captures home from a cluster, then take it down."),
    "status": ("analysis.cli:status", "Show every entry of a run directory, its state and its error."),
    "sql": ("analysis.cli:sql", "Ask a run directory in SQL."),
    "catalog": ("analysis.cli:catalog", "Write a .duckdb file of views over a run directory."),
    "report": ("analysis.cli_cells:report", "Summarise metrics per prompt, layer and token, with hotspots."),
    "grid": ("analysis.cli_cells:grid", "One layer x token grid as a table, CSV, Parquet or PNG."),
    "html": ("analysis.html_cli:html", "One HTML file that shows a run directory, without network."),
    "import-json": ("analysis.cli_json:import_json", "Read files of residual comparisons into a run directory."),
    "export-json": ("analysis.cli_json:export_json", "Write captures as files of residual comparisons."),
    "vast": ("cluster.vast.cli:vast", "Machines on Vast.ai: what is on offer, rented, forgotten."),
    "doctor": ("capture.cli:doctor", "Show what this machine has."),
}


class Verbs(click.Group):
    """A click group that loads a verb's module on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module, function = VERBS[name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), function)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # where no verb waits for it: before the work, and while something is asked
            click.echo("pairscope: stopped", err=True)
            sys.exit(130)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS:
            import difflib

            near = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else " See 'pairscope --help'."
            ctx.fail(f"No such verb '{args[0]}'.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])


@click.group(cls=Verbs, context_settings=HELP)
@click.version_option(package_name="pairscope")
def cli() -> None:
    """Compare a base language model with its fine-tune, layer by layer and token by token.

    \b
    Start here:
      pairscope sweep configs/demo.yaml --out out/demo
      pairscope status out/demo
      pairscope sql out/demo "SELECT pair, layer, avg(kl_divergence) AS kl FROM pairwise WHERE comparison = 'BB-SS' GROUP BY ALL ORDER BY ALL"
    """


def main() -> None:
    """Run the command line; a user's error is one line on stderr and its exit code, a bug keeps its traceback."""
    from capture.errors import PairscopeError, disk_is_full, why_not_written

    # closed by the caller, as with >&-: Python has no such stream then, and the next file that is opened would take its place
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (until the end)
    for stream in (sys.stdout, sys.stderr):  # in a locale without UTF-8, where tokens have letters that it has not
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="backslashreplace")
    try:
        cli(prog_name="pairscope")
    except OSError as error:
        if error.filename is not None or not disk_is_full(error):
            raise
        click.echo(f"pairscope: StoreError: cannot write the output: {why_not_written(error)}", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's exit tries once more
        sys.exit(1)
    except PairscopeError as error:
        from capture.printable import escape, without_logins

        text = escape(without_logins(str(error)), keep="\n\t")
        click.echo(f"pairscope: {type(error).__name__}: {text}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
