"""How long an entry waits for a place: on a clock of the test's own, over jobs that no Ray has seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fake_work import make_entry

from cluster import placing
from cluster.job import Job
from cluster.placing import WITHIN, WITHIN_GROWING, WITHOUT_NODES, Patience
from cluster.resources import Request


def job(name: str, *, asked: float = 0.0, placed: bool = False, **fields: Any) -> Job:
    one = Job(make_entry(name, **fields), Request(1, 1))
    crew: Any = SimpleNamespace(asked=asked, place={"node": "here"} if placed else None)
    one.crews[0] = crew
    return one


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "what_there_is", lambda: "here: 0 of 2 GPUs free")
    monkeypatch.setattr(placing, "live_nodes", lambda: [{"CPU": 2.0}])


def given_up(patience: Patience, jobs: list[Job], now: float) -> list[str]:
    return [one.name for one, _ in patience.look(jobs, now)[1]]


def test_an_entry_is_given_up_when_its_time_is_over() -> None:
    patience = Patience(growing=False, within=None, now=0)
    waits = job("waits")
    assert given_up(patience, [waits], WITHIN - 1) == []
    _, ((_, error),) = patience.look([waits], WITHIN + 1)
    assert str(error).startswith(
        "entry 'waits' asks for 1 GPU, 1 CPU on one node, and got no place within 10 min 00 s; there is here: 0 of 2 GPUs free"
    )


def test_time_does_not_count_while_another_entry_works() -> None:
    patience = Patience(growing=False, within=100, now=0)
    waits = job("waits")
    assert given_up(patience, [waits, job("works", placed=True)], 5000) == []
    assert given_up(patience, [waits], 5099) == []
    assert given_up(patience, [waits], 5101) == ["waits"]


def test_time_counts_from_when_the_place_was_asked_for() -> None:
    patience = Patience(growing=False, within=100, now=0)
    assert given_up(patience, [job("late", asked=50)], 149) == []
    assert given_up(patience, [job("late", asked=50)], 151) == ["late"]


def test_what_is_behind_those_that_were_given_up_waits_no_time_of_its_own() -> None:
    patience = Patience(growing=False, within=100, now=0)
    assert given_up(patience, [job("first")], 101) == ["first"]
    other = job("other", asked=101)
    other.request = Request(2, 1)
    assert given_up(patience, [job("next", asked=101), other], 102) == ["next"]
    assert given_up(patience, [job("works", placed=True)], 110) == []
    assert given_up(patience, [job("later", asked=105)], 209) == []
    assert given_up(patience, [job("later", asked=105)], 211) == ["later"]


def test_where_no_node_is_left_all_of_a_long_queue_is_given_up_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(growing=False, within=None, now=0)
    there: list[dict[str, float]] = []
    monkeypatch.setattr(placing, "live_nodes", lambda: there)
    assert given_up(patience, [job("first")], WITHOUT_NODES - 1) == []
    assert given_up(patience, [job("first")], WITHOUT_NODES + 5) == ["first"]
    assert given_up(patience, [job("second", asked=35.1)], WITHOUT_NODES + 5.2) == ["second"]
    there.append({"CPU": 2.0})
    assert given_up(patience, [job("third", asked=35.3)], WITHOUT_NODES + 5.4) == []
    there.clear()
    assert given_up(patience, [job("third", asked=35.3)], WITHOUT_NODES + 30) == []


def test_a_growing_cluster_gets_the_autoscalers_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "never_to_come", list)
    patience = Patience(growing=True, within=None, now=0)
    assert WITHIN_GROWING > WITHIN
    assert given_up(patience, [job("waits")], WITHIN_GROWING - 1) == []
    assert given_up(patience, [job("waits")], WITHIN_GROWING + 1) == ["waits"]


def test_a_span_whose_turn_it_is_waits_like_an_entry() -> None:
    patience = Patience(growing=False, within=100, now=0)
    from capture.settings import Spans

    halfway = job("halfway", spans=Spans(workers=2))
    halfway.crews[0].place = {"node": "here"}
    assert given_up(patience, [halfway], 1000) == []
    sent: Any = object()
    halfway.sent[0] = sent
    halfway.crews = {1: job("x", asked=1000).crews[0]}
    assert given_up(patience, [halfway], 1099) == []
    assert given_up(patience, [halfway], 1101) == ["halfway"]


def test_what_is_waited_for_is_told_once() -> None:
    patience = Patience(growing=False, within=None, now=0)
    waits = job("waits")
    assert [text for _, text in patience.look([waits], 20)[0]] == ["waiting for a place with 1 GPU, 1 CPU"]
    assert patience.look([waits], 40)[0] == []
