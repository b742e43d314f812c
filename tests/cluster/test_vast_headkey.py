"""The API key on the head: restricted, its own, in one file of mode 0600, and gone with the cluster."""

from __future__ import annotations

import copy
import json
import stat
import threading
import time
from pathlib import Path
from typing import Any

import click
import pytest
from fake_server import Fake, hasty
from provider_stage import HEAD_TAGS, WORKER_TAGS, config, node_config, on_head, on_laptop, ray_up

from cluster.vast import headkey
from cluster.vast.api import Vast
from cluster.vast.errors import VastKeyError
from cluster.vast.offers import Wish, find_offers

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")


def file(laptop: Any) -> Path:
    return Path(laptop.folder) / "vast_api_key"


def test_the_head_gets_a_key_that_may_rent_and_nothing_else(fake: Fake) -> None:
    laptop = on_laptop()
    assert fake.control("keys") == [], "no key is made before there is a head"
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (made,) = fake.control("keys")
    assert set(made["permissions"]["api"]) == {"instance_read", "instance_write", "misc"}
    assert file(laptop).read_text() == made["key"] != "full-rights"
    assert stat.S_IMODE(file(laptop).stat().st_mode) == 0o600
    heads = Vast(made["key"], fake.url, sleep=hasty)
    assert len(heads.instances()) == 1
    assert find_offers(heads, Wish("x", gpus=("RTX 4090",)), {}, "x")
    with pytest.raises(VastKeyError, match="lacks the right"):
        heads.create_key("another", {"api": {"user_write": {}}})


def test_neither_key_is_in_any_config_and_workers_get_none(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    boot = laptop.bootstrap_config(config())
    for_head = laptop.prepare_for_head_node(copy.deepcopy(boot))
    assert "~/.config/vastai/vast_api_key" in boot["file_mounts"]
    assert "~/.config/vastai/vast_api_key" not in for_head["file_mounts"]
    assert "~/.ray/auth_token" in for_head["file_mounts"]
    assert for_head["provider"]["mounts"] == {}, "where files lie at home"
    token = Path(boot["file_mounts"]["~/.ray/auth_token"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    head = on_head(laptop, tmp_path / "head", monkeypatch)
    head.create_node(node_config(), WORKER_TAGS, 1)
    sent = [json.dumps(x) for x in (boot, for_head, fake.bill())]
    for secret in ("full-rights", file(laptop).read_text(), token.read_text()):
        assert not any(secret in text for text in sent)


def test_ray_down_deletes_the_key(fake: Fake) -> None:
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    laptop.terminate_nodes(laptop.non_terminated_nodes({}))
    laptop.cleanup_cluster_resources()
    assert fake.control("keys") == []
    assert not file(laptop).exists()


def test_a_key_whose_reply_was_lost_is_deleted_by_its_name(fake: Fake) -> None:
    laptop = on_laptop()
    fake.fault("key_make", "lost")
    with pytest.raises(click.ClickException, match="create API key"):
        laptop.create_node(node_config(), HEAD_TAGS, 1)
    assert (len(fake.control("keys")), fake.live()) == (1, [])
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (left,) = fake.control("keys")
    assert left["key"] == file(laptop).read_text()


def test_of_two_ray_ups_at_once_both_have_a_key_that_vast_knows(fake: Fake, monkeypatch: Any) -> None:
    first, second = on_laptop(), on_laptop()
    make, other = (
        Vast.create_key,
        threading.Thread(target=lambda: headkey.ensure(second.vast, "pairscope", second.state)),
    )

    def slowly(self: Vast, name: str, rights: dict[str, Any]) -> tuple[int, str]:
        made = make(self, name, rights)
        if self is first.vast:  # the other one comes before this one has written its key down
            other.start()
            other.join(1)
        return made

    monkeypatch.setattr(Vast, "create_key", slowly)
    headkey.ensure(first.vast, "pairscope", first.state)
    other.join()
    (left,) = fake.control("keys")
    assert file(first).read_text() == left["key"]


def test_a_key_that_cannot_be_deleted_is_named(fake: Fake, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr("cluster.vast.api.FIRST_PAUSE_S", 0.01)
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    (made,) = fake.control("keys")
    fake.fault("key_delete", "503", times=20)
    laptop.terminate_nodes(laptop.non_terminated_nodes({}))
    laptop.cleanup_cluster_resources()
    assert f"API key {made['id']}" in caplog.text
    assert "manage-keys" in caplog.text


def test_a_second_ray_up_keeps_the_key_and_makes_a_new_one_where_vast_forgot_it(fake: Fake, monkeypatch: Any) -> None:
    on_laptop().create_node(node_config(), HEAD_TAGS, 1)
    (first,) = fake.control("keys")
    ray_up(monkeypatch)
    assert [k["id"] for k in fake.control("keys")] == [first["id"]]
    fake.control("forget_keys")
    laptop, _ = ray_up(monkeypatch)
    (second,) = fake.control("keys")
    assert file(laptop).read_text() == second["key"]


def test_a_key_that_may_not_make_keys_is_told_before_anything_is_rented(fake: Fake, monkeypatch: Any) -> None:
    monkeypatch.setenv("VAST_API_KEY", "no-new-keys")
    with pytest.raises(click.ClickException, match=r"user_write.*VAST_HEAD_API_KEY") as caught:
        on_laptop().create_node(node_config(), HEAD_TAGS, 1)
    assert "instance_read, instance_write, misc" in str(caught.value)
    assert fake.live() == []


def test_a_key_given_for_the_head_is_used_as_it_is(fake: Fake, monkeypatch: Any) -> None:
    number, given = Vast("full-rights", fake.url, sleep=hasty).create_key(
        "mine", {"api": {"instance_read": {}, "instance_write": {}}}
    )
    monkeypatch.setenv("VAST_API_KEY", "no-new-keys")
    monkeypatch.setenv("VAST_HEAD_API_KEY", given)
    laptop = on_laptop()
    laptop.create_node(node_config(), HEAD_TAGS, 1)
    assert file(laptop).read_text() == given
    laptop.terminate_nodes(laptop.non_terminated_nodes({}))
    time.sleep(0.02)
    laptop.cleanup_cluster_resources()
    assert [k["id"] for k in fake.control("keys")] == [number], "what the user made is the user's to delete"


def test_a_wrong_key_given_for_the_head_is_named(fake: Fake, monkeypatch: Any) -> None:
    monkeypatch.setenv("VAST_HEAD_API_KEY", "made-up")
    with pytest.raises(click.ClickException, match=r"VAST_HEAD_API_KEY: .*does not know this API key"):
        on_laptop().create_node(node_config(), HEAD_TAGS, 1)
    assert fake.live() == []
