"""Machines that turned out bad, and how what one cluster learnt of them reaches the next.

Not rented again for a day: one that hung in its boot or failed its set-up (see Fleet and the provider), one that took long to
boot, and one that downloads far slower than was asked for. The head finds out about its workers, so the laptop hands it the list
at set-up (machines.json) and fetches it again before the head is destroyed.
"""

from __future__ import annotations

import json
import logging
import random
import subprocess
from pathlib import Path
from typing import Any

from capture.errors import StoreError
from cluster.mesh.daemon import ask
from cluster.vast import keys
from cluster.vast.node import Node
from cluster.vast.state import State

logger = logging.getLogger(__name__)

SLOW_DOWNLOAD = 1 / 8  # of what was asked for: the figure is of a set-up, which also unpacks what it loads
FETCH_S = 15
ASK_AT_ONCE = 4
_NO_BOOKS = (
    OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError, AttributeError, RecursionError, StoreError
)  # fmt: skip


def slow_download(download: Any, wanted_mbit: float) -> str | None:
    """Why a node's download was too slow, or None. download: {bytes, seconds} as setup_node.sh wrote it."""
    try:
        mbit = float(download["bytes"]) * 8e-6 / float(download["seconds"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    if mbit >= SLOW_DOWNLOAD * wanted_mbit:
        return None
    return f"its set-up downloaded at {mbit:.0f} Mb/s, min_inet_down is {wanted_mbit:g}"


def look_at(nodes: list[Node], asked: set[str], state: State, wanted_mbit: float) -> None:
    """Ask nodes that were not asked yet how their download went, through the mesh; note the machines where it was slow.

    The mesh's daemon answers once the set-up is done. Some at a time, since a poll may not take long. asked: ids of those that have
    answered, added to here.
    """
    waiting = [node for node in nodes if node.id not in asked]
    for node in random.sample(waiting, min(len(waiting), ASK_AT_ONCE)):
        answer = ask(node.label.k, "status", timeout=1)
        if answer is None:
            continue
        asked.add(node.id)
        reason = slow_download(answer.get("download"), wanted_mbit)
        if reason:
            logger.warning("instance %s on machine %s: %s; not rented again", node.id, node.machine, reason)
            state.block_machine(node.machine, reason)


def fetch(head: Node, folder: Path, user: str, state: State) -> None:
    """Bring home what the head found out about machines, the ids of its workers, to be asked for one by one at the end, and what
    those cost that are gone.

    A head that does not answer keeps both to itself. Nothing here may raise: the head is to be ended, whatever its books are like,
    and where they cannot be written down here, too.
    """
    if head.ssh is None or not (folder / keys.SSH_KEY).exists():
        return
    host, port = head.ssh
    command = [
        "ssh", "-i", str(folder / keys.SSH_KEY), "-p", str(port), "-o", f"UserKnownHostsFile={keys.as_option(folder / keys.KNOWN_HOSTS)}",
        "-o", f"HostKeyAlias=vast-{head.id}", "-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5",
        "-o", "LogLevel=ERROR", f"{user}@{host}", f"cat ~/.pairscope/clusters/{head.label.cluster}/state.json",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_S, stdin=subprocess.DEVNULL)
        found = json.loads(done.stdout)
        state.merge_machines(dict(found["machines"]))
        state.merge_seen(dict(found["seen"]))
        state.merge_gone(list(found.get("gone", [])))
    except _NO_BOOKS as error:
        logger.info("the head's books were not fetched: %s", error)
