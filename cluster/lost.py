"""What became of a worker that did not come back: it died, Ray ended it to save memory, it stands still, or it is a bug of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.exceptions import RayError, RayTaskError

from capture.attempt import Outcome, duration
from capture.errors import PairscopeError

if TYPE_CHECKING:
    from cluster.crew import Crew


class WorkerDiedError(PairscopeError):
    """The process or the machine that worked on an entry was lost."""


# what a worker says that never heard of the work that it is asked about
UNHEARD = Outcome(
    "failed",
    {"error_class": WorkerDiedError.__name__, "error": "the line to the worker was cut before it got its work"},
    died=True,
)

SILENT_S = 1800.0  # an import, a compilation or a machine that swaps may keep a worker from answering for minutes
STEP_S = 5.0


class Pulse:
    """For how long a worker has not said how far it is, which its second thread does at once unless the whole process stands
    still: stopped by a signal, or hanging in a driver's call. Only time in which the driver itself was awake counts."""

    def __init__(self) -> None:
        self.silent = 0.0
        self._before: float | None = None

    def heard(self) -> None:
        self.silent = 0.0

    def look(self, now: float, *, asked: bool) -> float:
        """Seconds of silence up to now; asked: whether an answer is waited for."""
        step = 0.0 if self._before is None else min(now - self._before, STEP_S)
        self._before = now
        self.silent = self.silent + step if asked else 0.0
        return self.silent


def silent(crew: Crew) -> Outcome:
    """How an attempt ended whose worker does not answer any more."""
    where = f" on {crew.place['node']}, pid {crew.place['pid']}," if crew.place is not None else ""
    text = f"no sign of life from the worker{where} for {duration(crew.pulse.silent)}: its process is stopped or hangs; it is ended"
    return Outcome("failed", {"error_class": WorkerDiedError.__name__, "error": text}, died=True)


def lost(error: RayError, crew: Crew) -> Outcome:
    """How an attempt ended whose worker Ray gives up with this error."""
    text = " ".join(str(error).split())
    if isinstance(error, RayTaskError) or getattr(error, "actor_init_failed", False):
        cause = getattr(error, "cause", None) or error
        return Outcome("failed", {"error_class": type(cause).__name__, "error": text[-2000:]}, bug=True)
    memory = "memory pressure" in text or "OUT_OF_MEMORY" in text or "running low on memory" in text
    detail = text.split("Worker exit detail:")[-1].split("Some common causes")[0].strip()
    if detail == text:
        detail = text.removeprefix("The actor died unexpectedly before finishing this task.").strip()
    if "unexpectedly exits with a connection error" in detail:
        detail = "the worker process was killed or crashed; if memory was short, try --jobs 1 or mode: streamed"
    where = f" on {crew.place['node']}" if crew.place is not None else ""
    fields = {"error_class": WorkerDiedError.__name__, "error": f"lost the worker{where}: {detail}"[:2000]}
    return Outcome("failed", fields, out_of_memory=memory, died=True, node_gone="its node has died" in text)
