"""The daemon of the mesh outlives a full disk and its own death; nothing here needs a second machine."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.mesh import daemon as mesh_daemon
from cluster.mesh import tunnel as tunnels
from cluster.mesh.peers import Mesh, Peer
from cluster.mesh.tunnel import Tunnel


def peer(k: int) -> Peer:
    return Peer(k, "127.0.0.1", 9, f"vast-{k}", "/nowhere/key", "/nowhere/known_hosts")


def full(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_a_tunnel_that_cannot_be_started_says_why_and_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Tunnel(peer(1), [], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tunnels.subprocess, "Popen", full)
        one.tend()
    assert "No space left" in one.status()["last_error"]
    assert not one.status()["alive"]
    one.next_start = 0.0
    one.tend()
    assert one.starts == 1
    one.stop()


def test_a_tunnel_has_files_for_all_its_ports_where_the_machine_begins_with_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/sh\nulimit -n > {tmp_path}/files\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    one = Tunnel(peer(1), [], tmp_path)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
    try:
        one.tend()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert one.process is not None
    assert one.process.wait(30) == 0
    assert (tmp_path / "files").read_text().strip() == ("unlimited" if hard == resource.RLIM_INFINITY else str(hard))
    one.stop()


def test_a_full_disk_ends_no_tunnel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh(1, 4, (peer(2),))
    (tmp_path / "node.json").write_text(mesh.node_text)
    (tmp_path / "peers.json").write_text(mesh.peers_text)
    monkeypatch.setattr(mesh_daemon, "_Server", _NoServer)
    monkeypatch.setattr(mesh_daemon.Daemon, "let_workers_in", full)
    monkeypatch.setattr(Tunnel, "_start", full)
    stopped: list[int] = []
    monkeypatch.setattr(Tunnel, "stop", lambda self: stopped.append(self.peer.k))
    one = mesh_daemon.Daemon(tmp_path)
    running = threading.Thread(target=one.run)
    running.start()
    time.sleep(1.0)
    assert running.is_alive()
    assert stopped == []
    assert "No space left" in one.status()["tunnels"][0]["last_error"]
    one.ending.set()
    running.join(10)
    assert not running.is_alive()


def test_a_key_with_a_comment_of_any_encoding_keeps_its_place_and_ends_no_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    theirs = "ssh-rsa AAAAtheirs jürgen@büro".encode("latin-1")
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "authorized_keys").write_bytes(theirs + b"\n")
    (tmp_path / "node.json").write_text(Mesh(1, 4).node_text)
    (tmp_path / "key.pub").write_text("ssh-ed25519 AAAAours pairscope\n")
    one = mesh_daemon.Daemon(tmp_path)
    for _ in range(2):
        one.let_workers_in()
        first, ours = (tmp_path / ".ssh" / "authorized_keys").read_bytes().splitlines()
        assert first == theirs
        assert ours.endswith(b"ssh-ed25519 AAAAours pairscope")


def test_it_is_started_again_when_it_dies_and_not_when_it_was_told_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_daemon.time, "sleep", lambda _: None)
    ends = iter(["import os; os.kill(os.getpid(), 9)", "raise OSError(28, 'full')", ""])
    mesh_daemon.keep(lambda: subprocess.Popen([sys.executable, "-c", next(ends)], stderr=subprocess.DEVNULL))
    assert next(ends, None) is None


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_its_ssh_processes_end_with_it_however_it_ends() -> None:
    code = (
        "import os, subprocess, sys\n"
        "from cluster.mesh.tunnel import _end_with_parent\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], preexec_fn=_end_with_parent)\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    pid = int(done.stdout)
    until = time.monotonic() + 30
    while time.monotonic() < until and _runs(pid):
        time.sleep(0.1)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class _NoServer:
    def __init__(self, *_: Any) -> None: ...

    def serve_forever(self, **_: Any) -> None: ...

    def shutdown(self) -> None: ...

    def server_close(self) -> None: ...
