"""What became of a worker that did not come back: it died, Ray ended it to save memory, or it is a bug of ours."""

from __future__ import annotations

from ray.exceptions import RayError, RayTaskError

from capture.attempt import Outcome
from capture.errors import PairscopeError
from cluster.crew import Crew


class WorkerDiedError(PairscopeError):
    """The process or the machine that worked on an entry was lost."""


# what a worker says that never heard of the work that it is asked about
UNHEARD = Outcome(
    "failed",
    {"error_class": WorkerDiedError.__name__, "error": "the line to the worker was cut before it got its work"},
    died=True,
)


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
