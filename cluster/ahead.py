"""While an entry computes on a node, the files of the one that is likely to run there next are fetched into the node's cache.

The driver decides, since it knows the queue. A node fetches ahead once all entries at work on it have their own weights, for one
entry at a time, and gives way when another one begins there. Where the entry runs elsewhere after all, only bytes were spent; so
no two nodes fetch for the same entry, and a node that is free goes on with the entry whose files it has.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from capture.attempt import duration
from capture.config import Entry
from capture.progress import Progress
from capture.show import WAITING, Show
from cluster.ahead_fetch import Fetched, Fetching
from cluster.job import Job
from cluster.prepare_disk import GIB
from cluster.prepare_files import hub_models
from cluster.prepare_gate import find_gate
from cluster.queue import Queue
from cluster.resources import refusal

WATCH_EVERY = 1.0  # seconds between two looks at what has come
GIVE_WAY = 3.0  # seconds in which a fetch that was asked to stop keeps what it has; then it is killed


@dataclass(eq=False)
class Fetch:
    """One that is under way. ending: when it was asked to stop."""

    job: Job
    actor: Any
    task: Any
    watch: Any = None
    watched: float = 0.0
    ending: float | None = None

    def stop(self) -> None:
        if self.ending is None:
            self.ending = time.monotonic()
            with contextlib.suppress(Exception):  # what is gone needs not be stopped
                self.actor.stop.options(concurrency_group="control").remote()

    def kill(self) -> None:
        with contextlib.suppress(Exception):
            ray.kill(self.actor, no_restart=True)


class Ahead:
    """at: which node has, gets, or was to get an entry's files ahead of its turn, by the job's id()."""

    def __init__(self, jobs: Sequence[Job], show: Show) -> None:
        self.show = show
        self.models = {id(job): {repo for repo, _ in hub_models(job.entry)} for job in jobs}
        self.gate = find_gate() if any(self.models.values()) else None
        self.may = {id(job) for job in jobs if self.gate is not None and self.models[id(job)] and is_worth(job.entry)}
        self.needed: set[str] | None = None
        self.fetches: dict[str, Fetch] = {}  # by node
        self.at: dict[int, str] = {}
        self.gave_way: set[int] = set()  # jobs whose fetch is to be gone on with
        self.room_told = self.stopped = False
        self.actor_class = ray.remote(concurrency_groups={"control": 1})(Fetching)

    def look(self, queue: Queue, now: float) -> None:
        """Follow what is under way, and begin what can be begun; called in every turn of the loop."""
        if self.gate is None:
            return
        needed = {repo for job in (*queue.active, *queue.waiting) for repo in self.models[id(job)]}
        if needed != self.needed:
            self.needed = needed
            self.gate.need.remote(sorted(needed))
        for node, fetch in list(self.fetches.items()):
            self._follow(node, fetch, now)
        if self.may and not self.stopped:
            for node in self._free_nodes(queue):
                job = self._next_for(node, queue)
                if job is not None:
                    self._start(node, job)

    def begins(self, job: Job, node: str) -> None:
        """An entry begins on a node: what is fetched there gives way to it, and so does what is fetched of it elsewhere."""
        self.at.pop(id(job), None)
        self.gave_way.discard(id(job))
        for where, fetch in self.fetches.items():
            if fetch.job is job or (where == node and self.models[id(job)]):
                fetch.stop()

    def rank(self, job: Job, node: str) -> int:
        """How well an entry suits a free worker of this node, least best: its files are here, nowhere, at another node."""
        at = self.at.get(id(job))
        return 1 if at is None else 2 * (at != node)

    def better(self, job: Job, node: str, queue: Queue) -> Job | None:
        """The entry that should have the place on this node which Ray found for `job`, since its files are here."""
        if job.spans > 1 or self.rank(job, node) == 0:
            return None
        same = (j for j in _not_begun(queue) if j is not job and j.spans == 1 and j.request == job.request)
        return next((j for j in same if self.rank(j, node) == 0), None)

    def stop(self) -> None:
        """Begin nothing more, and end what is under way; what has come stays for the next sweep."""
        self.stopped = True
        for fetch in self.fetches.values():
            fetch.stop()

    def close(self) -> None:
        """End all of it. No process is left behind."""
        self.stop()
        tasks = [fetch.task for fetch in self.fetches.values()]
        try:
            if tasks:
                ray.wait(tasks, num_returns=len(tasks), timeout=GIVE_WAY)
        finally:
            for fetch in self.fetches.values():
                fetch.kill()
            self.fetches.clear()

    # -- whose turn ----------------------------------------------------------------------------------------------------

    def _free_nodes(self, queue: Queue) -> list[str]:
        """Nodes with entries at work, all of which have their own weights, that fetch nothing ahead."""
        free: dict[str, bool] = {}
        for job in queue.active:
            for crew in job.crews.values():
                if crew.place is not None:
                    has = job.spans == 1 and (crew.here or not self.models[id(job)])
                    free[crew.place["node_id"]] = free.get(crew.place["node_id"], True) and has
        return [node for node, is_free in free.items() if is_free and node not in self.fetches]

    def _next_for(self, node: str, queue: Queue) -> Job | None:
        """The entry to fetch for; one at a time, so none where one was fetched here whose turn has not come."""
        waiting = _not_begun(queue)
        here = next((job for job in waiting if self.at.get(id(job)) == node), None)
        if here is not None:
            return here if id(here) in self.gave_way else None
        mine = [job for job in waiting if id(job) in self.may and id(job) not in self.at]
        if not mine:
            return None
        resources = [n["Resources"] for n in ray.nodes() if n["NodeID"] == node and n["Alive"]]
        return next((job for job in mine if refusal(job.request, resources) is None), None) if resources else None

    def _start(self, node: str, job: Job) -> None:
        again = id(job) in self.gave_way
        self.gave_way.discard(id(job))
        self.at[id(job)] = node
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        actor = self.actor_class.options(num_cpus=0, max_restarts=0, scheduling_strategy=here).remote()
        self.fetches[node] = Fetch(job, actor, actor.fetch.remote(job.entry))
        if not again:
            self.show.event(job.name, f"fetching ahead on {_name(node)}")

    # -- what comes back -----------------------------------------------------------------------------------------------

    def _follow(self, node: str, fetch: Fetch, now: float) -> None:
        if ray.wait([fetch.task], timeout=0)[0] or (fetch.ending is not None and now > fetch.ending + GIVE_WAY):
            self._ended(node, fetch)
        elif fetch.watch is None:
            if now > fetch.watched + WATCH_EVERY:
                fetch.watched, fetch.watch = now, fetch.actor.watch.options(concurrency_group="control").remote()
        elif ray.wait([fetch.watch], timeout=0)[0]:
            with contextlib.suppress(RayError):  # a dead actor is seen at its task
                come, need = ray.get(fetch.watch)
                if need and self.at.get(id(fetch.job)) == node:
                    message = f"{come / GIB:.2f} of {need / GIB:.2f} GiB"
                    self.show.progress(Progress(fetch.job.name, "fetching ahead", message=message))
            fetch.watch = None

    def _ended(self, node: str, fetch: Fetch) -> None:
        job, found = fetch.job, Fetched("stopped")
        if ray.wait([fetch.task], timeout=0)[0]:
            try:
                found = ray.get(fetch.task)
            except RayError as error:
                found = Fetched("failed", why=f"the process that did it ended: {type(error).__name__}")
        fetch.kill()
        del self.fetches[node]
        waits = self.at.get(id(job)) == node
        if waits and found.state == "stopped":
            self.gave_way.add(id(job))
        if waits:
            self.show.doing(job.name, WAITING)
        if found.state == "done" and found.nbytes:
            rate = f"{found.nbytes / GIB:.2f} GiB in {duration(found.seconds)}"
            self.show.event(job.name, f"fetched ahead on {_name(node)}, {rate}")
        elif found.state == "failed" and not self.stopped:
            self.show.event(job.name, f"not fetched ahead: {found.why}; its own turn tries again")
        elif found.state == "no room" and not self.room_told:
            self.room_told = True
            self.show.event(job.name, f"not fetched ahead, for want of room (told once): {found.why}")


def is_worth(entry: Entry) -> bool:
    """Whether what is fetched of an entry ahead of its turn is kept and found by it."""
    from capture.run import way_of_weights

    plain = entry.spans.workers == 1 and not entry.allow_pickle
    return entry.fetch_ahead and plain and way_of_weights(entry) != "stream"


def _not_begun(queue: Queue) -> list[Job]:
    """In the order in which they are likely to begin."""
    return [*(job for job in queue.active if not job.working and job.attempt is None), *queue.waiting]


def _name(node: str) -> str:
    return next((str(n["NodeManagerHostname"]) for n in ray.nodes() if n["NodeID"] == node), node[:8])
