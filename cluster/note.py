"""What the machine that drives a cluster's sweeps notes about each, for those who look from home.

PAIRSCOPE_HOME (or ~/.pairscope)/sweeps/<when>-<pid>.json, or in memory where that cannot be written to: a sweep of which nobody knows
may have its cluster taken down under it, and whoever waits for it at home waits for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from capture.errors import why_not_written
from capture.manifest import later_than, now
from capture.process import alive, born

MEMORY = Path("/dev/shm")  # has room where a disk is full, and lasts as long as the machine
KEPT = 50  # notes, and more where they are the last ones of a run directory or of sweeps that run


def folder() -> Path:
    return Path(os.environ.get("PAIRSCOPE_HOME") or Path.home() / ".pairscope") / "sweeps"


def in_memory() -> Path:
    """The folder for notes of which `folder()` cannot hold the last word."""
    home = hashlib.sha256(str(folder()).encode()).hexdigest()[:12]
    return MEMORY / f"pairscope-{os.getuid()}-{home}"


@contextlib.contextmanager
def noted(out: str, entries: Sequence[str], say: Callable[[str], None] = lambda line: None) -> Iterator[dict[str, Any]]:
    """Note a sweep for the length of the block; what the block adds to the dict (exit_code, items) is noted at its end. beside:
    [pid, born] of the sweeps that run as it begins: it does not take up what those leave.

    out: the run directory, an absolute path or a URI. say: is told where no note can be left. A block that ends with an exception
    leaves exit_code null.
    """
    before: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):  # it must not cost a sweep
        before = read_notes()[0]
    started = later_than(max((str(note.get("started")) for note in before), default=""), now())
    content: dict[str, Any] = {
        "out": out, "entries": list(entries), "started": started, "ended": None, "exit_code": None, "items": [],
        "pid": os.getpid(), "born": born(os.getpid()), "beside": [[note["pid"], note["born"]] for note in before if note["alive"]],
    }  # fmt: skip
    name = f"{started.replace(':', '')}-{os.getpid()}.json"
    _leave(name, content, say)
    try:
        yield content
    finally:
        content["ended"] = now()
        _leave(name, content, say)


def read_notes() -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All notes, oldest first, and those that cannot be read, as path -> why. `alive` is true where the process that wrote it
    still runs."""
    found, unread = [], {}
    paths = {path.name: path for path in folder().glob("*.json")}
    if _is_ours(in_memory()):
        paths |= {path.name: path for path in in_memory().glob("*.json")}  # of two of a name the later word
    for _, path in sorted(paths.items()):
        try:
            note = json.loads(path.read_text())
            alive = _runs(note)
            if not isinstance(note["out"], str):
                raise TypeError(f"'out' is {note['out']!r}")
            found.append(note | {"alive": alive})
        except FileNotFoundError:  # an old one, forgotten meanwhile
            continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            unread[str(path)] = f"{type(error).__name__}: {error}"
    return found, unread


def _runs(note: dict[str, Any]) -> bool:
    """Whether its process works on; one that was killed and that nobody reaps is still in the list of processes."""
    return note["ended"] is None and born(note["pid"]) == note["born"] and alive(note["pid"])


def _leave(name: str, content: dict[str, Any], say: Callable[[str], None]) -> None:
    """Write a note where it can be written; that it cannot be is told, and must not cost a sweep."""
    spare = in_memory()
    try:
        folder().mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(folder() / name, content)
    except OSError as error:
        with contextlib.suppress(OSError):
            spare.mkdir(mode=0o700, exist_ok=True)
            if _is_ours(spare):
                _write(spare / name, content)
                return
        say(
            f"no note of this sweep can be left in '{folder()}' ({why_not_written(error)}): `pairscope collect` will not see it, so do not "
            "let it take the cluster down"
        )
        return
    with contextlib.suppress(OSError):
        if _is_ours(spare):
            (spare / name).unlink(missing_ok=True)
        _forget_old(folder())


def _is_ours(place: Path) -> bool:
    """Whether it is a folder that nobody else may write to: in memory anybody makes some."""
    try:
        found = place.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _write(path: Path, content: dict[str, Any]) -> None:
    tmp = path.with_suffix(".tmp")
    try:
        tmp.write_text(json.dumps(content))
        os.replace(tmp, path)
    except OSError:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise


def _forget_old(place: Path) -> None:
    """Keep the last KEPT, the last of each run directory, whose captures may not be at home yet, and those of sweeps that run."""
    outs: set[str] = set()
    for n, path in enumerate(sorted(place.glob("*.json"), reverse=True)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # what cannot be read stays
            note = json.loads(path.read_text())
            if n >= KEPT and note["out"] in outs and not _runs(note):
                path.unlink(missing_ok=True)
            outs.add(note["out"])
