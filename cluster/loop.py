"""The sweep's own loop over Ray: places a crew of actors for every entry, follows it, tries again, stops cleanly."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from capture.attempt import INTERRUPTED, Outcome, complete_line, failure, finish, next_try
from capture.attemptlog import append_log
from capture.errors import DeviceError, StoreError
from capture.layout import RunDir
from capture.manifest import Attempt
from capture.show import WAITING, Show
from capture.stop import Stop
from cluster.actor import CaptureActor
from cluster.ahead import Ahead
from cluster.crew import Crew, brought_home
from cluster.job import Job
from cluster.lost import SILENT_S, UNHEARD, lost, silent
from cluster.placing import Patience, live_nodes
from cluster.queue import Queue
from cluster.resources import refusal

WATCH_EVERY = 0.5  # seconds between two looks at an actor's progress
AGAIN_EVERY = 2.0  # seconds between two tries at a worker whose line was cut
CUT_OFF_S = 600.0  # for so long a node from which the hub was out of reach is left alone
CUT_OFF_NODES = 3  # on which an entry is tried
GRACE = 5.0  # seconds that running work gets to end by itself after a first Ctrl-C
GRACE_TERM = 1.5  # and after a SIGTERM: whoever sends one kills soon after it (`ray job stop` after 3 s)


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
        place_within: float | None = None,
    ) -> None:
        """place_within: seconds that an entry waits for a place while nothing else of the sweep is at work."""
        self.runs_dir, self.out, self.force, self.work = run, out, force, work
        self.queue, self.show, self.stop = Queue(jobs), show, stop
        self.patience = Patience(growing=growing, within=place_within, now=time.monotonic())
        self.ahead = Ahead([], show)
        self.kill_at: float | None = None
        self.cut_off: dict[str, float] = {}  # nodes from which the hub was out of reach, and when that was found
        self.actor_class = ray.remote(concurrency_groups={"control": 1})(CaptureActor)

    def run(self, jobs: list[Job]) -> None:
        """Work through the jobs. A KeyboardInterrupt (the second Ctrl-C) ends all at once; no actor is left behind."""
        self.ahead = Ahead(jobs, self.show)
        self.queue.waiting = list(jobs)
        for job in jobs:
            self.show.doing(job.name, WAITING)
        try:
            while self.queue.active or (self.queue.waiting and not self.stop.requested()):
                self._turn()
        except KeyboardInterrupt:
            pass
        finally:
            for job in list(self.queue.active):
                self._interrupt(job)
            self.ahead.close()
            for job in self.queue.waiting:
                self.show.end(job.name)

    def _turn(self) -> None:
        if self.stop.requested():
            self._stop_active()
        else:
            self._start_some()
        waited = {ref: then for job in self.queue.active for ref, then in self._awaited(job)}
        if not self.queue.active:
            return
        if not waited:  # all are out of sight
            time.sleep(0.25)
        done = ray.wait(list(waited), num_returns=1, timeout=0.25)[0] if waited else []
        for ref in done:
            job, crew, then = waited[ref]
            if job in self.queue.active and crew in job.crews.values():  # else it was settled in this same turn
                then(ref)
        now = time.monotonic()
        self.ahead.look(self.queue, now)
        told, given_up = self.patience.look(self.queue.active, now)
        for job, text in told:
            self.show.event(job.name, text)
        for job, error in given_up:
            self._give_up(job, error)
        for job in list(self.queue.active):
            for crew in job.crews.values():
                crew.look_for_it(now - AGAIN_EVERY)
            if job.crew is None:
                continue
            if job.crew.is_to_be_watched(now - WATCH_EVERY):
                job.crew.ask_for_progress(now)
            if job.crew.pulse.look(now, asked=job.crew.watch is not None) > SILENT_S:
                self._failed(job, job.span, silent(job.crew))

    def _awaited(self, job: Job) -> Iterator[tuple[Any, tuple[Job, Crew, Callable[[Any], None]]]]:
        """What to wait for of a job, and what to do once it is there."""
        for span, crew in job.crews.items():
            single = (
                (crew.ready, self._placed), (crew.task, self._end), (crew.sending, self._sent), (crew.watch, self._progress)
            )  # fmt: skip
            for ref, then in single:
                if ref is not None:
                    yield ref, (job, crew, partial(then, job, span))
            for ref in crew.running:
                yield ref, (job, crew, partial(self._end_rank, job, span))

    # -- placing -------------------------------------------------------------------------------------------------------

    def _start_some(self) -> None:
        for job in self.queue.next_ones():
            self._place(job, job.span)
            self.show.doing(job.name, WAITING)

    def _place(self, job: Job, span: int) -> None:
        taken = [crew.place["node_id"] for crew in job.crews.values() if crew.place is not None]
        job.crews[span] = Crew(
            self.actor_class, job.request, turn=(span, job.spans), avoid=taken, never=self._to_avoid(job)
        )

    def _to_avoid(self, job: Job) -> set[str]:
        """Nodes from which the hub was out of reach a while ago, where the entry needs the hub and another node would do."""
        cut_off = {node for node, since in self.cut_off.items() if time.monotonic() - since < CUT_OFF_S}
        if not cut_off:
            return cut_off
        from cluster.prepare_files import hub_models

        if not hub_models(job.entry):
            return set()
        return cut_off if refusal(job.request, live_nodes(without=cut_off)) is None else set()

    def _placed(self, job: Job, span: int, ref: Any) -> None:
        """The actors are there (or died on the way): hand over the work, and give the next span's crew a head start."""
        crew = job.crews[span]
        try:
            crew.placed(ray.get(ref))
            if crew.node_id in self._to_avoid(job):  # it was asked for before that was known
                self._dismiss(job, span)
                self._place(job, span)
                return
            if (better := self.ahead.better(job, crew.node_id, self.queue)) is not None:
                self.queue.trade(job, better)
                job = better
            job.begin_attempt(self.runs_dir)
            self._begin(job, span, crew)
        except RayError as error:
            job.begin_attempt(self.runs_dir)
            self._failed(job, span, self._lost(job, error, crew))
            return
        if span == job.span:
            self._let_go(job, crew)

    def _begin(self, job: Job, span: int, crew: Crew) -> None:
        assert job.attempt is not None
        assert crew.place is not None
        node, first = crew.place["node"], job.attempt.row["node"] is None
        of = f"layers {span + 1} of {job.spans}" if job.spans > 1 else ""
        log = job.attempt.log_path if first else f"{job.attempt.log_path.removesuffix('.log')}.span{span + 1}.log"
        with self._writing():
            nodes = [] if first else job.attempt.row["node"].split(", ")
            job.attempt.start(capture=job.capture, node=", ".join(dict.fromkeys([*nodes, node])))
        notes = ", ".join(filter(None, [of, job.tried.note if first else ""]))
        name = log.removeprefix(self.runs_dir.root + "/")
        self.show.event(job.name, f"started on {node}{f' ({notes})' if notes else ''}, log {name}")
        if first:
            self.show.doing(job.name, "starting")
        self.ahead.begins(job, crew.node_id)
        crew.work(job.entry, self.out, log, job.tried, self.force, self.work)

    def _let_go(self, job: Job, crew: Crew) -> None:
        """It is this crew's turn: give it what it needs, and ask for a place for the next one."""
        span = job.span
        if job.spans > 1 and not crew.given:
            crew.give(tuple(job.sent[k] for k in range(span)))
        following = next((k for k in range(span + 1, job.spans) if k not in job.sent), None)
        if following is not None and following not in job.crews and not job.request.exclusive:
            self._place(job, following)

    # -- what comes back -----------------------------------------------------------------------------------------------

    def _end(self, job: Job, span: int, ref: Any) -> None:
        crew = job.crews[span]
        try:
            outcome: Outcome = ray.get(ref) or UNHEARD
        except ActorUnavailableError as error:  # a cut line, and no word yet that the worker died
            if not self.stop.requested():
                crew.out_of_sight()
                return
            outcome = self._lost(job, error, crew)
        except RayError as error:
            outcome = self._lost(job, error, crew)
        if outcome.state != "complete":
            self._failed(job, span, outcome)
        elif outcome.handover is None:  # all is written, or was there already
            self._settle(job, outcome)
        else:
            crew.send(outcome.handover)

    def _end_rank(self, job: Job, span: int, ref: Any) -> None:
        """Another rank than the first ended: well, or it takes its group down, since the others would wait for it."""
        crew = job.crews[span]
        crew.running.remove(ref)
        try:
            outcome = ray.get(ref)
        except ActorUnavailableError:  # the first rank's word will do
            return
        except RayError as error:
            outcome = self._lost(job, error, crew)
        if outcome.state != "complete":
            self._failed(job, span, outcome)

    def _sent(self, job: Job, span: int, ref: Any) -> None:
        """What a span found out is in the object store: its crew is done, the next one's turn begins."""
        crew = job.crews[span]
        try:
            ray.get(ref)
        except RayError as error:
            self._failed(job, span, self._lost(job, error, crew))
            return
        assert crew.sent is not None
        assert crew.place is not None
        job.sent[span] = brought_home(crew.sent, crew.place["node_id"])
        self._dismiss(job, span)
        if span > job.furthest:
            job.furthest, job.tried = span, replace(job.tried, deaths=0, losses=0, nodes=0)
        at = crew.sent.handover.done[-1].last
        self.show.event(job.name, f"layers {span + 1} of {job.spans} are done, up to layer {at}")
        if job.crew is None:
            self._place(job, job.span)
        elif job.crew.place is not None:
            self._let_go(job, job.crew)

    def _failed(self, job: Job, span: int, outcome: Outcome) -> None:
        """A crew is lost or its work failed. One that only waited for its turn is asked for again when that comes."""
        if outcome.cut_off:
            self.cut_off[job.crews[span].node_id] = time.monotonic()
        if outcome.lost_span is not None:  # with the node that made it: that span, too, is to be done again
            job.sent.pop(outcome.lost_span, None)
        if span != job.span and (outcome.died or outcome.out_of_memory):
            self._dismiss(job, span)
            return
        self._settle(job, outcome)

    def _give_up(self, job: Job, error: DeviceError) -> None:
        job.begin_attempt(self.runs_dir)
        self._settle(job, failure(error))

    def _pass_on(self, job: Job, outcome: Outcome) -> tuple[Job, Crew] | None:
        """Take the worker of an entry that is complete, for the next entry that asks for the same: the start of a process
        and the import of all libraries take longer than a small capture."""
        if outcome.state != "complete" or not outcome.tidy or job.crew is None or self.stop.requested():
            return None
        node = job.crew.node_id
        following = self.queue.follower(job, lambda other: self.ahead.rank(other, node))
        if following is None:
            return None
        return following, job.crews.pop(job.span)

    def _dismiss(self, job: Job, span: int) -> None:
        crew = job.crews.pop(span)
        if (dollars := crew.dollars()) is not None:
            job.spent = (job.spent or 0.0) + dollars
        crew.remove()

    def _lost(self, job: Job, error: RayError, crew: Crew) -> Outcome:
        """What a Ray error says about an attempt."""
        if self.stop.requested():
            return INTERRUPTED
        if job.attempt is not None:
            append_log(self.runs_dir, job.attempt.log_path, f"\nThe driver lost this attempt's worker.\n{error}\n")
        return lost(error, crew)

    def _settle(self, job: Job, outcome: Outcome) -> None:
        """Write how the attempt ended, let the actor go, and put the job back where another try is worth it."""
        assert job.attempt is not None
        self._finish(job, job.attempt, outcome)
        passed_on = self._pass_on(job, outcome)
        self._drop(job)
        if outcome.state == "complete":
            self.show.event(job.name, complete_line(job.attempt.row, len(job.entry.prompt_variants)))
            if passed_on is not None:
                following, crew = passed_on
                self.queue.take_over(following, crew)
                following.begin_attempt(self.runs_dir)
                self._begin(following, following.span, crew)
            return
        if outcome.state == "interrupted":
            self.show.event(job.name, "interrupted")
            return
        tried = next_try(job.tried, job.entry, outcome)
        if outcome.cut_off and job.tried.cut_off + 1 < CUT_OFF_NODES and self._to_avoid(job):
            tried = replace(job.tried, cut_off=job.tried.cut_off + 1)
        if tried is None or self.stop.requested():
            where = f"; traceback in {job.attempt.row['log']}" if outcome.bug else ""
            self.show.event(job.name, f"failed: {outcome.error}{where}")
            return
        self.show.event(job.name, f"{outcome.error}; trying again: {tried.note}")
        job.tried = tried
        self.queue.waiting.insert(0, job)

    def _progress(self, job: Job, span: int, ref: Any) -> None:
        job.crews[span].watch = None
        job.crews[span].pulse.heard()
        with contextlib.suppress(RayError):  # a dead actor is seen at its work
            progress = ray.get(ref)
            if (
                progress is not None and span == job.span and progress.entry == job.name
            ):  # a worker may know its last entry yet
                job.crews[span].here |= progress.here
                self.show.progress(progress)

    def _stop_active(self) -> None:
        """First turn after a stop: ask running work to end, drop what has not begun. After the grace: end it."""
        if self.kill_at is None:
            asked = min(GRACE, GRACE_TERM) if self.stop.signal == signal.SIGTERM else GRACE
            self.kill_at = time.monotonic() + asked
            self.ahead.stop()
            for job in list(self.queue.active):
                if job.attempt is None:
                    self._drop(job)
                else:
                    for crew in job.crews.values():
                        crew.stop()
        elif time.monotonic() > self.kill_at:
            for job in list(self.queue.active):
                self._interrupt(job)

    def _interrupt(self, job: Job) -> None:
        attempt = job.attempt
        self._drop(job)
        if attempt is not None and attempt.row["state"] == "running":
            self._finish(job, attempt, INTERRUPTED)
            append_log(self.runs_dir, attempt.log_path, "\nThe driver ended this attempt: interrupted.\n")

    def _finish(self, job: Job, attempt: Attempt, outcome: Outcome) -> None:
        """Write how an attempt ended, and what its node took for the time that it held."""
        if (dollars := job.dollars()) is not None:
            attempt.row["dollars"] = round(dollars, 6)
        with self._writing():
            finish(attempt, outcome)
        job.row, job.outcome = attempt.row, outcome

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """The manifest is a record of the work: that it cannot be written is said, and does not end the work."""
        try:
            yield
        except (OSError, StoreError) as error:
            self.show.note(f"the manifest cannot be written: {error}")

    def _drop(self, job: Job) -> None:
        """Kill the actors: their processes, and with them all memory they held."""
        with contextlib.suppress(ValueError):
            self.queue.active.remove(job)
        self.show.end(job.name)
        for span in list(job.crews):
            self._dismiss(job, span)
