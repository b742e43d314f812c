"""A cluster's books: what they carry on, what a stranger's machine may put into them, and what is done where they cannot be written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from fake_server import Fake, wait_for
from provider_stage import HEAD_TAGS, WORKER_TAGS, config, node_config, on_head, on_laptop, ray_up

from capture.errors import StoreError
from cluster.vast import machines
from cluster.vast.api import Vast
from cluster.vast.cli import vast as command
from cluster.vast.fleet import LATE_S
from cluster.vast.labels import parse
from cluster.vast.state import State

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")


def up(content: dict[str, Any] | None = None) -> Any:
    """A laptop whose cluster has a head that answers."""
    laptop = on_laptop(content)
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    wait_for(lambda: [h for h in laptop.non_terminated_nodes({}) if laptop.is_running(h)])
    return laptop


def down(laptop: Any) -> None:
    """As Ray does it."""
    while doomed := laptop.nodes_for_teardown({}):
        laptop.terminate_nodes(doomed)
    laptop.cleanup_cluster_resources()


def age(provider: Any, id_: str, hours: float) -> None:
    with provider.state.edit() as content:
        content["seen"][id_]["since"] -= hours * 3600


@pytest.fixture
def head_says(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Make the head answer with these books when the laptop fetches its own."""

    def say(books: Any) -> None:
        real = subprocess.run

        def ssh(words: list[str], **options: Any) -> Any:
            if words[0] != "ssh":
                return real(words, **options)
            return subprocess.CompletedProcess(words, 0, stdout=json.dumps(books), stderr="")

        monkeypatch.setattr(machines.subprocess, "run", ssh)

    return say


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the disk under the books full."""

    def fill() -> None:
        write = Path.write_text

        def no_room(self: Path, *args: Any, **options: Any) -> int:
            if self.name.startswith("state"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(self, *args, **options)

        monkeypatch.setattr(Path, "write_text", no_room)

    return fill


def test_what_a_head_before_this_one_has_spent_counts_against_the_limit_on_the_new_one(
    fake: Fake, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("cluster.vast.fleet.NEW_S", 0.0)
    laptop = up()
    (first,) = laptop.fleet.refresh()
    age(laptop, first, hours=10)
    fake.control(f"vanish/{first}")
    laptop.fleet.refresh(force=True)
    spent = laptop.fleet.bill().dollars
    assert spent > 4
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (second,) = laptop.fleet.refresh(force=True)
    files = laptop._files(second)
    head = on_head(laptop, tmp_path / "head", monkeypatch)
    (head.folder / "spent.json").write_text(files["~/.pairscope/clusters/pairscope/spent.json"])
    head.fleet.refresh(force=True)
    assert head.fleet.bill().dollars == pytest.approx(spent, abs=0.01)
    fake.control(f"vanish/{second}")
    head.fleet.refresh(force=True)
    (head.folder / "spent.json").write_text(json.dumps(head.state.read()["gone"]))  # what both know counts once
    before = head.state.read()["gone"]
    assert head.fleet.bill().dollars == pytest.approx(sum((r["until"] - r["since"]) * r["dph"] for r in before) / 3600)


@pytest.fixture
def later(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Move this machine's clock on by hours, and Vast's with it."""
    clock, moved = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: clock() + moved[0] * 3600)
    monkeypatch.setattr("cluster.vast.api.Vast.clock_ahead", lambda _: 0.0)
    monkeypatch.setattr("cluster.vast.fleet.NEW_S", 0.0)

    def on(hours: float) -> None:
        moved[0] += hours

    return on


def test_a_head_that_went_while_nobody_looked_is_billed_until_now_before_its_deadline(
    fake: Fake, later: Callable[[float], None], monkeypatch: Any
) -> None:
    limits = config(max_hours=2, max_total_dollars=10)
    laptop = up(limits)
    (head,) = laptop.fleet.refresh()
    dph = laptop.fleet.get(head).dph
    laptop._files(head)
    fake.control(f"vanish/{head}")
    later(1)
    early = on_laptop(limits)
    assert early.fleet.refresh() == {}
    assert early.fleet.bill().dollars == pytest.approx(dph, abs=0.01), "it may have gone just now"


