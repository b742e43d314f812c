"""The simulated sweep: list scheduling on 1 to N machines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.schedule import Job, schedule


def job(name, hours, kind="A", disk=10.0, usd=2.0):
    return Job(name, kind, hours, 0.5, usd, 0.01, disk, 1.0)


def test_one_machine_boots_once_and_runs_all_of_a_kind():
    (machine,) = schedule([job("a", 1), job("b", 3), job("c", 2)], 1).machines
    assert [j.name for j in machine.jobs] == ["b", "c", "a"]
    assert (machine.start, machine.end, machine.disk_gb) == (0, 6.5, 30)
    assert machine.usd == pytest.approx(6.5 * (2 + 30 * 0.01) + 3)


def test_longest_first_balances_two_machines():
    found = schedule([job(n, h) for n, h in zip("abcde", (3, 3, 2, 2, 2), strict=True)], 2)
    assert found.makespan == 0.5 + 7
    assert sorted(m.end for m in found.machines) == [5.5, 7.5]


def test_another_kind_boots_again_in_the_place_of_the_first():
    found = schedule([job("a", 4), job("b", 2, kind="B")], 1)
    assert [(m.kind, m.start, m.end) for m in found.machines] == [("A", 0, 4.5), ("B", 4.5, 7.0)]
    assert found.usd == pytest.approx(4.5 * 2.1 + 1 + 2.5 * 2.1 + 1)


def test_more_machines_are_never_slower_and_never_beat_the_longest():
    jobs = [job(str(i), h) for i, h in enumerate((5, 4, 3, 3, 1, 1))]
    spans = [schedule(jobs, n).makespan for n in range(1, 8)]
    assert spans == sorted(spans, reverse=True)
    assert spans[-1] == 5.5


def test_no_more_machines_than_asked_run_at_a_time():
    found = schedule([job(str(i), 1 + i % 3, kind="AB"[i % 2]) for i in range(9)], 3)
    for machine in found.machines:
        assert sum(m.start <= machine.start < m.end for m in found.machines) <= 3
    assert sum(len(m.jobs) for m in found.machines) == 9


def test_a_full_disk_takes_another_machine():
    found = schedule([job("a", 2, disk=60), job("b", 1, disk=60)], 1, max_disk_gb=100)
    assert [m.disk_gb for m in found.machines] == [60, 60]


def test_what_any_entry_needs_beside_its_checkpoints_is_there_once_a_machine():
    jobs = [replace(job(name, hours), spare_gb=30.0) for name, hours in (("a", 1), ("b", 2))]
    assert [m.disk_gb for m in schedule(jobs, 1).machines] == [30 + 20]
    assert [m.disk_gb for m in schedule(jobs, 2).machines] == [30 + 10, 30 + 10]


def test_nothing_to_do_takes_no_time():
    assert schedule([], 2).makespan == 0
