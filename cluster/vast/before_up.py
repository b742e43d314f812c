"""What `ray up` is told before it asks whether to rent: what fits and what it costs, or what stands in the way.

Ray asks its provider for a running head first, so this is done at that question. Every failure is an error before money is spent.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from ray.autoscaler._private.cli_logger import cli_logger

from capture.errors import ConfigError
from cluster.vast import keys
from cluster.vast.errors import CapError, HeadError, NoOfferError, VersionError
from cluster.vast.fleet import Fleet
from cluster.vast.locked import differences, locked_versions, versions
from cluster.vast.money import Bill, Caps
from cluster.vast.node import Node
from cluster.vast.offers import find_offers, traffic
from cluster.vast.settings import Settings
from cluster.vast.state import open_requests

CONSTRAINTS = "constraints.txt"
PROGRAMS = ("ssh", "rsync")  # that Ray starts here, once a machine is rented
CLOCK_S = 300.0  # that this machine may be off
LEAST_LEFT_S = 600.0  # for a running head: `ray up` takes minutes itself
RENTED_AS = ("image", "gpus", "num_gpus", "disk_gb", "bid")  # what a running head cannot change, wherever it is written


def ray_command() -> str | None:
    """The command of Ray's that this process serves, as `up`; None in a program that uses Ray's functions.

    Ray does not tell its provider, and only some commands may rent or destroy; click knows, wherever options stand.
    """
    context = click.get_current_context(silent=True)
    while context is not None and context.parent is not None and context.parent.parent is not None:
        context = context.parent
    if context is None or context.parent is None:
        return None
    ray = getattr(context.parent.command.callback, "__module__", "") == "ray.scripts.scripts"
    return context.command.name if ray else None


def check(settings: Settings, caps: Caps, fleet: Fleet, heads: Sequence[Node]) -> float | None:
    """All checks. Shows the price where a head is to be rented, and returns it: dollars an hour. Raises an error of ours that says
    what to do."""
    check_programs()
    check_versions(settings.image_versions)
    check_mounts(settings.mounts)
    keys.check_closed(fleet.state.folder)
    if not heads:
        return quote(settings, caps, fleet)
    check_head(fleet.cluster, heads)
    made = fleet.state.read()["made"]
    if made:
        check_unchanged(fleet.cluster, made, as_made(settings))
    check_clock(fleet.vast.clock_ahead())
    check_left(fleet.cluster, caps, fleet.bill(), heads[0].dph)
    return None


def check_programs() -> None:
    """Raise ConfigError where this machine lacks what it would need to reach a rented one."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise ConfigError(
            f"there is no {' and no '.join(missing)} on this machine, and without it no rented one can be set up: install it, then run "
            "`ray up` again"
        )


def check_versions(image: Mapping[str, str], constraints: Path | None = None) -> None:
    """Raise VersionError where nodes could not be given what this machine runs.

    Nodes get the versions of this machine, with the other packages as constraints.txt has them; both must agree. image: what the
    image is said to have (provider: image_versions); where that differs, every node would install a Python of its own first.
    """
    here = versions()
    path = constraints or (Path(CONSTRAINTS) if Path(CONSTRAINTS).exists() else Path(__file__).parents[2] / CONSTRAINTS)
    locked = locked_versions(path.read_text()) if path.exists() else {}
    wrong = differences({k: v for k, v in locked.items() if k in here}, here)
    if wrong:
        raise VersionError(
            f"this machine differs from '{path}', with which nodes are set up ({'; '.join(wrong)}). Run `make install`, and start "
            "`ray` from .venv/bin"
        )
    wrong = differences(dict(image), here)
    if wrong:
        raise VersionError(
            f"this machine differs from what provider: image_versions says of the image ({'; '.join(wrong)}). Python's minor version "
            "and Ray's version must be the same on every machine: choose another image, or start `ray` from an environment like it"
        )


