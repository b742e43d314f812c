"""`pairscope vast`: what is on offer, what is rented, what was forgotten."""

from __future__ import annotations

import json
from typing import Any

import click

from capture.cli import HELP
from capture.errors import ConfigError, StoreError
from capture.printable import escape
from cluster.vast import headkey
from cluster.vast.api import Vast
from cluster.vast.errors import NotGoneError, VastError
from cluster.vast.fleet import Fleet, even_unnoted, raise_for
from cluster.vast.labels import check_names
from cluster.vast.node import Node, listed
from cluster.vast.orphans import rented_by
from cluster.vast.state import State, cluster_folder, open_requests

LOOKS = 10  # for what turns up while a cluster is destroyed


@click.group(context_settings=HELP)
def vast() -> None:
    """Machines on Vast.ai: what is on offer, what is rented, what was forgotten.

    The API key is taken from VAST_API_KEY or from where `vastai set api-key` put it.

    \b
    Example:
      pairscope vast orphans
    """


@vast.command()
@click.argument("config", default="ray_cluster.yaml")
@click.option("--type", "type_", metavar="NAME", help="Node type of CONFIG.  [default: the head's]")
@click.option("--limit", type=click.IntRange(min=1), default=10, show_default=True, help="How many.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object an offer.")
def offers(config: str, type_: str | None, limit: int, as_json: bool) -> None:
    """Show the offers that fit a node type of CONFIG, cheapest work first.

    \b
    Example:
      pairscope vast offers ray_cluster.yaml --type rtx4090
    """
    import yaml

    from cluster.vast.money import Caps
    from cluster.vast.offers import find_offers
    from cluster.vast.settings import Settings, check_shape

    try:
        with open(config) as stream:
            content = yaml.safe_load(stream)
    except OSError as error:
        raise ConfigError(f"cannot read '{config}': {error.strerror}; name the file that `ray up` takes") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"'{config}' is no cluster config of Ray's: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"'{config}' is no cluster config of Ray's: it holds {content!r:.40}, not keys and values")
    try:
        check_shape(content)
        types, type_ = content["available_node_types"], type_ or content["head_node_type"]
        if type_ not in types:
            raise ConfigError(f"no node type '{type_}'; there are {', '.join(types)}")
        settings, caps = Settings.read(content["provider"]), Caps.read(content["provider"])
        wish = settings.wish(types[type_]["node_config"], type_)
    except ConfigError as error:
        raise ConfigError(f"'{config}': {error}") from error
    state = State(cluster_folder(content["cluster_name"]))
    where, hours = f"node type '{type_}'", caps.max_hours if type_ == content["head_node_type"] else 0.0
    found = find_offers(Vast(url=settings.api_url), wish, state.blocked_machines(), where, hours=hours)[:limit]
    rows = [
        {
            "offer": o.id, "machine": o.machine, "gpus": f"{o.row['num_gpus']}x {o.row['gpu_name']}", "gib": round(o.row["gpu_ram"] / 1024, 1),
            "dollars_per_hour": round(o.dph, 4), "dollars_for_work": round(o.dollars, 3), "mbit_down": o.row["inet_down"],
            "dollars_per_gb": o.row.get("inet_down_cost"), "reliability": o.row.get("reliability"), "place": o.row.get("geolocation"),
        }
        for o in found
    ]  # fmt: skip
    _show(rows, as_json)
    if not as_json:
        click.echo(f"work: {wish.hours:g} hours and {wish.download_gb:g} GB down, with {wish.disk_gb:g} GB of disk")


@vast.command()
@click.option("--cluster", metavar="NAME", help="Only this cluster's.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object an instance.")
def nodes(cluster: str | None, as_json: bool) -> None:
    """Show all instances that pairscope rented, on this machine or another.

    \b
    Example:
      pairscope vast nodes
    """
    if cluster is not None:
        check_names(cluster, [])
    found = [f for f in rented_by(_connect()) if cluster in (None, f.node.label.cluster)]
    _show([f.row() for f in found], as_json)
    if not as_json:
        click.echo(f"{len(found)} rented, ${sum(f.node.dph for f in found):.3f}/h")


@vast.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object an instance.")
def orphans(as_json: bool) -> None:
    """Show rented instances that nobody looks after any more, and why that is thought. Exit code 1 if there are any.

    All that Vast lists, and all that this machine has rented, asked for one by one.

    \b
    Example:
      pairscope vast orphans && echo nothing left behind
    """
    unread: list[StoreError] = []
    found = [f for f in rented_by(_connect(), sure=True, unread=unread) if f.orphan]
    _show([f.row() for f in found], as_json)
    if found and not as_json:
        click.echo(f"to end them: pairscope vast destroy {' '.join(f.node.id for f in found)}")
    if unread:  # what else there is nobody can tell
        raise unread[0]
    if found:
        raise SystemExit(1)
    if not as_json:
        click.echo("no orphans")


