"""Machines that can be rented: assumed ones from configs/prices.yaml, a saved list of Vast's offers, or Vast's live list.

Units: memory in MiB of one GPU, money in dollars, network in Gbit/s, everything else in GB (10^9 bytes) and hours. The price
is that of the whole machine.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from capture.errors import ConfigError
from cluster.plan_facts import CONFIGS

COUNTS = (1, 2, 4, 8)  # GPUs of an assumed machine
SHARE, CONTEXT_BYTES = 0.97, 1e9  # of a card's memory for tensors; of it for CUDA's context and libraries
HEADROOM = 0.05  # of what tensors may use; left free, because needs are computed and not measured on the card
BFLOAT16_FROM = 800
LIVE_QUERY: dict[str, Any] = {
    "verified": {"eq": True}, "external": {"eq": False}, "rentable": {"eq": True}, "rented": {"eq": False},
    "reliability": {"gt": 0.98}, "inet_down": {"gte": 500}, "cuda_max_good": {"gte": 13.0},
}  # fmt: skip
LARGE_CARD_MB = 40_000


@dataclass(frozen=True)
class Tflops:
    """Speed of products in practice, 10^12 operations a second: 16-bit operands; float32 products of 16-bit operands; float32."""

    half: float
    tf32: float
    single: float


@dataclass(frozen=True)
class Offer:
    """One machine. pcie: GB/s of one GPU; disk_speed: GB/s; usd_per_gb: of traffic; offer_id: Vast's, None for an assumed one."""

    gpu: str
    gpus: int
    memory_mib: float
    usd_per_hour: float
    gbit: float
    usd_per_gb: float
    disk_gb: float
    disk_speed: float
    usd_per_gb_month: float
    pcie: float
    tflops: Tflops
    compute_cap: int = 0
    offer_id: int | None = None
    place: str = ""

    @property
    def title(self) -> str:
        """Short, for tables: `RTX 4090 24G`, `8x H100 SXM 80G`."""
        if self.here:
            return "this machine"
        return f"{f'{self.gpus}x ' if self.gpus > 1 else ''}{self.gpu} {self.memory_mib / 1024:.0f}G"

    @property
    def here(self) -> bool:
        """Whether it is the machine that the plan is made on."""
        return self.gpu == "CPU"

    @property
    def memory_bytes(self) -> float:
        """Memory of one GPU as it is sold."""
        return self.memory_mib * 2**20

    @property
    def usable_bytes(self) -> float:
        """What tensors may take on each GPU: 97 % of the memory less 1 GB for CUDA's context and libraries (assumed)."""
        return SHARE * self.memory_bytes - CONTEXT_BYTES

    @property
    def room_bytes(self) -> float:
        """What a plan fills of it at most: all but 5 %."""
        return (1 - HEADROOM) * self.usable_bytes

    @property
    def bfloat16(self) -> bool:
        return self.compute_cap == 0 or self.compute_cap >= BFLOAT16_FROM


@functools.cache
def prices() -> dict[str, Any]:
    """The assumptions that come with the project, configs/prices.yaml."""
    return read_prices(CONFIGS / "prices.yaml")


def read_prices(file: Path) -> dict[str, Any]:
    """The assumptions of a file in the layout of configs/prices.yaml. Raises ConfigError that names what is missing."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the prices '{file}': {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"'{file}' is not a list of prices; see configs/prices.yaml")
    for block, keys in (("network", ("gbit", "usd_per_gb")), ("disk", ("gb_per_second", "usd_per_gb_month", "gb")),
                        ("cpu", ("tflops_per_core",))):  # fmt: skip
        for key in keys:
            if not _is_amount(_part(data, block).get(key)):
                raise ConfigError(f"'{file}': {block}.{key} is missing or no number; see configs/prices.yaml")
    if not _is_amount(data.get("boot_minutes")) or not isinstance(data.get("gpus"), list):
        raise ConfigError(f"'{file}': boot_minutes or gpus is missing; see configs/prices.yaml")
    for gpu in data["gpus"]:
        if not isinstance(gpu, dict) or not isinstance(gpu.get("name"), str):
            raise ConfigError(f"'{file}': gpus: {gpu!r:.60} is no GPU with a name; see configs/prices.yaml")
        tflops = {f"tflops: {f.name}": _part(gpu, "tflops").get(f.name) for f in fields(Tflops)}
        numbers = {key: gpu.get(key) for key in ("memory_mib", "usd_per_hour", "pcie", "compute_cap")} | tflops
        for key, value in numbers.items():
            if not _is_amount(value):
                raise ConfigError(
                    f"'{file}': the GPU '{gpu['name']}': '{key}' is a number from 0 up, with a point, not {value!r}; see configs/prices.yaml"
                )
        unknown = set(gpu["tflops"]) - {f.name for f in fields(Tflops)}
        if unknown or not isinstance(gpu.get("also", []), list):
            raise ConfigError(
                f"'{file}': the GPU '{gpu['name']}': tflops or also is not as in configs/prices.yaml {sorted(unknown, key=str) or ''}".rstrip()
            )
    return data


def _part(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = data.get(key)
    return part if isinstance(part, Mapping) else {}


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def assumed_offers(data: Mapping[str, Any], gbit: float | None = None) -> list[Offer]:
    """One machine of each kind of GPU and each count. gbit: the network instead of the file's."""
    network, disk = data["network"], data["disk"]
    return [
        Offer(
            gpu["name"], n, gpu["memory_mib"], n * gpu["usd_per_hour"], gbit or network["gbit"], network["usd_per_gb"],
            disk["gb"], disk["gb_per_second"], disk["usd_per_gb_month"], gpu["pcie"], Tflops(**gpu["tflops"]),
            gpu["compute_cap"],
        )
        for gpu in data["gpus"]
        for n in COUNTS
    ]  # fmt: skip


