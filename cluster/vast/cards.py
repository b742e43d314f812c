"""Whether torch can use the cards that this node is rented for: `python3 -m cluster.vast.cards`, at the end of a node's set-up, and
`check_card` before each entry.

With a driver that is broken, or too old for this torch, entries would fail one after the other, or compute on the CPU, at the
price of the cards.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.rate import rate_file

if TYPE_CHECKING:
    from capture.config import Entry

log = logging.getLogger(__name__)

RAYLET_S = 60.0  # in which it ends, and this process with it


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


def check_card(entry: Entry) -> None:
    """Where an entry that takes what is there has a rented GPU that torch cannot use: it would go on on the CPU, for hours, at the
    price of the GPU. A worker's Ray is ended: the autoscaler gives the machine back, and the entry goes on elsewhere. It is not
    left to fail one entry after the other. On the head raises DeviceError.
    """
    import ray  # here: the set-up runs this file with no more than the image has

    from capture.errors import DeviceError
    from cluster.mesh.peers import mesh_folder, read_mesh
    from cluster.mesh.ports import HEAD
    from cluster.prepare_disk import is_rented

    if entry.device is not None or not is_rented() or not ray.is_initialized() or not ray.get_gpu_ids():
        return
    import torch

    if torch.cuda.is_available():
        return
    error = DeviceError(
        f"torch {torch.__version__} cannot use the GPU of {socket.gethostname()}, which is rented for it: the driver is broken, or too "
        f"old for CUDA {torch.version.cuda}. With device: cpu the entry computes without a GPU; for another machine `ray down`, and `ray up`"
    )
    if read_mesh(mesh_folder()).k != HEAD:
        log.error("%s: this node leaves the cluster", error)
        if (raylet := _raylet()) is not None:
            os.kill(raylet, signal.SIGTERM)
            time.sleep(RAYLET_S)
    raise error


def _raylet() -> int | None:
    """Ray's own process on this node, whose child this is; None where it has gone, and our parent is another."""
    parent = os.getppid()
    try:
        return parent if Path(f"/proc/{parent}/comm").read_text().strip() == "raylet" else None
    except OSError:
        return None


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
