"""Which offers fit a node type, and which of them is cheapest for the work."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from capture.errors import ConfigError
from cluster.vast.api import Vast
from cluster.vast.errors import NoOfferError


@dataclass(frozen=True)
class Wish:
    """What a node type asks for: its `node_config`, over the provider's `offers`.

    gpus: Vast's names of cards that will do, such as RTX 4090, A100 SXM4, RTX 6000Ada. min_gpu_gb: memory per card; cards report
    a little less than their name says (a 48 GB card with ECC 46068 MB), so 5% less passes. disk_gb is rented and paid from
    creation to destroy. hours, download_gb: what one machine is expected to do, for ranking. bid: an interruptible machine, for
    bid_over times the lowest bid.
    """

    image: str
    gpus: tuple[str, ...] = ()
    num_gpus: int = 1
    min_gpu_gb: float = 0.0
    disk_gb: float = 100.0
    bid: bool = False
    bid_over: float = 1.25
    max_dph: float | None = None
    min_reliability: float = 0.98
    min_inet_down: float = 500.0
    min_cuda: float = 13.0
    min_cpu_ram_gb: float = 0.0
    verified: bool = True
    hours: float = 2.0
    download_gb: float = 50.0


# What numbers make sense; 0 and up elsewhere. A bid below the lowest bid stops at once, and bills its disk.
BOUNDS = {
    "bid_over": (1.0, math.inf),
    "disk_gb": (1.0, math.inf),
    "hours": (0.01, math.inf),
    "min_reliability": (0.0, 1.0),
}


def read_wish(values: Mapping[str, Any], where: str) -> Wish:
    """A Wish from plain values; ConfigError for keys and types that it does not have."""
    types = {f.name: f.type for f in fields(Wish)}
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise ConfigError(f"{where}: unknown key '{unknown[0]}'; known are {', '.join(types)}")
    if not values.get("image"):
        raise ConfigError(f"{where}: 'image' is missing, the Docker image that nodes start from")
    clean = dict(values)
    for name, value in values.items():
        kind = str(types[name])
        if name == "gpus":
            listed = [value] if isinstance(value, str) else value
            if not isinstance(listed, list) or not all(isinstance(v, str) for v in listed):
                raise ConfigError(f"{where}: 'gpus' is a list of names such as RTX 4090")
            clean[name] = tuple(v.replace("_", " ") for v in listed)
        elif kind == "bool":
            if not isinstance(value, bool):
                raise ConfigError(f"{where}: '{name}' is true or false, not {value!r}")
        elif kind == "str":
            if not isinstance(value, str):
                raise ConfigError(f"{where}: '{name}' is text, not {value!r}")
            if any(letter.isspace() for letter in value):  # Vast rents, and the machine never boots
                raise ConfigError(
                    f"{where}: '{name}' is the name of a Docker image, which has no spaces, not {value!r}"
                )
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{where}: '{name}' is a number, not {value!r}")
        elif kind == "int" and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{where}: '{name}' is a whole number above 0, not {value!r}")
        else:
            low, high = BOUNDS.get(name, (0.0, math.inf))
            if not low <= value <= high or value == math.inf:  # not so of nan, which would let any price pass
                most = f" to {high:g}" if high < math.inf else " up"
                raise ConfigError(f"{where}: '{name}' is a number from {low:g}{most}, not {value!r}")
    return Wish(**clean)


@dataclass(frozen=True)
class Offer:
    """An offer that fits. dph: dollars an hour as it would be rented, disk included. dollars: for the Wish's hours and download."""

    id: int
    machine: int
    dph: float
    dollars: float
    bid: float | None
    row: Mapping[str, Any]

    @property
    def text(self) -> str:
        r = self.row
        kind = "interruptible, bid" if self.bid is not None else "on demand"
        return (
            f"{r['num_gpus']}x {r['gpu_name']} ({r['gpu_ram'] / 1024:.0f} GiB each), ${self.dph:.3f}/h {kind}, "
            f"{r['inet_down']:.0f} Mb/s down at ${r.get('inet_down_cost') or 0.0:.4f}/GB, {r.get('geolocation') or 'unknown place'}"
        )


