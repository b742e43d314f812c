"""A simulated sweep: entries on 1 to N machines at a time, longest first. Plain arithmetic, nothing is rented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Job:
    """One entry: hours on a machine of `kind`, at usd_per_hour; disk_gb of it stay on the machine, beside spare_gb that any entry
    there needs once; usd_fixed: traffic. boot_hours: until a new machine of the kind is up, paid for."""

    name: str
    kind: str
    hours: float
    boot_hours: float
    usd_per_hour: float
    usd_per_gb_hour: float
    disk_gb: float
    usd_fixed: float
    spare_gb: float = 0.0


@dataclass
class Machine:
    """One rented machine, from start to end (hours from the beginning of the sweep), and what ran on it, in order."""

    kind: str
    start: float
    end: float
    jobs: list[Job] = field(default_factory=list)

    @property
    def disk_gb(self) -> float:
        """Nothing is deleted between entries, so the disk holds all of them."""
        return max((j.spare_gb for j in self.jobs), default=0.0) + sum(j.disk_gb for j in self.jobs)

    @property
    def usd(self) -> float:
        first = self.jobs[0]
        hourly = first.usd_per_hour + self.disk_gb * first.usd_per_gb_hour
        return (self.end - self.start) * hourly + sum(j.usd_fixed for j in self.jobs)


@dataclass(frozen=True)
class Schedule:
    """nodes: machines at a time; makespan in hours."""

    nodes: int
    machines: tuple[Machine, ...]

    @property
    def makespan(self) -> float:
        return max((m.end for m in self.machines), default=0.0)

    @property
    def usd(self) -> float:
        return sum(m.usd for m in self.machines)


def schedule(jobs: Sequence[Job], nodes: int, max_disk_gb: float = float("inf")) -> Schedule:
    """List scheduling, longest job first (Graham 1969: at most 4/3 of the best makespan on equal machines).

    At most `nodes` machines run at a time. A job goes where it ends first: on a machine of its kind that is free and whose
    disk still holds it, or on a new one, which first boots, in the place of the one that was free. A machine is given back
    when nothing more runs on it.
    """
    running: list[Machine | None] = [None] * nodes
    free = [0.0] * nodes
    done: list[Machine] = []
    for job in sorted(jobs, key=lambda j: (-j.hours, j.name)):

        def fits(machine: Machine | None, job: Job = job) -> bool:
            return machine is not None and machine.kind == job.kind and machine.disk_gb + job.disk_gb <= max_disk_gb

        ends = [free[i] + job.hours + (0.0 if fits(running[i]) else job.boot_hours) for i in range(nodes)]
        place = min(range(nodes), key=lambda i: (ends[i], i))
        machine = running[place]
        if machine is None or not fits(machine):
            machine = Machine(job.kind, free[place], ends[place])
            running[place] = machine
            done.append(machine)
        machine.jobs.append(job)
        machine.end = free[place] = ends[place]
    return Schedule(nodes, tuple(done))
