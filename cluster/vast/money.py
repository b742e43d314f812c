"""Limits on what a cluster may cost, and the sums that they are held against."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capture.errors import ConfigError
from cluster.vast.errors import CapError

if TYPE_CHECKING:
    from cluster.vast.offers import Offer

ROUNDING = 1e-9  # dollars an hour: 0.4 + 0.2 is more than 0.6
SETTINGS = ("max_price_per_hour", "max_total_dollars", "max_hours")


@dataclass(frozen=True)
class Caps:
    """Dollars an hour for all nodes together, dollars in all, hours from the head's creation."""

    max_price_per_hour: float
    max_total_dollars: float
    max_hours: float

    @classmethod
    def read(cls, provider: Mapping[str, Any]) -> Caps:
        """The three limits of a provider block; all must be there, none has a default. Raises ConfigError."""
        for name in SETTINGS:
            value = provider.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(
                    f"provider: '{name}' must be a number above 0, not {value!r}; it limits what a forgotten cluster can cost"
                )
        return cls(*(float(provider[name]) for name in SETTINGS))

    def check(self, bill: Bill, dph: float, what: str) -> None:
        """Raise CapError if renting `what` at dph dollars an hour would cross a limit."""
        if not self._has_room(bill, dph):
            raise CapError(
                f"{what} costs ${dph:.3f}/h; with ${bill.rate:.3f}/h rented already that is above max_price_per_hour "
                f"{self.max_price_per_hour:g}. Raise it in the provider block, or ask for a cheaper card"
            )
        reason = self.exceeded(bill)
        if reason:
            raise CapError(f"{what} is not rented: {reason}")

    def within(self, bill: Bill, offers: Sequence[Offer]) -> list[Offer]:
        """Those of the offers that max_price_per_hour has room for, in their order. CapError names the cheapest where none is."""
        fit = [offer for offer in offers if self._has_room(bill, offer.dph)]
        if not fit:
            cheapest = min(offers, key=lambda offer: offer.dph)
            self.check(bill, cheapest.dph, cheapest.text)
        return fit

    def _has_room(self, bill: Bill, dph: float) -> bool:
        return bill.rate + dph <= self.max_price_per_hour + ROUNDING

    def exceeded(self, bill: Bill) -> str | None:
        """Why the cluster has to end, or None."""
        if bill.dollars >= self.max_total_dollars:
            return f"${bill.dollars:.2f} spent, max_total_dollars is {self.max_total_dollars:g}"
        if bill.hours >= self.max_hours:
            return f"{bill.hours:.2f} hours since the cluster began, max_hours is {self.max_hours:g}"
        return None

    def deadline(self, bill: Bill, dph: float, now: float | None = None) -> int:
        """When a node rented now at dph has to be gone, as seconds since 1970.

        The hours are the cluster's. The dollars are what is left of them divided by this node's own rate: a bound that holds
        even when nobody is left to add up the others.
        """
        now = time.time() if now is None else now
        hours = min(self.max_hours - bill.hours, (self.max_total_dollars - bill.dollars) / max(dph, 1e-6))
        return int(now + max(hours, 0.0) * 3600)

    def last_word(self, bill: Bill, head: float, grace_s: float, silence_s: float, now: float | None = None) -> int:
        """When the head has to be gone should this be the last time that anybody adds up, as seconds since 1970.

        Workers, of $/h bill.rate - head together, then end themselves after grace_s + silence_s. The head stays for as long as what
        is left of the dollars pays for them and for it, but grace_s at least, in which the next poll is to come. So a cluster that
        nobody watches costs at most the larger of max_total_dollars and what it had cost by then + head x grace_s + workers x
        (grace_s + silence_s).
        """
        now = time.time() if now is None else now
        workers = max(bill.rate - head, 0.0) * (grace_s + silence_s) / 3600
        paid_s = (self.max_total_dollars - bill.dollars - workers) / max(head, 1e-6) * 3600
        return int(now + min((self.max_hours - bill.hours) * 3600, max(grace_s, paid_s)))


@dataclass(frozen=True)
class Bill:
    """rate: dollars an hour now. dollars: so far, without traffic. hours: since the oldest node of the cluster was made."""

    rate: float
    dollars: float
    hours: float


def add_up(live: Iterable[tuple[float, float]], gone: Iterable[Mapping[str, Any]], now: float | None = None) -> Bill:
    """The bill from (created, $/h) of each live node and from the state's list of nodes that are gone.

    Counted from creation, booting included, so it is never below what Vast takes for time and disk. Traffic is not in it.
    """
    now = time.time() if now is None else now
    nodes = list(live)
    dollars = sum(max(now - since, 0.0) / 3600 * dph for since, dph in nodes)
    dollars += sum((g["until"] - g["since"]) / 3600 * g["dph"] for g in gone)
    oldest = min((since for since, _ in nodes), default=now)
    return Bill(sum(dph for _, dph in nodes), dollars, max(now - oldest, 0.0) / 3600)
