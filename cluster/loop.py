"""The sweep's own loop over Ray: starts an actor per entry, follows it, tries again, stops cleanly."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from capture.attempt import INTERRUPTED, Outcome, Try, complete_line, failure, finish, next_try
from capture.attemptlog import append_log
from capture.config import Entry
from capture.errors import DeviceError, PairscopeError, StoreError
from capture.layout import RunDir
from capture.manifest import Attempt
from capture.show import WAITING, Show
from capture.stop import Stop
from cluster.actor import CaptureActor
from cluster.connect import never_to_come
from cluster.ranks import RankGroup
from cluster.resources import Request

WATCH_EVERY = 0.5  # seconds between two looks at an actor's progress
GRACE = 5.0  # seconds that running work gets to end by itself after a first Ctrl-C
ASK_EVERY = 5.0  # seconds between two questions to the autoscaler about what waits
WAITING_LONG = 15.0  # seconds without a place after which the screen says what an entry waits for


class WorkerDiedError(PairscopeError):
    """The process or the machine that worked on an entry was lost."""


@dataclass
class Job:
    """One entry on its way through the sweep; `row` is its last attempt's manifest row."""

    entry: Entry
    request: Request
    capture: str | None = None
    tried: Try = field(default_factory=Try)
    attempt: Attempt | None = None
    row: dict[str, Any] | None = None
    outcome: Outcome | None = None
    actor: Any = None
    group: RankGroup | None = None  # the other ranks, where several share the entry
    ref: Any = None  # what the loop waits for: the actor's readiness, then its work
    watch: Any = None
    watched: float = 0.0
    since: float = 0.0

    @property
    def name(self) -> str:
        return self.entry.name


