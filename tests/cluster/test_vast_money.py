"""The sums behind the limits."""

from __future__ import annotations

import pytest

from capture.errors import ConfigError
from cluster.vast.errors import CapError
from cluster.vast.money import Bill, Caps, add_up

CAPS = Caps(max_price_per_hour=5, max_total_dollars=20, max_hours=10)


def test_a_bill_counts_live_nodes_from_creation_and_those_that_are_gone() -> None:
    bill = add_up([(0.0, 2.0), (3600.0, 1.0)], [{"since": 0.0, "until": 1800.0, "dph": 4.0}], now=7200.0)
    assert (bill.rate, bill.dollars, bill.hours) == (3.0, 2 * 2.0 + 1.0 + 2.0, 2.0)


def test_the_rate_of_all_nodes_together_is_capped() -> None:
    CAPS.check(Bill(rate=4, dollars=0, hours=0), 1.0, "it")
    with pytest.raises(CapError, match="max_price_per_hour"):
        CAPS.check(Bill(rate=4, dollars=0, hours=0), 1.01, "it")


@pytest.mark.parametrize(("bill", "name"), [(Bill(1, 20, 1), "max_total_dollars"), (Bill(1, 1, 10), "max_hours")])
def test_a_limit_that_is_reached_names_itself(bill: Bill, name: str) -> None:
    assert name in str(CAPS.exceeded(bill))
    with pytest.raises(CapError, match=name):
        CAPS.check(bill, 0.1, "it")


def test_a_nodes_deadline_is_the_nearer_of_hours_left_and_of_what_the_dollars_left_pay_for() -> None:
    assert CAPS.deadline(Bill(0, 0, 4), 0.5, now=1000) == 1000 + 6 * 3600
    assert CAPS.deadline(Bill(0, 18, 4), 1.0, now=1000) == 1000 + 2 * 3600
    assert CAPS.deadline(Bill(0, 30, 4), 1.0, now=1000) == 1000


@pytest.mark.parametrize("value", [None, 0, -1, "5", True])
def test_all_three_limits_have_to_be_numbers(value: object) -> None:
    with pytest.raises(ConfigError, match="max_hours"):
        Caps.read({"max_price_per_hour": 1, "max_total_dollars": 1, "max_hours": value})
