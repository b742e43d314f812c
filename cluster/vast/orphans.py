"""What an account has rented with a label of ours, and what of it nobody looks after any more."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capture.errors import StoreError
from cluster.vast.api import Vast
from cluster.vast.node import Node, listed, look_up
from cluster.vast.state import State, cluster_folder


@dataclass(frozen=True)
class Found:
    """A rented instance, and why it looks forgotten (empty if it does not)."""

    node: Node
    orphan: str

    def row(self) -> dict[str, Any]:
        n = self.node
        hours = (time.time() - (n.start or time.time())) / 3600
        return {
            "id": n.id, "cluster": n.label.cluster, "kind": n.label.kind, "k": n.label.k, "type": n.label.type, "status": n.status,
            "gpus": f"{n.row.get('num_gpus')}x {n.row.get('gpu_name')}", "hours": round(hours, 2), "dollars_per_hour": round(n.dph, 4),
            "ssh": "{}:{}".format(*n.ssh) if n.ssh else "", "orphan": self.orphan,
        }  # fmt: skip


def why_orphan(node: Node, heads: Iterable[str], now: float, moved: float | None = None) -> str:
    """In words; empty for a node that a cluster still looks after. heads: clusters with a head that is listed. moved: its cluster's
    deadline as the last `ray up` from this machine set it; a node keeps the one that it was made with in its environment.
    """
    deadline = node.deadline if moved is None else moved
    if deadline is not None and now > deadline:
        return f"{(now - deadline) / 60:.0f} minutes past its deadline"
    if node.status in ("stopped", "exited"):
        return f"{node.status}: does nothing, bills its disk"
    if node.status == "offline":
        return "offline: Vast cannot see it; it may be at work"
    if node.label.kind == "worker" and node.label.cluster not in set(heads):
        return "its cluster has no head"
    return ""


def rented_by(client: Vast, *, sure: bool = False, unread: list[StoreError] | None = None) -> list[Found]:
    """What Vast lists as ours. sure: also what this machine has rented or seen and the listing leaves out, asked for one by one.
    unread: takes the errors of clusters whose books cannot be read, of which no more than the listing is known then.

    Raises VastError where Vast does not say: nothing that it was not asked for counts as gone. StoreError for books that cannot be
    read, where there is no `unread`.
    """
    found = {node.id: node for node in listed(client)}
    undone: set[str] = set()
    astray: set[str] = set()  # attempts
    if sure:
        for folder in _folders():
            try:
                content = State(folder).read()
            except StoreError as error:
                if unread is None:
                    raise
                unread.append(error)
                continue
            undone |= {id_ for id_, row in content["destroyed"].items() if "gone" not in row}
            astray |= {*content["abandoned"], *content["unknown"]}
            for id_ in {*content["seen"], *undone} - set(found):
                node = look_up(client, id_, books=content["seen"].get(id_))
                if node is not None:
                    found[id_] = node
    moved: dict[str, float] = {}
    for folder in _folders():
        with contextlib.suppress(StoreError):  # then what the nodes were made with is all there is
            deadline = State(folder).read()["deadline"]
            if deadline:
                moved[folder.name] = float(deadline["at"])
    heads = [n.label.cluster for n in found.values() if n.label.kind == "head" and n.id not in undone]

    def why(node: Node) -> str:
        if node.id in undone:
            return "it was destroyed, and is still there"
        if node.label.attempt in astray:
            return "the reply to the request that made it was lost, and nobody uses it"
        reason = why_orphan(node, heads, time.time(), moved.get(node.label.cluster))
        if not reason and node.label.kind == "head" and heads.count(node.label.cluster) > 1:
            return f"its cluster has {heads.count(node.label.cluster)} heads; see which one Ray uses"
        return reason

    return [Found(n, why(n)) for n in found.values()]


def _folders() -> list[Path]:
    return sorted(cluster_folder("x").parent.glob("*/"))