@pytest.mark.parametrize("raised", [False, True])
def test_a_head_that_is_looked_for_days_later_is_billed_until_its_deadline_and_leaves_room_for_the_next(
    fake: Fake, later: Callable[[float], None], monkeypatch: Any, raised: bool
) -> None:
    laptop = up(config(max_hours=2, max_total_dollars=10))
    (head,) = laptop.fleet.refresh()
    dph, hours = laptop.fleet.get(head).dph, 2
    if raised:
        laptop, hours = on_laptop(config(max_hours=5, max_total_dollars=10)), 5
        laptop.fleet.refresh()
        laptop._files(head)
    fake.control(f"vanish/{head}")
    later(40)
    laptop, _ = ray_up(monkeypatch, config(max_hours=2, max_total_dollars=10))
    assert laptop.fleet.bill().dollars == pytest.approx(dph * (hours + LATE_S / 3600), abs=0.02)


@pytest.mark.parametrize("known", [True, False])
def test_what_workers_cost_that_went_while_the_laptop_was_off_is_told_by_the_head(
    fake: Fake, tmp_path: Path, later: Callable[[float], None], monkeypatch: Any, head_says: Any, known: bool
) -> None:
    limits = config(max_total_dollars=15, max_hours=24)
    laptop = up(limits)
    head = on_head(laptop, tmp_path / "head", monkeypatch)
    head.create_node(node_config(), WORKER_TAGS, 3)
    workers = head.non_terminated_nodes({"ray-node-type": "worker"})
    if known:
        laptop.fleet.refresh(force=True)
    later(2)
    head.terminate_nodes(workers)
    later(8)
    head.fleet.refresh(force=True)
    head_says(head.state.read())
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path / "laptop"))
    laptop, _ = ray_up(monkeypatch, limits)
    (id_,) = laptop.fleet.nodes
    dph = laptop.fleet.get(id_).dph
    assert head.fleet.bill().dollars == pytest.approx(16 * dph, abs=0.05)
    assert laptop.fleet.bill().dollars == pytest.approx(16 * dph, abs=0.05)
    left = (15 - 16 * dph) / dph * 3600
    told = int(laptop._files(id_)["~/.pairscope/deadline"])
    assert told == pytest.approx(time.time() + min(left, 14 * 3600), abs=600)


@pytest.mark.parametrize(
    "row",
    [5, {}, {"id": "../x"}, {"id": "1", "kind": "worker", "dph": float("nan"), "since": 0, "until": 1},
     {"id": "1", "kind": "worker", "dph": 9e9, "since": 2, "until": 1}, {"id": "1", "kind": "head", "dph": 1, "since": 0, "until": 1}],
)  # fmt: skip
def test_what_a_head_says_of_workers_that_are_gone_is_taken_as_a_strangers(tmp_path: Path, row: Any) -> None:
    ours = [{"id": "1", "kind": "worker", "dph": 1.0, "since": 5.0, "until": 9.0}]
    state = State(tmp_path)
    with state.edit() as content:
        content["gone"] = ours
    state.merge_gone([row])
    assert state.read()["gone"] == ours
    state.merge_gone([ours[0] | {"until": 9e9}, ours[0] | {"until": 0.0, "since": 0.0}])
    assert state.read()["gone"] == [ours[0] | {"until": 5.0}]


