"""`pairscope vast` on the fake."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_server import Fake, hasty, running_fake

from capture.errors import ConfigError
from cluster.vast.api import Vast
from cluster.vast.cli import vast as command

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
    with pytest.raises(ConfigError, match="no node type 'nothing'"):
        run("offers", str(ROOT / "ray_cluster.yaml"), "--type", "nothing")


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


def test_destroy_refuses_what_is_not_ours_and_asks_before_it_acts(fake: Fake) -> None:
    theirs = rent(fake, "somebody's training")
    with pytest.raises(ConfigError, match="not one that pairscope rented"):
        run("destroy", str(theirs), "--yes")
    ours = rent(fake, "ps/demo/h/1/gpu/00000000")
    assert CliRunner().invoke(command, ["destroy", str(ours)], input="n\n").exit_code == 1
    assert len(fake.live()) == 2
