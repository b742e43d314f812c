"""The mesh alone, without Ray: hosts that reach each other at one ssh port only."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_server import wait_for
from hosts import Namespaces, missing

from cluster.mesh.peers import Mesh, Peer
from cluster.mesh.ports import address, block

ROOT = Path(__file__).parents[2]
PYTHON = f"PYTHONPATH={ROOT} {sys.executable}"


class Nodes:
    """Three hosts as a head and two workers, with the files that the provider would write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts = Namespaces(folder)
        for name in ("cluster", "mesh"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        self.at = {k: self.hosts.start(k, {}, "") for k in (1, 2, 3)}
        for k in self.at:
            self.hosts.authorize(k, (folder / "cluster.pub").read_text())
            self.home(k).mkdir(parents=True)
            self.write(k, "node.json", Mesh(k, 4).node_text)
        self.write(1, "key.pub", (folder / "mesh.pub").read_text())
        self.write(1, "bootstrap", (folder / "cluster").read_text())
        self.write(2, "key", (folder / "mesh").read_text())
        self.write(3, "key", (folder / "mesh").read_text())
        known = (folder / "1" / "host_key.pub").read_text().split()
        for k in (2, 3):
            self.write(k, "known_hosts", f"vast-1 {known[0]} {known[1]}\n")
            self.peers(k, [1])
        self.peers(1, [2, 3])

    def home(self, k: int) -> Path:
        return self.folder / str(k) / "home" / ".pairscope" / "mesh"

    def write(self, k: int, name: str, text: str) -> None:
        path = self.home(k) / name
        path.write_text(text)
        path.chmod(0o600)

    def peers(self, k: int, others: list[int]) -> None:
        where, key = "~/.pairscope/mesh", "bootstrap" if k == 1 else "key"
        peers = tuple(Peer(o, *self.at[o], f"vast-{o}", f"{where}/{key}", f"{where}/known_hosts") for o in others)
        self.write(k, "peers.json", Mesh(k, 4, peers).peers_text)

    def on(
        self, k: int, command: str, *, key: str = "cluster", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        host, port = self.at[k]
        return subprocess.run(
            ["ssh", "-i", str(self.folder / key), "-p", str(port), "-o", "StrictHostKeyChecking=no", "-o",
             "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "BatchMode=yes", f"root@{host}", command],
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    def up(self, *ks: int) -> None:
        for k in ks:
            done = self.on(k, f"{PYTHON} -m cluster.mesh up --wait 40")
            assert f"node {k} is in" in done.stdout, done.stdout + done.stderr


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    lacks = missing()
    if lacks:
        pytest.skip(lacks)
    made = Nodes(tmp_path_factory.mktemp("nodes"))
    try:
        time.sleep(0.5)
        made.up(1, 2, 3)
        yield made
    finally:
        made.hosts.close()


def say(nodes: Nodes, k: int, to: int, port: int) -> str:
    """What node k hears at another node's address and port of its block."""
    code = f"import socket; s = socket.create_connection(('{address(to)}', {block(to) + port}), 5); print(s.recv(9).decode())"
    return nodes.on(k, f'{sys.executable} -c "{code}"').stdout.strip()


def listen(nodes: Nodes, k: int, port: int) -> None:
    """Greet on the wildcard address, as Ray's processes bind."""
    code = f"import socket; s = socket.create_server(('', {block(k) + port}))\nwhile True:\n c, _ = s.accept(); c.sendall(b'node {k}'); c.close()"
    path = nodes.home(k) / f"greet{port}.py"
    path.write_text(code)
    nodes.on(k, f"nohup {sys.executable} ~/.pairscope/mesh/greet{port}.py > /dev/null 2>&1 < /dev/null &")


def test_every_node_reaches_every_other_at_its_address(nodes: Nodes) -> None:
    for k in (1, 2, 3):
        listen(nodes, k, 1)
    time.sleep(0.5)
    heard = {(a, b): say(nodes, a, b, 1) for a in (1, 2, 3) for b in (1, 2, 3)}
    assert heard == {(a, b): f"node {b}" for a in (1, 2, 3) for b in (1, 2, 3)}


def test_the_mesh_key_opens_no_shell_and_no_other_port(nodes: Nodes) -> None:
    done = nodes.on(1, "echo in", key="mesh")
    assert done.returncode != 0
    assert "in" not in done.stdout
    host, port = nodes.at[1]
    ssh = subprocess.run(
        ["ssh", "-i", str(nodes.folder / "mesh"), "-p", str(port), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
         "-o", "BatchMode=yes", "-W", f"{host}:{port}", f"root@{host}"],
        capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "SSH-2.0" not in ssh.stdout
    assert "administratively prohibited" in ssh.stderr


def test_a_tunnel_that_is_killed_comes_back_within_seconds(nodes: Nodes) -> None:
    nodes.on(2, "pkill -f tunnel-1.conf")
    began = time.monotonic()
    wait_for(lambda: json.loads(nodes.on(2, _ASK).stdout or "{}").get("ok"), 15)
    assert time.monotonic() - began < 10
    status = nodes.on(2, f"{PYTHON} -m cluster.mesh status").stdout
    assert ": up " in status


def test_a_node_that_leaves_loses_its_tunnel_and_one_that_joins_gets_it(nodes: Nodes) -> None:
    status = f"{PYTHON} -m cluster.mesh status"
    nodes.peers(1, [2])
    wait_for(lambda: "to node 3" not in nodes.on(1, status).stdout, 10)
    ssh = "pgrep -f 'ssh -N -F .*/tunnel-{}[.]conf'"
    wait_for(lambda: nodes.on(1, ssh.format(3)).stdout == "", 10)  # and its ssh has ended
    assert nodes.on(1, ssh.format(2)).stdout != ""
    nodes.peers(1, [2, 3])
    wait_for(lambda: nodes.on(1, status).stdout.count(": up ") == 2, 15)


def test_a_head_with_another_host_key_is_not_trusted(nodes: Nodes) -> None:
    other = (nodes.folder / "2" / "host_key.pub").read_text().split()
    good = (nodes.home(3) / "known_hosts").read_text()
    nodes.write(3, "known_hosts", f"vast-1 {other[0]} {other[1]}\n")
    nodes.on(3, "pkill -f tunnel-1.conf")
    wait_for(lambda: "down:" in nodes.on(3, f"{PYTHON} -m cluster.mesh status").stdout, 10)
    assert "node 3 is in" not in nodes.on(3, f"{PYTHON} -m cluster.mesh up --wait 3").stdout
    nodes.write(3, "known_hosts", good)
    nodes.up(3)


_ASK = (
    f"{PYTHON} -c \"import json; from cluster.mesh.daemon import ask; print(json.dumps(ask(1, 'probe 2') or dict()))\""
)
