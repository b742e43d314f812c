"""One ssh connection with its forwards, kept alive."""

from __future__ import annotations

import contextlib
import ctypes
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cluster.mesh.peers import Peer

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # before any fork

LONGEST_PAUSE_S = 2.0
STEADY_S = 10.0  # a tunnel that held this long starts again without a growing pause


def _end_with_parent() -> None:
    """In a new ssh: end when the daemon does, however that ends; else its forwards would be in the next one's way."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _as_ssh() -> None:
    """In a new ssh. A worker's listens on every port of every other node, and a container may begin with 1,024 open files."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    _end_with_parent()


class Tunnel:
    """A supervised ssh process. `tend` is called every now and then and starts it again after a short, jittered pause."""

    def __init__(self, peer: Peer, forwards: list[tuple[str, int]], folder: Path) -> None:
        self.peer = peer
        self.forwards = forwards
        self.config = folder / f"tunnel-{peer.k}.conf"
        self.log = folder / f"tunnel-{peer.k}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.next_start = 0.0
        self.pause = 0.1
        self.starts = 0
        self.last_error = ""

    def tend(self) -> None:
        now = time.monotonic()
        if self.process is not None and self.process.poll() is not None:
            self.last_error = self._last_line() or f"ssh ended with {self.process.returncode}"
            self.process = None
            self.pause = 0.1 if now - self.started > STEADY_S else min(self.pause * 2, LONGEST_PAUSE_S)
            self.next_start = now + self.pause * random.uniform(0.5, 1.0)
        if self.process is None and now >= self.next_start:
            try:
                self._start()
            except (
                OSError
            ) as error:  # a full disk, no process to be had: the other tunnels go on, and this one tries again
                self.last_error = str(error)
                self.pause = min(self.pause * 2, LONGEST_PAUSE_S)
                self.next_start = now + self.pause

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for path in (self.config, self.log):
            path.unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        alive = self.process is not None and self.process.poll() is None
        return {
            "k": self.peer.k, "to": f"{self.peer.host}:{self.peer.port}", "alive": alive, "starts": self.starts,
            "seconds": round(time.monotonic() - self.started, 1) if alive else 0.0, "last_error": self.last_error,
        }  # fmt: skip

    def _start(self) -> None:
        peer = self.peer
        lines = [
            f"Host {peer.alias}",
            f"HostName {peer.host}",
            f"Port {peer.port}",
            f"User {peer.user}",
            f"HostKeyAlias {peer.alias}",
            f"IdentityFile {peer.key}",
            f"UserKnownHostsFile {peer.known_hosts}",
            "GlobalKnownHostsFile /dev/null",
            "HashKnownHosts no",
            "StrictHostKeyChecking accept-new",
            "IdentitiesOnly yes",
            "BatchMode yes",
            "ExitOnForwardFailure yes",
            "ServerAliveInterval 5",
            "ServerAliveCountMax 3",
            "ConnectTimeout 10",
            "ControlPath none",
            "Ciphers aes128-gcm@openssh.com",
            "Compression no",
            *(f"LocalForward {host}:{port} {host}:{port}" for host, port in self.forwards),
        ]
        text = "\n".join(lines) + "\n"
        if not self.config.exists() or self.config.read_text() != text:  # a full disk has room for what is there
            self.config.write_text(text)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                ["ssh", "-N", "-F", str(self.config), peer.alias], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=_as_ssh,
            )  # fmt: skip
        self.started = time.monotonic()
        self.starts += 1

    def _last_line(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1][:300] if lines else ""
