"""Addresses and ports of the mesh. Node k is 127.0.1.k everywhere, and its ports are a block that no other node has.

The blocks must differ because Ray's processes bind the wildcard address: a forward of the same port for another node would
collide with them. Ray treats only 127.0.0.1, localhost and ::1 specially; 127.0.1.k it leaves alone.
"""

from __future__ import annotations

HEAD = 1
MOST_NODES = 48  # the last block ends at 32287, below the kernel's own range of ports (32768 and up)
BLOCK = 256
FIRST = 20000

# offsets in a node's block
NODE_MANAGER, OBJECT_MANAGER, AGENT, AGENT_GRPC, RUNTIME_ENV, METRICS, STATUS = 0, 1, 2, 3, 4, 5, 6
WORKERS = (10, 169)  # a range of 24 stalls at 24 actors

GCS = 6379
DASHBOARD = 8265
CLIENT = 10001


def address(k: int) -> str:
    """Node k's address, the same on every node."""
    return f"127.0.1.{k}"


def block(k: int) -> int:
    """First port of node k. Raises ValueError outside 1..MOST_NODES."""
    if not 1 <= k <= MOST_NODES:
        raise ValueError(f"no node {k} in a mesh of at most {MOST_NODES}")
    return FIRST + (k - 1) * BLOCK


def peer_ports(k: int) -> list[int]:
    """Ports of node k that every other node dials: raylet, objects, workers."""
    b = block(k)
    return [b + NODE_MANAGER, b + OBJECT_MANAGER, *range(b + WORKERS[0], b + WORKERS[1] + 1)]


def ports_for_head(k: int) -> list[int]:
    """Ports of worker k that the head dials: those of every peer, the dashboard's agents, the mesh's own status."""
    b = block(k)
    return [*peer_ports(k), b + AGENT, b + AGENT_GRPC, b + STATUS]


def ports_of_head() -> list[int]:
    """Ports of the head that a worker dials."""
    return [*peer_ports(HEAD), GCS, block(HEAD) + STATUS]


def ray_flags(k: int) -> list[str]:
    """What `ray start` needs on node k, without --autoscaling-config."""
    b = block(k)
    flags = [
        f"--node-ip-address={address(k)}",
        f"--node-manager-port={b + NODE_MANAGER}",
        f"--object-manager-port={b + OBJECT_MANAGER}",
        f"--dashboard-agent-listen-port={b + AGENT}",
        f"--dashboard-agent-grpc-port={b + AGENT_GRPC}",
        f"--runtime-env-agent-port={b + RUNTIME_ENV}",
        f"--metrics-export-port={b + METRICS}",
        f"--min-worker-port={b + WORKERS[0]}",
        f"--max-worker-port={b + WORKERS[1]}",
        "--disable-usage-stats",
    ]
    if k != HEAD:
        return [*flags, f"--address={address(HEAD)}:{GCS}"]
    return [
        "--head",
        f"--port={GCS}",
        "--dashboard-host=127.0.0.1",  # seen through ssh only
        f"--dashboard-port={DASHBOARD}",
        f"--ray-client-server-port={CLIENT}",
        *flags,
    ]
