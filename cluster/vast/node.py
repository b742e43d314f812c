"""One rented instance, and how it is found: by its label in the listing, or by its id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.vast.api import Vast
from cluster.vast.labels import Label, parse


@dataclass(frozen=True)
class Node:
    """One instance of the cluster: its row of the listing, and its label taken apart."""

    id: str
    label: Label
    row: dict[str, Any]

    @property
    def status(self) -> str:
        return self.row.get("actual_status") or "created"

    @property
    def dph(self) -> float:
        return float(self.row.get("dph_total") or 0.0)

    @property
    def machine(self) -> int | None:
        return self.row.get("machine_id")

    @property
    def env(self) -> dict[str, str]:
        """What it was created with; Vast lists it as pairs."""
        return {str(pair[0]): str(pair[1]) for pair in self.row.get("extra_env") or [] if len(pair) == 2}

    @property
    def deadline(self) -> float | None:
        """When it has to be gone, in seconds since 1970, as it was made; `ray up` and its head may have moved that since."""
        made_with = self.env.get("PAIRSCOPE_DEADLINE", "")
        return float(made_with) if made_with.isdecimal() else None

    @property
    def start(self) -> float | None:
        """Since when it is there, as Vast says it, in seconds since 1970, and not from before it was asked for: the hours and dollars
        of a cluster that ends with them are counted from then."""
        asked, said = self.env.get("PAIRSCOPE_ASKED", ""), self.row.get("start_date")
        return max(float(said), float(asked) if asked.isdecimal() else 0.0) if said else None

    @property
    def ssh(self) -> tuple[str, int] | None:
        """Where its sshd listens: the machine's own address and the port that 22 is mapped to, else Vast's proxy. Never half of each."""
        mapped = (self.row.get("ports") or {}).get("22/tcp") or []
        port = mapped[0].get("HostPort") if mapped else None
        if self.row.get("public_ipaddr") and port:
            return str(self.row["public_ipaddr"]).strip(), int(port)
        if self.status == "running" and self.row.get("ssh_host") and self.row.get("ssh_port") and not mapped:
            return str(self.row["ssh_host"]), int(self.row["ssh_port"])
        return None


def listed(vast: Vast, cluster: str | None = None) -> list[Node]:
    """All instances with a label of ours, or with that of one cluster, from a fresh listing."""
    rows = ((str(row["id"]), parse(row.get("label")), row) for row in vast.instances())
    return [Node(id_, label, row) for id_, label, row in rows if label and cluster in (None, label.cluster)]


def look_up(vast: Vast, id_: str, cluster: str | None = None, books: Mapping[str, Any] | None = None) -> Node | None:
    """A node that the listing left out, by its id. Raises VastError where that cannot be told.

    None if Vast has none, or one with another label, or with that of another cluster than is named: ids also come from the books of a
    head, which is a stranger's machine. books: what this machine noted of the instance (`seen` of its state); one that it asked for
    itself is known by the label of then where Vast shows none of ours any more, since somebody changed it and it bills on.
    """
    row = vast.instance(int(id_))
    if row is None:
        return None
    label = parse(row.get("label")) or parse((books or {}).get("label"))
    return Node(id_, label, row) if label and cluster in (None, label.cluster) else None
