"""Which process left something behind, and whether it is still there: file names and rows carry the answer."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from pathlib import Path

STAGE = re.compile(r"^\.tmp-(?P<host>.+)-(?P<pid>\d+)-(?P<born>\d*)-[^-]+$")  # a directory of capture/store.py
TEMPORARY = re.compile(r"\.(?P<pid>\d+)-(?P<born>\d*)-[0-9a-f]{8}@(?P<host>[^@]+)\.tmp$")  # a file of write_bytes
_PID = re.compile("[0-9]{1,10}")
LONG_AGO_S = 7 * 24 * 3600.0  # nobody can ask another machine: what it did not touch for so long is nobody's


def me() -> str:
    """This process, so that a later one can tell whether it still runs: `<host>/<pid>/<when it was born>`."""
    return f"{socket.gethostname()}/{os.getpid()}/{born(os.getpid()) or ''}"


def born(pid: int) -> str | None:
    """When a process began, as the kernel counts; None where it is gone. Tells a process from a later one of its number."""
    fields = _fields(pid)
    return fields[19] if fields else None


def alive(pid: int, when: str = "") -> bool:
    """Whether a process of this number runs on this machine: that which was born then, where that is known. One that is dead and
    that nobody asked for how it ended (a zombie) does not run."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    fields = _fields(pid)
    return fields is None or (fields[0] not in ("Z", "X") and when in ("", fields[19]))


def _fields(pid: int) -> list[str] | None:
    """What the kernel says of a process, from its state on; None where there is none, or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields if len(fields) > 19 else None


def is_here(who: str) -> bool:
    """Whether a process called as by `me` was one of this machine's."""
    return who.rpartition("/")[0].rpartition("/")[0] == socket.gethostname()


def runs(who: str) -> bool:
    """Whether a process of this machine, called as by `me`, is still there."""
    _, pid, when = who.rsplit("/", 2)
    return _PID.fullmatch(pid) is not None and alive(int(pid), when)


def temporary(path: str) -> str:
    """A name beside `path` to write to before it is renamed; says whose it is."""
    pid = os.getpid()
    return f"{path}.{pid}-{born(pid) or ''}-{uuid.uuid4().hex[:8]}@{socket.gethostname()}.tmp"


def stage() -> str:
    """The same for a directory, as the beginning of its name."""
    pid = os.getpid()
    return f".tmp-{socket.gethostname()}-{pid}-{born(pid) or ''}-"


def folder() -> Path:
    """A new directory among the system's temporary files, for its owner alone; those that killed processes left there are
    removed."""
    remove_leftovers(Path(tempfile.gettempdir()))
    return Path(tempfile.mkdtemp(prefix=stage()))


def remove_leftovers(directory: Path) -> None:
    """Remove what killed writers left in a directory: files and stages of dead processes of this machine, and of other
    machines what was not touched for a week."""
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        found = STAGE.search(name) or TEMPORARY.search(name)
        if found is None:
            continue
        path = directory / name
        try:
            if found["host"] == socket.gethostname():
                left = not alive(int(found["pid"]), found["born"])
            else:
                left = time.time() - path.stat().st_mtime > LONG_AGO_S
        except OSError:  # its writer was faster
            continue
        if left:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
