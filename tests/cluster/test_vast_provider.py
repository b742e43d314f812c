"""What Ray's autoscaler and `ray up` see of the provider, on the laptop and on the head."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import click
import pytest
from fake_server import Fake, wait_for
from provider_stage import HEAD_TAGS, WORKER_TAGS, config, node_config, on_head, on_laptop
from ray.autoscaler._private import updater

from capture.errors import ConfigError
from cluster.mesh.daemon import UNWATCHED_S
from cluster.mesh.peers import POLLED, mesh_folder
from cluster.vast import deadman
from cluster.vast.errors import NotGoneError, VastBusyError
from cluster.vast.provider import VastNodeProvider
from cluster.vast.settings import ssh_user

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")


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


def test_a_poll_is_noted_where_the_limits_were_looked_at_and_not_where_it_failed(
    fake: Fake, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("cluster.vast.api.FIRST_PAUSE_S", 0.01)
    head = on_head(on_laptop(), tmp_path / "head", monkeypatch)
    fake.fault("list", "503", times=3)
    with pytest.raises(VastBusyError):
        head.non_terminated_nodes({})
    assert not (mesh_folder() / POLLED).exists()
    head.non_terminated_nodes({})
    os.utime(mesh_folder() / POLLED, (0, 0))
    time.sleep(0.02)
    head.non_terminated_nodes({})
    assert (mesh_folder() / POLLED).stat().st_mtime == pytest.approx(time.time(), abs=60)


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
    head.create_node(node_config(), WORKER_TAGS, 1)  # one that comes after all were seen to be gone
    assert len(fake.live()) == 1
    fresh.cleanup_cluster_resources()
    assert fake.live() == []
    assert fresh.fleet.bill().dollars == 0  # the next cluster of this name begins at nothing, with new keys
    assert not list((tmp_path / "laptop/clusters/pairscope").glob("*ed25519*"))


def test_teardown_tries_all_and_keeps_what_it_needs_while_one_is_left(fake: Fake, monkeypatch: Any) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    monkeypatch.setattr(laptop.vast, "sleep", lambda s: None)
    for k in (2, 3):
        offer = laptop.vast.search({}, bid=False, disk_gb=1)[0]["id"]
        laptop.vast.create(offer, image="x", disk=1, label=f"ps/pairscope/w/{k}/rtx4090/0000000{k}", env={})
    fake.fault("destroy", "ignored", times=6)  # of the first that is asked for, all tries
    monkeypatch.setattr("cluster.vast.fleet.AT_ONCE", 1)
    with pytest.raises(SystemExit) as ended:
        laptop.cleanup_cluster_resources()
    (left,) = fake.live()
    assert f"NotGoneError: instance {left['id']} was destroyed 6x" in str(ended.value)
    assert (laptop.folder / "id_ed25519").exists()
    assert str(left["id"]) in laptop.state.read()["seen"]
    fake.control("faults", [])
    laptop.cleanup_cluster_resources()
    assert fake.live() == []


def test_a_limit_ends_the_head_although_a_worker_will_not_go(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    head = on_head(laptop, tmp_path / "head", monkeypatch)
    monkeypatch.setattr(head.vast, "sleep", lambda s: None)
    head.create_node(node_config(), WORKER_TAGS, 2)
    object.__setattr__(head.caps, "max_hours", 1e-9)
    monkeypatch.setattr("cluster.vast.fleet.AT_ONCE", 1)
    fake.fault("destroy", "ignored", times=6)
    time.sleep(0.02)
    with pytest.raises(NotGoneError):
        head.non_terminated_nodes({})
    assert ["/w/" in line["label"] for line in fake.live()] == [True]


def test_ray_down_ends_workers_that_only_the_head_knows_of(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    wait_for(lambda: [h for h in laptop.non_terminated_nodes({}) if laptop.is_running(h)])
    home = str(tmp_path / "laptop")
    head = on_head(laptop, tmp_path / "head", monkeypatch)
    head.create_node(node_config(), WORKER_TAGS, 1)
    monkeypatch.setenv("PAIRSCOPE_HOME", home)
    text = head.state.path.read_text()
    monkeypatch.setattr(
        "cluster.vast.machines.subprocess.run", lambda c, **_: subprocess.CompletedProcess(c, 0, stdout=text, stderr="")
    )
    fake.fault("list", "no_rows", times=1000)
    while doomed := laptop.nodes_for_teardown({}):  # as Ray does
        laptop.terminate_nodes(doomed)
    laptop.cleanup_cluster_resources()
    assert fake.live() == []


def test_a_machine_whose_set_up_failed_is_not_rented_again(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    head = on_head(on_laptop(), tmp_path / "head", monkeypatch)
    head.create_node(node_config(), WORKER_TAGS, 1)
    (worker,) = head.non_terminated_nodes({})
    machine = head.fleet.get(worker).machine
    head.set_node_tags(worker, {"ray-node-status": "update-failed"})
    head.terminate_node(worker)
    assert set(head.state.blocked_machines()) == {machine}


def test_a_host_key_that_changed_is_not_accepted(fake: Fake) -> None:
    """What ssh makes of the options that Ray is given, by its own account."""
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (head,) = wait_for(lambda: [h for h in laptop.non_terminated_nodes({}) if laptop.is_running(h)])
    ran: list[list[str]] = []

    class Processes:
        @staticmethod
        def check_call(command: list[str], **_: Any) -> None:
            ran.append([str(word) for word in command])

    auth = {"ssh_user": "root", "ssh_private_key": str(laptop.folder / "id_ed25519")}
    runner = laptop.get_command_runner("", head, auth, "pairscope", Processes, False)
    runner.run("true")
    runner.run("true", ssh_options_override_ssh_key="other")  # initialization commands
    for command in ran:
        assert command[0] == "ssh"
        asked = subprocess.run(["ssh", "-G", *command[1:]], capture_output=True, text=True, check=True).stdout
        options = dict(line.split(" ", 1) for line in asked.splitlines() if " " in line)
        assert options["stricthostkeychecking"] == "accept-new"
        assert options["hostkeyalias"] == f"vast-{head}"
        assert options["userknownhostsfile"] == str(laptop.folder / "known_hosts")
        assert (options["hostname"], int(options["port"])) == laptop.fleet.get(head).ssh
    assert len(ran) == 2


@pytest.mark.parametrize(("ahead_h", "fit"), [(0, True), (0.02, True), (-0.02, True), (5, False), (-5, False)])
def test_a_node_whose_clock_is_off_is_not_set_up(fake: Fake, ahead_h: float, fit: bool) -> None:
    """Its deadline is a time by its own clock."""
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (head,) = wait_for(lambda: [h for h in laptop.non_terminated_nodes({}) if laptop.is_running(h)])
    ran: list[str] = []

    class Node:
        """Runs what ssh is given, with a clock of its own; lets rsync be."""

        @staticmethod
        def check_call(command: list[str], **_: Any) -> None:
            words = [str(word) for word in command]
            ran.append(" ".join(words))
            if words[0] == "ssh" and "date" in words[-1]:
                clock = f"date() {{ echo {time.time() + ahead_h * 3600:.0f}; }}; export -f date; "
                there = clock + " ".join(words[words.index(f"root@{runner.ssh_ip}") + 1 :])
                done = subprocess.run(["bash", "-c", there], capture_output=True, text=True, stdin=subprocess.DEVNULL)
                told = re.search(r"is (-?\d+) seconds ahead", done.stdout)
                assert fit or (told is not None and abs(int(told[1]) - ahead_h * 3600) < 60)
                done.check_returncode()

    auth = {"ssh_user": "root", "ssh_private_key": str(laptop.folder / "id_ed25519")}
    runner = laptop.get_command_runner("", head, auth, "pairscope", Node, False)
    with contextlib.nullcontext() if fit else pytest.raises(click.ClickException, match="SSH command failed"):
        runner.run_init(as_head=True, file_mounts={}, sync_run_yet=True)
    assert any("date" in command for command in ran)
    assert any("deadline" in command for command in ran) == fit


def test_a_create_request_carries_no_secret(fake: Fake) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (line,) = fake.live()
    assert set(line["env"]) == {"PAIRSCOPE_K", "PAIRSCOPE_API", "PAIRSCOPE_ASKED", "PAIRSCOPE_DEADLINE", "PAIRSCOPE_SILENCE_S", "PAIRSCOPE_HEAD", "PAIRSCOPE_OWNER", "PAIRSCOPE_LAUNCH", "PAIRSCOPE_REQUEST"}  # fmt: skip
    assert len(line["label"]) <= 60


@pytest.mark.parametrize(
    ("caps", "hours"),
    [({"max_hours": 3, "max_total_dollars": 100}, lambda dph: 3), ({"max_total_dollars": 1}, lambda dph: 1 / dph)],
)
def test_a_head_is_told_when_to_be_gone_by_the_nearer_limit(fake: Fake, caps: dict[str, float], hours: Any) -> None:
    laptop = on_laptop(config(**caps))
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    ((head, node),) = laptop.fleet.refresh().items()
    (line,) = fake.live()
    ends = time.time() + hours(node.dph) * 3600
    assert int(line["env"]["PAIRSCOPE_DEADLINE"]) == pytest.approx(ends, abs=60)
    assert line["env"]["PAIRSCOPE_SILENCE_S"] == "0"  # nobody is above it to be heard
    assert float(laptop._files(head)["~/.pairscope/deadline"]) == pytest.approx(ends, abs=60)


def test_a_worker_is_told_what_is_left_of_the_limits_and_how_long_its_head_may_be_silent(
    fake: Fake, tmp_path: Path, monkeypatch: Any
) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    head = on_head(laptop, tmp_path / "head", monkeypatch)
    spent = {"id": "1", "kind": "worker", "dph": 1.0, "since": 0.0, "until": (head.caps.max_total_dollars - 1) * 3600}
    with head.state.edit() as content:
        content["gone"].append(spent)
    head.create_node(node_config(), WORKER_TAGS, 1)
    (line,) = (line for line in fake.live() if line["env"]["PAIRSCOPE_K"] == "2")
    worker = next(n for n in head.fleet.refresh().values() if n.label.kind == "worker")
    one_dollar = time.time() + 3600 / worker.dph
    assert int(line["env"]["PAIRSCOPE_DEADLINE"]) == pytest.approx(one_dollar, abs=60)
    assert float(line["env"]["PAIRSCOPE_SILENCE_S"]) == head.settings.head_silence_minutes * 60 > 0


def test_the_autoscaler_tells_the_head_at_each_poll_when_to_be_gone_should_it_be_the_last(
    fake: Fake, tmp_path: Path, monkeypatch: Any
) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    head = on_head(laptop, tmp_path / "head", monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".pairscope").symlink_to(tmp_path / "head")
    head.non_terminated_nodes({})
    (node,) = head.fleet.refresh().values()
    caps = head.caps
    assert deadman.deadline() == pytest.approx(time.time() + caps.max_hours * 3600, abs=60)
    spent = {"id": "1", "kind": "worker", "dph": 1.0, "since": 0.0, "until": (caps.max_total_dollars - 1) * 3600}
    with head.state.edit() as content:
        content["gone"].append(spent)
    time.sleep(0.02)
    head.non_terminated_nodes({})
    alone = deadman.deadline()
    assert alone == pytest.approx(time.time() + 3600 / node.dph, abs=60), "what workers cost is no longer there for it"
    head.create_node(node_config(), WORKER_TAGS, 1)
    time.sleep(0.02)
    head.non_terminated_nodes({})
    assert deadman.deadline() < alone - 900, "nor what the worker will cost until it ends itself"
    with head.state.edit() as content:
        content["gone"][0]["until"] += 3590
    time.sleep(0.02)
    head.non_terminated_nodes({})
    assert deadman.deadline() == pytest.approx(time.time() + UNWATCHED_S, abs=60), (
        "time for the next poll there is always"
    )


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
        ({"max_workers": -1}, "'max_workers' is a whole number from 0 up, not -1"),
        ({"max_workers": True}, "'max_workers' is a whole number from 0 up, not True"),
        *(
            ({"provider": {name: value}}, f"provider: '{name}' is filled in by pairscope and cannot be given")
            for name, value in {
                "on_head": True,
                "slots": 40,
                "owner": "0" * 12,
                "public_key": "ssh-ed25519 A",
                "user": "me",
                "head_type": "h200",
                "head_config": {},
                "may_grow": {},
                "api_url": "http://127.0.0.1:9",
            }.items()
        ),
        ({"auth": {"ssh_user": ""}}, "auth: 'ssh_user' is a name"),
        ({"docker": {"image": "me/mine", "container_name": "ray"}}, "'docker' is not heeded.*offers: image"),
        ({"head_start_ray_commands": None}, "'head_start_ray_commands' is missing"),
        ({"worker_start_ray_commands": []}, "'worker_start_ray_commands' is missing"),
        ({"provider": {"offers": "hi"}}, "provider: 'offers' is a mapping"),
        ({"provider": {"offers": None}}, "provider: 'offers' is a mapping"),
        ({"provider": {"image_versions": "3.12"}}, "provider: 'image_versions' is a mapping"),
        ({"provider": {"onstart": 5}}, "provider: 'onstart' is a line of shell"),
        ({"head_node_type": "gpu"}, "head_node_type 'gpu' is none of its node types"),
        ({"available_node_types": {"rtx4090": {}}}, "node type 'rtx4090': 'node_config' is a mapping"),
        ({"available_node_types": {"rtx4090": None}}, "node type 'rtx4090' is a mapping"),
    ],
)
def test_a_wrong_config_is_an_error_before_anything_is_rented(fake: Fake, change: dict[str, Any], message: str) -> None:
    content = config()
    for key, value in change.items():
        content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
    with pytest.raises(click.ClickException, match=message):
        on_laptop(content)
    assert fake.live() == []


def test_a_node_types_own_docker_section_is_refused_and_an_empty_one_is_none(fake: Fake) -> None:
    content = config()
    content["docker"] = {"image": "", "container_name": ""}
    content["available_node_types"]["rtx4090"]["docker"] = {}
    VastNodeProvider.bootstrap_config(content)
    content["available_node_types"]["rtx4090"]["docker"] = {"worker_image": "me/mine"}
    with pytest.raises(click.ClickException, match="node type 'rtx4090': 'docker' is not heeded"):
        VastNodeProvider.bootstrap_config(content)


def test_a_config_without_initialization_commands_has_none(fake: Fake) -> None:
    content = config()
    del content["initialization_commands"]
    assert VastNodeProvider.bootstrap_config(content)["initialization_commands"] == []


def test_idle_machines_are_given_back_where_the_config_does_not_say_when(fake: Fake) -> None:
    content = config()
    del content["idle_timeout_minutes"]
    assert VastNodeProvider.bootstrap_config(content)["idle_timeout_minutes"] == 5
    assert VastNodeProvider.bootstrap_config(config() | {"idle_timeout_minutes": 7})["idle_timeout_minutes"] == 7


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"on_head": True}, "unknown key 'on_head'"),
        ({"gpu": ["RTX 4090"]}, "unknown key 'gpu'"),
        ({"disk_gb": "200"}, "'disk_gb' is a number"),
        ({"num_gpus": 2}, "resources say 1 GPU"),
        ({"num_gpus": 0}, "'num_gpus' is a whole number above 0"),
        ({"image": 5}, "'image' is text"),
        ({"image": "vastai/base-image: cuda"}, "'image' is the name of a Docker image.*'vastai/base-image: cuda'"),
        ({"image": "vastai/base-image\n"}, "'image' is the name of a Docker image"),
    ],
)
def test_a_wrong_node_type_is_an_error_that_names_it(fake: Fake, wish: dict[str, Any], message: str) -> None:
    content = config()
    content["available_node_types"]["rtx4090"]["node_config"] |= wish
    with pytest.raises(click.ClickException, match=f"rtx4090.*{message}"):
        on_laptop(content)


@pytest.mark.parametrize("key", ["min_workers", "max_workers"])
def test_a_node_type_with_less_than_no_workers_is_an_error_that_names_it(fake: Fake, key: str) -> None:
    content = config()
    content["available_node_types"]["rtx4090"][key] = -1
    with pytest.raises(click.ClickException, match=f"node type 'rtx4090': '{key}' is a whole number from 0 up, not -1"):
        on_laptop(content)


def test_whoever_logs_in_logs_in_through_the_mesh_too_and_at_vasts_own_machines_that_is_root(fake: Fake) -> None:
    laptop = on_laptop(config() | {"auth": {"ssh_user": "me"}})
    assert laptop.settings.user == "me"
    assert laptop.bootstrap_config(config() | {"auth": {"ssh_user": "me"}})["auth"]["ssh_user"] == "me"
    with pytest.raises(ConfigError, match="'ssh_user' is 'me': Vast's machines let in root only"):
        ssh_user({"ssh_user": "me"}, None)
    assert ssh_user({"ssh_user": "root"}, None) == ssh_user({}, None) == "root"


@pytest.mark.parametrize("boot_minutes", [1, 15, 40])
def test_ray_waits_for_a_node_until_it_is_given_up(fake: Fake, monkeypatch: Any, boot_minutes: float) -> None:
    monkeypatch.setattr(updater, "AUTOSCALER_NODE_START_WAIT_S", 900)
    waiting = updater.NodeUpdater.__new__(updater.NodeUpdater)
    waiting.provider, waiting.node_id = on_laptop(config(boot_minutes=boot_minutes)), "1"
    waits: list[float] = []

    class Waited(Exception): ...

    def wait_ready(deadline: float) -> None:
        waits.append(deadline - time.time())
        raise Waited

    waiting.wait_ready = wait_ready
    with pytest.raises(Waited):
        waiting.do_update()
    assert waits[0] == pytest.approx(max(900, boot_minutes * 60 + 120), abs=5)
