"""The plan of a whole config: which machines, which entries, and what was assumed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from capture.config import Config
from capture.errors import ConfigError
from capture.fields import near
from cluster.offers import assumed_offers, is_prices, live_offers, prices, read_offers, read_prices, this_machine
from cluster.plan import EntryPlan, Plan, plan_entry, plan_sweeps
from cluster.plan_models import Models
from cluster.plan_options import DISK_MARGIN_GB
from cluster.plan_work import BYTES_PER_TOKEN


def make_plan(
    config: Config,
    names: Sequence[str] = (),
    *,
    offers: str | None = None,
    nodes: int = 4,
    prompts: int | None = None,
    tokens: int | None = None,
    gbit: float | None = None,
    offline: bool = False,
    refresh: bool = False,
) -> Plan:
    """The whole plan of a config. names: only these entries. offers: a file, `live`, or None for configs/prices.yaml.

    prompts, tokens: instead of the config's. gbit: network of assumed machines. Raises ConfigError and VastError; what is
    wrong with one entry is its own error.
    """
    checked = config.checked_entries()
    known = [name for name, _ in checked]
    for name in names:
        if name not in known:
            raise ConfigError(f"--entries: no entry '{name}'{near(name, known)}; {config.path} has {', '.join(known)}")
    data = prices()
    if offers is None:
        machines = assumed_offers(data, gbit)
    elif offers == "live":
        machines = live_offers(data, disk_gb=DISK_MARGIN_GB)
    elif is_prices(file := Path(offers).expanduser()):
        data = read_prices(file)
        machines = assumed_offers(data, gbit)
    else:
        machines = read_offers(file, data, gbit)
    here = this_machine(data, gbit or data["network"]["gbit"], os.cpu_count() or 1, _free_memory())
    models = Models(offline=offline, refresh=refresh)
    planned = []
    for name, entry in checked:
        if names and name not in names:
            continue
        if isinstance(entry, ConfigError):
            planned.append(EntryPlan(name, error=f"ConfigError: {entry}"))
        else:
            planned.append(plan_entry(entry, machines, models, here=here, prompts=prompts, tokens=tokens))
    sweeps = plan_sweeps(planned, nodes, data["boot_minutes"] / 60)
    return Plan(tuple(planned), sweeps, tuple(_assumptions(planned, data, offers, gbit, tokens)))


def _free_memory() -> int:
    """Main memory of this machine in bytes that is free now, as capture/device.py finds it."""
    from capture.device import _host_memory

    return _host_memory()[1]


def _assumptions(
    planned: Sequence[EntryPlan], data: dict[str, Any], offers: str | None, gbit: float | None, tokens: int | None
) -> Iterator[str]:
    network, disk = data["network"], data["disk"]
    if offers is None:
        yield (
            f"prices and speeds of configs/prices.yaml, {data['as_of']}: network {gbit or network['gbit']:g} Gbit/s at "
            f"${network['usd_per_gb']:g}/GB, disk {disk['gb_per_second']:g} GB/s at ${disk['usd_per_gb_month']:g}/GB-month"
        )
    else:
        yield "prices, network, disk and memory as offered by Vast now" if offers == "live" else f"offers of {offers}"
    works = [e.work for e in planned if e.work is not None]
    if works:
        counts = sorted({w.prompts for w in works}), sorted({w.longest for w in works})
        said = "" if tokens else f", estimated at a token for every {BYTES_PER_TOKEN} bytes of text (--tokens tells it)"
        yield f"prompts: {_range(counts[0])}, of at most {_range(counts[1])} tokens{said}"
    yield (
        "usable of a GPU: 97 % of its memory less 1 GB, and 5 % of that left free. Needs are the most that is alive at once"
    )
    yield "time: the download, then reading and computing side by side; whole checkpoints lie on the machine's disk"
    yield (
        f"sweep: longest entry first, each on its recommended kind of machine; {data['boot_minutes']:g} minutes until a machine is "
        "up, paid for; checkpoints stay on its disk"
    )


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
