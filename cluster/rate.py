"""What a node costs, as the provider noted it there when it set the node up."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def rate_file(home: str | None = None) -> Path:
    """PAIRSCOPE_HOME (or ~/.pairscope)/rate.json."""
    return Path(home or os.environ.get("PAIRSCOPE_HOME") or Path.home() / ".pairscope") / "rate.json"


def rate_text(dollars_per_hour: float, gpus: int) -> str:
    """The file's content. dollars_per_hour: the whole node's, disk included; gpus: how many it has."""
    return json.dumps({"dollars_per_hour": round(dollars_per_hour, 6), "gpus": gpus}) + "\n"


def share_of_rate(assigned: dict[str, Any], node_cpus: float) -> float | None:
    """Dollars an hour of what an actor holds of its node; None where no rate is known, as on a laptop.

    assigned: the actor's resources as Ray names them. Its part of the node is its part of the GPUs, or of the CPUs where it has
    no GPU.
    """
    try:
        note = json.loads(rate_file().read_text())
        rate, gpus = float(note["dollars_per_hour"]), int(note["gpus"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if assigned.get("GPU") and gpus:
        part = float(assigned["GPU"]) / gpus
    else:
        part = float(assigned.get("CPU", 0.0)) / node_cpus if node_cpus else 1.0
    return rate * min(1.0, part)
