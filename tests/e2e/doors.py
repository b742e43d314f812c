"""What listens on a host, and what each listener says to one who has no token, a wrong one, and the right one.

    python doors.py TOKEN_FILE

prints one line of JSON a listening TCP port: {"port", "addresses", "process", "grpc": {method: [none, wrong, right]}, "http": {...}}.
Only what is really served there is kept: a gRPC method that the right token reaches, an HTTP path that is found. Standard library
and grpc, which comes with Ray; run on the host itself, where no firewall is in the way. `faults` judges what it printed.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import urllib.error
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# One harmless call of each of Ray's services, with its message: an empty one, or node and object ids that nobody has.
METHODS = {
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo": b"",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys": b"",
    "/ray.rpc.NodeManagerService/GetSystemConfig": b"",
    "/ray.rpc.ObjectManagerService/Pull": b"\x0a\x1c" + bytes(28) + b"\x12\x1c" + bytes(28),
    "/ray.rpc.CoreWorkerService/NumPendingTasks": b"",
    "/ray.rpc.LogService/ListLogs": b"",
    "/ray.rpc.RayletDriver/ClusterInfo": b"",
    "/grpc.health.v1.Health/Check": b"",
}
# The dashboard, its agents, the agent for runtime environments, metrics.
PATHS = [
    ("GET", "/"),
    ("GET", "/api/jobs/"),
    ("POST", "/api/jobs/"),
    ("GET", "/nodes?view=summary"),
    ("GET", "/api/v0/nodes"),
    ("POST", "/api/job_agent/jobs/"),
    ("GET", "/api/local_raylet_healthz"),
    ("POST", "/get_runtime_envs_info"),
    ("GET", "/metrics"),
]
TIMEOUT_S = 10.0


def listeners() -> dict[int, tuple[set[str], set[str]]]:
    """Port -> (addresses, names of processes) of all TCP sockets that listen in this network namespace."""
    found: dict[int, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    owners = _owners()
    for path, form in (("/proc/net/tcp", "<I"), ("/proc/net/tcp6", "<4I")):
        for line in Path(path).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] != "0A":
                continue
            raw, port = words[1].split(":")
            numbers = [int(raw[i : i + 8], 16) for i in range(0, len(raw), 8)]
            family = socket.AF_INET if len(numbers) == 1 else socket.AF_INET6
            addresses, names = found[int(port, 16)]
            addresses.add(socket.inet_ntop(family, struct.pack(form, *numbers)))
            names.add(owners.get(words[9], "?"))
    return dict(found)


def _owners() -> dict[str, str]:
    """Inode of a socket -> the process that has it, in a word or two."""
    owners = {}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            for fd in (process / "fd").iterdir():
                target = str(fd.readlink())
                if target.startswith("socket:["):
                    owners[target[8:-1]] = words[:150]
        except OSError:
            continue
    return owners


def wildcard(addresses: set[str] | list[str]) -> bool:
    """Whether a listener would be reached from outside if nothing stood before it."""
    return any(not a.removeprefix("::ffff:").startswith("127.") and a != "::1" for a in addresses)


def knock(host: str, port: int, token: str) -> dict[str, Any]:
    import grpc

    tokens = [None, "f" * 64, token]
    said: dict[str, dict[str, list[str]]] = {"grpc": {}, "http": {}}
    for method in METHODS:
        answers = [_grpc(grpc, host, port, method, given) for given in tokens]
        if answers[2] not in ("UNIMPLEMENTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"):
            said["grpc"][method] = answers
    if not said["grpc"]:
        for verb, path in PATHS:
            answers = [_http(host, port, verb, path, given) for given in tokens]
            if answers[2] not in ("404", "405", "none"):
                said["http"][f"{verb} {path}"] = answers
    return said


def _grpc(grpc: Any, host: str, port: int, method: str, token: str | None) -> str:
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        call = channel.unary_unary(method)
        try:
            call(METHODS[method], timeout=TIMEOUT_S, metadata=[("authorization", f"Bearer {token}")] if token else None)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"


def _http(host: str, port: int, verb: str, path: str, token: str | None) -> str:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    data = b"{}" if verb == "POST" else None
    request = urllib.request.Request(f"http://{host}:{port}{path}", data=data, headers=headers, method=verb)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            return str(reply.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except OSError:
        return "none"
    except Exception:  # an answer that is no HTTP
        return "none"


REFUSED = ("UNAUTHENTICATED", "401", "403")
SERVICES = {
    "GCS": "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "node manager": "/ray.rpc.NodeManagerService/GetSystemConfig",
    "object manager": "/ray.rpc.ObjectManagerService/Pull",
    "dashboard": "GET /api/jobs/",
    "agent": "POST /api/job_agent/jobs/",
    "agent's gRPC": "/ray.rpc.LogService/ListLogs",
    "runtime environments": "POST /get_runtime_envs_info",
    "Ray client": "/ray.rpc.RayletDriver/ClusterInfo",
}
WORKER = "/ray.rpc.CoreWorkerService/NumPendingTasks"
# What Ray serves without a token: its health, the dashboard's page without its data, and the numbers of metrics.
OPEN = {"/grpc.health.v1.Health/Check", "GET /api/local_raylet_healthz"}


def faults(
    rows: list[dict[str, Any]], services: dict[int, str], workers: range, metrics: set[int], ssh: int
) -> list[str]:
    """What is not as it should be on one host, in words. services: port -> name in SERVICES; workers: ports that they may have."""
    wrong = []
    by_port = {row["port"]: row for row in rows}
    for port, name in services.items():
        said = by_port.get(port, {"grpc": {}, "http": {}})
        if SERVICES[name] not in said["grpc"] | said["http"]:
            wrong.append(f"{port}: no {name} was found there")
    if not any(WORKER in by_port[port]["grpc"] for port in workers if port in by_port):
        wrong.append("no worker's port was found")
    for row in rows:
        port, outside = row["port"], wildcard(row["addresses"])
        names = " ".join(row["process"])
        ours = names.startswith("ssh -N") or "cluster.mesh" in names
        if port not in {*services, *workers, *metrics, ssh} and (outside or not ours):
            wrong.append(f"{port}: nobody said that {names} listens there, on {', '.join(row['addresses'])}")
        if ours and outside:
            wrong.append(f"{port}: {names} is not on loopback only")
        if port in services and services[port] == "dashboard" and outside:
            wrong.append(f"{port}: the dashboard is not on loopback only")
        for call, answers in (row["grpc"] | row["http"]).items():
            opened = call in OPEN or port in metrics or (call == "GET /" and services.get(port) == "dashboard")
            if not opened and (not set(answers[:2]) <= set(REFUSED) or answers[2] in REFUSED):
                wrong.append(f"{port}: {call} answers {answers} without a token, with a wrong one, with the right one")
        if port in {*services, *workers} and not ours and not (row["grpc"] or row["http"]):
            wrong.append(f"{port}: nothing was understood of what {names} says there")
    return wrong


def main() -> None:
    token = Path(sys.argv[1]).expanduser().read_text().strip()
    found = listeners()

    def one(port: int) -> dict[str, Any]:
        addresses, names = found[port]
        host = "127.0.0.1" if wildcard(addresses) else min(addresses).removeprefix("::ffff:")
        tunnel = all(name.startswith("ssh -N") for name in names)  # behind it is another host's listener
        said = {"grpc": {}, "http": {}} if tunnel else knock(host, port, token)
        return {"port": port, "addresses": sorted(addresses), "process": sorted(names), **said}

    with ThreadPoolExecutor(8) as pool:
        for row in pool.map(one, sorted(found)):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
