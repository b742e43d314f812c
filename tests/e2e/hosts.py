"""Instances as small machines of their own on this one: network, processes, home, /tmp and /dev/shm apart, one open ssh port.

Linux namespaces, so it takes root, and `ip`, `nft`, `unshare`, `sshd`. A host's first process ends all others with it. The
machine's file system is the "image": Python and all packages are there, nothing has to be installed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

NEEDED = {"ip": "iproute2", "nft": "nftables", "unshare": "util-linux", "sshd": "openssh-server", "ssh": "openssh-client",
          "ssh-keygen": "openssh-client", "rsync": "rsync"}  # fmt: skip
SHM_BYTES = "8g"  # a ceiling, not taken

FIREWALL = """
table inet fence {{
  chain input {{
    type filter hook input priority 0; policy drop;
    iif lo accept
    ct state established,related accept
    tcp dport {port} accept
  }}
}}
"""

# The container's first process. It must not end before its sshd does, and it adopts what loses its parent. The host's folder is
# moved out of /tmp before /tmp is covered; root's home is changed in passwd, since /root may hold the Python that all use.
INIT = """#!/bin/bash
exec 2> {folder}/init.log
mount -t tmpfs tmpfs /mnt && mkdir /mnt/host && mount --bind {folder} /mnt/host || exit 1
{keep}mount --rbind /mnt/host/tmp /tmp || exit 1
mount --bind /mnt/host/passwd /etc/passwd && mount -t tmpfs -o size={shm} tmpfs /dev/shm && mount -t tmpfs tmpfs /run || exit 1
mkdir -p /run/sshd
hostname {name}
export HOME=/mnt/host/home
cd $HOME
bash ~/.onstart > ~/.onstart.log 2>&1 < /dev/null &
{sshd} -D -e -f /mnt/host/sshd_config > /mnt/host/sshd.log 2>&1 < /dev/null &
wait $!
"""


def _covered_by_tmp() -> list[Path]:
    """The project and its Python, where they lie under /tmp: a host has a /tmp of its own, and needs both."""
    roots = sorted({Path(__file__).resolve().parents[2], Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()})
    under = [p for p in roots if p.is_relative_to("/tmp")]
    return [p for p in under if not any(p != q and p.is_relative_to(q) for q in under)]


def missing() -> str:
    """What this machine lacks for namespaces, in words; empty if nothing."""
    if sys.platform != "linux":
        return "namespaces need Linux"
    lacks = sorted({package for tool, package in NEEDED.items() if not _which(tool)})
    if lacks:
        return f"not installed: {', '.join(lacks)}"
    if os.geteuid() != 0:
        return "namespaces with a network need root"
    done = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else ""


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Namespaces:
    """Hosts on a bridge of their own. root: an empty folder for their files. gateway: this machine's address there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bridge = f"psb{os.getpid() % 1_000_000}"
        self.net = f"10.{random.randint(100, 250)}.{random.randint(1, 250)}"
        self.gateway = f"{self.net}.1"
        self.hosts: dict[int, subprocess.Popen[bytes]] = {}
        self.links: dict[int, str] = {}
        self.count = 0
        # an address of its own: a bridge without one changes it with every new port, and hosts lose it for a minute
        mac = "02:" + ":".join(f"{random.randrange(256):02x}" for _ in range(5))
        _do("ip", "link", "add", self.bridge, "address", mac, "type", "bridge")
        _do("ip", "address", "add", f"{self.gateway}/24", "dev", self.bridge)
        _do("ip", "link", "set", self.bridge, "up")

    def start(self, instance: int, env: dict[str, str], onstart: str) -> tuple[str, int]:
        self.count += 1
        n = self.count
        folder, name, ip, port = self.root / str(instance), self.name(instance), f"{self.net}.{10 + n}", 41000 + n
        home, tmp = folder / "home", folder / "tmp"
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        home.chmod(0o700)
        tmp.mkdir()
        tmp.chmod(0o1777)
        here = Path(sys.executable).parent
        # Ray gives up on a node of its own after 30 s, which a machine that plays several of them may need
        (home / ".bashrc").write_text(f"export PATH={here}:$PATH RAY_raylet_start_wait_time_s=180\n")
        (home / ".onstart").write_text(onstart + "\n")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key")], check=True)
        (folder / "passwd").write_text(
            "".join(
                "root:x:0:0:root:/mnt/host/home:/bin/bash\n" if line.startswith("root:") else line
                for line in Path("/etc/passwd").read_text().splitlines(keepends=True)
            )
        )
        (folder / "sshd_config").write_text(
            f"Port {port}\nHostKey /mnt/host/host_key\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
            f"UsePAM no\nPidFile none\nSetEnv PATH={here}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
        )
        init = folder / "init"
        keep = "".join(
            f"mkdir -p /mnt/host{path} && mount --bind {path} /mnt/host{path} || exit 1\n" for path in _covered_by_tmp()
        )
        init.write_text(INIT.format(shm=SHM_BYTES, name=f"C.{instance}", sshd=_which("sshd"), folder=folder, keep=keep))
        init.chmod(0o755)
        _do("ip", "netns", "add", name)
        # names of interfaces have 15 characters at most
        outer, inner = f"v{os.getpid() % 1_000_000}n{n}", f"w{os.getpid() % 1_000_000}n{n}"
        _do("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
        _do("ip", "link", "set", outer, "master", self.bridge, "up")
        _do("ip", "-n", name, "address", "add", f"{ip}/24", "dev", inner)
        _do("ip", "-n", name, "link", "set", inner, "up")
        _do("ip", "-n", name, "link", "set", "lo", "up")
        subprocess.run(
            ["ip", "netns", "exec", name, str(_which("nft")), "-f", "-"],
            input=FIREWALL.format(port=port).encode(),
            check=True,
        )
        clean = {"PATH": f"{here}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        self.links[instance] = outer
        self.hosts[instance] = subprocess.Popen(
            ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", str(init)],
            env=clean | env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return ip, port

    def name(self, instance: int) -> str:
        """The network namespace's name."""
        return f"{self.bridge}-{instance}"

    def authorize(self, instance: int, key: str) -> None:
        with open(self.root / str(instance) / "home" / ".ssh" / "authorized_keys", "a") as keys:
            keys.write(key.strip() + "\n")

    def stop(self, instance: int) -> None:
        process = self.hosts.pop(instance, None)
        if process is None:
            return
        process.send_signal(
            signal.SIGKILL
        )  # unshare dies, --kill-child takes the host's first process, that all the others
        process.wait()
        subprocess.run(["ip", "link", "delete", self.links.pop(instance)], capture_output=True)
        subprocess.run(["ip", "netns", "delete", self.name(instance)], capture_output=True)

    def close(self) -> None:
        for instance in list(self.hosts):
            self.stop(instance)
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
