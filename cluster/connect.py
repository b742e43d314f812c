"""The Ray that a sweep runs on: the cluster that RAY_ADDRESS names (`ray job submit` sets it), else one of our own."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capture.errors import PairscopeError

OBJECT_STORE_BYTES = 100 * 1024**2  # actors hand back paths and counts, so Ray's smallest store is plenty


class ClusterError(PairscopeError):
    """Ray did not start, or the cluster that RAY_ADDRESS names cannot be used."""


@dataclass(frozen=True)
class Cluster:
    """A connected Ray. nodes: total resources of each live node. growing: an autoscaler may add nodes."""

    local: bool
    nodes: tuple[dict[str, float], ...]
    growing: bool
    grows_gpus: bool = False

    @property
    def has_gpus(self) -> bool:
        return self.grows_gpus or any(n.get("GPU", 0) > 0 for n in self.nodes)


def running_elsewhere() -> str | None:
    """Address of a Ray that `ray start` left running on this machine, where RAY_ADDRESS does not point to one."""
    if os.environ.get("RAY_ADDRESS"):
        return None
    note = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    with contextlib.suppress(OSError):
        return note.read_text().strip() or None
    return None


@contextlib.contextmanager
def connected(cpus: int | None = None) -> Iterator[Cluster]:
    """Connect for the length of the block; a Ray of our own is started quietly and ended with the block.

    cpus: cores of a Ray of our own; all of the machine's by default. A Ray that is already connected in this process is
    used and left alone. What Ray prints meanwhile goes to stderr (a cluster's) or nowhere (our own, whose failures are
    reported here), never to stdout, which belongs to results.
    Raises ClusterError.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield _look(local=True)
        return
    address = os.environ.get("RAY_ADDRESS", "")
    local = address in ("", "local")
    with contextlib.ExitStack() as stack:
        quiet = stack.enter_context(open(os.devnull, "w")) if local else sys.stderr
        stack.enter_context(contextlib.redirect_stdout(quiet))
        try:
            stack.callback(ray.shutdown)
            _start(ray, address, local, cpus)
            cluster = _look(local=local)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            raise _explained(error, address, local) from error
        yield cluster


def _start(ray: Any, address: str, local: bool, cpus: int | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if local:
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet
        )
    else:
        _knock(address)
        ray.init(address=address, **quiet)


def _knock(address: str) -> None:
    """Raise ConnectionError at once where nobody listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(f"nobody listens there ({error.strerror or error})") from error


def _look(*, local: bool) -> Cluster:
    import ray

    nodes = tuple(dict(n["Resources"]) for n in ray.nodes() if n["Alive"])
    types = _autoscaler_node_types()
    return Cluster(local, nodes, bool(types), any(t.get("GPU", 0) > 0 for t in types))


def _autoscaler_node_types() -> list[dict[str, float]]:
    """Resources of the node types that an autoscaler may add; none without an autoscaler."""
    from ray._private.state import state

    try:  # not a public function: without it a request is only checked against the nodes that are there
        config = state.get_cluster_config()
        return [dict(group.resources) for group in config.node_group_configs] if config is not None else []
    except Exception:
        return []


def _explained(error: Exception, address: str, local: bool) -> ClusterError:
    line = " ".join(str(error).split())[:600]
    if local:
        return ClusterError(f"Ray did not start on this machine: {type(error).__name__}: {line}")
    remedy = "unset RAY_ADDRESS to run on this machine, or check the cluster with `ray status`"
    if "uthenticat" in line:
        remedy = "put the cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN_PATH"
    return ClusterError(f"no Ray cluster at RAY_ADDRESS={address}: {type(error).__name__}: {line}; {remedy}")
