"""The jobs of a sweep: those that wait, in order, and those that have a worker or have asked for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from cluster.crew import Crew
from cluster.job import Job

ASKED_FOR = 64  # workers of one kind that are asked for at a time and have no place yet


class Queue:
    """waiting: jobs that nothing was asked for yet. active: the others that are not done. limit: most active at a time."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.waiting: list[Job] = []
        self.active: list[Job] = []

    def next_ones(self) -> Iterator[Job]:
        """Make active and give out, one after the other, the jobs that a worker is to be asked for now."""
        taken = {job.request.exclusive for job in self.active}
        asked = Counter(job.request.text for job in self.active if not job.working)
        for job in list(self.waiting):
            if self.limit is not None and len(self.active) >= self.limit:
                return
            if (job.request.exclusive and job.request.exclusive in taken) or asked[job.request.text] >= ASKED_FOR:
                continue
            taken.add(job.request.exclusive)
            asked[job.request.text] += 1
            self.activate(job)
            yield job

    def activate(self, job: Job) -> None:
        self.waiting.remove(job)
        self.active.append(job)
        job.attempt, job.spent, job.waiting_told = None, None, False

    def follower(self, done: Job, rank: Callable[[Job], int] = lambda job: 0) -> Job | None:
        """The next job without a worker that can go on with the worker of this one; None where there is none. rank: the first
        of those with the least is the next."""
        if not done.shares:
            return None
        unplaced = (job for job in self.active if not job.working and job.attempt is None)
        fitting = (
            job for jobs in (unplaced, self.waiting) for job in jobs if job.shares and job.request == done.request
        )
        return min(fitting, key=rank, default=None)

    def trade(self, placed: Job, other: Job) -> None:
        """Give the place that was found for one job to another, which asks for the same and has none; the first waits on."""
        crew, asked = placed.crews.pop(placed.span), other.crews.pop(other.span, None)
        if asked is None:
            self.active.remove(placed)
            self.waiting.insert(0, placed)
            self.activate(other)
        else:
            placed.crews[placed.span] = asked
        other.crews[other.span] = crew

    def take_over(self, job: Job, crew: Crew) -> None:
        """Give a job a worker that is done. What it had asked for, and has no place yet, is for the next one in the queue."""
        asked = job.crews.pop(job.span, None)
        if asked is None:
            self.activate(job)
        else:
            heir = next((j for j in self.waiting if j.shares and j.request == job.request), None)
            if heir is None:
                asked.remove()
            else:
                self.activate(heir)
                heir.crews[heir.span] = asked
        crew.start_over()
        job.crews[job.span] = crew