def test_a_price_that_changes_changes_what_is_to_come_and_not_what_was(fake: Fake, monkeypatch: Any) -> None:
    monkeypatch.setattr("cluster.vast.fleet.NEW_S", 0.0)
    laptop = up()
    (head,) = laptop.fleet.refresh()
    age(laptop, head, hours=10)
    listed, dph = laptop.vast.instances, laptop.fleet.get(head).dph
    for price in (0.01, 1.0):
        monkeypatch.setattr(laptop.vast, "instances", lambda p=price: [row | {"dph_total": p} for row in listed()])
        for _ in range(2):
            laptop.fleet.refresh(force=True)
        bill = laptop.fleet.bill()
        assert (bill.rate, bill.dollars) == (price, pytest.approx(10 * dph, abs=0.01))
    fake.control(f"vanish/{head}")
    laptop.fleet.refresh(force=True)
    assert (laptop.fleet.bill().rate, laptop.fleet.bill().dollars) == (0, pytest.approx(10 * dph, abs=0.01))


def test_a_price_below_nothing_pays_back_nothing(fake: Fake, monkeypatch: Any) -> None:
    """The limits would be out of reach, for this machine and for those beside it."""
    monkeypatch.setattr("cluster.vast.fleet.NEW_S", 0.0)
    laptop = up()
    (head,) = laptop.fleet.refresh()
    age(laptop, head, hours=10)
    dph, page = laptop.fleet.get(head).dph, laptop.vast.sdk.show_instances_v1

    def odd(params: Any) -> Any:
        found = page(params)
        return found | {"instances": [row | {"dph_total": -5.0} for row in found["instances"]]}

    monkeypatch.setattr(laptop.vast.sdk, "show_instances_v1", odd)
    laptop.fleet.refresh(force=True)
    assert (laptop.fleet.bill().rate, laptop.fleet.bill().dollars) == (dph, pytest.approx(10 * dph, abs=0.01))


@pytest.mark.parametrize("price", [1e9, 400.0])
def test_a_price_in_one_listing_that_no_machine_costs_does_not_end_the_cluster(
    fake: Fake, tmp_path: Path, monkeypatch: Any, price: float
) -> None:
    monkeypatch.setattr("cluster.vast.fleet.NEW_S", 0.0)
    laptop = up()
    head = on_head(laptop, tmp_path / "head", monkeypatch)
    head.non_terminated_nodes({})
    (id_,) = head.fleet.refresh()
    age(head, id_, hours=1)
    rate, page = head.fleet.bill().rate, head.vast.sdk.show_instances_v1
    absurd = [True]

    def odd(params: Any) -> Any:
        found = page(params)
        return found | {"instances": [row | ({"dph_total": price} if absurd[0] else {}) for row in found["instances"]]}

    monkeypatch.setattr(head.vast.sdk, "show_instances_v1", odd)
    for absurd[0] in (True, False, True, False):
        head.fleet.refresh(force=True)
        head.non_terminated_nodes({})
        assert head.fleet.bill().rate == pytest.approx(rate)
        assert head.fleet.bill().dollars == pytest.approx(rate, rel=0.02)
    assert len(fake.live()) == 1


def test_a_price_that_stays_high_is_believed(fake: Fake, monkeypatch: Any) -> None:
    laptop = up()
    listed = laptop.vast.instances
    monkeypatch.setattr(laptop.vast, "instances", lambda: [row | {"dph_total": 30.0} for row in listed()])
    for _ in range(2):
        laptop.fleet.refresh(force=True)
    assert laptop.fleet.bill().rate == 30.0


def test_a_machine_that_vast_calls_older_than_its_request_does_not_end_its_cluster(
    fake: Fake, tmp_path: Path, monkeypatch: Any
) -> None:
    laptop = up()
    listed = Vast.instances
    monkeypatch.setattr(Vast, "instances", lambda self: [row | {"start_date": 1.0} for row in listed(self)])
    head = on_head(laptop, tmp_path / "head", monkeypatch)
    assert head.non_terminated_nodes({})
    assert len(fake.live()) == 1
    for fleet in (laptop.fleet, head.fleet):
        fleet.refresh(force=True)
        assert fleet.bill().hours < 0.1


