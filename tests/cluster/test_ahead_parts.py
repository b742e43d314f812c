"""Fetching ahead, piece by piece and without Ray: who may, whose turn is next, what makes room for what."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ahead_driver import SIZE, header, make_models
from ahead_work import whole
from local_hub import Fault, LocalHub
from test_prepare import NoWait, usage

from capture import keep, ranges
from capture.config import Entry
from capture.errors import CheckpointError
from capture.show import Show
from capture.spool import Spool
from cluster import ahead as ahead_module
from cluster import ahead_fetch, prepare_disk
from cluster import prepare as prepare_module
from cluster.ahead import Ahead, is_worth
from cluster.ahead_fetch import Fetching
from cluster.job import Job
from cluster.prepare import prepare
from cluster.prepare_disk import GIB, Keeping, in_use, make_room
from cluster.prepare_gate import Gate
from cluster.queue import Queue
from cluster.resources import Request

ONE = Request(1.0, 1.0)


def entry(name: str, **fields: Any) -> Entry:
    return Entry.model_validate(
        {"name": name, "base_model": f"org/{name}-base", "sft_model": f"org/{name}-sft", "tokenizer": f"org/{name}-base",
         "prompts": ("a",), "weights": "download"} | fields
    )  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub with pairs a and b, and a gate that lets everybody through, called without Ray."""
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path / "pairscope"))
    gate = NoWait(sweep="this one")
    for module in (prepare_module, ahead_fetch):
        monkeypatch.setattr(module, "ask", lambda method, *args: method(*args))
        monkeypatch.setattr(module, "find_gate", lambda: gate)
        monkeypatch.setattr(module, "node_id", lambda: "")  # a Ray of other tests may be there
    monkeypatch.setattr(os, "nice", lambda by: by)
    make_models(tmp_path / "hub", "ab")
    (tmp_path / "cache").mkdir()
    with LocalHub(tmp_path / "hub") as made, made.used_here(monkeypatch, tmp_path / "cache"):
        made.gate = gate  # type: ignore[attr-defined]
        yield made


# -- the actor -------------------------------------------------------------------------------------------------------------


def test_an_entrys_files_come_with_their_weights_and_the_gate_hears_of_it(hub: LocalHub, tmp_path: Path) -> None:
    actor = Fetching()
    found = actor.fetch(entry("a"))
    size = SIZE + len(header())
    assert (found.state, found.nbytes, actor.watch()) == ("done", 2 * size, (2 * size, 2 * size))
    gate = hub.gate  # type: ignore[attr-defined]
    assert gate.came_ahead("a", "")[0] == 2 * size
    assert gate.came_ahead("a", "another node") == (0, 0.0)
    assert gate.heard == {}, "the place is given back"
    assert len(list(tmp_path.glob("cache/models--org--a-*/snapshots/*/tokenizer_config.json"))) == 2
    assert Fetching().fetch(entry("a")).nbytes == 0, "what is there is not fetched again"


def test_a_fetch_without_room_removes_nothing_that_is_needed_and_fetches_nothing(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_disk.shutil, "disk_usage", lambda path: usage(0, 0, GIB))
    found = Fetching().fetch(entry("a"))
    assert (found.state, found.nbytes) == ("no room", 0)
    assert "on disk and 2 to spare" in found.why
    assert not hub.seen("content")


@pytest.mark.parametrize("fault", [Fault("wrong"), Fault("status", where="hub", part="a-sft/resolve", status=403)])
def test_a_fetch_that_fails_says_why_and_the_entrys_own_turn_fetches_the_rest(
    hub: LocalHub, fault: Fault, tmp_path: Path
) -> None:
    hub.faults.append(fault)
    found = Fetching().fetch(entry("a"))
    assert found.state == "failed"
    assert found.why.startswith("CheckpointError: ")
    turn(entry("a"), hub)
    assert whole(tmp_path / "cache") == ["org/a-base", "org/a-sft"]


