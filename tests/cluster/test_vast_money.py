"""The sums behind the limits."""

from __future__ import annotations

import pytest

from capture.errors import ConfigError
from cluster.vast.errors import CapError
from cluster.vast.money import Bill, Caps, add_up
from cluster.vast.offers import Offer

CAPS = Caps(max_price_per_hour=5, max_total_dollars=20, max_hours=10)


def test_a_bill_counts_live_nodes_from_creation_and_those_that_are_gone() -> None:
    bill = add_up([(0.0, 2.0), (3600.0, 1.0)], [{"since": 0.0, "until": 1800.0, "dph": 4.0}], now=7200.0)
    assert (bill.rate, bill.dollars, bill.hours) == (3.0, 2 * 2.0 + 1.0 + 2.0, 2.0)


def test_where_nothing_is_rented_the_bill_is_what_is_gone() -> None:
    gone = [{"since": 0.0, "until": 1800.0, "dph": 4.0}]
    assert add_up([], gone, now=7200.0) == Bill(rate=0, dollars=2.0, hours=0.0)


def test_the_rate_of_all_nodes_together_is_capped() -> None:
    CAPS.check(Bill(rate=4, dollars=0, hours=0), 1.0, "it")
    with pytest.raises(CapError, match="max_price_per_hour"):
        CAPS.check(Bill(rate=4, dollars=0, hours=0), 1.01, "it")


def test_a_limit_that_machines_reach_exactly_has_room_for_them() -> None:
    caps, offer = Caps(0.6, 20, 10), Offer(1, 1, 0.2, 1.0, None, {})
    caps.check(Bill(rate=0.2 + 0.2, dollars=0, hours=0), 0.2, "the third of $0.2")
    assert caps.within(Bill(rate=0.2 + 0.2, dollars=0, hours=0), [offer]) == [offer]


@pytest.mark.parametrize(("bill", "name"), [(Bill(1, 20, 1), "max_total_dollars"), (Bill(1, 1, 10), "max_hours")])
def test_a_limit_that_is_reached_names_itself(bill: Bill, name: str) -> None:
    assert name in str(CAPS.exceeded(bill))
    with pytest.raises(CapError, match=name):
        CAPS.check(bill, 0.1, "it")


def test_a_nodes_deadline_is_the_nearer_of_hours_left_and_of_what_the_dollars_left_pay_for() -> None:
    assert CAPS.deadline(Bill(0, 0, 4), 0.5, now=1000) == 1000 + 6 * 3600
    assert CAPS.deadline(Bill(0, 18, 4), 1.0, now=1000) == 1000 + 2 * 3600
    assert CAPS.deadline(Bill(0, 18, 4), 4.0, now=1000) == 1000 + 1800
    assert CAPS.deadline(Bill(0, 30, 4), 1.0, now=1000) == 1000


@pytest.mark.parametrize("value", [None, 0, -1, "5", True])
def test_all_three_limits_have_to_be_numbers(value: object) -> None:
    with pytest.raises(ConfigError, match="max_hours"):
        Caps.read({"max_price_per_hour": 1, "max_total_dollars": 1, "max_hours": value})


GRACE_S, SILENCE_S = 900.0, 1200.0


def test_a_heads_last_word_is_the_nearer_of_its_hours_and_of_the_dollars_left() -> None:
    assert CAPS.last_word(Bill(1, 10, 4), 1.0, GRACE_S, SILENCE_S, now=1000) == 1000 + 6 * 3600
    assert CAPS.last_word(Bill(1, 18, 4), 1.0, GRACE_S, SILENCE_S, now=1000) == 1000 + 2 * 3600
    # 2 dollars an hour of workers for 35 minutes are no longer there for the head
    assert CAPS.last_word(Bill(3, 18, 4), 1.0, GRACE_S, SILENCE_S, now=1000) == pytest.approx(1000 + 3000, abs=1)
    assert CAPS.last_word(Bill(3, 19.9, 4), 1.0, GRACE_S, SILENCE_S, now=1000) == 1000 + GRACE_S
    assert CAPS.last_word(Bill(3, 19.9, 9.9), 1.0, GRACE_S, SILENCE_S, now=1000) == pytest.approx(1360, abs=1), (
        "hours get no grace"
    )


@pytest.mark.parametrize("silence_s", [300.0, SILENCE_S, 3600.0])
@pytest.mark.parametrize(
    ("head", "workers", "watched_h"), [(0.4, 0.0, 1), (0.4, 2.0, 2), (0.4, 2.0, 8.2), (4, 0.4, 4), (1, 10, 1.8)]
)
def test_a_cluster_whose_autoscaler_dies_costs_no_more_than_is_said(
    head: float, workers: float, watched_h: float, silence_s: float
) -> None:
    """Second by second, as the switches of head and workers do it; workers there from the start, watched until watched_h."""
    dollars = second = heard = last = bound = 0.0
    said = float("inf")
    head_alive = workers_alive = True
    while head_alive or workers_alive:
        dollars += ((head if head_alive else 0.0) + (workers if workers_alive else 0.0)) / 3600
        second += 1
        if second <= watched_h * 3600:
            bill = Bill(head + workers, dollars, second / 3600)
            assert CAPS.exceeded(bill) is None, "the orderly end would have come first"
            said, last = CAPS.last_word(bill, head, GRACE_S, silence_s, now=second), second
            bound = max(20.0, dollars + head * GRACE_S / 3600 + workers * (GRACE_S + silence_s) / 3600)
        if head_alive and second - last < GRACE_S:
            heard = second
        head_alive = head_alive and second < said
        workers_alive = workers_alive and second - heard <= silence_s
    assert dollars <= bound * 1.001
    assert second <= 10 * 3600 + silence_s + 1


@pytest.mark.parametrize("name", ["max_price_per_hour", "max_total_dollars", "max_hours"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, -1.0, True, "5"])
def test_a_limit_is_a_number_that_limits(name: str, value: object) -> None:
    limits = {"max_price_per_hour": 5, "max_total_dollars": 20, "max_hours": 10, name: value}
    with pytest.raises(ConfigError, match=f"'{name}' must be a number above 0"):
        Caps.read(limits)
