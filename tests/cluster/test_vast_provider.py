"""What Ray's autoscaler and `ray up` see of the provider, on the laptop and on the head."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from fake_server import Fake, running_fake, wait_for
from provider_stage import HEAD_TAGS, WORKER_TAGS, config, laptop_home, node_config, on_head, on_laptop

from cluster.mesh.peers import mesh_folder
from cluster.vast.errors import VastBusyError

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    with running_fake("--boot", "0.05,0.05") as fake:
        yield fake


@pytest.fixture
def fake(server: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    with laptop_home(server, tmp_path, monkeypatch) as found:
        yield found


def test_the_head_is_listed_at_once_with_all_its_tags(fake: Fake) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (head,) = laptop.non_terminated_nodes(HEAD_TAGS)
    assert laptop.node_tags(head).items() >= HEAD_TAGS.items()
    assert laptop.internal_ip(head) == "127.0.1.1"


def test_the_heads_launch_hash_survives_the_laptops_memory(fake: Fake, tmp_path: Path) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (tmp_path / "laptop/clusters/pairscope/state.json").unlink()
    again = on_laptop()
    (head,) = again.non_terminated_nodes({"ray-node-type": "head"})
    tags = again.node_tags(head)
    assert tags["ray-launch-config"] == HEAD_TAGS["ray-launch-config"]
    assert tags["ray-user-node-type"] == "rtx4090"


def test_volatile_tags_survive_a_new_process(fake: Fake) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (head,) = laptop.non_terminated_nodes({})
    laptop.set_node_tags(head, {"ray-node-status": "up-to-date", "ray-runtime-config": "r"})
    again = on_laptop()
    again.non_terminated_nodes({})
    assert again.node_tags(head)["ray-node-status"] == "up-to-date"


@pytest.mark.parametrize("kind", ["503", "malformed", "empty", "drop"])
def test_a_poll_that_fails_raises_on_the_head_and_loses_no_node(
    fake: Fake, tmp_path: Path, monkeypatch: Any, kind: str
) -> None:
    monkeypatch.setattr("cluster.vast.api.FIRST_PAUSE_S", 0.01)
    head = on_head(on_laptop(), tmp_path / "head", monkeypatch)
    head.create_node(node_config(), WORKER_TAGS, 1)
    (worker,) = head.non_terminated_nodes({})
    fake.fault("list", kind, times=3)
    time.sleep(0.02)
    with pytest.raises(VastBusyError):
        head.non_terminated_nodes({})
    assert head.is_terminated(worker) is False
    assert head.non_terminated_nodes({}) == [worker]


def test_the_head_lists_itself_and_its_workers_with_request_and_type(
    fake: Fake, tmp_path: Path, monkeypatch: Any
) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    head = on_head(laptop, tmp_path / "head", monkeypatch)
    head.create_node(node_config(), WORKER_TAGS, 2)
    assert len(head.non_terminated_nodes({})) == 3
    workers = head.non_terminated_nodes({"ray-node-type": "worker"})
    assert sorted(head.internal_ip(w) for w in workers) == ["127.0.1.2", "127.0.1.3"]
    assert {head.node_tags(w)["ray-launch-request"] for w in workers} == {WORKER_TAGS["ray-launch-request"]}


def test_a_head_that_was_ready_is_never_destroyed_behind_the_users_back(fake: Fake) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (head,) = wait_for(lambda: [h for h in laptop.non_terminated_nodes({}) if laptop.is_running(h)])
    fake.control(f"outbid/{head}")
    time.sleep(0.02)
    assert laptop.non_terminated_nodes({}) == [head]  # its disk may hold results
    assert not laptop.is_running(head)
    assert len(fake.live()) == 1


def test_one_listing_serves_a_whole_poll(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    head = on_head(on_laptop(config(poll_seconds=30)), tmp_path / "head", monkeypatch)
    head.fleet.poll_s = 30
    head.create_node(node_config(), WORKER_TAGS, 2)
    fake.control("calls")
    for node in head.non_terminated_nodes({}):
        head.node_tags(node)
        head.is_running(node)
        head.internal_ip(node)
        head.is_terminated(node)
    assert fake.calls("list") == 1


def test_tunnels_are_asked_for_when_ssh_is_there_and_not_after_the_node_left(
    fake: Fake, tmp_path: Path, monkeypatch: Any
) -> None:
    head = on_head(on_laptop(), tmp_path / "head", monkeypatch)
    head.create_node(node_config(), WORKER_TAGS, 1)

    def peers() -> list[Any]:
        head.non_terminated_nodes({})
        return list(json.loads((mesh_folder() / "peers.json").read_text()))

    assert wait_for(peers)[0]["k"] == 2
    (worker,) = head.non_terminated_nodes({})
    fake.control(f"status/{worker}", "loading")  # a hiccup of the listing does not cut a tunnel
    time.sleep(0.02)
    assert peers()[0]["k"] == 2
    fake.control(f"status/{worker}", "running")
    head.terminate_nodes(head.non_terminated_nodes({}))
    time.sleep(0.02)
    assert peers() == []


def test_a_reached_limit_ends_workers_and_head(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    head = on_head(laptop, tmp_path / "head", monkeypatch)
    head.create_node(node_config(), WORKER_TAGS, 1)
    object.__setattr__(head.caps, "max_hours", 1e-9)
    time.sleep(0.02)
    head.non_terminated_nodes({})
    assert fake.live() == []


def test_teardown_sees_all_and_reports_what_is_left(fake: Fake, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    home = str(tmp_path / "laptop")
    head = on_head(laptop, tmp_path / "head", monkeypatch)
    head.create_node(node_config(), WORKER_TAGS, 1)
    monkeypatch.setenv("PAIRSCOPE_HOME", home)
    fake.fault("destroy", "ignored")
    fresh = on_laptop()
    laptop.vast.sleep = fresh.vast.sleep = lambda s: time.sleep(s * 0.01)
    doomed = fresh.nodes_for_teardown({"ray-node-type": "head"}) + fresh.nodes_for_teardown({"ray-node-type": "worker"})
    assert len(doomed) == 2
    fresh.terminate_nodes(doomed)
    assert fresh.nodes_for_teardown({}) == []
    fresh.cleanup_cluster_resources()
    assert fake.live() == []
    assert fresh.fleet.bill().dollars == 0  # the next cluster of this name begins at nothing, with new keys
    assert not list((tmp_path / "laptop/clusters/pairscope").glob("*ed25519*"))


def test_a_machine_whose_set_up_failed_is_not_rented_again(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    head = on_head(on_laptop(), tmp_path / "head", monkeypatch)
    head.create_node(node_config(), WORKER_TAGS, 1)
    (worker,) = head.non_terminated_nodes({})
    machine = head.fleet.get(worker).machine
    head.set_node_tags(worker, {"ray-node-status": "update-failed"})
    head.terminate_node(worker)
    assert set(head.state.blocked_machines()) == {machine}


def test_a_create_request_carries_no_secret(fake: Fake) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (line,) = fake.live()
    assert set(line["env"]) == {"PAIRSCOPE_K", "PAIRSCOPE_API", "PAIRSCOPE_DEADLINE", "PAIRSCOPE_SILENCE_S", "PAIRSCOPE_HEAD", "PAIRSCOPE_OWNER", "PAIRSCOPE_LAUNCH", "PAIRSCOPE_REQUEST"}  # fmt: skip
    assert len(line["label"]) <= 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"provider": {"max_hours": None}}, "max_hours"),
        ({"provider": {"max_total_dollars": "40"}}, "max_total_dollars"),
        ({"provider": {"api_key": "secret"}}, "no secrets here"),
        ({"provider": {"boot_minute": 3}}, "unknown key 'boot_minute'"),
        ({"cluster_name": "a name"}, "cannot be part of a Vast label"),
        ({"cluster_name": "a" * 40}, "characters too long"),
        ({"max_workers": 60}, "room for 47 workers"),
    ],
)
def test_a_wrong_config_is_an_error_before_anything_is_rented(fake: Fake, change: dict[str, Any], message: str) -> None:
    content = config()
    for key, value in change.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    with pytest.raises(click.ClickException, match=message):
        on_laptop(content)
    assert fake.live() == []


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"gpu": ["RTX 4090"]}, "unknown key 'gpu'"),
        ({"disk_gb": "200"}, "'disk_gb' is a number"),
        ({"num_gpus": 2}, "resources say 1 GPU"),
    ],
)
def test_a_wrong_node_type_is_an_error_that_names_it(fake: Fake, wish: dict[str, Any], message: str) -> None:
    content = config()
    content["available_node_types"]["rtx4090"]["node_config"] |= wish
    with pytest.raises(click.ClickException, match=f"rtx4090.*{message}"):
        on_laptop(content)
