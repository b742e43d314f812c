"""Whether torch can use the cards that this node is rented for: `python3 -m cluster.vast.cards`, at the end of a node's set-up.

With a driver that is broken, or too old for this torch, entries would fail one after the other, or compute on the CPU, at the
price of the cards.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cluster.rate import rate_file


def rented(devices: Path = Path("/dev")) -> int:
    """How many cards Vast says that this node has; 0 where no card is here at all, as on the hosts of a rehearsal."""
    if not any(devices.glob("nvidia[0-9]*")):
        return 0
    try:
        return int(json.loads(rate_file().read_text())["gpus"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1


def why_unfit(torch: Any, wanted: int) -> str | None:
    """In words, where torch sees fewer cards than `wanted`."""
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen >= wanted:
        return None
    return (
        f"torch {torch.__version__} can use {seen} of the {wanted} GPUs of this machine: the driver is broken, or too old for CUDA "
        f"{torch.version.cuda}; it cannot be used"
    )


def main() -> None:
    """Exit 0 where all cards can be used, or there is none; else say why not and exit 1."""
    wanted = rented()
    if not wanted:
        return
    try:
        import torch
    except ImportError:  # an image that is said to have all, see locked.py
        return
    if why := why_unfit(torch, wanted):
        print(why)
        sys.exit(1)


if __name__ == "__main__":
    main()