def test_a_fetch_that_is_told_to_stop_before_it_began_ends(hub: LocalHub) -> None:
    actor = Fetching()
    actor.stop()
    assert actor.fetch(entry("a")).state == "stopped"


def test_one_that_gave_way_is_gone_on_with_by_the_entrys_own_turn(hub: LocalHub, tmp_path: Path) -> None:
    """Weights that were fetched in part are not asked for anew, although the hub's library would."""
    size, part = SIZE + len(header()), 1 << 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keep, "PART", part)
        actor = Fetching()
        read_all, write = ranges.Ranges.read, Spool.write

        def read(self: Any, file: Any, start: int, view: memoryview) -> None:
            if file.repo == "org/a-sft" and start > 0:  # only its first part comes before the stop
                self.stop.wait(60)
            read_all(self, file, start, view)

        def written(self: Any, start: int, view: memoryview) -> None:
            write(self, start, view)
            if self.file.repo == "org/a-sft":
                actor.stop()

        patch.setattr(ranges.Ranges, "read", read)
        patch.setattr(Spool, "write", written)
        found = actor.fetch(entry("a"))
    assert found.state == "stopped"
    assert found.nbytes in (size, size + part), "the part may have been kept and not been counted yet"
    before = len(hub.seen("content"))
    turn(entry("a"), hub)
    later = hub.seen("content")[before:]
    assert all(r.range is not None for r in later), "the library had nothing left to download"
    assert sum(r.range[1] - r.range[0] + 1 for r in later if r.range) == size - part


def turn(one: Entry, hub: LocalHub) -> Entry:
    """What an entry does when its own turn comes."""
    with prepare_module._online_again():
        found, used = prepare(one, hub.gate, lambda progress: None, lambda: False)  # type: ignore[attr-defined]
    for stream in used:
        stream.close()
    return found


# -- room ------------------------------------------------------------------------------------------------------------------


