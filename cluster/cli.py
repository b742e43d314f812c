"""The `sweep` verb. Nothing heavy is imported before it runs."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from capture.cli import HELP

if TYPE_CHECKING:
    from capture.config import Entry
    from capture.errors import ConfigError
    from cluster.sweep import Item, Summary


class ListsEntries(click.Command):
    """Lets `--entries` take several names: `--entries a b` reads as `--entries a --entries b`; a .yaml file ends the list."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        listing = False
        for arg in args:
            if arg == "--entries":
                listing = True
                continue
            if arg.startswith("-") or arg.endswith((".yaml", ".yml")):
                listing = False
            spread += ["--entries", arg] if listing else [arg]
        if "--entries" in args and "--entries" not in spread:
            ctx.fail("--entries needs at least one name.")
        return super().parse_args(ctx, spread)


@click.command(
    cls=ListsEntries, context_settings=HELP, epilog="\b\nExample:\n  pairscope sweep configs/demo.yaml --out out/demo"
)
@click.argument("config", required=False)
@click.option(
    "--out",
    help="Run directory: a path (in a submitted job from the head's home) or a URI such as s3://bucket/run.  [default: out/<name of CONFIG>]",
)
@click.option("--entries", multiple=True, metavar="NAME...", help="Only these entries of the config.")
@click.option("--force", is_flag=True, help="Capture again what is complete.")
@click.option("--jobs", type=click.IntRange(min=1), help="Entries at a time.  [default: as many as there is room for]")
@click.option(
    "--place-within",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="How long an entry waits for a place while nothing else of the sweep is at work.  "
    "[default: 600; 3600 where the cluster can grow]",
)
@click.option("--dry-run", is_flag=True, help="Only show the entries, their capture ids and what is complete.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object an entry on stdout.")
def sweep(
    config: str | None,
    out: str | None,
    entries: tuple[str, ...],
    force: bool,
    jobs: int | None,
    place_within: float | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Capture all pairs of CONFIG through Ray; what is complete already is skipped.

    A Ray of its own is started on this machine, unless RAY_ADDRESS names a cluster (inside `ray job submit` it does).
    An entry that fails is reported and the others go on. Without CONFIG, DEV_MODE chooses configs/dev_config.yaml or
    configs/prod_config.yaml. Exit code: 0 all complete, 1 some entry failed, 2 the call or the config is wrong, 130 after
    Ctrl-C.
    """
    from capture.config import load_config
    from cluster.sweep import choose, run_sweep

    loaded = load_config(config)
    chosen = choose(loaded, entries)
    out = lasting(out or f"out/{Path(loaded.path).stem}")
    if dry_run:
        _dry_run(chosen, out, force, as_json)
        return
    with _noted(out, [name for name, _ in chosen]) as note:
        summary = run_sweep(chosen, out, force=force, jobs=jobs, place_within=place_within)
        note |= {"exit_code": summary.exit_code, "items": [_brief(item) for item in summary.items]}
    if as_json:
        _print_json(summary.items)
    else:
        _print_summary(summary, config)
    for item in summary.failed:
        what = (
            f"a bug ({item.row['error_class']}), its traceback is in"
            if item.bug
            else f"{item.row['error_class']}, log:"
        )
        click.echo(f"pairscope: {item.name} failed: {what} {summary.out}/{item.row['log']}", err=True)
    sys.exit(summary.exit_code)


def lasting(out: str, cwd: Path | None = None) -> str:
    """The output as given; but below the home directory where a job's own folder, which Ray deletes after it, would hold it."""
    place = Path(out).expanduser()
    if "://" in out or place.is_absolute() or "working_dir_files" not in (cwd or Path.cwd()).parts:
        return out
    return str(Path.home() / place)


def on_a_cluster() -> bool:
    """Whether the sweep runs on a Ray that was there before it, as a submitted job does."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


@contextlib.contextmanager
def _noted(out: str, names: list[str]) -> Iterator[dict[str, Any]]:
    """On a cluster: leave word for `pairscope collect` of where the results are and how the sweep ended."""
    from capture.layout import RunDir
    from cluster.note import noted

    if not on_a_cluster():
        yield {}
        return
    in_store = "://" in out and not out.startswith(
        "file://"
    )  # which is this machine's disk, and nobody else can look into it
    where = out if in_store else RunDir(out).root
    with noted(where, names, lambda line: click.echo(f"pairscope: {line}", err=True)) as note:
        yield note


def _brief(item: Item) -> dict[str, Any]:
    return {"entry": item.name, "state": item.state, "capture": item.capture}


def _dry_run(chosen: list[tuple[str, Entry | ConfigError]], out: str, force: bool, as_json: bool) -> None:
    from capture.attempt import check_output
    from capture.layout import RunDir
    from capture.show import tell
    from cluster.sweep import plan

    run = RunDir(out)
    check_output(run, write=False)
    items = plan(chosen, run, force=force, record=False)
    if as_json:
        _print_json(items)
    else:
        state = {"planned": "to do", "skipped": "complete"}
        rows = [[i.name, state.get(i.state, i.state), i.capture or "", _error(i)] for i in items]
        for line in table_lines(["entry", "state", "capture"], rows, _width()):
            tell(line)
        tell(f"{sum(i.state == 'planned' for i in items)} of {len(items)} entries to do, in {run.out}")
    if any(i.state == "failed" for i in items):
        sys.exit(1)


def _print_json(items: list[Item] | tuple[Item, ...]) -> None:
    from capture.show import tell

    for item in items:
        tell(json.dumps(item.as_dict(), ensure_ascii=False))


def _print_summary(summary: Summary, config: str | None) -> None:
    from capture.ask_next import commands
    from capture.show import tell

    n = len(summary.items)
    if summary.complete == n and not summary.ray_used:
        tell(f"nothing left to do: {n} of {n} complete in {summary.out}")
    else:
        rows = [
            [i.name, i.state, _number(_seconds(i), ".1f"), _number(i.row.get("n_tokens"), ",d"), i.row.get("mode") or "",
             _size(i.row.get("peak_memory_bytes")), _number(i.row.get("dollars"), ".3f"), _error(i)]
            for i in summary.items
        ]  # fmt: skip
        lines = list(
            table_lines(["entry", "state", "seconds", "tokens", "mode", "peak memory", "dollars"], rows, _width())
        )
        tell("\n".join(lines))
        if "peak memory" in lines[0] and any(i.row.get("gpu") == "cpu" for i in summary.items):
            tell("(peak memory on a CPU: of the weights alone)")
        tell(f"{summary.complete} of {n} complete in {summary.out}")
    tell("\nnext:")
    out = shlex.quote(summary.out)
    if summary.complete < n:
        again = f"pairscope sweep {shlex.quote(config) if config else ''}".rstrip() + f" --out {out}"
        tell(f"  {again}    # takes up what is missing")
        tell(f"  pairscope status {out}")
    if summary.complete and on_a_cluster() and "://" not in summary.out:
        tell(f"  at home: pairscope collect ray_cluster.yaml --out {shlex.quote(summary.out.lstrip('~/'))}")
    elif summary.complete:
        for line in commands(summary.out, [i.entry for i in summary.items if i.entry and i.state != "failed"]):
            tell(f"  {line}")


def _error(item: Item) -> str:
    return f"{item.row['error_class']}: {' '.join(item.row['error'].split())}" if item.row.get("error_class") else ""


def _seconds(item: Item) -> float | None:
    """How long it took; None of what another sweep had completed meanwhile, which was only looked at."""
    found = item.state == "complete" and item.row.get("n_tokens") is None
    return None if found else item.row.get("seconds")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _size(value: float | None) -> str:
    """Bytes in the unit that keeps one to three digits before the point."""
    if value is None:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if value < 1000:
            return f"{value:.1f} {unit}" if unit != "B" else f"{value:.0f} B"
        value /= 1024
    return f"{value:.2f} GiB"


def _width() -> int | None:
    """Columns of the terminal; None elsewhere, where nothing needs to be cut or wrapped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table_lines(columns: list[str], rows: list[list[str]], width: int | None) -> Iterator[str]:
    """Aligned lines: a header, a rule, a line for each row. Columns that are empty in every row are left out.

    A row has one cell more than there are columns: an error, or nothing; it ends its line. Within a width (None: there is
    none) it is wrapped below its line instead, and columns are left out from the right until the others fit; the first two
    never are, and no cell is ever cut.
    """
    shown = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    sizes = {i: max(len(columns[i]), *(len(row[i]) for row in rows)) for i in shown}
    dropped: list[str] = []
    while width is not None and len(shown) > 2 and sum(sizes[i] + 2 for i in shown) - 2 > width:
        dropped.insert(0, columns[shown.pop()])

    def line(cells: list[str]) -> str:
        right = ("seconds", "tokens", "peak memory", "dollars")
        texts = [cells[i].rjust(sizes[i]) if columns[i] in right else cells[i].ljust(sizes[i]) for i in shown]
        return "  ".join(texts)

    errors = "error" if width is None and any(row[-1] for row in rows) else ""
    yield f"{line(columns)}  {errors}".rstrip()
    yield "─" * min(width or 200, len(line(columns)))
    for row in rows:
        if width is None:
            yield f"{line(row)}  {row[-1]}".rstrip()
            continue
        yield line(row).rstrip()
        yield from textwrap.wrap(row[-1], max(20, width), initial_indent="    ", subsequent_indent="    ")
    if dropped:
        yield f"({', '.join(dropped)}: with --json, or on a wider terminal)"