@vast.command()
@click.argument("ids", nargs=-1, type=int)
@click.option("--cluster", metavar="NAME", help="All of this cluster.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def destroy(ids: tuple[int, ...], cluster: str | None, yes: bool) -> None:
    """Destroy instances by id, or all of a cluster, and see that they are gone. Other people's labels are left alone.

    One that will not go does not hold up the others; those left are named at the end, with exit code 1.

    \b
    Example:
      pairscope vast destroy --cluster pairscope
    """
    if bool(ids) == bool(cluster):
        raise ConfigError("name either instance ids or --cluster; `pairscope vast nodes` lists both")
    if cluster:
        check_names(cluster, [])
    client = _connect()
    unread: list[StoreError] = []
    # by id also what a listing leaves out
    rented = {f.node.id: f for f in rented_by(client, sure=bool(ids), unread=unread)}
    unknown = [i for i in ids if str(i) not in rented]
    for error in unread:  # of another cluster, or of this one: what is listed can be ended all the same
        if unknown:
            raise error
        click.echo(f"warning: {error}", err=True)
    if unknown:
        raise ConfigError(f"instance {unknown[0]} is not one that pairscope rented; `pairscope vast nodes` lists those")
    wanted = [f for f in rented.values() if int(f.node.id) in ids or f.node.label.cluster == cluster]
    clusters = {f.node.id: f.node.label.cluster for f in wanted}
    if cluster and _has_books(cluster):
        clusters |= dict.fromkeys(_fleet(client, cluster).remaining(), cluster)
    if not clusters:
        click.echo("nothing to destroy")
        if cluster and _has_books(cluster):  # it ended by itself
            _end(client, cluster)
        return None
    _show([f.row() for f in wanted], False)
    unlisted = [id_ for id_ in clusters if id_ not in rented]
    if unlisted:
        click.echo(
            f"rented from this machine, not in Vast's listing with its label, and not shown to be gone: {' '.join(unlisted)}"
        )
    if not yes:
        click.confirm(f"destroy {len(clusters)} with all that is on them?", abort=True)
    _destroy(client, clusters, {f.node.id: f.node for f in wanted})
    if not cluster:
        return None
    for _ in range(LOOKS):  # its head may have rented another until it was gone
        late = _fleet(client, cluster).remaining()
        if not late:
            return _end(client, cluster)
        click.echo(f"there meanwhile: {' '.join(late)}")
        _destroy(client, dict.fromkeys(late, cluster), {n.id: n for n in listed(client, cluster)})
    raise NotGoneError(
        f"machines of {cluster} turn up as others are destroyed; its keys and books are kept, run this again"
    )


def _destroy(client: Vast, clusters: dict[str, str], nodes: dict[str, Node]) -> None:
    """Destroy instances, id -> cluster. All are tried; an error at the end names those that are left. nodes: those that are listed."""
    left: dict[str, BaseException] = {}
    for id_, name in clusters.items():
        fleet = _fleet(client, name)
        if id_ in nodes:
            with even_unnoted(id_):
                fleet.add(nodes[id_])
        try:
            there = fleet.destroy(id_, "pairscope vast destroy")
        except VastError as error:
            left[id_] = error
            click.echo(f"{id_} is not gone", err=True)
        else:
            click.echo(f"{id_} is gone" if there else f"{id_} was not there: Vast knows no such instance")
    raise_for(left)


def _has_books(cluster: str) -> bool:
    """Whether this machine has rented for the cluster or asked to. One made elsewhere, which a listing may leave out, needs its key."""
    if not (cluster_folder(cluster) / "state.json").exists():
        return False
    content = State(cluster_folder(cluster)).read()
    return any(content[part] for part in ("head_key", "made", "seen", "gone", "intents", "unknown"))


def _end(client: Vast, cluster: str) -> None:
    """Close the books of a cluster that is gone, unless a machine for it is being rented at this moment."""
    state = State(cluster_folder(cluster))
    if open_requests(state.read()):
        click.echo(
            f"a request for a machine of {cluster} is not answered yet: its keys and books are kept, run this again later",
            err=True,
        )
        raise SystemExit(1)
    headkey.end(client, cluster, state)


def _fleet(client: Vast, cluster: str) -> Fleet:
    return Fleet(client, State(cluster_folder(cluster)), cluster, set(), boot_s=0, poll_s=0)


def _connect() -> Vast:
    import os

    return Vast(url=os.environ.get("VAST_URL"))


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    if not rows:
        return
    import sys

    from rich.console import Console

    from cluster.table import print_table

    used = [name for name in rows[0] if any(row[name] not in ("", None) for row in rows)]
    columns = [(name.replace("_", " "), all(isinstance(row[name], int | float) for row in rows)) for name in used]
    texts = [[escape(str(row[name])) for name in used] for row in rows]
    out = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    print_table(out, columns, texts)
