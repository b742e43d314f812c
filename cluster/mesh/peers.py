"""The mesh as one node knows it: a small JSON file that the provider writes and the daemon reads."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capture.errors import ConfigError
from cluster.mesh.ports import HEAD, address, peer_ports, ports_for_head, ports_of_head


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

    def as_dict(self) -> dict[str, Any]:
        return {"k": self.k, "slots": self.slots, "peers": [asdict(p) for p in self.peers]}


def mesh_folder() -> Path:
    """PAIRSCOPE_HOME (or ~/.pairscope)/mesh."""
    return Path(os.environ.get("PAIRSCOPE_HOME") or Path.home() / ".pairscope") / "mesh"


def write_mesh(mesh: Mesh, folder: Path) -> None:
    """Replace the file, unless it says the same already."""
    text = json.dumps(mesh.as_dict(), indent=1) + "\n"
    path = folder / "peers.json"
    if path.exists() and path.read_text() == text:
        return
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    tmp = path.with_suffix(".tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def read_mesh(folder: Path) -> Mesh:
    """The file's content. ConfigError where there is none."""
    path = folder / "peers.json"
    try:
        found = json.loads(path.read_text())
        return Mesh(int(found["k"]), int(found["slots"]), tuple(Peer(**p) for p in found["peers"]))
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
