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

# Ray gives its own node 30 seconds to start, which a machine that does much else may not keep to the first time.
START_TRIES = 3
TOO_SLOW = "timed out during startup"


class ClusterError(PairscopeError):
    """Ray did not start, or the cluster that RAY_ADDRESS names cannot be used."""


@dataclass(frozen=True)
class Cluster:
    """A connected Ray. nodes: total resources of each live node. growing: an autoscaler may add nodes, of these types; none are
    known where it was not `ray up` that started the cluster."""

    local: bool
    nodes: tuple[dict[str, float], ...]
    growing: bool
    types: tuple[dict[str, float], ...] = ()

    @property
    def has_gpus(self) -> bool:
        """A cluster that can grow is one that rents machines, and those are rented for their GPUs."""
        return self.growing or any(n.get("GPU", 0) > 0 for n in self.nodes)


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
        except Exception as error:  # a node that does not start in time is a bare Exception of Ray's
            raise _explained(error, address, local) from error
        yield cluster


def _start(ray: Any, address: str, local: bool, cpus: int | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not local:
        _knock(address)
        ray.init(address=address, **quiet)
        return
    for left in reversed(range(START_TRIES)):
        try:
            ray.init(
                address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet
            )
            return
        except Exception as error:
            if TOO_SLOW not in str(error) or not left:
                raise
            ray.shutdown()  # what is left of it ends with this process


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
    growing = not local and _has_autoscaler()
    return Cluster(local, nodes, growing, node_types() if growing else ())


def node_types(file: Path = Path("~/ray_bootstrap_config.yaml")) -> tuple[dict[str, float], ...]:
    """Resources of every type of node that the autoscaler may start, from the config that `ray up` leaves on the head."""
    import yaml

    try:
        config = yaml.safe_load(file.expanduser().read_text(encoding="utf-8"))
        types = config["available_node_types"].values()
        return tuple(
            {name: float(amount) for name, amount in t["resources"].items()} for t in types if t.get("max_workers")
        )
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError):
        return ()


def _has_autoscaler() -> bool:
    """True where Ray's autoscaler (version 2, the one that `ray up` starts) looks after the cluster."""
    try:  # not a public module: without it a request is only checked against the nodes that are there
        from ray.autoscaler.v2.utils import is_autoscaler_v2

        return bool(is_autoscaler_v2(fetch_from_server=True))
    except Exception:
        return False


def never_to_come() -> list[dict[str, float]]:
    """The waiting requests that the autoscaler says none of its node types can hold; resources of each."""
    try:  # nor is this; without it such a request waits, and the screen says for what
        import ray
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

        answer = GcsClient(address=ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=5)
        reply = answer if isinstance(answer, GetClusterStatusReply) else GetClusterStatusReply.FromString(answer)
        state = reply.autoscaling_state
        groups = [[dict(r.resources_bundle) for r in g.requests] for g in state.infeasible_gang_resource_requests]
        # a group's bundles are wanted on one node: together they are one request
        together = [{name: sum(b.get(name, 0.0) for b in g) for name in {n for b in g for n in b}} for g in groups]
        return [*(dict(r.resources_bundle) for r in state.infeasible_resource_requests), *together]
    except Exception:
        return []


def _explained(error: Exception, address: str, local: bool) -> ClusterError:
    line = " ".join(str(error).split())[:600]
    if local:
        return ClusterError(f"Ray did not start on this machine: {type(error).__name__}: {line}")
    remedy = "unset RAY_ADDRESS to run on this machine, or check the cluster with `ray status`"
    cause: BaseException | None = error
    while cause is not None:  # what Ray raises at last does not say that it was the token
        if "uthenticat" in str(cause):
            line = "the cluster refused the token"
            remedy = "set RAY_AUTH_MODE=token, and put the cluster's token into ~/.ray/auth_token"
            break
        cause = cause.__cause__ or cause.__context__
    return ClusterError(f"no Ray cluster at RAY_ADDRESS={address}: {type(error).__name__}: {line}; {remedy}")
