"""Renting and watching against a market that misbehaves: one machine per request, no orphan, no live node taken for dead."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_server import Fake, hasty, running_fake, wait_for

from cluster.vast.api import Vast
from cluster.vast.errors import (
    CapError,
    NoOfferError,
    NotGoneError,
    VastBusyError,
    VastError,
    VastKeyError,
    VastRefusedError,
)
from cluster.vast.fleet import Fleet
from cluster.vast.labels import parse
from cluster.vast.money import Caps
from cluster.vast.node import Node
from cluster.vast.offers import Wish
from cluster.vast.rent import Renter
from cluster.vast.state import BLOCKED_S, SET_UP_FAILED, State

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")

WISH = Wish(image="img", gpus=("RTX 4090",), disk_gb=20)


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    with running_fake("--boot", "0.05,0.05") as fake:
        yield fake


@pytest.fixture
def fake(server: Fake) -> Iterator[Fake]:
    server.control("faults", [])
    server.control("calls")
    yield server
    server.control("faults", [])
    server.control("offers", [{} for _ in range(6)])
    for line in server.live():
        server.control(f"vanish/{line['id']}")


def make(
    fake: Fake, folder: Path, *, boot_s: float = 30.0, key: str = "full-rights", caps: Caps | None = None
) -> Renter:
    vast = Vast(key, fake.url, sleep=hasty)
    fleet = Fleet(vast, State(folder), "demo", {"worker"}, boot_s=boot_s, poll_s=0.0)
    return Renter(fleet, caps or Caps(100, 100, 100), "ssh-ed25519 AAAA test", found_within_s=10.0)


def rent(renter: Renter, wish: Wish = WISH) -> Node:
    return renter.rent(wish, "worker", "gpu", lambda k, offer: {"PAIRSCOPE_K": str(k)}, "")


def ready(renter: Renter, id_: str) -> None:
    wait_for(lambda: renter.fleet.refresh() and renter.fleet.is_running(id_))


def test_after_three_machines_that_could_not_be_set_up_no_other_is_rented_for_an_hour(
    fake: Fake, tmp_path: Path
) -> None:
    """A package index that is out of reach would have one machine after the other paid for, up to the limits."""
    renter = make(fake, tmp_path)
    state = renter.fleet.state
    for machine in (9001, 9002):
        state.block_machine(machine, SET_UP_FAILED)
    state.block_machine(9003, "it took 40 minutes to boot")
    renter.fleet.destroy(rent(renter).id, "the test has seen it")
    state.block_machine(9004, SET_UP_FAILED, hours=BLOCKED_S / 3600 - 0.9)
    with pytest.raises(NoOfferError, match=r"set-up of 3 machines failed.*for [56] minutes.*monitor"):
        rent(renter)
    assert fake.live() == []
    state.block_machine(9004, SET_UP_FAILED, hours=BLOCKED_S / 3600 - 1.1)
    assert rent(renter)


def test_where_a_worker_has_come_up_machines_that_could_not_be_set_up_keep_no_other_from_being_rented(
    fake: Fake, tmp_path: Path
) -> None:
    renter = make(fake, tmp_path)
    for machine in (9001, 9002, 9003):
        renter.fleet.state.block_machine(machine, SET_UP_FAILED)
    for kind in ("head", "worker"):
        with renter.fleet.state.edit() as content:
            content["tags"]["5"] = {"ray-node-type": kind, "ray-node-status": "up-to-date"}
        if kind == "head":
            with pytest.raises(NoOfferError):
                rent(renter)
    assert rent(renter)


@pytest.mark.parametrize("kind", ["lost", "503_done"])
def test_a_lost_reply_to_create_is_found_by_its_label(fake: Fake, tmp_path: Path, kind: str) -> None:
    renter = make(fake, tmp_path)
    fake.fault("create", kind)
    node = rent(renter)
    assert [str(line["id"]) for line in fake.live()] == [node.id]
    ready(renter, node.id)


@pytest.mark.parametrize("kind", ["503", "drop", "malformed"])
def test_a_create_that_did_not_happen_takes_another_offer(fake: Fake, tmp_path: Path, kind: str) -> None:
    renter = make(fake, tmp_path)
    fake.fault("create", kind)
    node = rent(renter)
    assert [str(line["id"]) for line in fake.live()] == [node.id]


def test_an_instance_that_turns_up_after_it_was_given_up_is_destroyed(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path)
    fake.fault("create", "lost")
    listing, blind = renter.fleet.listing, []
    renter.fleet.listing = lambda: blind.append(1) or {}  # type: ignore[method-assign, func-returns-value]  # answers, late
    node = rent(renter)
    assert blind
    assert len(fake.live()) == 2
    renter.fleet.listing = listing  # type: ignore[method-assign]
    assert set(renter.fleet.refresh()) == {node.id}
    assert [str(line["id"]) for line in fake.live()] == [node.id]


@pytest.mark.parametrize("silence", ["503", "404"])
def test_while_no_listing_answers_no_second_machine_is_rented(fake: Fake, tmp_path: Path, silence: str) -> None:
    renter = make(fake, tmp_path, caps=Caps(1.0, 100, 100))
    fake.fault("create", "503_done", times=20)
    fake.fault("list", silence, times=1000)
    for _ in range(2):
        with pytest.raises(VastError, match=r"not known|listing|404|503"):
            rent(renter)
        assert len(fake.live()) == 1
    assert renter.fleet.bill().rate > 0  # it is counted although nobody has seen it
    fake.control("faults", [])
    node = rent(renter)
    assert [str(line["id"]) for line in fake.live()] == [node.id]
    assert renter.fleet.state.read()["unknown"] == {}
    ready(renter, node.id)
    assert len(fake.live()) == 1
    rent(renter)
    assert len(fake.live()) == 2


def test_a_request_that_made_nothing_is_forgotten_once_a_listing_answers(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path)
    fake.fault("create", "503")
    fake.fault("list", "503", times=1000)
    with pytest.raises(VastBusyError, match="No other machine is rented until it does"):
        rent(renter)
    fake.control("faults", [])
    node = rent(renter)
    assert [str(line["id"]) for line in fake.live()] == [node.id]
    assert renter.fleet.state.read()["unknown"] == {}


def test_an_offer_that_somebody_else_got_first_ends_in_another_machine(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path)
    vast = renter.fleet.vast
    stale = vast.search({}, bid=False, disk_gb=20)  # the market as it was before
    vast.create(stale[0]["id"], image="x", disk=5, label="somebody else's")
    vast.search = lambda *_, **__: stale  # type: ignore[method-assign]
    node = rent(renter)
    ours = [line for line in fake.live() if parse(line["label"])]
    assert [str(line["id"]) for line in ours] == [node.id]


def test_two_launches_at_once_get_two_machines_and_two_places(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path)
    nodes: list[Node] = []
    threads = [threading.Thread(target=lambda: nodes.append(rent(renter))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len({n.id for n in nodes}) == 4
    assert sorted(n.label.k for n in nodes) == [2, 3, 4, 5]
    assert len(fake.live()) == 4


@pytest.mark.parametrize("kind", ["stuck", "sold_twice"])
def test_a_machine_that_hangs_in_loading_is_destroyed_and_not_used_again(fake: Fake, tmp_path: Path, kind: str) -> None:
    renter = make(fake, tmp_path, boot_s=0.3)
    fake.fault("create", kind)
    node = rent(renter)
    wait_for(lambda: node.id not in renter.fleet.refresh())
    assert fake.live() == []
    assert set(renter.fleet.state.blocked_machines()) == {node.machine}
    assert rent(renter).machine != node.machine


def test_an_instance_gone_right_after_create_is_noticed_as_gone(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.vast.fleet.NEW_S", 0.3)
    renter = make(fake, tmp_path)
    fake.fault("create", "gone")
    node = rent(renter)
    wait_for(lambda: node.id not in renter.fleet.refresh(force=True))
    assert fake.live() == []
    assert renter.fleet.state.blocked_machines() == {node.machine: "its instance was gone before it was ready"}
    assert rent(renter).machine != node.machine


def test_an_instance_that_vast_does_not_list_at_once_is_not_rented_again(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path)
    node = rent(renter)
    fake.fault("list", "no_rows", times=2)
    fake.fault("show", "no_rows", times=2)
    for _ in range(3):
        assert set(renter.fleet.refresh(force=True)) == {node.id}
    ready(renter, node.id)


def test_what_another_process_has_just_rented_is_there_before_vast_lists_it(fake: Fake, tmp_path: Path) -> None:
    node = rent(make(fake, tmp_path))
    again = make(fake, tmp_path)  # as after Ctrl-C, or a restart of the autoscaler
    fake.fault("list", "no_rows", times=2)
    fake.fault("show", "no_rows", times=2)
    assert set(again.fleet.refresh(force=True)) == {node.id}
    assert set(again.fleet.remaining()) == {node.id}
    ready(again, node.id)


def test_what_was_just_rented_is_not_gone_because_vast_does_not_know_it_yet(fake: Fake, tmp_path: Path) -> None:
    node = rent(make(fake, tmp_path))
    again = make(fake, tmp_path)
    fake.fault("destroy", "404", times=2)
    fake.fault("list", "no_rows")
    fake.fault("show", "no_rows", times=3)
    again.fleet.destroy_all(again.fleet.remaining(), "as `ray down` does")
    assert fake.live() == []
    assert again.fleet.remaining() == {}
    assert "gone" in again.fleet.state.read()["destroyed"][node.id]


def test_a_destroy_that_is_ignored_is_repeated_until_it_is_true(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path)
    node = rent(renter)
    fake.fault("destroy", "ignored", times=2)
    renter.fleet.destroy(node.id, "test")
    assert fake.live() == []


def test_a_machine_on_its_way_out_keeps_its_place_and_the_mesh_has_one_for_its_successor(
    fake: Fake, tmp_path: Path
) -> None:
    renter = make(fake, tmp_path, boot_s=0.0)
    renter.places = 3
    fake.fault("create", "stuck")
    stuck = rent(renter)
    fake.fault("destroy", "ignored", times=100)
    time.sleep(0.02)
    assert renter.fleet.refresh(force=True) == {}
    renter.fleet.boot_s = 30.0
    assert (stuck.label.k, rent(renter).label.k) == (2, 3)
    with pytest.raises(NoOfferError, match="all 3 places of the mesh are taken, also by machines that were destroyed"):
        rent(renter)
    assert len(fake.live()) == 2
    fake.control("faults", [])
    renter.fleet.refresh(force=True)
    assert rent(renter).label.k == 2


def test_a_machine_on_its_way_out_keeps_its_place_for_a_process_that_never_saw_it(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path)
    node = rent(renter)
    fake.fault("destroy", "ignored", times=100)
    with pytest.raises(NotGoneError):
        renter.fleet.destroy(node.id, "test")
    again = make(fake, tmp_path)
    fake.fault("list", "no_rows")
    fake.fault("show", "503", times=100)
    assert again.fleet.refresh(force=True) == {}
    assert (node.label.k, rent(again).label.k) == (2, 3)


def test_a_destroy_that_never_works_is_an_error_that_names_the_instance(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path)
    node = rent(renter)
    fake.fault("destroy", "ignored", times=100)
    with pytest.raises(NotGoneError, match=node.id):
        renter.fleet.destroy(node.id, "test")
    fake.control("faults", [])
    assert renter.fleet.refresh(force=True) == {}  # and it is destroyed as soon as Vast obeys again
    assert fake.live() == []
    assert not renter.fleet.state.blocked_machines(), "it is not the machine's fault"


def test_where_several_machines_stay_all_are_named_and_those_that_obey_are_gone(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path)
    nodes = [rent(renter).id for _ in range(3)]
    destroy = renter.fleet.vast.destroy
    renter.fleet.vast.destroy = lambda id_: str(id_) not in nodes[:2] and destroy(id_)  # type: ignore[method-assign]
    with pytest.raises(NotGoneError, match=rf"2 instances are not shown.* {nodes[0]}: .* {nodes[1]}: "):
        renter.fleet.destroy_all(nodes, "test")
    assert [str(line["id"]) for line in fake.live()] == nodes[:2]


@pytest.mark.parametrize("kind", ["429", "503", "empty", "malformed", "no_rows", "drop"])
def test_a_live_node_is_never_taken_for_dead_because_a_listing_failed(
    fake: Fake, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.vast.fleet.NEW_S", 0.0)  # being new is not what keeps it
    renter = make(fake, tmp_path)
    node = rent(renter)
    ready(renter, node.id)
    fake.fault("list", kind, times=9)
    for _ in range(3):
        try:
            assert set(renter.fleet.refresh(force=True)) == {node.id}
        except VastBusyError:
            assert renter.fleet.get(node.id) is not None
    fake.control("faults", [])
    assert set(renter.fleet.refresh(force=True)) == {node.id}
    assert len(fake.live()) == 1


def test_a_node_is_not_judged_by_what_was_known_of_it_before_the_listing_failed(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path, boot_s=0.5)
    node = rent(renter)
    ready(renter, node.id)
    fake.control(f"status/{node.id}", "rebooting")
    renter.fleet.refresh(force=True)
    fake.control(f"status/{node.id}", "running")
    fake.fault("list", "no_rows", times=3)
    fake.fault("show", "503", times=9)
    for _ in range(3):  # for longer than a boot may take
        time.sleep(0.3)
        assert set(renter.fleet.refresh(force=True)) == {node.id}
    assert len(fake.live()) == 1


def test_what_was_destroyed_while_vast_would_not_say_so_is_booked_and_its_place_free(
    fake: Fake, tmp_path: Path
) -> None:
    renter = make(fake, tmp_path)
    node = rent(renter)
    fake.fault("show", "503", times=50)
    with pytest.raises(NotGoneError):
        renter.fleet.destroy(node.id, "test", tries=1)
    fake.control("faults", [])
    assert renter.fleet.refresh(force=True) == {}
    assert [g["id"] for g in renter.fleet.state.read()["gone"]] == [node.id]
    assert rent(renter).label.k == node.label.k


def test_a_node_that_reboots_long_after_its_boot_is_waited_for(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path, boot_s=0.6)
    node = rent(renter)
    ready(renter, node.id)
    time.sleep(0.8)
    fake.control(f"status/{node.id}", "rebooting")
    assert node.id in renter.fleet.refresh(force=True)
    assert not renter.fleet.is_running(node.id)
    wait_for(lambda: node.id not in renter.fleet.refresh(force=True))  # but not for ever
    assert fake.live() == []


def test_an_outbid_node_is_lost_and_destroyed(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path)
    node = rent(renter, replace(WISH, bid=True))
    ready(renter, node.id)
    fake.control(f"outbid/{node.id}")
    assert renter.fleet.refresh(force=True) == {}
    assert fake.live() == []


def test_a_bid_that_is_too_low_leaves_nothing_behind(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path)
    rent(renter, replace(WISH, bid=True, bid_over=0.5))
    wait_for(lambda: renter.fleet.refresh(force=True) == {})
    assert fake.live() == []


def test_a_node_is_running_only_when_ssh_answers(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path)
    fake.fault("create", "stuck")
    node = rent(renter)
    renter.fleet.refresh()
    assert not renter.fleet.is_running(node.id)
    row = {
        **node.row,
        "actual_status": "running",
        "public_ipaddr": "127.0.0.1",
        "ports": {"22/tcp": [{"HostPort": "9"}]},
    }
    renter.fleet.nodes[node.id] = Node(node.id, node.label, row)
    assert not renter.fleet.is_running(node.id)


def test_the_direct_address_and_the_proxys_are_never_mixed(tmp_path: Path) -> None:
    label = parse("ps/demo/w/2/gpu/00000000")
    assert label is not None
    proxy = {
        "id": 1,
        "actual_status": "running",
        "public_ipaddr": "192.0.2.1",
        "ports": {},
        "ssh_host": "proxy",
        "ssh_port": 30022,
    }
    assert Node("1", label, proxy).ssh == ("proxy", 30022)
    direct = proxy | {"ports": {"22/tcp": [{"HostPort": "40022"}]}}
    assert Node("1", label, direct).ssh == ("192.0.2.1", 40022)
    assert Node("1", label, direct | {"public_ipaddr": None}).ssh is None


def test_a_second_process_knows_the_fleet_from_the_labels_alone(fake: Fake, tmp_path: Path) -> None:
    node = rent(make(fake, tmp_path / "one"))
    other = make(fake, tmp_path / "two").fleet.refresh()
    assert other[node.id].label == node.label
    assert other[node.id].env == {"PAIRSCOPE_K": "2"}


def test_limits_are_checked_before_anything_is_rented(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path, caps=Caps(max_price_per_hour=0.6, max_total_dollars=10, max_hours=1))
    rent(renter)
    with pytest.raises(CapError, match="max_price_per_hour"):
        rent(renter)
    assert len(fake.live()) == 1


def test_an_old_cluster_rents_nothing_more(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path, caps=Caps(max_price_per_hour=10, max_total_dollars=10, max_hours=1e-6))
    rent(renter)
    with pytest.raises(CapError, match="max_hours"):
        rent(renter)


def test_no_offer_that_fits_names_what_excluded_most(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path)
    with pytest.raises(NoOfferError, match=r"none of 6 offers .* excluded most by min_gpu_gb 80: 6"):
        rent(renter, replace(WISH, min_gpu_gb=80))
    with pytest.raises(NoOfferError, match="nobody offers 1x B200"):
        rent(renter, replace(WISH, gpus=("B200",)))


def test_offers_are_ranked_by_what_the_work_costs_and_not_by_their_rate(fake: Fake, tmp_path: Path) -> None:
    fake.control("offers", [
        {"dph_base": 0.30, "inet_down_cost": 0.03},  # cheap by the hour, dear by the gigabyte
        {"dph_base": 0.40, "inet_down_cost": 0.0},
        {"dph_base": 0.35, "inet_down_cost": 0.0, "inet_down": 500.0},  # slow: its download takes hours
    ])  # fmt: skip
    wish = replace(WISH, hours=1, download_gb=500, min_inet_down=100)
    assert rent(make(fake, tmp_path), wish).machine == 501


@pytest.mark.parametrize("bid", [False, True])
def test_a_machine_has_the_disk_that_was_asked_for(fake: Fake, tmp_path: Path, bid: bool) -> None:
    node = rent(make(fake, tmp_path), replace(WISH, disk_gb=120, bid=bid))
    listed = make(fake, tmp_path).fleet.listing()[node.id]
    assert (listed.row["disk_space"], listed.row["is_bid"]) == (120, bid)


def test_a_head_is_offered_for_as_long_as_the_cluster_may_last_and_a_worker_for_its_work(
    fake: Fake, tmp_path: Path
) -> None:
    renter = make(fake, tmp_path)
    short, long = (renter.caps.max_hours * 3600 + more for more in (-60, 60))
    fake.control("offers", [{"dph_base": 0.30, "duration": short}, {"dph_base": 0.40, "duration": long}])
    env = lambda k, offer: {}  # noqa: E731
    assert renter.rent(WISH, "head", "gpu", env, "true").machine == 501
    assert rent(renter).machine == 500


def test_a_key_without_rights_rents_nothing(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(VastKeyError):
        rent(make(fake, tmp_path, key="read-only"))
    assert fake.live() == []
    assert State(tmp_path).read()["intents"] == {}


def test_a_key_that_cannot_be_attached_leaves_no_machine(fake: Fake, tmp_path: Path) -> None:
    fake.fault("attach", "503", times=50)
    with pytest.raises(VastBusyError):
        rent(make(fake, tmp_path))
    assert fake.live() == []


@pytest.mark.parametrize(
    ("said", "let_in"),
    [({"success": False, "msg": "no room for another key"}, False), ({"success": False}, False),
     ({"success": False, "msg": "SSH key already attached"}, True), ({"success": True}, True), ("", True)],
)  # fmt: skip
def test_a_key_that_vast_says_it_did_not_attach_is_not_noted_as_attached(
    fake: Fake, tmp_path: Path, said: object, let_in: bool
) -> None:
    renter = make(fake, tmp_path)
    renter.fleet.vast.sdk.attach_ssh = lambda *_: said
    if let_in:
        node = rent(renter)
        assert renter.fleet.state.read()["seen"][node.id]["key"] is True
        return
    with pytest.raises(VastRefusedError, match="Vast did not let it into instance"):
        renter.fleet.vast.attach_key(1, "ssh-ed25519 AAAA")
    with pytest.raises(NoOfferError, match="Vast did not let it into instance"):
        rent(renter)
    assert fake.live() == []


def test_a_row_without_a_price_is_billed_as_before(fake: Fake, tmp_path: Path) -> None:
    renter = make(fake, tmp_path)
    node = rent(renter)
    ready(renter, node.id)
    before = renter.fleet.bill().rate
    assert before > 0
    listed = renter.fleet.vast.instances

    def priceless() -> list[dict[str, object]]:
        return [row | {"dph_total": None} for row in listed()]

    renter.fleet.vast.instances = priceless  # type: ignore[method-assign, assignment]
    renter.fleet.refresh()
    assert renter.fleet.bill().rate == before


def test_what_a_lost_request_made_costs_what_was_offered_until_vast_says_what(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renter = make(fake, tmp_path)
    create = renter.fleet.vast.create

    def killed(*args: object, **fields: object) -> None:
        create(*args, **fields)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(renter.fleet.vast, "create", killed)
    with pytest.raises(KeyboardInterrupt):
        rent(renter)
    again = make(fake, tmp_path)
    offered = again.fleet.bill().rate
    listed = again.fleet.vast.instances
    monkeypatch.setattr(again.fleet.vast, "instances", lambda: [row | {"dph_total": None} for row in listed()])
    again.fleet.refresh()
    assert again.fleet.bill().rate == offered > 0
    monkeypatch.setattr(again.fleet.vast, "instances", lambda: [row | {"dph_total": 0.5} for row in listed()])
    again.fleet.refresh()
    assert again.fleet.bill().rate == 0.5
