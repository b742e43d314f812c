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
from capture.process import born

KEPT = 50  # notes of ended sweeps


def folder() -> Path:
    return Path(os.environ.get("PAIRSCOPE_HOME") or Path.home() / ".pairscope") / "sweeps"


@contextlib.contextmanager
def noted(out: str, entries: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Note a sweep for the length of the block; what the block adds to the dict (exit_code, items) is noted at its end.

    out: the run directory, an absolute path or a URI. A block that ends with an exception leaves exit_code null.
    """
    place = folder()
    content: dict[str, Any] = {
        "out": out, "entries": list(entries), "started": now(), "ended": None, "exit_code": None, "items": [],
        "pid": os.getpid(), "born": born(os.getpid()),
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
            alive = note["ended"] is None and born(note["pid"]) == note["born"]
            if not isinstance(note["out"], str):
                raise TypeError(f"'out' is {note['out']!r}")
            found.append(note | {"alive": alive})
        except FileNotFoundError:  # an old one, forgotten meanwhile
            continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            unread[str(path)] = f"{type(error).__name__}: {error}"
    return found, unread


def _write(path: Path, content: dict[str, Any]) -> None:
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(content))
    os.replace(tmp, path)


def _forget_old(place: Path) -> None:
    for path in sorted(place.glob("*.json"))[:-KEPT]:
        path.unlink(missing_ok=True)