def check_mounts(mounts: Mapping[str, Any]) -> None:
    """Raise ConfigError where a file that is to be mounted cannot be read here. Ray reads all of them, once the head is rented, and
    would leave it there. mounts: the user's file_mounts, remote -> local.
    """
    for remote, local in mounts.items():
        if not isinstance(local, str):
            raise ConfigError(f"file_mounts: what is mounted at '{remote}' is a path of this machine, not {local!r}")
        top = os.path.expanduser(local)
        if not os.path.exists(top):
            raise ConfigError(
                f"file_mounts: there is no '{local}', which is to be mounted at '{remote}' (relative paths begin in '{os.getcwd()}'). Type "
                "`ray up` in the folder that they begin in, or put the path right, or take the line out"
            )
        inside = (os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names)
        for path in inside if os.path.isdir(top) else [top]:
            if not os.access(path, os.R_OK):
                raise ConfigError(
                    f"file_mounts: '{path}', which is to be mounted at '{remote}', cannot be read: it leads nowhere, or is not yours to "
                    "read. Remove it or make it readable, or mount something else"
                )


def check_clock(ahead_s: float) -> None:
    """Raise ConfigError where this machine's clock would give nodes a deadline that is hours too early or too late."""
    if abs(ahead_s) > CLOCK_S:
        raise ConfigError(
            f"this machine's clock is {abs(ahead_s) / 60:.0f} minutes {'ahead of' if ahead_s > 0 else 'behind'} Vast's, and the limits "
            "are kept by the clock. Set it right, then run `ray up` again"
        )


def as_made(settings: Settings) -> dict[str, Any]:
    """What a head is made with and keeps until it is destroyed, as plain values, by the words of the YAML."""
    wish = dataclasses.asdict(settings.wish(settings.head_config, settings.head_type))
    kept = {key: wish[key] for key in {*RENTED_AS, *settings.head_config}}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in sorted(kept.items())}
    here = versions()
    return {
        "head_node_type": settings.head_type,
        **{f"{settings.head_type}: {key}": value for key, value in plain.items()},
        "max_workers": settings.slots - 1,
        "ssh_user": settings.user,
        "python": here["python"],
        "ray": here.get("ray", "none"),
    }


