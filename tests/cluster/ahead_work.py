"""A capture in a worker that fetches as the real one does and computes nothing: it waits until the driver of the test says so."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from fake_work import Result

import capture.run
from capture.config import Entry
from capture.progress import Progress
from cluster.prepare import capture_prepared

LONGEST_S = 120.0


def capture_pair(entry: Entry, out: str, *, progress: Any, stop: Any, **more: Any) -> Result:
    """Stands in for the capture: its weights have come, and it goes on until the file exists that the entry's notes name."""
    home = Path(os.environ["HF_HUB_CACHE"])
    note = {"entry": entry.name, "weights": entry.weights, "cache": home.parent.name, "whole": whole(home)}
    progress(Progress(entry.name, "layers", 1, 2, here=True))
    end = time.monotonic() + LONGEST_S
    while entry.notes and not Path(entry.notes).exists():
        if stop():
            raise KeyboardInterrupt
        assert time.monotonic() < end, f"{entry.name}: nobody said to go on"
        time.sleep(0.05)
    note["whole_at_the_end"] = whole(home)
    folder = Path(out) / "notes"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{entry.name}.json").write_text(json.dumps(note))
    return Result(
        entry.name, f"id-{entry.name}", f"{out}/captures", "complete", 0.1, 2, 34, "resident", "cpu", "cpu", 1, 1
    )


def whole(cache: Path) -> list[str]:
    """Models in a cache with all their weights."""
    found = cache.glob("models--*/snapshots/*/model.safetensors")
    return sorted(p.parents[2].name.removeprefix("models--").replace("--", "/") for p in found if p.exists())


def work(entry: Entry, out: str, **more: Any) -> Any:
    capture.run.capture_pair = capture_pair  # type: ignore[assignment]
    return capture_prepared(entry, out, **more)
