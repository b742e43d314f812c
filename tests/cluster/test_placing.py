"""How long an entry waits for a place: on a clock of the test's own, over jobs that no Ray has seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fake_work import make_entry

from cluster import placing
from cluster.job import Job
from cluster.placing import ASK_EVERY, WITHIN, WITHIN_GROWING, WITHOUT_NODES, Patience
from cluster.resources import Request

WHAT_THERE_IS = placing.what_there_is


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
    assert given_up(patience, [job("works", placed=True)], 160) == []
    assert given_up(patience, [job("later", asked=200)], 299) == []
    assert given_up(patience, [job("later", asked=200)], 301) == ["later"]


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
    monkeypatch.setattr(placing, "live_nodes", list)  # nor is it given up for want of nodes, which come
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


def test_a_ray_without_a_node_is_given_up_and_one_that_has_some_again_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[dict[str, float]] = []
    monkeypatch.setattr(placing, "live_nodes", lambda: nodes)
    patience, waits = Patience(growing=False, within=None, now=0), job("waits")
    assert patience.look([waits], WITHOUT_NODES - 1)[1] == []
    nodes.append({"CPU": 2.0})
    assert patience.look([waits], WITHOUT_NODES + 6)[1] == []
    nodes.clear()
    assert patience.look([waits], 2 * WITHOUT_NODES)[1] == []
    assert patience.look([waits, job("works", placed=True)], 2 * WITHOUT_NODES + 6) == ([], [])
    assert patience.look([waits], 3 * WITHOUT_NODES + 6)[1] == []
    assert patience.look([waits], 3 * WITHOUT_NODES + 12)[1] == [(waits, placing.NO_NODE)]


def test_a_cluster_that_grows_gives_up_at_once_what_no_node_type_of_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise an hour would go by, in which the head bills."""
    never = [{"GPU": 1.0, "CPU": 1.0}]
    monkeypatch.setattr(placing, "never_to_come", lambda: never)
    other = job("other")
    other.request = Request(2, 1)
    patience = Patience(growing=True, within=None, now=0)
    assert given_up(patience, [job("waits"), other], ASK_EVERY - 1) == [], "the autoscaler has not looked yet"
    assert given_up(patience, [job("waits"), other], ASK_EVERY + 1) == ["waits"]
    monkeypatch.setattr(placing, "live_nodes", lambda: [{"CPU": 2.0, "GPU": 1.0}])
    assert given_up(patience, [job("waits"), other], 3 * ASK_EVERY) == [], "a node that is there has it"
    assert given_up(Patience(growing=False, within=None, now=0), [job("waits")], 3 * ASK_EVERY) == []


def test_what_there_is_tells_what_is_free_of_each_live_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(id_: str, alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"NodeID": id_, "Alive": alive, "NodeManagerHostname": f"host-{id_}", "Resources": resources}

    nodes = [node("a", GPU=2.0, CPU=8.0), node("b", CPU=4.0), node("c", memory=1.0), node("gone", alive=False, GPU=8.0)]
    nodes[0]["Resources"]["accelerator_type:H100"] = 1.0
    monkeypatch.setattr(placing.ray, "nodes", lambda: nodes)
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: {"a": {"CPU": 7.0}})
    assert WHAT_THERE_IS() == "host-a: H100, 0 of 2 GPUs free, 7 of 8 CPUs free; host-b: 4 CPUs; host-c: nothing"
