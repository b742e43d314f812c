"""Which offers are taken, and in which order: each condition alone, and each part of the price alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from fake_server import Fake, hasty, running_fake

from capture.errors import ConfigError
from cluster.vast.api import Vast
from cluster.vast.errors import NoOfferError
from cluster.vast.offers import Offer, Wish, find_offers, read_wish

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")

MONTH_H = 730.0
Search = Callable[..., list[Offer]]
# one that passes all conditions of WISH, each exactly or by next to nothing
WISH = Wish(
    image="x", gpus=("RTX 4090",), min_gpu_gb=24, disk_gb=100, min_reliability=0.98, min_inet_down=500, min_cuda=12.8,
    min_cpu_ram_gb=32, max_dph=0.5, hours=2, download_gb=50,
)  # fmt: skip
GOOD = {
    "gpu_ram": 22800, "disk_space": 100.0, "reliability": 0.98, "inet_down": 500.0, "cuda_max_good": 12.8, "cpu_ram": 32000,
    "direct_port_count": 1, "dph_base": 0.4999, "storage_cost": 0.0, "inet_down_cost": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    with running_fake() as fake:
        yield fake


@pytest.fixture
def search(server: Fake) -> Search:
    """search(wish, row, …, blocked={}): what is found where these rows are on offer."""

    def found(wish: Wish, *rows: dict[str, Any], blocked: dict[int, str] | None = None) -> list[Offer]:
        server.control("offers", list(rows))
        return find_offers(Vast("full-rights", server.url, sleep=hasty), wish, blocked or {}, "node type 'gpu'")

    return found


def test_an_offer_that_just_passes_every_condition_is_taken(search: Search) -> None:
    assert [o.id for o in search(WISH, GOOD)] == [1000]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("gpu_ram", 22799, "min_gpu_gb 24"),  # 5% below what the card's name says
        ("disk_space", 99.0, "disk_gb 100"),
        ("reliability", 0.9799, "min_reliability 0.98"),
        ("reliability", None, "min_reliability 0.98"),
        ("inet_down", 499.0, "min_inet_down 500 Mb/s"),
        ("cuda_max_good", 12.7, "min_cuda 12.8"),
        ("cpu_ram", 31999, "min_cpu_ram_gb 32"),
        ("direct_port_count", 0, "no open port for ssh"),
        ("machine_id", 77, "machine that failed before"),
        ("duration", 7199.0, "offered for 2 hours"),
        ("duration", 0.0, "offered for 2 hours"),
        ("verified", False, "verified"),
        ("dph_base", 0.5001, r"max_dph 0.5 \$/h"),
        ("storage_cost", 1.0, r"max_dph 0.5 \$/h"),  # the disk counts, 100 GB at $1 a month
    ],
)
def test_an_offer_that_fails_one_condition_is_passed_over_and_the_refusal_names_it(
    search: Search, field: str, value: Any, said: str
) -> None:
    bad = GOOD | {field: value}
    assert [o.id for o in search(WISH, bad, GOOD, blocked={77: "it hung"})] == [1001]
    with pytest.raises(NoOfferError, match=f"none of 1 offers of 1x RTX 4090 fits; excluded most by {said}: 1\\."):
        search(WISH, bad, blocked={77: "it hung"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gpu_name", "RTX 3090"),
        ("num_gpus", 2),
        ("rentable", False),
        ("rented", True),
        ("external", True),
    ],
)
def test_what_is_not_asked_for_or_not_to_be_had_is_not_among_the_offers(search: Search, field: str, value: Any) -> None:
    assert [o.id for o in search(WISH, GOOD | {field: value}, GOOD)] == [1001]
    with pytest.raises(NoOfferError, match="nobody offers 1x RTX 4090 now"):
        search(WISH, GOOD | {field: value})


def test_conditions_that_a_wish_does_not_have_exclude_nothing(search: Search) -> None:
    loose = replace(WISH, gpus=(), verified=False, max_dph=None)
    odd = GOOD | {"gpu_name": "RTX 3090", "verified": False, "dph_base": 9.0}
    assert [o.id for o in search(loose, odd)] == [1000]


def test_the_condition_that_excluded_most_is_named_first(search: Search) -> None:
    slow = GOOD | {"inet_down": 10.0}
    with pytest.raises(NoOfferError, match="by min_inet_down 500 Mb/s: 3, verified: 1"):
        search(WISH, slow, slow, slow | {"verified": False})


# Two offers that only one part of the price puts in this order, the one for less work money first
DEAR, FAST = {"dph_base": 0.40, "inet_down": 5000.0}, {"dph_base": 0.41, "inet_down": 5000.0}


@pytest.mark.parametrize(
    ("wish", "first", "second"),
    [
        pytest.param({}, DEAR, FAST, id="rate"),
        pytest.param({}, FAST, DEAR | {"inet_down_cost": 0.02}, id="traffic"),
        pytest.param({"hours": 200}, DEAR | {"inet_down_cost": 0.02}, FAST, id="rate outweighs traffic in long work"),
        pytest.param({}, FAST, DEAR | {"inet_down": 500.0}, id="time to download"),
        pytest.param({"download_gb": 0}, DEAR | {"inet_down": 500.0}, FAST, id="nothing to download"),
        pytest.param({}, FAST, DEAR | {"storage_cost": 0.2}, id="disk"),
        pytest.param({"disk_gb": 1}, DEAR | {"storage_cost": 0.2}, FAST, id="hardly any disk"),
        pytest.param(
            {"bid": True}, {"min_bid": 0.2, "dph_base": 0.6}, {"min_bid": 0.3, "dph_base": 0.4}, id="lowest bid"
        ),
    ],
)
def test_the_cheapest_work_comes_first(
    search: Search, wish: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
) -> None:
    for rows, order in (((first, second), [1000, 1001]), ((second, first), [1001, 1000])):
        found = search(replace(WISH, max_dph=None, **wish), *(GOOD | row for row in rows))
        assert [o.id for o in found] == order


def test_the_price_of_the_work_is_rate_times_hours_and_download_time_plus_traffic(search: Search) -> None:
    (offer,) = search(
        WISH, GOOD | {"dph_base": 0.4, "storage_cost": 0.073, "inet_down": 1000.0, "inet_down_cost": 0.01}
    )
    assert offer.dph == pytest.approx(0.4 + 0.073 * 100 / MONTH_H) == pytest.approx(0.41)
    download_h = 50 * 8 / 1.0 / 3600  # GB to Gb, at 1 Gb/s
    assert offer.dollars == pytest.approx(0.41 * (2 + download_h) + 50 * 0.01)
    assert offer.bid is None


def test_a_bid_is_above_the_lowest_and_is_what_counts_against_the_limit(search: Search) -> None:
    wish = replace(WISH, bid=True, bid_over=1.5)
    row = GOOD | {"min_bid": 0.2, "dph_base": 9.0, "storage_cost": 0.073}
    (offer,) = search(wish, row)
    assert (offer.bid, offer.dph) == (pytest.approx(0.3), pytest.approx(0.31))
    with pytest.raises(NoOfferError, match=r"max_dph 0\.305"):
        search(replace(wish, max_dph=0.305), row)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_dph", float("nan")), ("max_dph", float("inf")), ("bid_over", 0.5), ("disk_gb", -5), ("hours", 0), ("download_gb", -1),
     ("min_reliability", 2), ("min_reliability", float("nan"))],
)  # fmt: skip
def test_a_number_that_makes_no_sense_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is a number from"):
        read_wish({"image": "x", name: value}, "node type 'gpu'")


@pytest.mark.parametrize("values", [{}, {"image": ""}, {"image": None}])
def test_a_node_type_names_its_image(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="node type 'gpu': 'image' is missing"):
        read_wish(values, "node type 'gpu'")
