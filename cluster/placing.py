"""Places that do not come: what an entry waits for, what there is, and when to stop waiting."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import ray

from capture.attempt import duration
from capture.errors import DeviceError
from cluster.connect import never_to_come
from cluster.job import Job
from cluster.resources import refusal

WITHIN = 600.0  # seconds that an entry waits for a place while nothing of its own sweep is at work
WITHIN_GROWING = 3600.0  # the same where an autoscaler first has to rent, boot and set up a machine
WITHOUT_NODES = 30.0  # seconds after which a Ray that has no node left, and cannot grow, is given up
ASK_EVERY = 5.0  # seconds between two questions to the autoscaler about what waits
WAITING_LONG = 15.0  # seconds without a place after which the screen says what an entry waits for

NO_NODE = DeviceError(
    "the Ray of this sweep has no node left: its processes were killed, or their machine ran out of memory; run again"
)


class Patience:
    """Looks at the jobs that wait for a place. While any other job works nothing is failed: its place may be the next one's,
    and Ray calls a request infeasible too where only the number of nodes is used up."""

    def __init__(self, *, growing: bool, within: float | None, now: float) -> None:
        self.growing, self.within = growing, within or (WITHIN_GROWING if growing else WITHIN)
        self.asked = self.worked = self.looked = self.lived = now
        # no node was left for WITHOUT_NODES, and none came since: what is behind in the queue need not wait
        self.bare = False
        self.first: dict[str, float] = {}  # when a place like this was first asked for since anything worked

    def look(self, jobs: list[Job], now: float) -> tuple[list[tuple[Job, str]], list[tuple[Job, DeviceError]]]:
        """What to tell of which job, and which jobs to give up."""
        if any(job.working for job in jobs):
            self.worked = now
            self.first.clear()
            return [], []
        waiting = [job for job in jobs if job.crew is not None]
        told, given_up = [], [(job, error) for job in waiting if (error := self._late(job, now)) is not None]
        if waiting and not self.growing and (self.bare or now > self.looked + ASK_EVERY):
            self.looked = now
            if live_nodes():
                self.lived, self.bare = now, False
            elif now > max(self.lived, self.worked) + WITHOUT_NODES:
                self.bare = True
                given_up += [(job, NO_NODE) for job in waiting]
        for job in waiting:
            if now > self._since(job) + WAITING_LONG and not job.waiting_told:
                job.waiting_told = True
                told.append((job, f"waiting for a place with {job.request.text}"))
        if self.growing and waiting and now > self.asked + ASK_EVERY:
            self.asked = now
            given_up += [(job, error) for job in self._never(waiting) for error in [self._no_type(job)]]
        return told, list({id(job): (job, error) for job, error in given_up}.values())

    def _since(self, job: Job) -> float:
        """Since when it waits. The entry of a long queue that is asked for once others like it were given up waits no time of its own:
        a sweep of hundreds would take hours to fail, on machines that cost."""
        assert job.crew is not None
        return max(self.first.setdefault(job.request.text, job.crew.asked), self.worked)

    def _late(self, job: Job, now: float) -> DeviceError | None:
        if now < self._since(job) + self.within:
            return None
        return DeviceError(
            f"entry '{job.name}' asks for {job.request.text} on one node, and got no place within {duration(self.within)}; "
            f"there is {what_there_is()}. Wait for who holds it, ask for less (gpus, tensor_parallel, accelerator_type), or "
            "give it longer with --place-within"
        )

    def _never(self, waiting: list[Job]) -> list[Job]:
        nodes = live_nodes()
        unheard = [job for job in waiting if refusal(job.request, nodes) is not None]
        if not unheard:
            return []  # nodes that are there could hold them; what the autoscaler says is some seconds old
        never = never_to_come()
        return [job for job in unheard if any(job.request.is_asked_by(resources) for resources in never)]

    def _no_type(self, job: Job) -> DeviceError:
        return DeviceError(
            f"entry '{job.name}' asks for {job.request.text} on one node; no node type of this cluster has that"
        )


def live_nodes(without: Collection[str] = ()) -> list[dict[str, float]]:
    """Total resources of each live node, but for those of these ids."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in without]


def what_there_is() -> str:
    """Free and total GPUs and CPUs of each live node, in words."""
    free: dict[str, dict[str, float]] = {}
    with contextlib.suppress(Exception):  # not a public function: without it only totals are told
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
    parts = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        mine: Any = free.get(node["NodeID"])
        texts = []
        for kind in ("GPU", "CPU"):
            total = node["Resources"].get(kind, 0.0)
            if total:
                left = f"{mine.get(kind, 0.0):g} of " if mine is not None else ""
                texts.append(f"{left}{total:g} {kind}s{' free' if left else ''}")
        kinds = [k.removeprefix("accelerator_type:") for k in node["Resources"] if k.startswith("accelerator_type:")]
        parts.append(f"{node['NodeManagerHostname']}: {', '.join([*kinds, *texts]) or 'nothing'}")
    return "; ".join(parts) or "no node"
