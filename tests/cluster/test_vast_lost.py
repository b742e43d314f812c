"""When a machine counts as lost, and when only a person may say so; against the fake Vast with a clock that tests move."""

from __future__ import annotations

from pathlib import Path

import pytest
from virtual_market import World

from cluster.vast import fleet as fleet_module
from cluster.vast.fleet import LOST_GRACE_S, Fleet
from cluster.vast.money import Caps
from cluster.vast.offers import Wish
from cluster.vast.rent import Renter
from cluster.vast.state import State

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")

BOOT_S = 900.0


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch, offers=3, boot_s=(2.0, 20.0))


def make(world: World, folder: Path, kind: str) -> Fleet:
    return Fleet(world.vast(), State(folder), "demo", {kind}, boot_s=BOOT_S, poll_s=0.0)


def rented(world: World, folder: Path, kind: str, *, boots: bool = True) -> tuple[Fleet, str]:
    """A node that this machine asked for, up or stuck in its boot."""
    fleet = make(world, folder, kind)
    renter = Renter(fleet, Caps(100, 1000, 1000), "ssh-ed25519 AAAA test")
    id_ = renter.rent(Wish(image="x"), kind, "gpu", lambda k, _: {"PAIRSCOPE_K": str(k)}, "").id
    world.market.live[int(id_)].stuck = not boots
    world.clock.sleep(60)
    assert set(fleet.refresh()) == {id_}
    return fleet, id_


@pytest.mark.parametrize("status", ["running", "stopped", "exited", "offline", "loading"])
def test_a_head_that_this_machine_has_no_books_of_is_left_alone_although_it_does_not_answer(
    world: World, tmp_path: Path, status: str
) -> None:
    _, id_ = rented(world, tmp_path / "before", "head")
    world.market.live[int(id_)].status = status
    world.doors.open.clear()
    world.clock.sleep(2 * BOOT_S)
    after = make(world, tmp_path / "after", "head")  # state.json is gone
    for _ in range(3):
        assert set(after.refresh()) == {id_}
        world.clock.sleep(2 * BOOT_S)
    assert int(id_) in world.market.live


def test_a_head_that_never_booted_is_ended_where_this_machine_asked_for_it(world: World, tmp_path: Path) -> None:
    fleet, _ = rented(world, tmp_path, "head", boots=False)
    world.clock.sleep(2 * BOOT_S)
    assert fleet.refresh() == {}
    assert world.market.live == {}


@pytest.mark.parametrize("status", ["exited", "offline"])
def test_a_worker_that_is_off_is_ended_after_a_grace_and_not_after_the_time_of_a_boot(
    world: World, tmp_path: Path, status: str
) -> None:
    fleet, id_ = rented(world, tmp_path, "worker")
    one = world.market.live[int(id_)]
    one.status = status
    world.doors.open.clear()
    for _ in range(2):  # a hiccup, and a second one: the grace begins anew
        assert set(fleet.refresh()) == {id_}
        world.clock.sleep(LOST_GRACE_S - 20)
        assert set(fleet.refresh()) == {id_}
        one.status = "rebooting"
        world.clock.sleep(10)
        assert set(fleet.refresh()) == {id_}
        one.status = status
    fleet.refresh()
    world.clock.sleep(LOST_GRACE_S + 5)
    assert fleet.refresh() == {}
    assert world.market.live == {}


@pytest.mark.parametrize("status", ["offline", "unknown", "loading"])
def test_a_worker_that_answers_is_not_ended_because_vast_calls_it_offline_or_does_not_know(
    world: World, tmp_path: Path, status: str
) -> None:
    fleet, id_ = rented(world, tmp_path, "worker")
    one = world.market.live[int(id_)]
    one.status, one.stuck = status, True
    for wait_s in (0, 2 * LOST_GRACE_S, BOOT_S, 4 * BOOT_S):
        world.clock.sleep(wait_s)
        assert set(fleet.refresh()) == {id_}
    world.doors.open.clear()
    assert fleet.refresh() == {}, "it has been so for longer than the grace and than a boot"


def test_a_node_that_vast_will_not_speak_of_is_not_gone_for_a_process_that_never_saw_it(
    world: World, tmp_path: Path
) -> None:
    """Such as the autoscaler after a second `ray up`: it would rent another in its place."""
    fleet, id_ = rented(world, tmp_path, "worker")
    world.desk.faults = [{"call": "list", "kind": "no_rows", "times": 99}, {"call": "show", "kind": "503", "times": 99}]
    again = make(world, tmp_path, "worker")
    assert set(again.refresh()) == {id_}
    assert again.bill().rate == fleet.bill().rate > 0
    with again.state.edit() as content:
        content["destroyed"][id_] = {"since": 0.0, "k": 2}
    assert make(world, tmp_path, "worker").refresh() == {}, "one that was destroyed is on its way out"
    world.desk.faults = []
    assert again.refresh(force=True) == {}
    assert world.market.live == {}


def test_a_worker_that_exits_in_its_boot_has_the_grace_and_no_more(world: World, tmp_path: Path) -> None:
    fleet, id_ = rented(world, tmp_path, "worker", boots=False)
    world.clock.sleep(300)
    world.market.live[int(id_)].status = "exited"
    assert set(fleet.refresh()) == {id_}, "the boot was long, the exit is new"
    world.clock.sleep(LOST_GRACE_S + 5)
    assert fleet.refresh() == {}


def test_the_clock_is_the_one_that_is_moved(world: World) -> None:
    assert fleet_module.time.time() == world.clock.now
