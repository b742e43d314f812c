"""What a cluster's head has to give: `python3 -m cluster.shelf [OUT]`, run there by `pairscope collect` through ssh.

Prints one line: PREFIX and a JSON object. Reads only.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from capture.errors import PairscopeError
from capture.layout import RunDir
from cluster.note import read_notes

PREFIX = "pairscope-shelf "


def shelf(out: str | None) -> dict[str, Any]:
    """The sweeps that were noted; of the run directory `out` (by default the last sweep's) all that is complete, and the manifest.

    sweeps: those into `out` name it as it is named here, by whatever way it was named to them. others: run directories of other
    sweeps, with the captures that are complete in each. unread: notes and such directories that cannot be read, with the reason.
    error: in words, where `out` cannot be read. A run directory in an object store is only named: whoever asks can look there
    himself.
    """
    notes, unread = read_notes()
    out = out or (notes[-1]["out"] if notes else None)
    # here alone it is known where links lead
    notes = [note | {"out": out} if out and _same(note["out"], out) else note for note in notes]
    found: dict[str, Any] = {
        "sweeps": notes, "out": out, "captures": [], "rows": [], "logs": [], "others": {}, "unread": unread,
        "error": None,
    }  # fmt: skip
    if out is not None and "://" not in out:
        try:
            run = RunDir(out)
            found["captures"] = _captures(run)
            found["rows"] = run.manifest_rows()
            found["logs"] = logs(run)
        except (PairscopeError, OSError) as error:
            found["error"] = str(error)
    for other in {n["out"] for n in notes} - {out}:
        if "://" not in other:
            try:
                found["others"][other] = _captures(RunDir(other))
            except (PairscopeError, OSError) as error:
                unread[other] = str(error)
    return found


def _same(one: str, other: str) -> bool:
    """Whether two run directories of this machine are one, by way of links or `..`."""
    return not any("://" in out for out in (one, other)) and os.path.realpath(one) == os.path.realpath(other)


def _captures(run: RunDir) -> list[dict[str, Any]]:
    return [{"pair": c.pair, "capture": c.capture, "marker": c.marker} for c in run.captures()]


def logs(run: RunDir) -> list[str]:
    """All logs, as paths below the run directory; an attempt may have several, one for each of its workers."""
    folders = run.directories(f"{run.root}/logs")
    return [f"logs/{d.base_name}/{f.base_name}" for d in folders for f in run.list_dir(d.path)]


if __name__ == "__main__":
    print(PREFIX + json.dumps(shelf(sys.argv[1] if len(sys.argv) > 1 else None)))
