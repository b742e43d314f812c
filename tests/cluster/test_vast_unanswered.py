"""Requests for a machine that nobody heard the end of: what they made is used or ended, and what they did not make is forgotten."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from fake_server import Fake, wait_for
from provider_stage import HEAD_TAGS, WORKER_TAGS, config, node_config, on_head, on_laptop, ray_up

from cluster.vast import before_up
from cluster.vast.cli import vast as command
from cluster.vast.errors import VastBusyError
from cluster.vast.state import OPEN_S, State

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")

LONG_AGO = {"k": 1, "since": 0.0, "kind": "head", "type": "rtx4090", "dph": 0.44}


def rent_unheard(fake: Fake, provider: Any, tags: dict[str, str]) -> str:
    """A machine that was made, with the reply to its request lost and no listing answering since; its id."""
    before = {line["id"] for line in fake.live()}
    provider.renter.found_within_s = 0.01
    provider.vast.sleep = lambda s: None
    fake.fault("create", "lost")
    fake.fault("list", "503", times=100, after=1 if tags is HEAD_TAGS else 0)
    with pytest.raises((click.ClickException, VastBusyError), match=r"whether offer .* was rented"):
        provider.create_node(node_config(), tags, 1)
    fake.control("faults", [])
    fake.control("calls")
    (made,) = (str(line["id"]) for line in fake.live() if line["id"] not in before)
    return made


def run(*args: str) -> Any:
    return CliRunner().invoke(command, args, catch_exceptions=False)


def test_a_head_whose_reply_was_lost_is_let_in_and_used_by_the_next_ray_up(fake: Fake, monkeypatch: Any) -> None:
    laptop, _ = ray_up(monkeypatch)
    head = rent_unheard(fake, laptop, HEAD_TAGS)
    again, _ = ray_up(monkeypatch)
    wait_for(lambda: again.non_terminated_nodes({"ray-node-type": "head"}) == [head] and again.is_running(head))
    assert fake.control("calls").count(f"attach {head}") == 1
    content = again.state.read()
    assert (content["unknown"], content["seen"][head]["asked_here"]) == ({}, True)
    assert (run("orphans").exit_code, run("destroy", "--cluster", "pairscope", "--yes").exit_code) == (0, 0)
    assert (fake.live(), fake.control("keys")) == ([], [])


def test_a_head_of_which_ray_up_was_killed_before_its_key_was_attached_gets_it_later(
    fake: Fake, monkeypatch: Any
) -> None:
    laptop, _ = ray_up(monkeypatch)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(laptop.vast, "attach_key", killed)
    with pytest.raises(KeyboardInterrupt):
        laptop.create_node(node_config(), HEAD_TAGS, 1)
    (line,) = fake.live()
    fake.control("calls")
    fake.fault("attach", "403")
    for _ in range(3):  # the first is refused
        ray_up(monkeypatch)
    assert fake.control("calls").count(f"attach {line['id']}") == 2


def test_a_machine_that_got_its_key_as_it_was_rented_is_not_given_it_again(fake: Fake, monkeypatch: Any) -> None:
    laptop, _ = ray_up(monkeypatch)
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    for _ in range(2):
        ray_up(monkeypatch)
    assert fake.calls("attach") == 1


def test_a_worker_whose_reply_was_lost_is_let_in_by_the_next_poll_and_counts_once(
    fake: Fake, tmp_path: Path, monkeypatch: Any
) -> None:
    head = on_head(on_laptop(), tmp_path / "head", monkeypatch)
    worker = rent_unheard(fake, head, WORKER_TAGS)
    time.sleep(0.02)
    assert head.non_terminated_nodes({"ray-node-type": "worker"}) == [worker]
    assert f"attach {worker}" in fake.control("calls")
    assert head.state.read()["unknown"] == {}
    assert head.fleet.bill().rate == pytest.approx(head.fleet.get(worker).dph)
    head.create_node(node_config(), WORKER_TAGS, 1)  # Ray, which was told that it failed, asks again
    assert [str(line["id"]) for line in fake.live()] == [worker]
    head.create_node(node_config(), WORKER_TAGS, 1)
    assert len(fake.live()) == 2
    head.terminate_nodes(head.non_terminated_nodes({"ray-node-type": "worker"}))
    head.fleet.refresh(force=True)
    assert head.fleet.bill().rate == 0


@pytest.mark.parametrize(("kind", "asked"), [("403", 2), ("404", 2), ("503", 4)])
def test_a_machine_that_refuses_our_key_is_not_asked_at_every_poll(
    fake: Fake, tmp_path: Path, monkeypatch: Any, kind: str, asked: int
) -> None:
    head = on_head(on_laptop(), tmp_path / "head", monkeypatch)
    head.vast.sleep = lambda s: None
    worker = rent_unheard(fake, head, WORKER_TAGS)
    fake.fault("attach", kind, times=100)
    calls = 0

    def poll() -> None:
        head.fleet.refresh(force=True)
        monkeypatch.setattr(head.vast, "attach_key", counted)
        assert head.non_terminated_nodes({"ray-node-type": "worker"}) == [worker]

    attach = head.vast.attach_key

    def counted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        attach(*args)

    for _ in range(3):
        poll()
    monkeypatch.setattr("cluster.vast.rent.REFUSED_S", 0.0)
    poll()
    assert calls == asked


def test_a_machine_that_is_taken_later_and_gets_no_key_is_not_lost_sight_of(
    fake: Fake, tmp_path: Path, monkeypatch: Any
) -> None:
    head = on_head(on_laptop(), tmp_path / "head", monkeypatch)
    worker = rent_unheard(fake, head, WORKER_TAGS)
    fake.fault("attach", "503", times=100)
    with pytest.raises(VastBusyError, match="attach"):
        head.create_node(node_config(), WORKER_TAGS, 1)
    assert head.state.read()["seen"][worker]["asked_here"]
    fake.control("faults", [])
    head.create_node(node_config(), WORKER_TAGS, 1)
    assert [str(line["id"]) for line in fake.live()] == [worker]


@pytest.mark.parametrize("part", ["unknown", "intents"])
def test_a_request_of_long_ago_holds_up_neither_ray_up_nor_destroy(fake: Fake, monkeypatch: Any, part: str) -> None:
    state = State(on_laptop().folder)
    with state.edit() as content:
        content[part] = {"00000001": LONG_AGO}
    done = run("destroy", "--cluster", "pairscope", "--yes")
    assert (done.exit_code, done.output) == (0, "nothing to destroy\n")
    with state.edit() as content:
        content[part] = {"00000001": LONG_AGO}
    laptop, shown = ray_up(monkeypatch)
    assert "Cheapest machine" in shown[0]
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    assert len(fake.live()) == 1


def test_a_request_that_no_listing_has_shown_for_long_is_given_up(fake: Fake, monkeypatch: Any) -> None:
    laptop = on_laptop()
    young = LONG_AGO | {"since": time.time() - OPEN_S + 60}
    with laptop.state.edit() as content:
        content["unknown"] = {"00000001": LONG_AGO, "00000002": young}
    laptop.fleet.refresh(force=True)
    content = laptop.state.read()
    assert (set(content["abandoned"]), set(content["unknown"])) == ({"00000001"}, {"00000002"})


def test_a_head_that_turns_up_after_ray_down_is_told_of_and_can_be_ended(fake: Fake, monkeypatch: Any) -> None:
    laptop, _ = ray_up(monkeypatch)
    warned: list[str] = []
    monkeypatch.setattr(before_up.cli_logger, "warning", lambda text, *a, **_: warned.append(text.format(*a)))
    with laptop.state.edit() as content:
        content["intents"]["00000001"] = LONG_AGO | {"since": time.time()}  # another `ray up` is at it
    monkeypatch.setattr(before_up, "ray_command", lambda: "down")
    on_laptop().cleanup_cluster_resources()
    soon = {"PAIRSCOPE_DEADLINE": str(int(time.time()) + 600)}
    offer = laptop.vast.search({}, bid=False, disk_gb=1)[0]["id"]
    laptop.vast.create(offer, image="x", disk=1, label="ps/pairscope/h/1/rtx4090/00000001", env=soon)
    told = run("orphans")
    assert (told.exit_code, "nobody uses it" in told.output) == (1, True)
    assert run("destroy", "--cluster", "pairscope", "--yes").exit_code == 0
    assert fake.live() == []
    assert [line for line in warned if "pairscope is not answered yet" in line]


@pytest.mark.parametrize("made", [True, False])
def test_ray_up_that_is_interrupted_as_it_asks_for_the_head_can_be_typed_again(
    fake: Fake, monkeypatch: Any, made: bool
) -> None:
    laptop, _ = ray_up(monkeypatch)
    create = laptop.vast.create

    def interrupted(*args: Any, **fields: Any) -> None:
        if made:
            create(*args, **fields)
        raise KeyboardInterrupt

    monkeypatch.setattr(laptop.vast, "create", interrupted)
    with pytest.raises(KeyboardInterrupt):
        laptop.create_node(node_config(), HEAD_TAGS, 1)
    again, _ = ray_up(monkeypatch, config(max_price_per_hour=0.8))  # there is no room for two
    waited: list[float] = []
    monkeypatch.setattr(again.vast, "sleep", waited.append)
    if not again.non_terminated_nodes({"ray-node-type": "head"}):
        again.create_node(node_config(), HEAD_TAGS, 1)
        assert 20 < sum(waited) <= 30, "as long as a lost reply is looked for"
    assert len(fake.live()) == 1