def traffic(row: Mapping[str, Any], wish: Wish) -> float:
    """Dollars for the Wish's download, which Vast bills by the gigabyte."""
    return wish.download_gb * float(row.get("inet_down_cost") or 0.0)


def cost(row: Mapping[str, Any], wish: Wish, dph: float) -> float:
    """Dollars for the work: rate x (hours + time to download) + traffic. Mb/s to GB/h: x 3600 / 8000."""
    download_h = wish.download_gb * 8000 / max(float(row["inet_down"]), 1.0) / 3600
    return dph * (wish.hours + download_h) + traffic(row, wish)


def find_offers(vast: Vast, wish: Wish, blocked: Mapping[int, str], where: str, *, hours: float = 0.0) -> list[Offer]:
    """Offers that fit, cheapest work first. hours: for which the host must go on offering the machine, the Wish's at least: where
    his offer ends he may take it back, with all that is on it. NoOfferError says which condition excluded most.

    Only the card and its number are asked of the server; the rest is looked at here, to be able to say what was in the way.
    """
    query: dict[str, Any] = {
        "num_gpus": {"eq": wish.num_gpus},
        "rentable": {"eq": True},
        "rented": {"eq": False},
        "external": {"eq": False},
    }
    if wish.gpus:
        query["gpu_name"] = {"in": list(wish.gpus)}
    rows = vast.search(query, bid=wish.bid, disk_gb=wish.disk_gb)
    fitting: list[Offer] = []
    failed: Counter[str] = Counter()
    for row in rows:
        bid = float(row["min_bid"]) * wish.bid_over if wish.bid else None
        dph = float(row["dph_total"]) + (bid - float(row["min_bid"]) if bid is not None else 0.0)
        wrong = [
            text for text, passes in conditions(wish, blocked, dph, max(hours, wish.hours)).items() if not passes(row)
        ]
        failed.update(wrong)
        if not wrong:
            fitting.append(Offer(row["id"], row["machine_id"], dph, cost(row, wish, dph), bid, row))
    if not fitting:
        card = f"{wish.num_gpus}x {' or '.join(wish.gpus) or 'any GPU'}"
        if not rows:
            raise NoOfferError(f"{where}: nobody offers {card} now; name other cards under 'gpus', or try later")
        worst = ", ".join(f"{text}: {n}" for text, n in failed.most_common(3))
        raise NoOfferError(
            f"{where}: none of {len(rows)} offers of {card} fits; excluded most by {worst}. Loosen that in the node type or under provider: offers"
        )
    return sorted(fitting, key=lambda o: o.dollars)


def conditions(
    wish: Wish, blocked: Mapping[int, str], dph: float, hours: float
) -> dict[str, Callable[[Mapping[str, Any]], bool]]:
    """What an offer must pass, by the words that a refusal uses."""

    def least(key: str, bound: float) -> Callable[[Mapping[str, Any]], bool]:
        return lambda row: float(row.get(key) or 0.0) >= bound

    tests: dict[str, Callable[[Mapping[str, Any]], bool]] = {
        f"min_gpu_gb {wish.min_gpu_gb:g}": least("gpu_ram", wish.min_gpu_gb * 1000 * 0.95),
        f"disk_gb {wish.disk_gb:g}": least("disk_space", wish.disk_gb),
        f"min_reliability {wish.min_reliability:g}": least("reliability", wish.min_reliability),
        f"min_inet_down {wish.min_inet_down:g} Mb/s": least("inet_down", wish.min_inet_down),
        f"min_cuda {wish.min_cuda:g}": least("cuda_max_good", wish.min_cuda),
        f"min_cpu_ram_gb {wish.min_cpu_ram_gb:g}": least("cpu_ram", wish.min_cpu_ram_gb * 1000),
        "no open port for ssh": least("direct_port_count", 1),
        f"offered for {round(hours, 1):g} hours": lambda row: (
            row.get("duration") is None or float(row["duration"]) >= hours * 3600
        ),
        "machine that failed before": lambda row: row["machine_id"] not in blocked,
    }
    if wish.verified:
        tests["verified"] = lambda row: row.get("verified") is True or row.get("verification") == "verified"
    most = wish.max_dph
    if most is not None:
        tests[f"max_dph {most:g} $/h"] = lambda row: dph <= most
    return tests
