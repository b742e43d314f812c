"""Run a whole capture while everything that is alive is counted: weights by the ledger, all else by its storages.

How it counts: capture/live.py adds up the storages that operations of the capture's own thread make and that something still
refers to. Reading of weights is left out of that, in whatever thread, because the ledger counts weights from the moment that
their reading may begin. The check on a tiny model of the same class, which is no part of the capture, is left out too.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from capture import checkpoint, sublayer, work
from capture.ledger import Ledger
from capture.live import Live
from capture.run import capture_pair


@dataclass(frozen=True)
class Counted:
    """Bytes: what was planned for all and for weights, what was alive at most, and of weights; the sizes of what was alive then
    beside weights; and capture.json."""

    planned: int
    peak: int
    weights_planned: int
    weights_peak: int
    at_peak: list[int]
    document: dict[str, Any]


def counted_capture(entry: Any, out: Path, monkeypatch: Any, *, limit: float = float("inf")) -> Counted:
    """Capture with everything counted. limit: bytes above which an operation runs out of memory."""
    ledger = Ledger()
    monkeypatch.setattr(work, "Ledger", lambda: ledger)
    monkeypatch.setattr(work, "replay_check", lambda model: "left out")
    for owner, name in ((checkpoint.StreamedModel, "load"), (sublayer, "_read_rows")):
        monkeypatch.setattr(owner, name, _uncounted(getattr(owner, name)))
    with Live(torch.device("cpu"), beside=lambda: ledger.live, limit=limit) as live:
        result = capture_pair(entry, str(out))
    monkeypatch.undo()
    document = json.loads((Path(result.path) / "capture.json").read_text())
    return Counted(
        result.planned_memory_bytes,
        live.peak,
        document["memory"]["planned"]["weights"],
        ledger.peak,
        sorted(live.at_peak, reverse=True),
        document,
    )


def _uncounted(function: Any) -> Any:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return wrapped
