"""Instances as sshd processes on this machine's loopback, for machines where namespaces are not allowed. Takes no root.

Each has a port, a home, keys and a Ray of its own, and is otherwise no machine apart: nothing is closed to others, and all nodes share
127.0.0.0/8. So tunnels have nothing to carry: each node's address answers without one. Two commands stand in front of the real ones:
`ssh` without forwards, which would take the ports that the other nodes' Ray needs, and `ray`, whose `stop` must end this host's
processes and nobody else's.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from hosts import _which

MARK = "PAIRSCOPE_REHEARSAL_HOST"  # in the environment of all that runs on a host; its value is the host's folder
NEEDED = {"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "rsync": "rsync"}
PORTS = [6379, 8265, 10001, *(20000 + 256 * k + n for k in range(3) for n in (0, 1, 6))]

SSH = """#!/bin/bash
# ssh without local forwards, with ~ as $HOME and not as the password file has it
args=("$@")
for i in "${{!args[@]}}"; do
    if [ "${{args[$i]}}" = -F ]; then
        file=${{args[$((i + 1))]}}
        sed -e '/^LocalForward/d' -e "s#~/#$HOME/#" "$file" > "$file.plain"
        args[i + 1]=$file.plain
    elif [ "${{args[$i]}}" = -i ]; then
        args[i + 1]=${{args[$((i + 1))]/#\\~/$HOME}}
    fi
done
exec {ssh} "${{args[@]}}"
"""

RAY = """#!/bin/bash
if [ "$1" = stop ]; then exec {python} {here} stop "${mark}"; fi
exec {ray} "$@"
"""


def missing_loopback() -> str:
    """What this machine lacks for hosts on loopback, in words; empty if nothing."""
    if sys.platform != "linux":
        return "hosts on loopback need Linux"
    lacks = sorted({package for tool, package in NEEDED.items() if not _which(tool)})
    if lacks:
        return f"not installed: {', '.join(lacks)}"
    for port in PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what has ended does not count
            try:
                probe.bind(("", port))
            except OSError:
                return f"port {port} is taken, which a node on loopback needs"
    return ""


class Loopback:
    """Hosts on 127.0.0.1. root: an empty folder for their files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gateway = "127.0.0.1"
        self.short = Path(
            tempfile.mkdtemp(prefix="psl", dir="/tmp")
        )  # Ray's sockets have paths of 107 characters at most
        self.hosts: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, instance: int, env: dict[str, str], onstart: str) -> tuple[str, int]:
        folder = self.root / str(instance)
        home, bin_ = folder / "home", folder / "bin"
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        home.chmod(0o700)
        bin_.mkdir()
        (self.short / str(instance)).mkdir()
        here = Path(sys.executable).parent
        self._command(bin_ / "ssh", SSH.format(ssh=_which("ssh")))
        self._command(bin_ / "ray", RAY.format(python=sys.executable, here=__file__, ray=here / "ray", mark=MARK))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key")], check=True)
        path = f"{bin_}:{here}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        own = {
            "HOME": str(home),
            "PATH": path,
            MARK: str(folder),
            "RAY_TMPDIR": str(self.short / str(instance)),
            "LANG": "C.UTF-8",
        }
        (home / ".bashrc").write_text(f"export PATH={path}\ncd {home}\n")
        (folder / "sshd_config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host_key'}\nStrictModes no\nUsePAM no\nPidFile none\n"
            f"AuthorizedKeysFile {home}/.ssh/authorized_keys {home}/.ssh/authorized_keys2\nPermitRootLogin prohibit-password\n"
            f"PasswordAuthentication no\nSetEnv {' '.join(f'{k}={v}' for k, v in own.items())}\n"
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        with open(folder / "sshd.log", "wb") as log:
            self.hosts[instance] = subprocess.Popen(
                [str(_which("sshd")), "-D", "-e", "-f", str(folder / "sshd_config")],
                env=own | env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        with open(folder / "onstart.log", "wb") as log:
            subprocess.Popen(
                ["bash", "-c", onstart], env=own | env, cwd=home, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        return "127.0.0.1", port

    def authorize(self, instance: int, key: str) -> None:
        with open(self.root / str(instance) / "home" / ".ssh" / "authorized_keys", "a") as keys:
            keys.write(key.strip() + "\n")

    def stop(self, instance: int) -> None:
        process = self.hosts.pop(instance, None)
        if process is None:
            return
        end_all(str(self.root / str(instance)), everything=True)
        process.kill()
        process.wait()
        shutil.rmtree(self.short / str(instance), ignore_errors=True)

    def close(self) -> None:
        for instance in list(self.hosts):
            self.stop(instance)
        shutil.rmtree(self.short, ignore_errors=True)

    @staticmethod
    def _command(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)


def user() -> str:
    """Who logs in to these hosts."""
    return getpass.getuser()


def end_all(folder: str, *, everything: bool = False) -> None:
    """Kill this host's processes, found by the mark in their environment: Ray's, or all. Never anybody else's."""
    mark = f"{MARK}={folder}".encode()
    for _ in range(20):
        found = []
        for process in Path("/proc").iterdir():
            if not process.name.isdigit() or int(process.name) == os.getpid():
                continue
            with suppress(OSError):
                theirs = mark in (process / "environ").read_bytes().split(b"\0")
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                rays = b"raylet" in words or b"gcs_server" in words or b"ray::" in words or b"/ray/" in words
                if theirs and (everything or rays):
                    found.append(int(process.name))
        if not found:
            return
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__" and sys.argv[1:2] == ["stop"]:
    end_all(sys.argv[2])
