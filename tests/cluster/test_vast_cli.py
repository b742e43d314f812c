"""`pairscope vast` on the fake."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from fake_market import Market, offer
from fake_server import Fake, hasty, running_fake

from capture.errors import ConfigError
from cluster.vast.api import Vast
from cluster.vast.cli import vast as command
from cluster.vast.errors import NoOfferError, NotGoneError, VastBusyError
from cluster.vast.fleet import Fleet
from cluster.vast.labels import parse
from cluster.vast.state import State, cluster_folder

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    with running_fake("--boot", "0,0") as fake:
        yield fake


@pytest.fixture
def fake(server: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    server.control("faults", [])
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path))
    monkeypatch.setenv("VAST_API_KEY", "full-rights")
    monkeypatch.setenv("VAST_URL", server.url)
    yield server
    server.control("offers", [{} for _ in range(6)])
    for line in server.live():
        server.control(f"vanish/{line['id']}")


def rent(fake: Fake, label: str, **env: str) -> int:
    client = Vast("full-rights", fake.url, sleep=hasty)
    return client.create(client.search({}, bid=False, disk_gb=1)[0]["id"], image="x", disk=1, label=label, env=env)


def run(*args: str) -> Any:
    return CliRunner().invoke(command, args, catch_exceptions=False)


def rows(*args: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(*args, "--json").output.splitlines()]


def test_offers_are_those_that_fit_the_node_type(fake: Fake) -> None:
    found = rows("offers", str(ROOT / "ray_cluster.yaml"), "--limit", "3")
    assert len(found) == 3
    assert {r["gpus"] for r in found} == {"1x RTX 4090"}
    fake.control("offers", [{"duration": 11.9 * 3600}])
    assert len(rows("offers", str(ROOT / "ray_cluster.yaml"), "--type", "rtx4090-spot")) == 1
    with pytest.raises(NoOfferError, match="offered for 12 hours: 1"):  # the head, which has the results
        run("offers", str(ROOT / "ray_cluster.yaml"))
    with pytest.raises(ConfigError, match="no node type 'nothing'"):
        run("offers", str(ROOT / "ray_cluster.yaml"), "--type", "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"available_node_types": {"gpu": {"resources": {"GPU": 1}}}}, "node type 'gpu': 'node_config' is a mapping"),
        ({"available_node_types": {"gpu": None}}, "node type 'gpu' is a mapping"),
        ({"available_node_types": ["gpu"]}, "'available_node_types' is a mapping"),
        ({"available_node_types": None}, "'available_node_types' is a mapping"),
        ({"head_node_type": None}, "head_node_type None is none of its node types, which are"),
        ({"cluster_name": None}, "'cluster_name' is text"),
        ({"cluster_name": "../up"}, "'../up' cannot be part of a Vast label"),
        ({"provider": None}, "'provider' is a mapping"),
        ({"provider": {"offers": "hi"}}, "provider: 'offers' is a mapping"),
        ({"provider": {"image_versions": "3.12"}}, "provider: 'image_versions' is a mapping"),
        ({"provider": {"image_versions": ["3.12"]}}, "provider: 'image_versions' is a mapping"),
    ],
)
def test_a_config_of_the_wrong_shape_is_one_error_that_names_file_and_key(
    fake: Fake, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()) | change
    content = {key: value for key, value in content.items() if value is not None}
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=re.escape(message)) as told:
        run("offers", str(file))
    assert str(file) in str(told.value)


@pytest.mark.parametrize("text", ["", "hello", "- a", "a: [", "\0"])
def test_a_file_that_is_no_cluster_config_is_named(fake: Fake, tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml' is no cluster config of Ray's"):
        run("offers", str(tmp_path / "x.yaml"))
    with pytest.raises(
        ConfigError, match=r"cannot read '.*missing\.yaml': No such file or directory; name the file that"
    ):
        run("offers", str(tmp_path / "missing.yaml"))


def test_nodes_are_ours_and_nobody_elses(fake: Fake) -> None:
    ours = rent(fake, "ps/demo/h/1/gpu/00000000")
    rent(fake, "somebody's training")
    assert [r["id"] for r in rows("nodes")] == [str(ours)]
    assert rows("nodes", "--cluster", "other") == []


def test_orphans_are_told_with_their_reason_and_exit_code_1(fake: Fake) -> None:
    assert run("orphans").exit_code == 0
    rent(fake, "ps/demo/h/1/gpu/00000000", PAIRSCOPE_DEADLINE=str(int(time.time()) + 600))
    rent(fake, "ps/demo/w/2/gpu/00000001")
    late = rent(fake, "ps/late/h/1/gpu/00000002", PAIRSCOPE_DEADLINE=str(int(time.time()) - 600))
    alone = rent(fake, "ps/gone/w/2/gpu/00000003")
    found = {r["id"]: r["orphan"] for r in rows("orphans")}
    assert found == {str(late): "10 minutes past its deadline", str(alone): "its cluster has no head"}
    assert run("orphans").exit_code == 1


def test_orphans_are_told_of_lost_replies_and_of_second_heads(fake: Fake, tmp_path: Path) -> None:
    soon = str(int(time.time()) + 600)
    heads = [rent(fake, f"ps/two/h/1/gpu/0000000{i}", PAIRSCOPE_DEADLINE=soon) for i in (1, 2)]
    lost = [rent(fake, f"ps/two/w/{i}/gpu/0000000{i}", PAIRSCOPE_DEADLINE=soon) for i in (3, 4)]
    with State(tmp_path / "clusters" / "two").edit() as content:
        content["abandoned"] = {"00000003": {"k": 3, "since": 0}}
        content["unknown"] = {"00000004": {"k": 4, "since": 0, "kind": "worker", "type": "gpu"}}
    found = {r["id"]: r["orphan"] for r in rows("orphans")}
    assert found == {
        **{str(i): "its cluster has 2 heads; see which one Ray uses" for i in heads},
        **{str(i): "the reply to the request that made it was lost, and nobody uses it" for i in lost},
    }


def test_what_orphans_names_can_be_destroyed_also_where_the_listing_leaves_it_out(fake: Fake, tmp_path: Path) -> None:
    late = rent(fake, "ps/late/h/1/gpu/00000002", PAIRSCOPE_DEADLINE=str(int(time.time()) - 600))
    with State(tmp_path / "clusters" / "late").edit() as content:
        content["seen"] = {str(late): {"since": 0, "kind": "head"}}
    fake.fault("list", "no_rows", times=5)
    done = run("destroy", str(late), "--yes")
    assert done.exit_code == 0, done.output
    assert fake.live() == []


def test_orphans_asks_for_each_machine_that_the_listing_leaves_out(fake: Fake, tmp_path: Path) -> None:
    """As the listing of a bad hour has it: nothing is listed at all."""
    head = rent(fake, "ps/demo/h/1/gpu/00000000", PAIRSCOPE_DEADLINE=str(int(time.time()) + 600))
    late = rent(fake, "ps/late/h/1/gpu/00000002", PAIRSCOPE_DEADLINE=str(int(time.time()) - 600))
    undone = rent(fake, "ps/late/h/1/gpu/00000003", PAIRSCOPE_DEADLINE=str(int(time.time()) + 600))
    gone = rent(fake, "ps/late/w/2/gpu/00000004")
    fake.control(f"vanish/{gone}")
    for name, ids in (("demo", [head]), ("late", [late, gone])):
        with State(tmp_path / "clusters" / name).edit() as content:
            content["seen"] = {str(id_): {"since": 0, "kind": "head"} for id_ in ids}
    with State(tmp_path / "clusters" / "late").edit() as content:
        content["destroyed"] = {str(undone): {"since": 0, "k": 1}, str(gone): {"since": 0, "k": 2, "gone": 1.0}}
    fake.fault("list", "no_rows", times=2)
    assert {r["id"]: r["orphan"] for r in rows("orphans")} == {
        str(late): "10 minutes past its deadline",
        str(undone): "it was destroyed, and is still there",
    }
    assert run("orphans").exit_code == 1
    fake.control("faults", [])
    fake.fault("list", "no_rows")
    fake.fault("show", "503", times=9)
    with pytest.raises(VastBusyError):
        run("orphans")


def test_destroy_ends_a_cluster_and_leaves_the_others(fake: Fake) -> None:
    rent(fake, "ps/demo/h/1/gpu/00000000")
    rent(fake, "ps/demo/w/2/gpu/00000001")
    other = rent(fake, "ps/other/h/1/gpu/00000002")
    fake.fault("destroy", "429")
    account = Vast("full-rights", fake.url, sleep=hasty)
    for name in ("demo", "other"):
        account.create_key(f"pairscope head of {name}", {"api": {"instance_read": {}}})
    assert run("destroy", "--cluster", "demo", "--yes").exit_code == 0
    assert [line["id"] for line in fake.live()] == [other]
    assert [key["name"] for key in fake.control("keys")] == ["pairscope head of other"]


def test_destroy_tries_all_and_names_those_that_are_left(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("cluster.vast.cli._connect", lambda: Vast("full-rights", fake.url, sleep=lambda s: None))
    stuck = rent(fake, "ps/demo/h/1/gpu/00000000")
    rent(fake, "ps/demo/w/2/gpu/00000001")
    fake.fault("destroy", "ignored", times=6)  # of the first, all tries
    Vast("full-rights", fake.url, sleep=hasty).create_key("pairscope head of demo", {"api": {"instance_read": {}}})
    with pytest.raises(NotGoneError, match=str(stuck)):
        run("destroy", "--cluster", "demo", "--yes")
    assert [line["id"] for line in fake.live()] == [stuck]
    assert "pairscope head of demo" in [key["name"] for key in fake.control("keys")], "the head is there and needs it"
    fake.control("faults", [])
    assert run("destroy", "--cluster", "demo", "--yes").exit_code == 0
    assert fake.live() == []
    assert "pairscope head of demo" not in [key["name"] for key in fake.control("keys")]


def test_destroy_ends_what_this_machine_has_seen_and_the_listing_leaves_out(fake: Fake) -> None:
    head = rent(fake, "ps/demo/h/1/gpu/00000000")
    fake.fault("destroy", "ignored", times=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.vast.cli._connect", lambda: Vast("full-rights", fake.url, sleep=lambda s: None))
        with pytest.raises(NotGoneError):
            run("destroy", str(head), "--yes")
    fake.control("faults", [])
    fake.fault("list", "no_rows", times=1000)
    run("destroy", "--cluster", "demo", "--yes")
    assert fake.live() == []


def test_destroy_refuses_what_is_not_ours_and_asks_before_it_acts(fake: Fake) -> None:
    theirs = rent(fake, "somebody's training")
    with pytest.raises(ConfigError, match="not one that pairscope rented"):
        run("destroy", str(theirs), "--yes")
    ours = rent(fake, "ps/demo/h/1/gpu/00000000")
    assert CliRunner().invoke(command, ["destroy", str(ours)], input="n\n").exit_code == 1
    assert len(fake.live()) == 2


def test_what_vast_never_knew_of_is_not_called_gone(fake: Fake, monkeypatch: Any) -> None:
    ours = rent(fake, "ps/demo/h/1/gpu/00000000")
    monkeypatch.setattr("cluster.vast.cli._show", lambda *_: fake.control(f"vanish/{ours}"))
    assert run("destroy", str(ours), "--yes").output == f"{ours} was not there: Vast knows no such instance\n"


@pytest.mark.parametrize("limit", ["0", "-1"])
def test_a_limit_of_no_offers_is_refused(fake: Fake, limit: str) -> None:
    done = run("offers", str(ROOT / "ray_cluster.yaml"), "--limit", limit)
    assert (done.exit_code, "Invalid value for '--limit'" in done.output) == (2, True)


@pytest.mark.parametrize("k", ["\u00b2", "0", "-1", "001", "100", "9" * 5000, "\u0661"])
def test_a_label_with_a_number_that_is_none_is_not_ours(k: str) -> None:
    assert parse(f"ps/demo/w/{k}/gpu/00000000") is None


def test_a_label_whose_cluster_leads_out_of_the_state_folder_is_not_ours() -> None:
    assert parse("ps/../w/2/gpu/00000000") is None


@pytest.mark.parametrize("name", ["../../.ssh", "..", "a/b", "/root/.ssh"])
def test_a_cluster_name_that_leads_out_of_the_state_folder_is_refused_and_removes_nothing(
    fake: Fake, tmp_path: Path, monkeypatch: Any, name: str
) -> None:
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path / "home" / ".pairscope"))
    own = tmp_path / "home" / ".ssh" / "id_ed25519"
    for folder in (own.parent, tmp_path / "home" / ".pairscope" / "clusters"):
        folder.mkdir(parents=True)
    own.write_text("mine")
    for verb in (["destroy", "--yes"], ["nodes"]):
        with pytest.raises(ConfigError, match="cannot be part of a Vast label"):
            run(*verb, "--cluster", name)
    with pytest.raises(ConfigError, match="cannot be part of a Vast label"):
        cluster_folder(name)
    assert own.read_text() == "mine"


@pytest.mark.parametrize("books", ["none", "of a cluster of the name that has ended"])
def test_a_cluster_made_elsewhere_keeps_its_key_where_a_listing_leaves_it_out(
    fake: Fake, tmp_path: Path, books: str
) -> None:
    rent(fake, "ps/demo/h/1/gpu/00000000")
    Vast("full-rights", fake.url, sleep=hasty).create_key("pairscope head of demo", {"api": {"instance_read": {}}})
    if books != "none":
        state = State(tmp_path / "clusters" / "demo")
        state.block_machine(1, "it was slow")
        state.begin_anew()
    fake.fault("list", "no_rows", times=9)
    done = run("destroy", "--cluster", "demo", "--yes")
    assert (done.exit_code, done.output) == (0, "nothing to destroy\n")
    assert "pairscope head of demo" in [key["name"] for key in fake.control("keys")]
    fake.control("forget_keys")


def test_what_a_clusters_head_rents_while_it_is_destroyed_is_destroyed_too(
    fake: Fake, tmp_path: Path, monkeypatch: Any
) -> None:
    rent(fake, "ps/demo/h/1/gpu/00000000")
    destroy, rents = Fleet.destroy, ["ps/demo/w/3/gpu/00000002", "ps/demo/w/2/gpu/00000001"]

    def rent_another(self: Fleet, id_: str, reason: str) -> bool:
        if rents:
            rent(fake, rents.pop())
        return destroy(self, id_, reason)

    monkeypatch.setattr(Fleet, "destroy", rent_another)
    done = run("destroy", "--cluster", "demo", "--yes")
    assert fake.live() == []
    assert (done.exit_code, done.output.count("there meanwhile"), done.output.count("is gone")) == (0, 2, 3)


def test_an_instance_that_vast_cannot_see_is_not_said_to_do_nothing(fake: Fake) -> None:
    ours = rent(fake, "ps/demo/h/1/gpu/00000000")
    for status, said in (
        ("offline", "offline: Vast cannot see it; it may be at work"),
        ("exited", "exited: does nothing, bills its disk"),
    ):
        fake.control(f"status/{ours}", status)
        assert [r["orphan"] for r in rows("orphans")] == [said]


@pytest.mark.parametrize("part", ["intents", "unknown"])
def test_destroy_keeps_the_books_of_a_cluster_for_which_a_machine_is_being_rented(
    fake: Fake, tmp_path: Path, part: str
) -> None:
    state = State(tmp_path / "clusters" / "demo")
    spent = {"id": "1", "kind": "head", "dph": 1.0, "since": 0.0, "until": 3600.0}
    with state.edit() as content:
        content["gone"] = [spent]
        content[part] = {"00000001": {"k": 1, "since": time.time(), "kind": "head", "type": "gpu", "dph": 0.4}}
    done = run("destroy", "--cluster", "demo", "--yes")
    assert (done.exit_code, "is not answered yet" in done.output) == (1, True)
    assert state.read()["gone"] == [spent]
    with state.edit() as content:
        content[part] = {}
    assert run("destroy", "--cluster", "demo", "--yes").exit_code == 0
    assert state.read()["gone"] == []


def test_the_fake_leaves_an_instance_in_the_state_that_a_test_gave_it_while_its_host_came_up() -> None:
    class Slow:
        def start(self, instance: int, env: dict[str, str], onstart: str) -> tuple[str, int]:
            market.live[instance].status = "offline"
            return "127.0.0.1", 22

        def authorize(self, instance: int, key: str) -> None: ...

        def stop(self, instance: int) -> None: ...

    clock = [0.0]
    market = Market([offer(1)], Slow(), now=lambda: clock[0], live=False)
    one = market.create(1001, {})
    assert one is not None
    for clock[0] in (0.2, 1.0):
        market.tick()
    assert one.status == "offline"
