"""A laptop, a fake Vast and hosts in namespaces: what a person does with `ray up`, done by tests."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from fake_server import Fake, running_fake

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


class Rehearsal:
    """One cluster, from its own folder. name: the cluster's; folder: of the laptop's home and the hosts' files; user: of the hosts."""

    def __init__(self, fake: Fake, folder: Path, user: str = "root") -> None:
        self.fake = fake
        self.user = user
        self.folder = folder
        self.name = f"reh{os.getpid()}"
        self.yaml = folder / "ray_cluster.yaml"
        self.keys = folder / "home" / ".pairscope" / "clusters" / self.name
        for name in ("home", "tmp"):
            (folder / name).mkdir(exist_ok=True)
        self.env = {
            "PATH": f"{BIN}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"),
            "LANG": "C.UTF-8", "VAST_URL": fake.url, "VAST_API_KEY": "full-rights", "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.keys / "auth_token"), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",  # what a log says is seen when it is said
        }  # fmt: skip

    def write_yaml(self, *, spot: int = 0, **changes: Any) -> None:
        """The repository's file with another name and image. The hosts share this machine's cores, so they claim two each.

        spot: so many of `max_workers` are interruptible machines, of the type rtx4090-spot, and the rest of the head's type.
        """
        content = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
        content["cluster_name"] = self.name
        content["provider"]["offers"]["image"] = "this-machine"
        content["available_node_types"]["rtx4090"]["resources"]["CPU"] = 2
        content["auth"]["ssh_user"] = self.user
        for key, value in changes.items():
            content[key] = content[key] | value if isinstance(value, dict) else value
        if spot:
            types = content["available_node_types"]
            types["rtx4090"]["max_workers"] = content["max_workers"] - spot
            types["rtx4090-spot"] |= {"max_workers": spot, "resources": types["rtx4090"]["resources"]}
        self.yaml.write_text(yaml.safe_dump(content, sort_keys=False))

    def ray(self, verb: str, *args: str, timeout: float = 240) -> str:
        """`ray VERB ray_cluster.yaml ARGS` on the laptop; its output. Raises with the output where it fails."""
        return self.run("ray", verb, str(self.yaml), *args, timeout=timeout)

    def run(self, *command: str, timeout: float = 240) -> str:
        done = subprocess.run(
            command, env=self.env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=timeout,
        )  # fmt: skip
        if done.returncode:
            raise AssertionError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout[-6000:]}")
        return done.stdout

    @contextmanager
    def dashboard(self) -> Iterator[str]:
        """`ray dashboard`: the job server's address through ssh, at a port that is free now."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process = subprocess.Popen(
            ["ray", "dashboard", "--port", str(port), str(self.yaml)], env=self.env, cwd=ROOT, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            until = time.monotonic() + 30
            while not answers("127.0.0.1", port):
                assert time.monotonic() < until, "ray dashboard opened no port"
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=20)

    def instances(self) -> list[dict[str, Any]]:
        """As Vast lists them, the head first."""
        out = self.run("pairscope", "vast", "nodes", "--cluster", self.name, "--json")
        rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        return sorted(rows, key=lambda row: row["k"])

    def namespace(self, row: dict[str, Any]) -> str:
        """The network namespace of a host."""
        return next(p for p in self.run("ip", "netns", "list").split() if p.endswith(f"-{row['id']}"))

    def on(self, row: dict[str, Any], command: str, timeout: float = 60) -> str:
        """Run a command on a host, by ssh with the cluster's key."""
        host, port = row["ssh"].split(":")
        return self.run(
            "ssh", "-i", str(self.keys / "id_ed25519"), "-p", port, "-o", f"UserKnownHostsFile={self.keys / 'known_hosts'}",
            "-o", f"HostKeyAlias=vast-{row['id']}", "-o", "StrictHostKeyChecking=accept-new", "-o", "BatchMode=yes", "-o",
            "LogLevel=ERROR", f"{self.user}@{host}", command, timeout=timeout,
        )  # fmt: skip


def answers(host: str, port: int, timeout: float = 0.5) -> bool:
    with suppress(OSError), socket.create_connection((host, port), timeout=timeout):
        return True
    return False


@contextmanager
def rehearsal(folder: Path, hosts: str = "namespaces", user: str = "root") -> Iterator[Rehearsal]:
    """Everything is gone when this ends, also after a failure: the fake takes its hosts with it. hosts: namespaces or loopback."""
    (folder / "hosts").mkdir()
    with running_fake("--hosts", hosts, "--root", str(folder / "hosts"), "--boot", "0.5,1") as fake:
        yield Rehearsal(fake, folder, user)
