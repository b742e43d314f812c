"""The `plan` verb. Nothing is rented and no weights are downloaded."""

from __future__ import annotations

import json
import sys

import click

from capture.cli import HELP
from cluster.cli import ListsEntries


@click.command(cls=ListsEntries, context_settings=HELP)
@click.argument("config", required=False)
@click.option("--entries", multiple=True, metavar="NAME...", help="Only these entries of the config, in detail.")
@click.option(
    "--offers",
    metavar="FILE|live",
    help="Prices (.yaml), Vast's offers saved as JSON, or live from Vast.  [default: configs/prices.yaml]",
)
@click.option(
    "--nodes",
    type=click.IntRange(min=1, max=64),
    default=4,
    show_default=True,
    help="Simulate the sweep on 1 to N machines.",
)
@click.option("--prompts", type=click.IntRange(min=1), help="Plan for so many prompts instead of the config's.")
@click.option("--tokens", type=click.IntRange(min=1), help="Plan for prompts of so many tokens.")
@click.option("--gbit", type=click.FloatRange(min=0, min_open=True), help="Network of assumed machines, in Gbit/s.")
@click.option(
    "--offline", is_flag=True, help="Never ask the hub; only models in configs/models.yaml, directories and the cache."
)
@click.option("--hub", "refresh", is_flag=True, help="Ask the hub for models in configs/models.yaml too.")
@click.option("--verbose", "-v", is_flag=True, help="Every entry in detail.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row: entries, then the sweep.")
def plan(
    config: str | None,
    entries: tuple[str, ...],
    offers: str | None,
    nodes: int,
    prompts: int | None,
    tokens: int | None,
    gbit: float | None,
    offline: bool,
    refresh: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Show what each pair of CONFIG takes: memory, modes, GPUs, hours and dollars; and the makespan of the sweep.

    Needs no GPU, rents nothing and downloads no weights. Without CONFIG, DEV_MODE chooses configs/dev_config.yaml or
    configs/prod_config.yaml. Exit code: 0 all entries planned, 1 some entry cannot be, 2 the call or the config is wrong.

    \b
    Examples:
      pairscope plan configs/hardware_table.yaml
      pairscope plan configs/hardware_table.yaml --entries llama-3.1-405b --prompts 4 --tokens 100
    """
    from capture.config import load_config
    from cluster.plan_make import make_plan

    made = make_plan(
        load_config(config), entries, offers=offers, nodes=nodes, prompts=prompts, tokens=tokens, gbit=gbit, offline=offline,
        refresh=refresh,
    )  # fmt: skip
    if as_json:
        from cluster.plan_rows import rows

        for row in rows(made):
            click.echo(json.dumps(row, ensure_ascii=False))
    else:
        from cluster.plan_text import console, show
        from cluster.plan_yaml import cluster_lines

        show(made, console(), verbose=verbose or bool(entries), cluster=cluster_lines(made))
    for entry in made.failed:
        click.echo(f"pairscope: {entry.name} cannot be planned: {entry.error}", err=True)
    if made.failed:
        sys.exit(1)