def check_unchanged(cluster: str, made: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise where a running head was made otherwise than it would be now, and say in what."""
    changed = [f"{key} was {made[key]}, is {now.get(key)}" for key in made if made[key] != now.get(key)]
    if any(line.startswith(("python was", "ray was")) for line in changed):
        raise VersionError(
            f"cluster '{cluster}' runs with other versions than this machine has ({'; '.join(changed)}): start `ray` from the environment "
            "that made it, or end it with `ray down`"
        )
    if changed:
        raise ConfigError(
            f"cluster '{cluster}' is running and cannot be changed in this: {'; '.join(changed)}. Put that back, or bring the results "
            "home and end it with `ray down` first; limits, idle time, other node types and set-up may be changed as it runs"
        )


def check_head(cluster: str, heads: Sequence[Node]) -> None:
    """Raise HeadError where there are two heads, or one that does nothing any more."""
    if len(heads) > 1:
        raise HeadError(
            f"cluster '{cluster}' has {len(heads)} heads (instances {', '.join(h.id for h in heads)}): end those that nobody uses with "
            "`pairscope vast destroy ID`"
        )
    (head,) = heads
    if head.status in ("stopped", "exited", "offline"):
        raise HeadError(
            f"the head of '{cluster}', instance {head.id}, is {head.status}; its disk is still billed and may hold results. Start it at "
            "cloud.vast.ai/instances to fetch them, then end it with `ray down`"
        )


def check_left(cluster: str, caps: Caps, bill: Bill, dph: float) -> None:
    """Raise CapError where the limits leave a running head, of dph dollars an hour, no time: told so, it would end itself."""
    left_s = caps.deadline(bill, dph) - time.time()
    if left_s < LEAST_LEFT_S:
        raise CapError(
            f"cluster '{cluster}' is running, and would end itself {f'in {left_s / 60:.0f} minutes' if left_s > 60 else 'at once'}, with all "
            f"that lies there: ${bill.dollars:.2f} of max_total_dollars {caps.max_total_dollars:g} spent, {bill.hours:.2f} of max_hours "
            f"{caps.max_hours:g} over. Raise these in the provider block, or bring the results home and end it with `ray down`; nothing was "
            "changed"
        )


def refuse_to_rent(cluster: str) -> None:
    """Raise HeadError where a head would be rented by another command than `ray up`, the one that shows its price and asks."""
    command = ray_command()
    if command not in (None, "up"):
        raise HeadError(
            f"cluster '{cluster}' has no head, and `ray {command} --start` would rent one without asking. Type `ray up ray_cluster.yaml` "
            f"(your config), which shows the price first, then `ray {command}` without --start"
        )


def refuse_to_replace(node: Node) -> None:
    """Raise HeadError where another command than `ray down` would destroy a running head, and with it all that lies there."""
    command = ray_command()
    if command in (None, "down"):
        return
    raise HeadError(
        f"`ray {command}` would destroy the running head, instance {node.id}, since its node_config or auth has changed. Put that back, or "
        "bring the results home and end the cluster with `ray down` first"
    )


def quote(settings: Settings, caps: Caps, fleet: Fleet) -> float:
    """Show what the head would cost, the workers that may come, and the limits; the head's dollars an hour. Raises NoOfferError or
    CapError for the head."""
    check_clock(fleet.vast.clock_ahead())
    wish = settings.wish(settings.head_config, settings.head_type)
    where = f"node type '{settings.head_type}'"
    bill, content = fleet.bill(), fleet.state.read()
    # what became of a head that was asked for and not heard of is found out before one is rented
    unheard = [r for a, r in open_requests(content).items() if a in content["unknown"] and r["kind"] == "head"]
    bill = dataclasses.replace(bill, rate=max(bill.rate - sum(r.get("dph", 0.0) for r in unheard), 0.0))
    found = find_offers(fleet.vast, wish, fleet.state.blocked_machines(), where, hours=caps.max_hours - bill.hours)
    offer = caps.within(bill, found)[0]
    caps.check(bill, offer.dph, offer.text)
    cli_logger.print(
        "Cheapest machine for the head now: {}; traffic, which is not in the limits, for {} GB: ${}",
        offer.text, f"{wish.download_gb:g}", f"{traffic(offer.row, wish):.2f}",
    )  # fmt: skip
    bill = dataclasses.replace(bill, rate=bill.rate + offer.dph)
    for name, growth in settings.may_grow.items():
        try:
            more = settings.wish(growth["node_config"], name)
            found = find_offers(fleet.vast, more, fleet.state.blocked_machines(), f"node type '{name}'")
            cheapest = caps.within(bill, found)[0]
        except (NoOfferError, CapError) as error:
            if growth["least"] and isinstance(error, CapError):
                raise
            cli_logger.warning("No workers for now: {}", error)
            continue
        price, least = f"{cheapest.dph:.3f}", growth["least"]
        if least:
            caps.check(bill, least * cheapest.dph, f"min_workers {least} of node type '{name}'")
            bill = dataclasses.replace(bill, rate=bill.rate + least * cheapest.dph)
            cli_logger.print(
                "At once, and as long as the cluster is up: {} more of type {}, now ${}/h each.", least, name, price
            )
        if growth["most"] > least:
            cli_logger.print(
                "While entries wait: up to {} more of type {}, now ${}/h each.", growth["most"] - least, name, price
            )
    cli_logger.print(
        "Limits: ${}/h for all nodes, ${} in all, {} hours; after that every node destroys itself.",
        f"{caps.max_price_per_hour:g}", f"{caps.max_total_dollars:g}", f"{caps.max_hours:g}",
    )  # fmt: skip
    return offer.dph