class Loop:
    """Runs jobs until all are done or a stop is asked for. After `run`, each job that began has a row and an outcome."""

    def __init__(
        self,
        run: RunDir,
        out: str,
        *,
        force: bool,
        work: str,
        jobs: int | None,
        show: Show,
        stop: Stop,
        growing: bool = False,
    ) -> None:
        self.runs_dir, self.out, self.force, self.work = run, out, force, work
        self.limit, self.show, self.stop = jobs, show, stop
        self.waiting: list[Job] = []
        self.active: list[Job] = []
        self.growing, self.asked = growing, time.monotonic()
        self.kill_at: float | None = None
        self.actor_class = ray.remote(concurrency_groups={"control": 1})(CaptureActor)

    def run(self, jobs: list[Job]) -> None:
        """Work through the jobs. A KeyboardInterrupt (the second Ctrl-C) ends all at once; no actor is left behind."""
        self.waiting = list(jobs)
        try:
            while self.active or (self.waiting and not self.stop.requested()):
                self._turn()
        except KeyboardInterrupt:
            pass
        finally:
            for job in list(self.active):
                self._interrupt(job)

    def _turn(self) -> None:
        if self.stop.requested():
            self._stop_active()
        else:
            self._start_some()
        waited = {job.ref: job for job in self.active} | {
            job.watch: job for job in self.active if job.watch is not None
        }
        waited |= {ref: job for job in self.active if job.group for ref in job.group.running}
        if not waited:
            return
        done, _ = ray.wait(list(waited), num_returns=1, timeout=0.25)
        for ref in done:
            job = waited[ref]
            if ref == job.watch:
                self._take_progress(job)
            elif job.group and ref in job.group.running:
                self._end_rank(job, ref)
            elif job.ref is None:
                continue  # settled in this same turn
            elif job.attempt is None:
                self._begin(job)
            else:
                self._end(job)
        now = time.monotonic()
        self._look_at_the_waiting(now)
        for job in self.active:
            if job.attempt is not None and job.watch is None and now - job.watched > WATCH_EVERY:
                job.watched = now
                job.watch = job.actor.watch.options(concurrency_group="control").remote()

    def _look_at_the_waiting(self, now: float) -> None:
        """While nothing runs: say what entries wait for, and fail those that the autoscaler can do nothing for.

        While something runs nothing is failed: Ray calls a request infeasible too where only the number of nodes is used up.
        """
        waiting = [job for job in self.active if job.attempt is None]
        working = any(job.attempt is not None for job in self.active)  # then its place may be the next one's
        if self.growing and waiting and not working and now > self.asked + ASK_EVERY:
            self.asked = now
            never = never_to_come()
            for job in waiting:
                if any(job.request.is_asked_by(resources) for resources in never):
                    job.attempt = Attempt(self.runs_dir, job.name)
                    job.attempt.row |= {"capture": job.capture, "node": None}
                    text = f"asks for {job.request.text} on one node; no node type of this cluster has that"
                    self._settle(job, failure(DeviceError(f"entry '{job.name}' {text}")))
        for job in waiting:
            if now > job.since + WAITING_LONG and not working:
                job.since = math.inf
                self.show.event(job.name, f"waiting for a place with {job.request.text}")

    def _start_some(self) -> None:
        for job in list(self.waiting):
            if self.limit is not None and len(self.active) >= self.limit:
                return
            if job.request.exclusive and job.request.exclusive in {other.request.exclusive for other in self.active}:
                continue
            self.waiting.remove(job)
            self._place(job)

    def _place(self, job: Job) -> None:
        job.attempt, job.watch, job.since = None, None, time.monotonic()
        if job.request.ranks > 1:
            job.group = RankGroup(self.actor_class, job.request)
            job.actor = job.group.leader
        else:
            job.actor = self.actor_class.options(**job.request.options()).remote(job.request.env)
        job.ref = job.actor.prepare.remote()
        self.active.append(job)
        self.show.doing(job.name, WAITING)

    def _begin(self, job: Job) -> None:
        """The actor is there (or died on the way): write the row, hand over the work."""
        job.attempt = Attempt(self.runs_dir, job.name)
        try:
            place = ray.get(job.ref)
        except RayError as error:
            job.attempt.row |= {"capture": job.capture, "node": None}
            self._settle(job, self._lost(job, error))
            return
        with self._writing():
            job.attempt.start(capture=job.capture, node=place["node"])
        note = f" ({job.tried.note})" if job.tried.note else ""
        self.show.event(job.name, f"started on {place['node']}{note}, log {job.attempt.row['log']}")
        self.show.doing(job.name, "starting")
        task = (job.entry, self.out, job.attempt.log_path, job.tried, self.force, self.work)
        job.ref = job.group.run(*task) if job.group else job.actor.run.remote(*task)

    def _end_rank(self, job: Job, ref: Any) -> None:
        """Another rank than the first ended: well, or it takes its group down, since the others would wait for it."""
        assert job.group is not None
        job.group.running.remove(ref)
        try:
            outcome = ray.get(ref)
        except RayError as error:
            outcome = self._lost(job, error)
        if outcome.state != "complete":
            self._settle(job, outcome)

    def _end(self, job: Job) -> None:
        try:
            outcome = ray.get(job.ref)
        except RayError as error:
            outcome = self._lost(job, error)
        self._settle(job, outcome)

    def _lost(self, job: Job, error: RayError) -> Outcome:
        """What a Ray error says about an attempt: the worker died, Ray ended it to save memory, or a bug of ours."""
        if self.stop.requested():
            return INTERRUPTED
        text = " ".join(str(error).split())
        if isinstance(error, RayTaskError) or getattr(error, "actor_init_failed", False):
            cause = getattr(error, "cause", None) or error
            outcome = Outcome("failed", {"error_class": type(cause).__name__, "error": text[-2000:]}, bug=True)
        else:
            memory = "memory pressure" in text or "OUT_OF_MEMORY" in text or "running low on memory" in text
            detail = text.split("Worker exit detail:")[-1].split("Some common causes")[0].strip()
            if detail == text:
                detail = text.removeprefix("The actor died unexpectedly before finishing this task.").strip()
            if "unexpectedly exits with a connection error" in detail:
                detail = "the worker process was killed or crashed; if memory was short, try --jobs 1 or mode: streamed"
            where = f" on {job.attempt.row['node']}" if job.attempt and job.attempt.row.get("node") else ""
            fields = {"error_class": WorkerDiedError.__name__, "error": f"lost the worker{where}: {detail}"[:2000]}
            outcome = Outcome("failed", fields, out_of_memory=memory, died=True)
        if job.attempt is not None:
            append_log(self.runs_dir, job.attempt.log_path, f"\nThe driver lost this attempt's worker.\n{error}\n")
        return outcome

    def _settle(self, job: Job, outcome: Outcome) -> None:
        """Write how the attempt ended, let the actor go, and put the job back where another try is worth it."""
        assert job.attempt is not None
        with self._writing():
            finish(job.attempt, outcome)
        job.row, job.outcome = job.attempt.row, outcome
        self._drop(job)
        if outcome.state == "complete":
            self.show.event(job.name, complete_line(job.row, len(job.entry.prompt_variants)))
            return
        if outcome.state == "interrupted":
            self.show.event(job.name, "interrupted")
            return
        tried = next_try(job.tried, job.entry, outcome)
        if tried is None or self.stop.requested():
            where = f"; traceback in {job.row['log']}" if outcome.bug else ""
            self.show.event(job.name, f"failed: {outcome.error}{where}")
            return
        self.show.event(job.name, f"{outcome.error}; trying again: {tried.note}")
        job.tried = tried
        self.waiting.insert(0, job)

    def _take_progress(self, job: Job) -> None:
        ref, job.watch = job.watch, None
        with contextlib.suppress(RayError):  # a dead actor is seen at its work
            progress = ray.get(ref)
            if progress is not None:
                self.show.progress(progress)

    def _stop_active(self) -> None:
        """First turn after a stop: ask running work to end, drop what has not begun. After the grace: end it."""
        if self.kill_at is None:
            self.kill_at = time.monotonic() + GRACE
            for job in list(self.active):
                if job.attempt is None:
                    self._drop(job)
                else:
                    for actor in job.group.actors if job.group else [job.actor]:
                        actor.stop.options(concurrency_group="control").remote()
        elif time.monotonic() > self.kill_at:
            for job in list(self.active):
                self._interrupt(job)

    def _interrupt(self, job: Job) -> None:
        attempt = job.attempt
        self._drop(job)
        if attempt is not None and attempt.row["state"] == "running":
            outcome = INTERRUPTED
            with self._writing():
                finish(attempt, outcome)
            job.row, job.outcome = attempt.row, outcome
            append_log(self.runs_dir, attempt.log_path, "\nThe driver ended this attempt: interrupted.\n")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """The manifest is a record of the work: that it cannot be written is said, and does not end the work."""
        try:
            yield
        except (OSError, StoreError) as error:
            self.show.note(f"the manifest cannot be written: {error}")

    def _drop(self, job: Job) -> None:
        """Kill the actor: its process, and with it all memory it held."""
        with contextlib.suppress(ValueError):
            self.active.remove(job)
        self.show.end(job.name)
        if job.group:
            job.group.remove()
        else:
            with contextlib.suppress(Exception):
                ray.kill(job.actor, no_restart=True)
        job.actor = job.ref = job.watch = job.group = None
