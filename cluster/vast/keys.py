"""A cluster's own secrets, made on the laptop: ssh key, mesh key, Ray's token. Each in a file that only its owner can read."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import subprocess
from pathlib import Path

from capture.errors import ConfigError
from cluster.vast.state import not_written

SSH_KEY, MESH_KEY, TOKEN, API_KEY, KNOWN_HOSTS = (
    "id_ed25519",
    "mesh_ed25519",
    "auth_token",
    "vast_api_key",
    "known_hosts",
)


def make_missing(folder: Path) -> None:
    """Make the keys and the token that are not there yet. The head's API key is made when the head is: see headkey."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in (SSH_KEY, MESH_KEY):
            if not (folder / name).exists():
                _generate(folder / name)
        if not (folder / TOKEN).exists():
            write_secret(folder / TOKEN, secrets.token_hex(32))
        for name in (SSH_KEY, MESH_KEY, TOKEN, API_KEY):
            _close(folder / name)
        for name in (SSH_KEY, MESH_KEY):
            _complete(folder / name)
    except OSError as error:
        raise not_written(f"the cluster's keys in '{folder}'", error) from error


def remove(folder: Path) -> None:
    """Forget a cluster's secrets once it has ended; the next one of the name gets new ones."""
    for name in (SSH_KEY, f"{SSH_KEY}.pub", MESH_KEY, f"{MESH_KEY}.pub", TOKEN, API_KEY, KNOWN_HOSTS):
        (folder / name).unlink(missing_ok=True)


def owner(folder: Path) -> str:
    """A short fingerprint of the cluster's ssh key. Instances carry it, to tell our cluster from another's of the same name."""
    _complete(folder / SSH_KEY)
    return hashlib.sha256((folder / f"{SSH_KEY}.pub").read_bytes()).hexdigest()[:12]


def write_secret(path: Path, text: str) -> None:
    """Write a file of mode 0600, never readable to others in between."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.unlink(missing_ok=True)
    with os.fdopen(os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    os.replace(tmp, path)


def as_option(path: Path) -> str:
    """A path as the value of an option that ssh takes several files for: a space would begin the next one."""
    return re.sub(r"([ '\"\\])", r"\\\1", str(path)).replace("%", "%%")


def pinned(known_hosts: Path, alias: str) -> str:
    """The lines of a known_hosts file for one alias; empty where it was never met."""
    if not known_hosts.exists():
        return ""
    lines = known_hosts.read_text().splitlines()
    return "".join(f"{line}\n" for line in lines if line.split(" ", 1)[0] == alias)


def check_closed(folder: Path) -> None:
    """Raise ConfigError where the disk keeps no secret to its owner: ssh passes over a key that others can read, and a machine that is
    rented lets in no other."""
    for name in (SSH_KEY, MESH_KEY):
        if _is_open(folder / name):
            raise ConfigError(
                f"'{folder / name}' can be read by others, and its disk keeps it so: ssh does not use it. Set PAIRSCOPE_HOME to a folder on "
                "a disk that knows owners and rights"
            )


def _close(path: Path) -> None:
    """Leave a secret to its owner alone, also one that was copied."""
    if _is_open(path):
        path.chmod(0o600)


def _is_open(path: Path) -> bool:
    """Whether a file of ours can be read by others; of one that is not ours ssh does not ask."""
    return path.exists() and path.stat().st_uid == os.getuid() and bool(path.stat().st_mode & 0o077)


def _complete(path: Path) -> None:
    """The public half of the key at `path`, where it is not there."""
    public = Path(f"{path}.pub")
    if public.exists():
        return
    _close(path)  # nor does ssh-keygen read one that others can read
    try:
        done = subprocess.run(
            ["ssh-keygen", "-y", "-P", "", "-f", str(path)], capture_output=True, stdin=subprocess.DEVNULL, text=True
        )
    except OSError as error:
        raise ConfigError(f"cannot read the ssh key '{path}': {error}; install the ssh client") from error
    if done.returncode:
        raise ConfigError(
            f"'{path}' is no key that ssh-keygen can read ({' '.join(done.stderr.split())[-200:]}): copy the folder anew from where the "
            "cluster was made, or remove the file if nothing is rented"
        )
    write_secret(public, done.stdout)


def _generate(path: Path) -> None:
    """A pair at `path`, the public key first: whoever finds the private one has both, however this ends."""
    new = path.with_name(path.name + ".new")
    made = ((Path(f"{new}.pub"), Path(f"{path}.pub")), (new, path))
    for half, _ in made:
        half.unlink(missing_ok=True)
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "pairscope", "-f", str(new)]
    try:
        subprocess.run(
            command, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        )
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split())[-300:] or f"ssh-keygen ended with {error.returncode}"
        raise ConfigError(
            f"could not make the ssh key '{path}': {said}; make room there, or set PAIRSCOPE_HOME"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"could not make the ssh key '{path}': {error}; install the ssh client (openssh-client)"
        ) from error
    for half, whole in made:
        os.replace(half, whole)