def put(cache: Path, repo: str, *, by: str | None, read: float) -> Path:
    """A model of 1 MiB in the cache. by: the sweep that fetched it."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True)
    blob = folder / "blobs" / "aa"
    blob.write_bytes(os.urandom(1 << 20))
    os.utime(blob, (read, read))
    if by is not None:
        prepare_disk._mark(repo).write_text(by)
    return folder


def test_a_bound_is_kept_by_what_is_done_then_by_what_comes_later_and_never_by_what_is_in_use(
    hub: LocalHub, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    own = put(cache, "org/own", by=None, read=1)
    other = put(cache, "org/other", by="another sweep", read=1)
    later, sooner, used, old, done = (
        put(cache, f"org/{name}", by="this one", read=at)
        for at, name in enumerate(("later", "sooner", "used", "old", "done"), 2)
    )
    needed = frozenset({"org/later", "org/sooner", "org/used"})

    def room(mib: float, most: float, **more: Any) -> None:
        make_room(int(mib * (1 << 20)), ["org/new"], Keeping("this one", needed, int(most * (1 << 20))), **more)

    with in_use("org/used"):
        room(1, 6)
        assert all(p.exists() for p in (later, sooner, used, old, done)), "five and one are within six"
        room(1, 5, ahead=True)
        assert (old.exists(), done.exists()) == (False, True), "the one that was not read for longer"
        with pytest.raises(CheckpointError, match="in use or still needed, and cache_gib is"):
            room(2, 4, ahead=True)
        assert not done.exists()
        assert later.exists(), "nothing that is needed goes for what has not its turn"
        room(2, 4)
        assert (later.exists(), sooner.exists()) == (False, True)
        with pytest.raises(CheckpointError, match=r"need 0\.0 GiB more in the hub's cache"):
            room(3, 3)
    assert used.exists()
    assert own.exists()
    assert other.exists()


@pytest.mark.parametrize("bound", ["the disk's", "cache_gib"])
def test_a_pair_for_which_all_is_not_enough_costs_later_entries_nothing(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    mib = 1 << 20
    node = prepare_disk.mesh_folder() / "node.json"
    node.parent.mkdir(parents=True)
    node.write_text("{}")
    later, used, done = (
        put(tmp_path / "cache", f"org/{name}", by="this one", read=at)
        for at, name in enumerate(("later", "used", "done"))
    )

    def free(path: Path) -> usage:
        held = sum(file.stat().st_size for file in Path(path).glob("models--*/blobs/*"))
        return usage(0, 0, prepare_disk.SPARE_BYTES + 4 * mib - held)

    if bound != "cache_gib":
        monkeypatch.setattr(prepare_disk.shutil, "disk_usage", free)
    kept = Keeping("this one", frozenset({"org/later", "org/used"}), 4 * mib if bound == "cache_gib" else None)
    with in_use("org/used"):
        with pytest.raises(CheckpointError, match="org/large"):
            make_room(4 * mib, ["org/large"], kept)
        assert (later.exists(), used.exists(), done.exists()) == (True, True, False)
        make_room(3 * mib, ["org/fits"], kept)
        assert (later.exists(), used.exists()) == (False, True)


def test_weights_that_a_sweep_is_done_with_leave_a_rented_nodes_disk_to_its_results(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head writes down what all nodes find out, long after it made room for its own next pair."""
    cache, mib = tmp_path / "cache", 1 << 20
    later, here, used, old, done = (
        put(cache, f"org/{name}", by="this one", read=at)
        for at, name in enumerate(("later", "here", "used", "old", "done"))
    )

    def free(path: Path) -> usage:
        held = sum(file.stat().st_size for file in Path(path).glob("models--*/blobs/*"))
        return usage(0, 0, prepare_disk.RESULTS_BYTES + 5 * mib - held)

    monkeypatch.setattr(prepare_disk.shutil, "disk_usage", free)
    kept = Keeping("this one", frozenset({"org/later", "org/used"}))
    with in_use("org/done"):
        make_room(mib, ["org/here"], kept)
        assert old.exists(), "it is nobody's disk but its owner's"
        node = prepare_disk.mesh_folder() / "node.json"
        node.parent.mkdir(parents=True)
        node.write_text("{}")
        make_room(0, ["org/here"], kept)
        assert old.exists(), "there is room"
        make_room(3 * mib, ["org/here"], kept)
    assert [p.exists() for p in (later, here, used, old, done)] == [True, True, True, False, True]


def test_a_pair_larger_than_the_bound_fails_with_download_and_is_streamed_with_cache(hub: LocalHub) -> None:
    with pytest.raises(CheckpointError, match=r"cache_gib is 0\.001; raise it, or set weights: stream"):
        turn(entry("a", cache_gib=0.001), hub)
    assert turn(entry("a", cache_gib=0.001, weights="cache"), hub).weights == "stream"
    assert turn(entry("a", cache_gib=1, weights="cache"), hub).weights == "cache"


def test_what_is_there_is_used_whatever_the_bound(hub: LocalHub) -> None:
    turn(entry("a"), hub)
    assert turn(entry("a", cache_gib=0.001), hub).weights == "download"


# -- who and where ---------------------------------------------------------------------------------------------------------


def test_those_who_fetch_ahead_take_no_place_from_those_whose_turn_it_is() -> None:
    gate = Gate(at_once=1, apart_s=10.0, clock=lambda: 100.0)
    assert gate.ask("early", True) == 0
    assert gate.ask("early, too", True) > 0
    assert gate.ask("mine") == 0, "neither the place nor the pause between two beginnings"
    assert gate.ask("yours") > 0


