"""The actor that works on entries. It imports no torch and no Ray, so that it starts fast; the work imports what it needs."""

from __future__ import annotations

import os
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import cluster.deliver  # noqa: F401  what opens an output on the head's disk
from capture.attempt import WORK, Outcome, Try, work_on
from capture.config import Entry
from capture.progress import Progress
from capture.ranks import Ranks
from capture.relay import LostError, Relay, Sent
from cluster.rate import share_of_rate
from cluster.resources import WORKER_BYTES

PREPARED = "cluster.prepare:capture_prepared"
LEFT_ON_GPU = 64 * 1024**2  # bytes that torch may keep after an entry


class CaptureActor:
    """Runs attempts, one after the other. `run` works in one thread while `watch` and `stop` answer in another."""

    def __init__(self, env: dict[str, str | None]) -> None:
        for name, value in env.items():  # read by torch and OpenMP when they are first imported, which is later
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._stop = threading.Event()
        self._progress: Progress | None = None
        self._relay: Relay | None = None
        self._meeting: socket.socket | None = None
        self._outcomes: dict[str, Outcome] = {}  # of the last attempt, by its log

    def prepare(self, turn: tuple[int, int] = (0, 1)) -> dict[str, Any]:
        """Answers once the actor is placed and alive: where it is, and what it costs there (None where that is not known).

        turn: (index, count) among the workers that walk the layers of one capture in turn.
        """
        if turn[1] > 1:
            self._relay = Relay(*turn, fetch=_fetch)
        return {
            "node": socket.gethostname(), "node_id": _node_id(), "pid": os.getpid(), "dollars_per_hour": _rate()
        }  # fmt: skip

    def meeting_place(self) -> tuple[str, int]:
        """Address and port of this node where the ranks of a group meet; rank 0 is asked, and holds the port until they have."""
        self._leave_meeting()
        self._meeting = socket.socket()
        self._meeting.bind(("127.0.0.1", 0))  # all ranks are on one node
        address, port = self._meeting.getsockname()
        return address, port

    def run(
        self, entry: Entry, out: str, log: str, tried: Try, force: bool, work: str, ranks: Ranks | None = None
    ) -> Outcome:
        """One attempt; returns how it ended, and never raises for what the work does."""
        self._progress, self._outcomes = None, {}
        if ranks is not None and self._meeting is not None:
            ranks = replace(ranks, listener=self._meeting.fileno())
        try:
            outcome = work_on(
                entry, out, log, tried=tried, force=force, work=PREPARED if work == WORK else work, progress=self._keep, stop=self._stop.is_set,
                own_process=True, ranks=ranks, relay=self._relay,
            )  # fmt: skip
        finally:
            self._leave_meeting()
        self._outcomes[log] = replace(outcome, tidy=holds_little())
        return self._outcomes[log]

    def outcome(self, log: str) -> Outcome | None:
        """Once more what `run` returned for the attempt with this log, for a driver whose line was cut meanwhile: calls wait
        for those before them. None where the attempt never came this far."""
        return self._outcomes.get(log)

    def give(self, sent: tuple[Sent, ...]) -> None:
        """What the workers before this one handed over: now its layers can be walked."""
        assert self._relay is not None
        self._relay.give(sent)

    def part(self, parcel: int, index: int) -> Any:
        """A part of what this worker hands over, for the object store."""
        assert self._relay is not None
        return self._relay.outbox.part(parcel, index)

    def all_sent(self) -> None:
        """Answers after all parts that were asked for before."""

    def watch(self) -> Progress | None:
        """The latest progress."""
        return self._progress

    def stop(self) -> None:
        """Ask the work to end at the next layer."""
        self._stop.set()

    def _leave_meeting(self) -> None:
        if self._meeting is not None:
            self._meeting.close()
        self._meeting = None

    def _keep(self, progress: Progress) -> None:
        self._progress = progress


def holds_little() -> bool:
    """True if this process, its work done, holds no more memory than one that was just started: it can be given another entry.

    Counted is memory of its own, not pages of mapped files. False where that cannot be found out.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > LEFT_ON_GPU:
        return False
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        own = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
    except (OSError, StopIteration, ValueError):
        return False
    return own * 1024 <= WORKER_BYTES


def _fetch(span: int, part: Any) -> Any:
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(part)
    except RayError as error:  # its node is gone, and with it the only copy
        raise LostError(span) from error


def _node_id() -> str | None:
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else None


def _rate() -> float | None:
    import ray

    if not ray.is_initialized():
        return None
    here = ray.get_runtime_context()
    cpus = next((n["Resources"].get("CPU", 0.0) for n in ray.nodes() if n["NodeID"] == here.get_node_id()), 0.0)
    return share_of_rate(here.get_assigned_resources(), cpus)
