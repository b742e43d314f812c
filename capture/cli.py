"""The `capture` and `doctor` verbs. Nothing heavy is imported before they run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from capture.config import Config, Entry

HELP = {"help_option_names": ["-h", "--help"]}  # of every command, also where it is called without the group


@click.command(
    context_settings=HELP, epilog="\b\nExample:\n  pairscope capture configs/demo.yaml --pair pydoc --out out/demo"
)
@click.argument("config", required=False)
@click.option("--pair", help="The entry to capture.  [default: the config's own pair, or its only entry]")
@click.option("--out", help="Run directory: a path or a URI such as s3://bucket/run.  [default: out/<name of CONFIG>]")
@click.option("--force", is_flag=True, help="Capture again if it is complete.")
@click.option("--json", "as_json", is_flag=True, help="The attempt as one JSON object on stdout.")
def capture(config: str | None, pair: str | None, out: str | None, force: bool, as_json: bool) -> None:
    """Capture one pair of CONFIG in this process, without Ray.

    Without CONFIG, DEV_MODE chooses configs/dev_config.yaml or configs/prod_config.yaml. Exit code: 0 complete, 1 failed,
    2 the call or the config is wrong, 130 after Ctrl-C.
    """
    from capture.ask_next import commands
    from capture.attempt import check_output, complete_line, run_entry
    from capture.config import load_config
    from capture.layout import RunDir
    from capture.show import Show, tell
    from capture.stop import Stop

    loaded = load_config(config)
    entry = the_entry(loaded, pair)
    run = RunDir(out or f"out/{Path(loaded.path).stem}")
    check_output(run)
    with Show() as show, Stop(show.note) as stop:
        row, outcome = run_entry(entry, run, force=force, progress=show.progress, say=show.event, stop=stop.requested)
    if as_json:
        tell(json.dumps(row, ensure_ascii=False))
    if outcome.state == "complete":
        if not as_json:
            tell(
                f"{entry.name}: {complete_line(row, len(entry.prompt_variants))}, {run.capture_path(entry.name, row['capture'])}"
            )
            tell("\n  ".join(["\nnext:", *commands(run.out, [entry])[:2]]))
    elif outcome.state == "interrupted":
        then = " to start over" if force else ", and it goes on after its last commit"
        click.echo(f"pairscope: {entry.name} interrupted; type the same again{then}", err=True)
        sys.exit(stop.exit_code)
    else:
        what = "a bug, its traceback is" if outcome.bug else "more"
        click.echo(f"pairscope: {entry.name} failed: {outcome.error} ({what} in {run.out}/{row['log']})", err=True)
        sys.exit(1)


def the_entry(config: Config, name: str | None) -> Entry:
    """The entry called `name`, or the only one there is. Raises ConfigError that lists the names."""
    from capture.errors import ConfigError

    if name is not None:
        return config.entry(name)
    if config.settings.base_model and config.settings.sft_model:
        return config.entry(config.own_name())
    names = config.names()
    if len(names) > 1:
        raise ConfigError(f"--pair is needed: {config.path} has {', '.join(names)}")
    return config.entry(names[0])


@click.command(context_settings=HELP, epilog="\b\nExample:\n  pairscope doctor")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def doctor(as_json: bool) -> None:
    """Show what this machine has, and what to do about what it lacks.

    Logins and keys are shown as present or not, never their values.
    """
    from capture.machine import checks

    for check in checks():
        if as_json:
            click.echo(
                json.dumps(
                    {
                        "check": check.name,
                        "ok": check.ok,
                        "found": check.found,
                        "remedy": "" if check.ok else check.remedy,
                    }
                )
            )
        else:
            click.echo(f"{'ok' if check.ok else 'missing':8}{check.name:20}{check.found}")
            if not check.ok:
                click.echo(f"{'':28}{check.remedy}")
