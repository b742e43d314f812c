"""The way to a cluster's head, as its provider knows it; and what it means when there is none."""

from __future__ import annotations

import re
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_server import Fake, running_fake, wait_for
from provider_stage import HEAD_TAGS, config, laptop_home, node_config, on_laptop

from capture.errors import ConfigError
from cluster import collect_cli
from cluster.collect_errors import ClusterGoneError, UnreachableError
from cluster.collect_follow import why_not_down
from cluster.collect_head import HeadWay
from cluster.collect_source import Found, Look
from cluster.vast.errors import VastKeyError

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    with running_fake("--boot", "0.05,0.05") as fake:
        yield fake


@pytest.fixture
def fake(server: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where Ray keeps the configs that it has worked out
    monkeypatch.setattr("cluster.vast.api.FIRST_PAUSE_S", 0.001)
    with laptop_home(server, tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    path = tmp_path / "ray_cluster.yaml"
    path.write_text(yaml.safe_dump(config()))
    return str(path)


def test_the_way_has_the_heads_own_port_and_its_pinned_key(fake: Fake, cluster: str, tmp_path: Path) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (head,) = wait_for(lambda: [h for h in laptop.non_terminated_nodes({}) if laptop.is_running(h)])
    link = HeadWay(cluster)()
    words = " ".join(link.ssh)
    assert link.target.startswith("root@")
    assert f"HostKeyAlias=vast-{head}" in words
    assert "Port=" in words
    assert f"UserKnownHostsFile={tmp_path}" in words
    assert "BatchMode=yes" in words, "a question would wait for ever"
    assert "ControlPath" not in words


def test_a_cluster_that_was_given_another_name_is_found_and_ended_by_it(
    fake: Fake, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    laptop = on_laptop(config() | {"cluster_name": "another"})
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    wait_for(lambda: [h for h in laptop.non_terminated_nodes({}) if laptop.is_running(h)])
    assert HeadWay(cluster, "another")().target.startswith("root@")
    with pytest.raises(ClusterGoneError, match=r"cluster 'third' has no head.* `ray up .* -n third` makes it"):
        HeadWay(cluster, "third")()
    called: list[list[str]] = []
    monkeypatch.setattr(
        collect_cli.subprocess, "run", lambda words, **_: called.append(words) or subprocess.CompletedProcess(words, 0)
    )
    assert collect_cli.take_down(cluster, "another") == 0
    assert called[0][1:] == ["down", "-y", cluster, "-n", "another"]


def test_a_cluster_without_a_head_is_gone(fake: Fake, cluster: str) -> None:
    with pytest.raises(ClusterGoneError, match=r"has no head: it was never up, or is gone; `ray up .*` makes it"):
        HeadWay(cluster)()


def test_commands_that_are_told_can_be_pasted(
    fake: Fake, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    spaced = str(tmp_path / "my cluster.yaml")
    Path(cluster).rename(spaced)
    with pytest.raises(ClusterGoneError, match=f"`ray up '{re.escape(spaced)}'` makes it"):
        HeadWay(spaced)()
    monkeypatch.setattr(collect_cli.subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 1))
    assert collect_cli.take_down(spaced) == 1
    assert f"`ray down -y '{spaced}'` ended with 1" in capsys.readouterr().err
    look = Look("/root/out", others={"/root/my out": [Found("a", "0123456789abcdef", {})]})
    missing: Any = types.SimpleNamespace(verify=lambda found: ["home has none"])
    assert "--remote-out '/root/my out', or" in why_not_down(look, missing)[0]


def test_a_vast_that_does_not_answer_is_for_later_and_one_that_comes_back_is_asked_again(
    fake: Fake, cluster: str
) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    wait_for(lambda: [h for h in laptop.non_terminated_nodes({}) if laptop.is_running(h)])
    way = HeadWay(cluster)
    fake.fault("list", "503", times=20)
    with pytest.raises(UnreachableError, match="503"):
        way()
    fake.control("faults", [])
    assert way().target.startswith("root@")


def test_a_wrong_key_is_the_users_to_mend(fake: Fake, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAST_API_KEY", "nobody's")
    with pytest.raises(VastKeyError, match="does not know this API key"):
        HeadWay(cluster)()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("available_node_types"), "no cluster config that Ray can use"),
        (lambda c: c.update(available_node_types=7), "TypeError"),
        (lambda c: c.update(auth=None), "ValidationError: None is not of type 'object'"),
        (lambda c: c.update(nonsense=1), "'nonsense' was unexpected"),
        (lambda c: c.pop("head_setup_commands"), "KeyError: 'head_setup_commands'"),
        (lambda c: c["provider"].pop("module"), "KeyError: 'module'"),
    ],
)
def test_a_config_that_ray_cannot_use_is_one_line(
    fake: Fake, cluster: str, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    content = config()
    change(content)
    Path(cluster).write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as raised:
        HeadWay(cluster)()
    assert f"'{cluster}' is no cluster config" in str(raised.value)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\x00")
    with pytest.raises(ConfigError, match=r"c\.yaml' cannot be read"):
        HeadWay(str(tmp_path / "c.yaml"))


@pytest.fixture
def way(fake: Fake, cluster: str) -> HeadWay:
    """To a head that is up."""
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    wait_for(lambda: [h for h in laptop.non_terminated_nodes({}) if laptop.is_running(h)])
    made = HeadWay(cluster)
    assert made().target.startswith("root@")
    return made


def test_a_head_without_an_address_is_for_later_and_not_waited_for(fake: Fake, way: HeadWay) -> None:
    fake.control(f"outbid/{way._head()}")
    way.provider.fleet.listed_at = float("-inf")
    object.__setattr__(way.provider.settings, "boot_minutes", 0.05)  # it would be waited for so long
    with pytest.raises(UnreachableError, match=r"the head, instance \d+, has no ssh address"):
        way()


def test_a_head_that_loses_its_address_while_it_is_asked_for_is_for_later(
    fake: Fake, way: HeadWay, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.control(f"outbid/{way._head()}")
    way.provider.fleet.listed_at = float("-inf")
    monkeypatch.setattr(way.provider, "external_ip", lambda _: "127.0.0.1")
    object.__setattr__(way.provider.settings, "boot_minutes", 1e-3)
    with pytest.raises(UnreachableError, match="had no ssh address for"):
        way()


def test_a_head_that_goes_while_its_address_is_asked_for_is_gone(
    fake: Fake, way: HeadWay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.vast.fleet.NEW_S", 0.0)

    def vanish(head: str) -> str:
        fake.control(f"vanish/{head}")
        way.provider.fleet.listed_at = float("-inf")
        return "127.0.0.1"

    monkeypatch.setattr(way.provider, "external_ip", vanish)
    with pytest.raises(ClusterGoneError, match=r"head is gone: instance \d+ is gone"):
        way()