@pytest.mark.parametrize("seen", [{"abc": {}}, {"9" * 40: {}}, {"1": {"since": "x", "dph": []}}, {"7": None}])
def test_ray_down_ends_all_whatever_the_head_says_that_it_has_rented(
    fake: Fake, head_says: Callable[[Any], None], seen: Any
) -> None:
    laptop = up()
    head_says({"machines": {}, "seen": seen})
    down(laptop)
    assert fake.live() == []


def test_a_head_cannot_have_another_clusters_machines_destroyed(fake: Fake, head_says: Callable[[Any], None]) -> None:
    up(config() | {"cluster_name": "other"})
    (theirs,) = (line["id"] for line in fake.live())
    laptop = up()
    head_says({"machines": {}, "seen": {str(theirs): {"kind": "worker", "since": 1.0, "dph": 0.1}}})
    down(laptop)
    assert [line["id"] for line in fake.live()] == [theirs]


@pytest.mark.parametrize("label", ["my machine", "", "ps/pairscope/h/2/rtx4090/abcd1234"])
@pytest.mark.parametrize("command_", ["ray down", "destroy --cluster", "destroy ID"])
def test_a_machine_that_was_asked_for_here_is_ours_also_when_somebody_has_changed_its_label(
    fake: Fake, label: str, command_: str
) -> None:
    laptop = up()
    (head,) = laptop.fleet.refresh()
    laptop.vast.sdk.label_instance(int(head), label)
    assert [line["label"] for line in fake.live()] == [label]
    again = on_laptop()  # with the books alone
    assert again.nodes_for_teardown({}) == again.non_terminated_nodes({}) == [head]
    assert (again.node_tags(head)["ray-node-type"], again.internal_ip(head)) == ("head", "127.0.1.1")
    if command_ == "ray down":
        down(again)
    else:
        words = [head] if command_ == "destroy ID" else ["--cluster", "pairscope"]
        done = CliRunner().invoke(command, ["destroy", *words, "--yes"], catch_exceptions=False)
        assert (done.exit_code, f"{head} is gone" in done.output) == (0, True)
    assert fake.live() == []


def test_a_head_cannot_have_a_machine_without_a_label_destroyed(fake: Fake, head_says: Callable[[Any], None]) -> None:
    laptop = up()
    theirs = laptop.vast.create(1003, image="x", disk=5, label="theirs")
    row = {"kind": "worker", "since": 1.0, "dph": 0.1, "asked_here": True, "label": "ps/pairscope/w/2/rtx4090/abcd1234"}
    head_says({"machines": {}, "seen": {str(theirs): row}})
    down(laptop)
    assert [line["id"] for line in fake.live()] == [theirs]


@pytest.mark.parametrize("found", [{"abc": {"reason": "x", "until": 9e9}}, {"1": {"reason": "x", "until": "z"}}])
def test_what_a_head_says_of_machines_does_not_keep_the_next_cluster_from_renting(
    fake: Fake, head_says: Callable[[Any], None], found: Any
) -> None:
    laptop = up()
    head_says({"machines": found, "seen": {}})
    down(laptop)
    on_laptop().create_node(node_config(), HEAD_TAGS, 1)
    assert len(fake.live()) == 1


def test_a_machine_that_a_head_calls_bad_is_left_alone_for_a_day_at_most(
    fake: Fake, head_says: Callable[[Any], None]
) -> None:
    laptop = up()
    head_says({"machines": {"77": {"reason": "x", "until": 9e11}}, "seen": {}})
    down(laptop)
    assert laptop.state.read()["machines"]["77"]["until"] <= time.time() + 24 * 3600


@pytest.mark.parametrize("place", ["w/49", "w/99", "w/1", "h/2"])
def test_a_label_with_a_place_that_the_mesh_does_not_have_is_not_ours(
    fake: Fake, tmp_path: Path, monkeypatch: Any, place: str
) -> None:
    laptop = up()
    label = f"ps/pairscope/{place}/rtx4090/abcd1234"
    foreign = laptop.vast.create(1003, image="x", disk=5, label=label)
    wait_for(lambda: any(r["id"] == foreign and r["actual_status"] == "running" for r in laptop.vast.instances()))
    head = on_head(laptop, tmp_path / "head", monkeypatch)
    assert len(head.non_terminated_nodes({})) == 1  # and the poll came to its end
    assert parse(label) is None
    assert parse("ps/pairscope/w/48/rtx4090/abcd1234")


