"""The mesh as one node knows it: two small JSON files that the provider writes and the daemon reads.

node.json says who this node is, and comes with its set-up. peers.json says whom to connect to: it comes with the set-up of a
worker; on the head the autoscaler keeps it, and a second set-up must not touch it.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from capture.errors import ConfigError
from cluster.mesh.ports import HEAD, address, peer_ports, ports_for_head, ports_of_head

POLLED = "polled"  # a file whose time is that of the last poll
DEADLINE = "deadline"  # beside the mesh's folder: where the dead-man's switch looks


@dataclass(frozen=True)
class Peer:
    """A node that this one opens a tunnel to. alias: the name under which its host key is pinned in known_hosts."""

    k: int
    host: str
    port: int
    alias: str
    key: str
    known_hosts: str
    user: str = "root"


@dataclass(frozen=True)
class Mesh:
    """k: this node. slots: the highest k there may be; a worker listens for all of them from the start, so that no tunnel has
    to be opened anew when a node joins. peers: the workers on the head, the head on a worker."""

    k: int
    slots: int
    peers: tuple[Peer, ...] = ()

    def forwards(self, peer: Peer) -> list[tuple[str, int]]:
        """(address, port) pairs that this node's tunnel to `peer` carries; each is listened on here and dialled from there."""
        if self.k == HEAD:
            return [(address(peer.k), port) for port in ports_for_head(peer.k)]
        others = [k for k in range(HEAD + 1, self.slots + 1) if k != self.k]
        relayed = [(address(k), port) for k in others for port in peer_ports(k)]
        return [(address(HEAD), port) for port in ports_of_head()] + relayed

    @property
    def node_text(self) -> str:
        return json.dumps({"k": self.k, "slots": self.slots}) + "\n"

    @property
    def peers_text(self) -> str:
        return json.dumps([asdict(p) for p in self.peers], indent=1) + "\n"


def mesh_folder() -> Path:
    """PAIRSCOPE_HOME (or ~/.pairscope)/mesh."""
    return Path(os.environ.get("PAIRSCOPE_HOME") or Path.home() / ".pairscope") / "mesh"


def write_peers(mesh: Mesh, folder: Path) -> None:
    """Replace peers.json, unless it says the same already."""
    path = folder / "peers.json"
    if path.exists() and path.read_text() == mesh.peers_text:
        return
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    tmp = path.with_suffix(".tmp")
    tmp.write_text(mesh.peers_text)
    os.replace(tmp, path)


def note_poll(folder: Path) -> None:
    """On the head: somebody has just counted the cluster's nodes and held their cost against the limits."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / POLLED).touch()


def write_deadline(folder: Path, when: float) -> None:
    """Tell this node's dead-man's switch when it has to be gone, as seconds since 1970: whole or not at all, since half a number
    is one of long ago. Where the disk is full, what was said before stands."""
    path = folder.parent / DEADLINE
    tmp = path.with_name(DEADLINE + ".tmp")
    with contextlib.suppress(OSError):
        tmp.write_text(f"{when:.0f}\n")
        os.replace(tmp, path)


def read_deadline(folder: Path) -> float | None:
    """What was written last; None where nothing was, or nothing that makes sense."""
    with contextlib.suppress(OSError, ValueError):
        when = float((folder.parent / DEADLINE).read_text())
        return when if 0 < when < float("inf") else None
    return None


def read_mesh(folder: Path) -> Mesh:
    """Both files; no peers.json reads as no peers. ConfigError where this machine is no node."""
    path = folder / "node.json"
    try:
        node = json.loads(path.read_text())
        path = folder / "peers.json"
        peers = json.loads(path.read_text()) if path.exists() else []
        return Mesh(int(node["k"]), int(node["slots"]), tuple(Peer(**p) for p in peers))
    except FileNotFoundError:
        raise ConfigError(f"'{path}' is missing: this machine is not a node of a cluster that `ray up` made") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"'{path}' cannot be read: {type(error).__name__}: {error}") from error


def restricted_line(public_key: str, slots: int) -> str:
    """The line of authorized_keys that lets workers forward into the mesh, and do nothing else.

    `restrict` still allows commands, hence the forced one.
    """
    opens = ",".join(f'permitopen="{address(k)}:*"' for k in range(HEAD, slots + 1))
    return f'restrict,port-forwarding,{opens},command="/bin/false" {public_key.strip()}'
