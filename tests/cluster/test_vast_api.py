"""The client: every failed call is an error that says what to do, and nothing is ever rented twice by a retry."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from typing import Any

import pytest
from fake_server import Fake, hasty, running_fake

from cluster.vast.api import Vast
from cluster.vast.errors import VastBusyError, VastError, VastKeyError, VastRefusedError

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    with running_fake("--boot", "0,0") as fake:
        yield fake


@pytest.fixture
def fake(server: Fake) -> Iterator[Fake]:
    server.control("faults", [])
    server.control("calls")
    yield server
    for line in server.live():
        server.control(f"vanish/{line['id']}")


def client(fake: Fake, key: str = "full-rights") -> Vast:
    return Vast(key, fake.url, sleep=hasty)


def rent(vast: Vast, n: int) -> list[int]:
    offers = vast.search({}, bid=False, disk_gb=10)
    return [vast.create(offers[i]["id"], image="x", disk=10, label=f"l{i}") for i in range(n)]


@pytest.mark.parametrize("key", ["full-rights\n", " full-rights\r\n"])
def test_a_key_with_a_newline_at_its_end_is_the_key(fake: Fake, key: str) -> None:
    vast = client(fake, key)
    assert (vast.key, vast.instances()) == ("full-rights", [])


@pytest.mark.parametrize("key", ["schl\u00fcssel", "full-right\u0455", "full\nrights", "full rights", "\n", " "])
def test_a_key_that_no_request_can_carry_is_refused_at_once_and_not_shown(fake: Fake, key: str) -> None:
    with pytest.raises(VastKeyError, match="manage-keys") as told:
        client(fake, key).instances()
    assert not key.strip() or key not in str(told.value)
    assert fake.calls("list") == 0


@pytest.mark.parametrize("kind", ["429", "500", "502", "503", "empty", "malformed", "drop", "lost"])
def test_a_listing_that_fails_raises_and_is_never_an_empty_list(fake: Fake, kind: str) -> None:
    vast = client(fake)
    rent(vast, 1)
    fake.fault("list", kind, times=50)
    with pytest.raises(VastBusyError):
        vast.instances()


@pytest.mark.parametrize("kind", ["429", "503", "empty", "malformed", "drop"])
def test_a_listing_that_fails_once_is_asked_for_again(fake: Fake, kind: str) -> None:
    vast = client(fake)
    rent(vast, 2)
    fake.fault("list", kind)
    assert len(vast.instances()) == 2


def test_a_listing_of_several_pages_is_whole_or_an_error(fake: Fake) -> None:
    fake.control("offers", [{} for _ in range(60)])
    vast = client(fake)
    made = rent(vast, 53)
    assert sorted(r["id"] for r in vast.instances()) == made
    fake.fault("list", "503", times=50, after=2)
    with pytest.raises(VastBusyError):
        vast.instances()


@pytest.mark.parametrize("kind", ["503", "lost", "drop", "malformed", "503_done", "empty"])
def test_create_is_sent_once_where_it_may_have_been_carried_out(fake: Fake, kind: str) -> None:
    vast = client(fake)
    fake.fault("create", kind, times=50)
    with pytest.raises(VastBusyError) as caught:
        rent(vast, 1)
    assert caught.value.done
    assert fake.calls("create") == 1


def test_create_is_sent_again_after_too_many_requests(fake: Fake) -> None:
    fake.fault("create", "429", times=2)
    assert len(rent(client(fake), 1)) == 1
    assert fake.calls("create") == 3


def test_an_offer_that_is_taken_is_refused_and_not_retried(fake: Fake) -> None:
    vast = client(fake)
    offer = vast.search({}, bid=False, disk_gb=10)[0]["id"]
    vast.create(offer, image="x", disk=10)
    with pytest.raises(VastRefusedError, match="no_such_ask"):
        vast.create(offer, image="x", disk=10)


def test_a_wrong_key_and_a_key_without_rights_are_told_apart(fake: Fake) -> None:
    with pytest.raises(VastKeyError, match="does not know this API key"):
        client(fake, "made-up").instances()
    reader = client(fake, "read-only")
    assert reader.instances() == []
    with pytest.raises(VastKeyError, match="lacks the right"):
        rent(reader, 1)


def test_no_key_at_all_says_where_to_get_one(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VAST_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(VastKeyError, match="manage-keys"):
        Vast(url="http://127.0.0.1:9")


def test_an_instance_that_is_not_there_is_none_and_its_destroy_no_error(fake: Fake) -> None:
    vast = client(fake)
    assert vast.instance(4711) is None
    assert vast.destroy(4711) is False
    assert vast.destroy(rent(vast, 1)[0]) is True


def test_an_offer_is_priced_with_the_disk_asked_for(fake: Fake) -> None:
    small, large = (client(fake).search({}, bid=False, disk_gb=gb)[0]["dph_total"] for gb in (10, 410))
    assert large - small == pytest.approx(400 * 0.15 / 730)


@pytest.mark.parametrize(
    "reply",
    [
        {"success": True, "instance_api_key": "hush"},
        {"success": False, "instance_api_key": "hush"},
        {"success": True, "new_contract": "hush"},
        [{"jupyter_token": "hush"}],
        "hush",
    ],
)
def test_an_error_tells_the_shape_of_a_reply_and_not_what_it_holds(fake: Fake, reply: Any) -> None:
    vast = client(fake)
    sdk = types.SimpleNamespace(
        create_instance=lambda *_, **__: reply, show_instances_v1=lambda _: reply, search_offers=lambda *_, **__: reply
    )
    vast.sdk = sdk
    for ask in (lambda: vast.create(1, image="x"), vast.instances, lambda: vast.search({}, bid=False, disk_gb=1)):
        with pytest.raises(VastError) as caught:
            ask()
        assert "hush" not in str(caught.value)
        assert re.search(r"an object with |a list of |a str|\bnot rent|cannot be read", str(caught.value))
