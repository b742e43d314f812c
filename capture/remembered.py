"""Fingerprints of large local checkpoints, remembered between runs: a sweep asks for each of them in the driver and again in the
worker, and reading a gigabyte takes longer than a small capture.

What is remembered counts as long as every file has the same place, size, inode, time of change and time of status change (ctime)
as when it was hashed; nobody can set the last of these, and every write moves it. Files that changed less than QUIET_S before are
hashed again each time, because a later write could fall into the same tick of the clock. What is left is a file system that does
not keep these times, or a disk that changes under it: remove the folder, or set PAIRSCOPE_HOME to an empty one, to hash anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

QUIET_S = 2.0
LARGE = 32 << 20  # bytes; below, hashing costs less than asking


def folder() -> Path:
    """PAIRSCOPE_HOME (or ~/.pairscope)/fingerprints."""
    return Path(os.environ.get("PAIRSCOPE_HOME") or Path.home() / ".pairscope") / "fingerprints"


def remembered(files: Sequence[Path], make: Callable[[], str]) -> str:
    """`make()`, or what it gave for the same unchanged files before. A note that cannot be read or written is no matter."""
    began = time.time_ns()
    before = _state(files)
    if sum(state[3] for state in before) < LARGE:
        return make()
    note = folder() / f"{hashlib.sha256(json.dumps([s[0] for s in before]).encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["files"] == before:
            return str(known["fingerprint"])
    made = make()
    quiet = began - int(QUIET_S * 1e9)
    if _state(files) == before and all(max(state[4:]) < quiet for state in before):
        _write(note, {"fingerprint": made, "files": before})
    return made


def _state(files: Sequence[Path]) -> list[list[Any]]:
    """Of each file: real path, device, inode, size, time of change, time of status change (both in ns)."""
    found = []
    for file in files:
        s = file.stat()
        found.append([os.path.realpath(file), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns])
    return found


def _write(note: Path, content: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(note)
