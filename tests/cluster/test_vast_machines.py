"""Machines that turned out bad: which are noted, that they are not rented, and that the note outlives the cluster."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import Fake, running_fake, wait_for
from provider_stage import HEAD_TAGS, WORKER_TAGS, laptop_home, node_config, on_head, on_laptop

from capture.errors import StoreError
from cluster.vast import machines
from cluster.vast.errors import NoOfferError
from cluster.vast.offers import Wish, find_offers
from cluster.vast.state import State

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    with running_fake("--boot", "0.2,0.2") as fake:
        yield fake


@pytest.fixture
def fake(server: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    with laptop_home(server, tmp_path, monkeypatch) as found:
        yield found


def test_a_machine_that_was_slow_to_boot_is_kept_and_not_rented_again(
    fake: Fake, tmp_path: Path, monkeypatch: Any
) -> None:
    head = on_head(on_laptop(), tmp_path / "head", monkeypatch)
    head.fleet.boot_s = 0.5  # so that the fake's 0.4 seconds are most of what is allowed
    head.create_node(node_config(), WORKER_TAGS, 1)
    (worker,) = wait_for(lambda: [w for w in head.non_terminated_nodes({}) if head.is_running(w)])
    machine = head.fleet.get(worker).machine
    assert "to boot" in head.state.blocked_machines()[machine]
    assert head.non_terminated_nodes({}) == [worker]
    head.create_node(node_config(), WORKER_TAGS, 1)
    assert len({head.fleet.get(w).machine for w in head.fleet.nodes}) == 2


@pytest.mark.parametrize(
    ("download", "slow"),
    [
        ({"bytes": 3e9, "seconds": 300}, True),  # 80 Mb/s
        ({"bytes": 3e9, "seconds": 200}, False),  # 120 Mb/s
        (None, False),
        ({"bytes": 3e9, "seconds": 0}, False),
        ("?", False),
    ],
)
def test_a_download_is_slow_below_an_eighth_of_what_was_asked_for(download: Any, slow: bool) -> None:
    assert bool(machines.slow_download(download, 800)) == slow


def test_the_head_asks_each_worker_once_how_its_download_went(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    head = on_head(on_laptop(), tmp_path / "head", monkeypatch)
    head.create_node(node_config(), WORKER_TAGS, 2)
    asked: list[int] = []

    def ask(k: int, line: str, timeout: float = 0) -> Any:
        asked.append(k)
        first = asked.count(k) == 1
        return None if first else {"download": {"bytes": 1e9, "seconds": 800} if k == 2 else None}

    monkeypatch.setattr(machines, "ask", ask)
    wait_for(lambda: head.non_terminated_nodes({}) and len(head.asked) == 2)
    for _ in range(3):
        time.sleep(0.02)
        head.non_terminated_nodes({})
    assert sorted(asked) == [2, 2, 3, 3]
    slow = next(n for n in head.fleet.nodes.values() if n.label.k == 2)
    assert head.state.blocked_machines() == {slow.machine: "its set-up downloaded at 10 Mb/s, min_inet_down is 800"}


def test_a_new_head_is_told_of_the_bad_machines_of_before(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    laptop = on_laptop()
    laptop.state.block_machine(501, "it hung")
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (head_id,) = laptop.non_terminated_nodes({})
    text = laptop._files(head_id)["~/.pairscope/clusters/pairscope/machines.json"]
    head = on_head(laptop, tmp_path / "head", monkeypatch)
    (head.folder / "machines.json").write_text(text)
    assert head.state.blocked_machines() == {501: "it hung"}
    wish = Wish("x", gpus=("RTX 4090",))
    with pytest.raises(NoOfferError, match=r"machine that failed before"):
        find_offers(head.vast, wish, dict.fromkeys(range(500, 507), ""), "x")


def test_ray_down_fetches_what_the_head_found_out(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    wait_for(lambda: [h for h in laptop.non_terminated_nodes({}) if laptop.is_running(h)])
    on_the_head = State(tmp_path / "on the head")
    on_the_head.block_machine(77, "its set-up failed")
    asked: list[list[str]] = []

    def ssh(command: list[str], **_: Any) -> Any:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=on_the_head.path.read_text(), stderr="")

    monkeypatch.setattr(machines.subprocess, "run", ssh)
    laptop.terminate_nodes(laptop.non_terminated_nodes({}))
    assert "StrictHostKeyChecking=yes" in asked[0]
    laptop.cleanup_cluster_resources()
    assert laptop.state.blocked_machines() == {77: "its set-up failed"}, "also after the cluster has ended"


def test_a_head_that_cannot_tell_is_destroyed_all_the_same(fake: Fake) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    wait_for(lambda: [h for h in laptop.non_terminated_nodes({}) if laptop.is_running(h)])
    laptop.terminate_nodes(laptop.non_terminated_nodes({}))  # the fake's sshd greets and hangs up
    assert fake.live() == []


def _full_disk(monkeypatch: Any) -> str:
    def edit(_: Any) -> Any:
        raise StoreError("the disk is full")

    monkeypatch.setattr(State, "edit", edit)
    return json.dumps({"machines": {}, "seen": {"7": {"kind": "worker"}}, "gone": []})


def _nested(monkeypatch: Any) -> str:
    return "[" * 100_000


@pytest.mark.parametrize("trouble", [_full_disk, _nested])
def test_what_is_wrong_with_the_heads_books_does_not_keep_ray_down_from_ending_it(
    fake: Fake, monkeypatch: Any, trouble: Any
) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    wait_for(lambda: [h for h in laptop.non_terminated_nodes({}) if laptop.is_running(h)])
    text = trouble(monkeypatch)
    monkeypatch.setattr(
        machines.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, stdout=text, stderr="")
    )
    laptop.terminate_nodes(laptop.nodes_for_teardown({}))
    assert fake.live() == []


def test_a_note_is_dropped_after_its_time(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.block_machine(1, "old", hours=-1)
    state.merge_machines(
        {"2": {"reason": "older", "until": time.time() - 9}, "3": {"reason": "new", "until": time.time() + 9}}
    )
    assert state.blocked_machines() == {3: "new"}
    assert set(json.loads(state.path.read_text())["machines"]) == {"3"}