def is_prices(file: Path) -> bool:
    """Whether a file of offers is one of prices, in the layout of configs/prices.yaml, by its name."""
    return file.suffix in (".yaml", ".yml")


def read_offers(file: Path, data: Mapping[str, Any], gbit: float | None = None) -> list[Offer]:
    """Offers from a file: prices in the layout of configs/prices.yaml, or Vast's list as `vastai search offers --raw` prints it."""
    if is_prices(file):
        return assumed_offers(read_prices(file), gbit)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--offers: cannot read '{file}': {error}") from error
    rows = found.get("offers") if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"--offers: '{file}' is no list of offers; save one with `vastai search offers ... --raw`")
    return vast_offers(rows, data, str(file))


def live_offers(data: Mapping[str, Any], disk_gb: float) -> list[Offer]:
    """Vast's present offers, on demand. disk_gb: of the storage in the price. Raises VastError. Nothing is rented.

    One and several GPUs, small and large cards are asked for apart: Vast sends the cheapest of each, and no more than a page.
    """
    from cluster.vast.api import Vast

    vast, rows = Vast(), []
    for counts in ({"eq": 1}, {"in": [2, 4, 8]}):
        for memory in ({"lt": LARGE_CARD_MB}, {"gte": LARGE_CARD_MB}):
            query = LIVE_QUERY | {"num_gpus": counts, "gpu_ram": memory}
            rows += vast.search(query, bid=False, disk_gb=disk_gb)
    return vast_offers(rows, data, "Vast")


def vast_offers(rows: Sequence[Mapping[str, Any]], data: Mapping[str, Any], where: str) -> list[Offer]:
    """Offers in Vast's own fields: gpu_ram in MB of one GPU, inet_down in Mb/s, disk_bw in MB/s, dph_base for the whole machine.

    Speeds of a card that the prices do not know are half of Vast's `total_flops`. Raises ConfigError for a row that lacks what
    a plan cannot do without.
    """
    offers = []
    for i, row in enumerate(rows):
        try:
            n = int(row["num_gpus"])
            if n < 1:  # a machine without a GPU, which Vast offers as well
                continue
            memory = float(row["gpu_ram"])
            known = _known(str(row["gpu_name"]), memory, data)
            flops = 0.5 * float(row.get("total_flops") or 0) / n
            speed = Tflops(**known["tflops"]) if known else Tflops(flops, flops, flops)
            price = row["dph_base"] if row.get("dph_base") is not None else row["dph_total"]
            offers.append(
                Offer(
                    str(row["gpu_name"]), n, memory, float(price), float(row["inet_down"]) / 1000,
                    float(row.get("inet_down_cost") or 0), float(row.get("disk_space") or 0),
                    float(row.get("disk_bw") or 1000 * data["disk"]["gb_per_second"]) / 1000,
                    float(row.get("storage_cost") or 0), float(row.get("pcie_bw") or (known or {}).get("pcie", 10)), speed,
                    int(row.get("compute_cap") or 0), row.get("id"), str(row.get("geolocation") or ""),
                )
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"--offers: {where}: offer {i} lacks {error}, or it is no number") from error
    return [o for o in offers if o.gbit > 0 and o.tflops.half > 0]


def _known(name: str, memory_mib: float, data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The card of that name in the prices; of two sizes of a card the one nearer in memory."""
    same = [g for g in data["gpus"] if name in (g["name"], *g.get("also", ()))]
    return min(same, key=lambda g: abs(g["memory_mib"] - memory_mib), default=None)


def this_machine(data: Mapping[str, Any], gbit: float, cores: int, memory_bytes: int) -> Offer:
    """The machine that the plan is made on, for entries with `device: cpu`. It costs nothing."""
    speed = cores * data["cpu"]["tflops_per_core"]
    # no context is to be left room for: what is free is for tensors
    memory = (memory_bytes + CONTEXT_BYTES) / SHARE / 2**20
    disk = data["disk"]
    return Offer("CPU", 1, memory, 0.0, gbit, 0.0, float("inf"), disk["gb_per_second"], 0.0, float("inf"),
                 Tflops(speed / 2, speed, speed))  # fmt: skip
