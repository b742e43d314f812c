"""Who gets a worker that is done: jobs that ask for the same, in order, and the workers that were asked for meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
from fake_work import make_entry

from capture.attempt import Try
from capture.settings import Spans
from cluster.job import Job
from cluster.queue import ASKED_FOR, Queue
from cluster.resources import Request

SAME = Request(0, 1)


class FakeCrew:
    """Stands in for a crew: it has a place or has none, and may be sent away."""

    def __init__(self, *, placed: bool = False) -> None:
        self.place = {"node": "here"} if placed else None
        self.removed = False
        self.began_again = 0

    def remove(self) -> None:
        self.removed = True

    def start_over(self) -> None:
        self.began_again += 1


def job(name: str, request: Request = SAME, **fields: Any) -> Job:
    return Job(make_entry(name, **fields), request)


def asked(queue: Queue) -> list[Job]:
    """Make active what can be, and ask for a worker for each, as the loop does."""
    found = []
    for one in queue.next_ones():
        one.crews[0] = FakeCrew()  # type: ignore[assignment]
        found.append(one)
    return found


def finish(queue: Queue, done: Job) -> Job | None:
    """What the loop does with the worker of a job that is complete."""
    following = queue.follower(done)
    crew = done.crews.pop(0)
    queue.active.remove(done)
    if following is not None:
        queue.take_over(following, crew)
    return following


def test_a_thousand_jobs_ask_for_few_workers_and_are_done_in_order() -> None:
    queue = Queue()
    jobs = queue.waiting = [job(f"j{i}") for i in range(1000)]
    jobs = list(jobs)
    assert len(asked(queue)) == ASKED_FOR
    assert asked(queue) == []
    made = {id(j.crews[0]) for j in queue.active}
    worker: Any = jobs[0].crews[0]
    worker.place = {"node": "here"}
    order, now = [jobs[0]], jobs[0]
    while (following := finish(queue, now)) is not None:
        now = following
        order.append(now)
        asked(queue)
        made |= {id(j.crews[0]) for j in queue.active}
    assert order == jobs
    assert worker.began_again == 999
    assert len(made) <= ASKED_FOR + 1, "one worker did it all; the others were asked for, and waited for a place"
    assert not queue.waiting


def test_what_a_job_had_asked_for_goes_to_the_next_one_or_is_sent_away() -> None:
    queue = Queue(limit=2)
    first, second, third = queue.waiting = [job("a"), job("b"), job("c")]
    assert asked(queue) == [first, second]
    worker, spare = first.crews[0], second.crews[0]
    worker.place = {"node": "here"}
    assert finish(queue, first) is second
    assert (second.crews[0], third.crews[0], spare.removed) == (worker, spare, False)  # type: ignore[attr-defined]
    assert queue.active == [second, third]
    assert finish(queue, second) is third
    assert (third.crews[0], spare.removed) == (worker, True)  # type: ignore[attr-defined]


def test_a_job_that_waits_for_a_rare_place_keeps_no_other_kind_back() -> None:
    queue = Queue()
    rare, common = Request(8, 1), Request(0, 1)
    queue.waiting = [job(f"r{i}", rare) for i in range(2 * ASKED_FOR)] + [job("small", common)]
    assert [one.name for one in asked(queue) if one.request == common] == ["small"]


def test_a_device_that_ray_does_not_hand_out_is_asked_for_once() -> None:
    queue = Queue()
    queue.waiting = [job(f"j{i}", Request(1, 1, exclusive="cuda:0")) for i in range(3)]
    assert [one.name for one in asked(queue)] == ["j0"]


@pytest.mark.parametrize(
    ("fields", "request_", "tried"),
    [
        ({}, Request(0, 2), Try()),
        ({}, Request(1, 1, ranks=2), Try()),
        ({"spans": Spans(workers=2)}, SAME, Try()),
        ({"model_kwargs": {"trust_remote_code": True}}, SAME, Try()),
        ({"model_kwargs": {"quantization_config": {"load_in_8bit": True}}}, SAME, Try()),
        ({"allow_pickle": True}, SAME, Try()),
        ({}, SAME, Try(deaths=1)),
    ],
    ids=["other request", "ranks", "spans", "code of others", "quantized", "pickle", "tried before"],
)
def test_what_does_not_fit_gets_a_process_of_its_own(fields: dict[str, Any], request_: Request, tried: Try) -> None:
    queue = Queue()
    first, other = queue.waiting = [job("a"), job("b", request_, **fields)]
    other.tried = tried
    asked(queue)
    first.crews[0].place = {"node": "here"}
    assert queue.follower(first) is None
    if request_ == SAME:
        assert queue.follower(other) is None, "nor does anything follow it"
