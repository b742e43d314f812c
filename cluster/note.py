"""What the machine that drives a cluster's sweeps notes about each, for those who look from home.

PAIRSCOPE_HOME (or ~/.pairscope)/sweeps/<when>-<pid>.json
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from capture.manifest import now
from capture.process import alive, born

KEPT = 50  # notes, and more where they are the last ones of a run directory or of sweeps that run


def folder() -> Path:
    return Path(os.environ.get("PAIRSCOPE_HOME") or Path.home() / ".pairscope") / "sweeps"


@contextlib.contextmanager
def noted(out: str, entries: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Note a sweep for the length of the block; what the block adds to the dict (exit_code, items) is noted at its end. beside:
    [pid, born] of the sweeps that run as it begins: it does not take up what those leave.

    out: the run directory, an absolute path or a URI. A block that ends with an exception leaves exit_code null.
    """
    place = folder()
    content: dict[str, Any] = {
        "out": out, "entries": list(entries), "started": now(), "ended": None, "exit_code": None, "items": [],
        "pid": os.getpid(), "born": born(os.getpid()), "beside": _running(),
    }  # fmt: skip
    path = place / f"{content['started'].replace(':', '')}-{os.getpid()}.json"
    with contextlib.suppress(OSError):  # it is for convenience, and must not cost a sweep
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(path, content)
        _forget_old(place)
    try:
        yield content
    finally:
        content["ended"] = now()
        with contextlib.suppress(OSError):
            _write(path, content)


def read_notes() -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All notes, oldest first, and those that cannot be read, as path -> why. `alive` is true where the process that wrote it
    still runs."""
    found, unread = [], {}
    for path in sorted(folder().glob("*.json")):
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


def _running() -> list[list[Any]]:
    with contextlib.suppress(OSError):  # as below
        return [[note["pid"], note["born"]] for note in read_notes()[0] if note["alive"]]
    return []


def _runs(note: dict[str, Any]) -> bool:
    """Whether its process works on; one that was killed and that nobody reaps is still in the list of processes."""
    return note["ended"] is None and born(note["pid"]) == note["born"] and alive(note["pid"])


def _write(path: Path, content: dict[str, Any]) -> None:
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(content))
    os.replace(tmp, path)


def _forget_old(place: Path) -> None:
    """Keep the last KEPT, the last of each run directory, whose captures may not be at home yet, and those of sweeps that run."""
    outs: set[str] = set()
    for n, path in enumerate(sorted(place.glob("*.json"), reverse=True)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # what cannot be read stays
            note = json.loads(path.read_text())
            if n >= KEPT and note["out"] in outs and not _runs(note):
                path.unlink(missing_ok=True)
            outs.add(note["out"])
