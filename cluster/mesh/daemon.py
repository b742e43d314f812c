"""The process on each node that keeps its tunnels as the peers file says, and tells how they are.

It writes status.json every few seconds, for `pairscope doctor`, and answers on STATUS of the node's block, one line in, one line
of JSON out:
  status     this node's tunnels, and how fast its set-up downloaded
  watched    the same, and when all has to be gone; on the head nothing while its autoscaler, which keeps to the limits, has not
             polled for UNWATCHED_S. A worker asks now and then, and moves its own deadline: limits that are raised reach it so
  probe K    whether node K's daemon answers from here (on the head: whether the tunnel to worker K works)
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from capture.errors import ConfigError
from cluster.mesh.peers import POLLED, Mesh, read_deadline, read_mesh, restricted_line, write_deadline
from cluster.mesh.ports import HEAD, STATUS, address, block
from cluster.mesh.tunnel import LONGEST_PAUSE_S, STEADY_S, Tunnel

TICK_S = 0.3
NOTE_EVERY_S = 3.0
UNWATCHED_S = 900.0  # outlives a restart of Ray on the head, and most of Vast's bad moments
LIMITS_EVERY_S = 60.0
KEYS_EVERY_S = 30.0  # Vast has been seen to rewrite authorized_keys, so the mesh's line is put back


class Daemon:
    """All tunnels of one node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mesh: Mesh = read_mesh(folder)
        self.stamp: tuple[int, ...] = ()
        self.tunnels: dict[int, Tunnel] = {}
        self.ending = threading.Event()
        self.began = time.time()

    def run(self) -> None:
        """Until SIGTERM."""
        server = _Server((address(self.mesh.k), block(self.mesh.k) + STATUS), self)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True).start()
        if self.mesh.k != HEAD:
            threading.Thread(target=self.follow_limits, daemon=True).start()
        keys_at = noted_at = float("-inf")
        try:
            while not self.ending.wait(TICK_S):
                self.read()
                for tunnel in self.tunnels.values():
                    tunnel.tend()
                if self.mesh.k == HEAD and time.monotonic() - keys_at > KEYS_EVERY_S:
                    with contextlib.suppress(OSError):  # as below
                        self.let_workers_in()
                    keys_at = time.monotonic()
                if time.monotonic() - noted_at > NOTE_EVERY_S:
                    self.note()
                    noted_at = time.monotonic()
        finally:
            server.shutdown()
            server.server_close()
            for tunnel in self.tunnels.values():
                tunnel.stop()
            (self.folder / "status.json").unlink(missing_ok=True)

    def note(self) -> None:
        """Write the status down, with the time, for those on this node who do not know the mesh's addresses."""
        with contextlib.suppress(OSError):  # a full disk must not end the tunnels
            tmp = self.folder / "status.tmp"
            tmp.write_text(json.dumps(self.status() | {"at": time.time()}) + "\n")
            os.replace(tmp, self.folder / "status.json")

    def follow_limits(self) -> None:
        """On a worker, until the daemon ends: be gone when the head has to be."""
        while not self.ending.wait(LIMITS_EVERY_S):
            self.take_limit(ask(HEAD, "watched"))

    def take_limit(self, reply: dict[str, Any] | None) -> None:
        """Move this node's deadline to what the head said; silence, or a word that is no time, leaves it."""
        when = (reply or {}).get("deadline")
        if isinstance(when, int | float) and not isinstance(when, bool) and 0 < when < float("inf"):
            with contextlib.suppress(OSError):  # the deadline of before stays
                write_deadline(self.folder, when)

    def read(self) -> None:
        """Take up changed files: new tunnels, none for peers that left or moved."""
        try:
            files = [p for p in (self.folder / "node.json", self.folder / "peers.json") if p.exists()]
            stamp = tuple(p.stat().st_mtime_ns for p in files)
            if stamp == self.stamp:
                return
            mesh = read_mesh(self.folder)
        except (ConfigError, OSError):
            return
        self.stamp, self.mesh = stamp, mesh
        wanted = {p.k: p for p in mesh.peers}
        for k in list(self.tunnels):
            if self.tunnels[k].peer != wanted.get(k) or self.tunnels[k].forwards != mesh.forwards(wanted[k]):
                self.tunnels.pop(k).stop()
        for k, peer in wanted.items():
            if k not in self.tunnels:
                self.tunnels[k] = Tunnel(peer, mesh.forwards(peer), self.folder)

    def let_workers_in(self) -> None:
        """Put the line of the mesh key into both files that sshd reads by default."""
        public = self.folder / "key.pub"
        if not public.exists():
            return
        line = restricted_line(public.read_text(), self.mesh.slots)
        ssh = Path.home() / ".ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        for path in (ssh / "authorized_keys", ssh / "authorized_keys2"):
            # comments of other keys, in whatever encoding, stay as they are
            lines = path.read_text("utf-8", "surrogateescape").splitlines() if path.exists() else []
            if line not in lines:
                key = line.split()[-2]
                kept = [old for old in lines if key not in old]
                tmp = path.with_name(path.name + ".pairscope")
                tmp.write_text("\n".join([*kept, line]) + "\n", "utf-8", "surrogateescape")
                tmp.chmod(0o600)
                os.replace(tmp, path)

    def answer(self, line: str) -> dict[str, Any] | None:
        """The reply to one line; None for silence."""
        word, _, rest = line.strip().partition(" ")
        if word == "watched":
            return self.status() | {"deadline": read_deadline(self.folder)} if self.watched() else None
        if word == "probe" and rest.isdigit() and 1 <= int(rest) <= self.mesh.slots:
            return {"k": self.mesh.k, "probe": int(rest), "ok": ask(int(rest), "status", timeout=5) is not None}
        return self.status()

    def watched(self) -> bool:
        """False on a head that nobody keeps to the limits. Its workers then hear nothing and, by their own switch, end themselves:
        each one's deadline alone does not hold the cluster's dollars."""
        polled = self.began
        with contextlib.suppress(OSError):
            polled = max(polled, (self.folder / POLLED).stat().st_mtime)
        return self.mesh.k != HEAD or time.time() - polled < UNWATCHED_S

    def status(self) -> dict[str, Any]:
        return {
            "k": self.mesh.k, "slots": self.mesh.slots, "since": self.began, "download": self.download(),
            "tunnels": [t.status() for _, t in sorted(self.tunnels.items())],
        }  # fmt: skip

    def download(self) -> Any:
        """What setup_node.sh measured, {bytes, seconds}; None where nothing had to be loaded."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder.parent / "download.json").read_text())
        return None


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, where: tuple[str, int], daemon: Daemon) -> None:
        self.mesh_daemon = daemon
        super().__init__(where, _Handler)


class _Handler(socketserver.StreamRequestHandler):
    server: _Server
    timeout = 10

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            line = self.rfile.readline(100).decode(errors="replace")
            reply = self.server.mesh_daemon.answer(line)
            if reply is not None:
                self.wfile.write(json.dumps(reply).encode() + b"\n")


def ask(k: int, line: str, timeout: float = 8.0) -> dict[str, Any] | None:
    """What node k's daemon answers, or None where it does not."""
    where = (address(k), block(k) + STATUS)
    with contextlib.suppress(OSError, ValueError), socket.create_connection(where, timeout=timeout) as peer:
        peer.settimeout(timeout)
        peer.sendall(line.encode() + b"\n")
        with peer.makefile("rb") as reply:
            found = json.loads(reply.readline(1_000_000))
            return found if isinstance(found, dict) else None
    return None


def run(folder: Path) -> None:
    """The daemon's main; ends on SIGTERM with all its ssh processes."""
    daemon = Daemon(folder)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.ending.set())
    with contextlib.suppress(OSError):
        (folder / "daemon.pid").write_text(str(os.getpid()))
    daemon.run()


def keep(start: Callable[[], subprocess.Popen[bytes]]) -> None:
    """Start the daemon, and start it again whenever it ends without having been told to: its tunnels are the cluster's life."""
    pause = 0.5
    while True:
        began = time.monotonic()
        if start().wait() == 0:
            return
        pause = 0.5 if time.monotonic() - began > STEADY_S else min(2 * pause, LONGEST_PAUSE_S)
        time.sleep(pause)
