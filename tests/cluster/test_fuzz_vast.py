"""Replies of Vast with anything in them: an instance is never lost, an offer that cannot be compared is passed over."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest

from cluster.vast import api
from cluster.vast import node as node_module
from cluster.vast.api import Vast
from cluster.vast.errors import VastError
from cluster.vast.offers import Wish, find_offers
from cluster.vast.orphans import Found, why_orphan

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")

INSTANCE: dict[str, Any] = {
    "id": 7, "label": "ps/c/h/1/gpu/aabbccdd", "actual_status": "running", "dph_total": 0.5, "machine_id": 3, "gpu_name": "RTX 4090",
    "num_gpus": 1, "start_date": 1.7e9, "public_ipaddr": "203.0.113.9", "ssh_host": "ssh1.example", "ssh_port": 22022,
    "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "41234"}]}, "extra_env": [["PAIRSCOPE_DEADLINE", "1700000000"]],
}  # fmt: skip
OFFER: dict[str, Any] = {
    "id": 5, "machine_id": 3, "gpu_name": "RTX 4090", "gpu_ram": 24576, "num_gpus": 1, "dph_total": 0.4, "min_bid": 0.2, "inet_down": 900.0,
    "inet_down_cost": 0.001, "disk_space": 500, "reliability": 0.99, "cuda_max_good": 13.0, "cpu_ram": 64000, "direct_port_count": 10,
    "verified": True, "geolocation": "Nowhere", "duration": 7776000.0,
}  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, -1, 10**30, float("nan"), float("inf"), "", "x", "-oProxyCommand=x", "a b;c", "\ud800", "\x1b[2J", [], [[]], [1], {}, {"22/tcp": "x"},
    {"22/tcp": [{}]}, {"22/tcp": [{"HostPort": "x"}]}, {"22/tcp": None}, ["PAIRSCOPE_DEADLINE"],
)  # fmt: skip


class Said:
    """Stands for the SDK: replies as it is told."""

    def __init__(self, reply: Any) -> None:
        self.reply = reply

    def search_offers(self, *args: Any, **options: Any) -> Any:
        return self.reply

    def show_instances_v1(self, params: Any) -> Any:
        return self.reply

    show_api_keys = create_instance = create_api_key = destroy_instance = attach_ssh = search_offers


def vast(reply: Any) -> Vast:
    made = Vast("key", "http://127.0.0.1:9", sleep=lambda seconds: None)
    made.sdk = Said(reply)
    return made


def odd(rng: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    keys = rng.sample([k for k in row if k != "id"], rng.randint(1, 3))
    gone = {keys[0]} if rng.random() < 0.2 else set()
    return {k: rng.choice(ODD) if k in keys else v for k, v in row.items() if k not in gone}


def test_an_instance_with_odd_fields_stays_in_the_listing_and_can_be_shown() -> None:
    rng = random.Random(1)
    for _ in range(400):
        row = odd(rng, INSTANCE)
        rows = vast({"instances": [row, INSTANCE | {"id": 8}]}).instances()
        assert [r["id"] for r in rows] == [7, 8]
        for node in node_module.listed(vast({"instances": [row]})):
            Found(node, why_orphan(node, [], 2e9)).row()
            assert node.ssh is None or not node.ssh[0].startswith("-")
            assert isinstance(node.env, dict)
            assert isinstance(node.dph, float)


def test_offers_with_odd_fields_are_passed_over_or_compared() -> None:
    rng = random.Random(2)
    for i in range(400):
        found = find_offers(vast([odd(rng, OFFER), OFFER | {"id": 6}]), Wish("image", bid=i % 2 == 0), {}, "gpu")
        assert 6 in [offer.id for offer in found]
        assert all(offer.text and offer.dollars >= 0 and offer.dph >= 0 for offer in found)


@pytest.mark.parametrize("reply", [None, "", "x", 1, [], [1], [None], [{}], [{"id": "7"}], {}, {"instances": None}, {"instances": [{}]}, {"instances": {}},
                                   {"success": False}, {"new_contract": "7"}, {"id": 1}, {"instances": [], "next_token": {}}])  # fmt: skip
def test_replies_that_are_something_else_are_errors_of_ours(reply: Any) -> None:
    client = vast(reply)
    calls = (
        client.instances, lambda: client.search({}, bid=False, disk_gb=1), lambda: client.create(1, image="x"), lambda: client.keys_named("x"),
        lambda: client.create_key("x", {}), lambda: client.destroy(1), lambda: client.attach_key(1, "k"),
    )  # fmt: skip
    for call in calls:
        with contextlib.suppress(VastError):
            call()


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"msg": {"a": 1}}', b"<html>" + b"x" * 10_000]
)
def test_any_http_reply_is_explained_in_a_line(body: bytes) -> None:
    import requests

    for status in (200, 301, 400, 401, 403, 404, 410, 418, 429, 500, 503):
        response = requests.Response()
        response.status_code = status
        response._content = body
        said = api._explain("list instances", requests.HTTPError("no", response=response))
        assert isinstance(said, VastError)
        assert len(str(said)) < 700
