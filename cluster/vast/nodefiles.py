"""What a node is told about itself and the mesh, as files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from cluster.mesh.peers import Mesh, Peer, mesh_folder
from cluster.mesh.ports import HEAD
from cluster.rate import rate_text
from cluster.vast import keys
from cluster.vast.errors import VastError
from cluster.vast.locked import versions
from cluster.vast.node import Node
from cluster.vast.runner import as_json
from cluster.vast.state import State

MESH = "~/.pairscope/mesh"
VERSIONS = {"~/.pairscope/versions.json": as_json(versions())}


def for_head(node: Node, places: int, state: State, deadline: int) -> dict[str, str]:
    """Who the head is, and its own host key as the laptop pinned it, to be passed on to workers; machines not to rent; what
    was spent on machines that are gone, such as a head before this one; when it has to be gone, which a second `ray up` with other limits moves. state: the cluster's on the laptop.
    """
    pinned = keys.pinned(state.folder / keys.KNOWN_HOSTS, f"vast-{node.id}")
    return _for_all(node) | {
        f"{MESH}/node.json": Mesh(HEAD, places).node_text,
        f"{MESH}/known_hosts": pinned,
        f"~/.pairscope/clusters/{node.label.cluster}/machines.json": as_json(state.read()["machines"]),
        f"~/.pairscope/clusters/{node.label.cluster}/spent.json": as_json(state.read()["gone"]),
        "~/.pairscope/deadline": f"{deadline}\n",
    }


def for_worker(node: Node, head: Node | None, places: int, user: str) -> dict[str, str]:
    """Who the worker is, and where the head is. Made on the head. Raises VastError while the head's address is not listed."""
    if head is None or head.ssh is None:
        raise VastError("the head has no ssh address in Vast's listing")
    peer = Peer(HEAD, *head.ssh, f"vast-{head.id}", f"{MESH}/key", f"{MESH}/known_hosts", user)
    mesh = Mesh(node.label.k, places, (peer,))
    known = mesh_folder() / "known_hosts"
    return _for_all(node) | {
        f"{MESH}/node.json": mesh.node_text,
        f"{MESH}/peers.json": mesh.peers_text,
        f"{MESH}/known_hosts": known.read_text() if known.exists() else "",
    }


def _for_all(node: Node) -> dict[str, str]:
    """The versions to have, and what the node costs, from which a sweep tells what each entry cost."""
    return VERSIONS | {"~/.pairscope/rate.json": rate_text(node.dph, int(node.row.get("num_gpus") or 1))}


def heads_mesh(
    workers: Iterable[Node], addresses: Mapping[str, tuple[str, int]], places: int, folder: Path, user: str
) -> Mesh:
    """The head's tunnels: to every worker whose address is known. addresses: the last that was listed, by instance id."""
    known = str(folder / keys.KNOWN_HOSTS)
    peers = [
        Peer(n.label.k, *addresses[n.id], f"vast-{n.id}", "~/ray_bootstrap_key.pem", known, user)
        for n in workers
        if n.id in addresses
    ]
    return Mesh(HEAD, places, tuple(sorted(peers, key=lambda p: p.k)))
