"""The actor that works on one entry. It imports no torch and no Ray, so that it starts fast; the work imports what it needs."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

from capture.attempt import Outcome, Try, work_on
from capture.config import Entry
from capture.progress import Progress
from capture.ranks import Ranks


class CaptureActor:
    """Runs attempts at one entry. `run` works in one thread while `watch` and `stop` answer in another."""

    def __init__(self, env: dict[str, str | None]) -> None:
        for name, value in env.items():  # read by torch and OpenMP when they are first imported, which is later
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._stop = threading.Event()
        self._progress: Progress | None = None

    def prepare(self) -> dict[str, Any]:
        """Answers once the actor is placed and alive: where it is."""
        return {"node": socket.gethostname(), "pid": os.getpid()}

    def meeting_place(self) -> tuple[str, int]:
        """Address and a free port of this node, where the ranks of a group meet: rank 0 is asked."""
        with socket.socket() as found:
            found.bind(("", 0))
            return "127.0.0.1", int(found.getsockname()[1])  # all ranks are on one node

    def run(
        self, entry: Entry, out: str, log: str, tried: Try, force: bool, work: str, ranks: Ranks | None = None
    ) -> Outcome:
        """One attempt; returns how it ended, and never raises for what the work does."""
        return work_on(
            entry, out, log, tried=tried, force=force, work=work, progress=self._keep, stop=self._stop.is_set,
            own_process=True, ranks=ranks,
        )  # fmt: skip

    def watch(self) -> Progress | None:
        """The latest progress."""
        return self._progress

    def stop(self) -> None:
        """Ask the work to end at the next layer."""
        self._stop.set()

    def _keep(self, progress: Progress) -> None:
        self._progress = progress