def test_a_head_whose_disk_is_full_still_gives_machines_back(
    fake: Fake, tmp_path: Path, monkeypatch: Any, full: Callable[[], None]
) -> None:
    laptop = up()
    head = on_head(laptop, tmp_path / "head", monkeypatch)
    head.create_node(node_config(), WORKER_TAGS, 1)
    (worker,) = head.non_terminated_nodes({"ray-node-type": "worker"})
    head.set_node_tags(worker, {"ray-node-status": "update-failed"})
    full()
    head.terminate_nodes([worker])
    assert ["/h/" in line["label"] for line in fake.live()] == [True]


@pytest.mark.parametrize("by_id", [True, False])
def test_destroy_destroys_where_nothing_can_be_written_down(
    fake: Fake, monkeypatch: Any, full: Callable[[], None], by_id: bool
) -> None:
    monkeypatch.setattr("cluster.vast.fleet.NEW_S", 0.0)
    laptop = up()
    (head,) = laptop.fleet.refresh()
    full()
    done = CliRunner().invoke(command, ["destroy", *([head] if by_id else ["--cluster", "pairscope"]), "--yes"])
    assert fake.live() == []
    assert f"{head} is gone" in done.output
    if not by_id:  # its books are still open
        assert "the disk is full" in str(done.exception)


def test_a_home_that_cannot_be_is_one_line(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path / "file"))
    with pytest.raises(click.ClickException, match=r"cannot write .*set PAIRSCOPE_HOME to a folder"):
        on_laptop()


def test_a_home_without_locks_is_one_line_and_rents_nothing(fake: Fake, monkeypatch: Any) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("cluster.vast.state.fcntl.flock", none)
    with pytest.raises(click.ClickException, match=r"cannot lock .*Set PAIRSCOPE_HOME to a folder on a disk"):
        up()
    assert fake.live() == []


@pytest.mark.parametrize("text", ["", "[]", "null"])
def test_books_that_are_damaged_are_named(fake: Fake, text: str) -> None:
    laptop = on_laptop()
    laptop.state.path.write_text(text)
    done = CliRunner().invoke(command, ["orphans"])
    assert isinstance(done.exception, StoreError)
    assert f"'{laptop.state.path}' is not the JSON that it was written as" in str(done.exception)


@pytest.mark.parametrize("whose", ["old", "pairscope"])
def test_damaged_books_do_not_keep_a_machine_that_vast_lists_from_being_seen_and_ended(
    fake: Fake, tmp_path: Path, whose: str
) -> None:
    laptop = up()
    (head,) = laptop.fleet.refresh()
    books = tmp_path / "laptop" / "clusters" / whose / "state.json"
    books.parent.mkdir(exist_ok=True)
    books.write_text('{"tags": ')
    fake.control(f"status/{head}", "exited")
    told = CliRunner().invoke(command, ["orphans"])
    assert f"to end them: pairscope vast destroy {head}" in told.output
    assert isinstance(told.exception, StoreError)
    assert f"'{books}' is not the JSON" in str(told.exception)
    done = CliRunner().invoke(command, ["destroy", "1", "--yes"])
    assert f"'{books}' is not the JSON" in str(done.exception), "it may be in there"
    done = CliRunner().invoke(command, ["destroy", head, "--yes"])
    assert (done.exit_code, f"{head} is gone" in done.output) == (0, True)
    assert f"'{books}' is not the JSON" in done.output
    assert fake.live() == []
    told = CliRunner().invoke(command, ["orphans"])
    assert (isinstance(told.exception, StoreError), told.output) == (True, "")
