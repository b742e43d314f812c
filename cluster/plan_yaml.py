"""What a plan asks of ray_cluster.yaml: the node types that are the machines it names, and the disk that one of them must have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from capture.errors import ConfigError
from cluster.offers import Offer
from cluster.plan import Plan
from cluster.vast.offers import Wish, read_wish

FILE = Path("ray_cluster.yaml")


def cluster_lines(plan: Plan, path: Path = FILE) -> list[str]:
    """Lines that say which node type each machine is, and what must be changed; none where there is no such file, it is no cluster's
    config, or nothing is to be rented."""
    try:
        content = yaml.safe_load(path.read_text())
        types, common = dict(content["available_node_types"]), content["provider"].get("offers", {})
        wanted = {name: {**common, **one["node_config"]} for name, one in types.items()}
        head = content["head_node_type"]
        lines = []
        for title, offer in _machines(plan).items():
            name = node_type(wanted, offer)
            if name is None:
                lines.append(f"{title} is no node type of {path}: add one, or plan with the cards that are there")
                continue
            told = "its head_node_type" if name == head else f"to be its head_node_type, which is {head}"
            disk = max(m.disk_gb for one in plan.sweeps for m in one.machines if m.kind == title)
            have = _wish(wanted[name]).disk_gb
            room = (
                f"disk_gb {have:g} holds all of it"
                if have >= disk
                else f"set disk_gb: {math.ceil(disk)} there, it is {have:g}"
            )
            lines.append(f"{title} is node type {name} of {path} ({told}); {room}")
        return lines
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, ConfigError):
        return []


def node_type(types: Mapping[str, Mapping[str, Any]], offer: Offer) -> str | None:
    """The name of the node type that rents such a machine: where both A100 sizes pass, the one that asks for the larger card."""
    wishes = {name: _wish(one) for name, one in types.items()}
    fitting = {
        name: wish.min_gpu_gb
        for name, wish in wishes.items()
        if (offer.gpu in wish.gpus or not wish.gpus)
        and wish.num_gpus == offer.gpus
        and wish.min_gpu_gb * 1000 * 0.95 <= offer.memory_mib
        and not wish.bid
    }
    return max(fitting, key=lambda name: fitting[name], default=None)


def _wish(values: Mapping[str, Any]) -> Wish:
    """What is asked of a machine, with what stands for that which a file leaves out."""
    return read_wish({**values, "image": values.get("image") or "any"}, "")


def _machines(plan: Plan) -> dict[str, Offer]:
    """What the sweep rents, by the words of the plan's tables."""
    chosen = [entry.choice.offer for entry in plan.entries if entry.choice is not None]
    return {offer.title: offer for offer in chosen if not offer.here}