class Crews:
    """A queue of jobs whose crews are made up: `job.crews[0]` has a place, or waits for one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
        monkeypatch.setattr(ahead_module, "find_gate", lambda: SimpleNamespace())
        nodes = [{"NodeID": n, "Alive": True, "Resources": {"GPU": 1.0, "CPU": 4.0}} for n in ("A", "B")]
        monkeypatch.setattr(ahead_module.ray, "nodes", lambda: nodes)
        self.jobs = {e.name: Job(e, ONE) for e in entries}
        self.queue = Queue()
        self.queue.waiting = list(self.jobs.values())
        self.ahead = Ahead(list(self.jobs.values()), Show(live=False))

    def crew(self, node: str | None) -> Any:
        place = None if node is None else {"node_id": node}
        return SimpleNamespace(place=place, here=False, node_id=node)

    def places(self, name: str, node: str | None) -> Any:
        """Ask for a place for a job; node: where it gets one."""
        job = self.jobs[name]
        if job in self.queue.waiting:
            self.queue.activate(job)
        job.crews[0] = self.crew(node)
        return job.crews[0]


def test_a_node_fetches_once_all_that_works_there_has_its_weights_and_no_two_for_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Crews(monkeypatch, *(entry(name) for name in "abcdef"))
    ahead, queue = stage.ahead, stage.queue
    first, second, third = stage.places("a", "A"), stage.places("b", "A"), stage.places("c", "B")
    first.here = third.here = True
    assert ahead._free_nodes(queue) == ["B"]
    second.here = True
    assert ahead._free_nodes(queue) == ["A", "B"]
    chosen = []
    for node in ("A", "B"):
        job = ahead._next_for(node, queue)
        assert job is not None
        ahead.at[id(job)] = node
        chosen.append(job.name)
    assert chosen == ["d", "e"]
    assert ahead._next_for("A", queue) is None, "one entry ahead"
    ahead.gave_way.add(id(stage.jobs["d"]))
    assert ahead._next_for("A", queue) is stage.jobs["d"], "one that gave way is gone on with"
    ahead.begins(stage.jobs["d"], "B")
    queue.activate(stage.jobs["d"])
    stage.places("d", "B").here = True
    following = ahead._next_for("A", queue)
    assert following is not None
    assert following.name == "f", "where the entry ran elsewhere the node goes on with the next"


def test_a_place_goes_to_the_entry_whose_files_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Crews(monkeypatch, *(entry(name) for name in "abc"))
    a, b, c = stage.jobs.values()
    stage.ahead.at |= {id(a): "A", id(b): "B"}
    placed, asked = stage.places("a", "B"), stage.places("b", None)
    assert stage.ahead.better(a, "A", stage.queue) is None
    assert stage.ahead.better(a, "B", stage.queue) is b
    stage.queue.trade(a, b)
    assert (a.crews[0], b.crews[0]) == (asked, placed)
    stage.ahead.at |= {id(c): "B"}
    stage.ahead.at.pop(id(b))
    stage.queue.trade(b, c)
    assert (c.crews[0], b.crews) == (placed, {})
    assert stage.queue.waiting == [b]
    assert sorted(job.name for job in stage.queue.active) == ["a", "c"]


def test_a_free_worker_goes_on_with_the_entry_whose_files_are_there_and_with_others_ones_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Crews(monkeypatch, *(entry(name) for name in "abcd"))
    a, b, _, d = stage.jobs.values()
    stage.ahead.at |= {id(b): "B", id(d): "A"}
    stage.places("a", "A")

    def order() -> Iterator[str]:
        while (job := stage.queue.follower(a, lambda other: stage.ahead.rank(other, "A"))) is not None:
            stage.queue.waiting.remove(job)
            yield job.name

    assert list(order()) == ["d", "c", "b"]


@pytest.mark.parametrize(
    ("fields", "worth"),
    [({}, True), ({"weights": "cache"}, True), ({"weights": "stream"}, False), ({"fetch_ahead": False}, False),
     ({"allow_pickle": True}, False), ({"weights": "cache", "spans": {"workers": 2}}, False)],
)  # fmt: skip
def test_only_what_is_kept_and_found_is_fetched_ahead(fields: dict[str, Any], worth: bool) -> None:
    assert is_worth(entry("a", **fields)) is worth
