"""Work for tests of spans over workers: real captures whose workers end, or are lost, where a test wants it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from capture.config import Entry
from capture.run import capture_pair

PATIENCE_S = 120  # for a worker that another one waits for to import torch on a busy machine


def in_step(entry: Entry, out: str, **kwargs: Any) -> Any:
    """A capture whose first worker computes on only once the second has read its first layers."""
    from capture import spanwalk

    mark = Path(out) / "prefetched"
    due, prefetch = spanwalk.SpanWalk.due, spanwalk.SpanWalk._prefetch

    def wait_for_the_next(self: Any, layer: int) -> bool:
        end = time.monotonic() + PATIENCE_S
        while self.relay.index == 0 and not mark.exists():
            assert time.monotonic() < end, "the next worker has read nothing"
            time.sleep(0.02)
        return due(self, layer)

    def leave_a_mark(self: Any, start: int, mode: str) -> None:
        prefetch(self, start, mode)
        mark.write_text(str(self.ledger.live))

    spanwalk.SpanWalk.due, spanwalk.SpanWalk._prefetch = wait_for_the_next, leave_a_mark  # type: ignore[method-assign]
    return capture_pair(entry, out, **kwargs)


def killed_once(entry: Entry, out: str, **kwargs: Any) -> Any:
    """The same, and the second worker is killed by SIGKILL behind its first layer, once."""
    from capture import spanwalk

    due = spanwalk.SpanWalk.due

    def then_die(self: Any, layer: int) -> bool:
        mark = Path(out) / "killed"
        if self.relay.index == 1 and not mark.exists():
            mark.write_text(str(layer))
            os.kill(os.getpid(), signal.SIGKILL)
        return due(self, layer)

    spanwalk.SpanWalk.due = then_die  # type: ignore[method-assign]
    return in_step(entry, out, **kwargs)
