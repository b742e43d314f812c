"""All ways to run one entry: every mode on every machine that it fits, how long each takes and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from capture.degrees import degree_error
from capture.footprint import (
    AUTO,
    LENS_TILE_BYTES,
    MODES,
    RUNNABLE,
    RUNNABLE_DEGREES,
    RUNNABLE_STORED,
    Activations,
    activations,
    rank_share,
    ways,
)  # fmt: skip
from cluster.offers import Offer
from cluster.plan_sizes import ModelSizes
from cluster.plan_work import Work

HOURS_PER_MONTH = 730.0
DISK_MARGIN_GB = 30.0  # beside the checkpoints: the image, the packages, the tables


@dataclass(frozen=True)
class Stages:
    """Seconds of each stage. A layer is read from disk and copied to the GPU by one thread, while the layer before computes."""

    download: float
    disk: float
    pcie: float
    compute: float

    @property
    def bottleneck(self) -> str:
        return max(("download", "disk", "pcie", "compute"), key=lambda stage: getattr(self, stage))

    def seconds(self, mode: str, batches: int = 1) -> float:
        """All of it: the download, then reading and computing side by side; one after the other for one model at a time.
        Sub-layer mode reads all layers once for every batch."""
        reading = (self.disk + self.pcie) * (batches if mode == "sub-layer" else 1)
        return self.download + (reading + self.compute if mode == "one-at-a-time" else max(reading, self.compute))


@dataclass(frozen=True)
class Option:
    """One mode on one machine. degree: GPUs that the capture is split over. Bytes are those of one GPU.

    usd: hours x (the machine's price + its disk) + traffic. traffic_gb: from the hub. readable: this version reads checkpoints of
    that dtype.
    """

    offer: Offer
    mode: str
    degree: int
    weight_bytes: int
    need_bytes: int
    stages: Stages
    hours: float
    usd: float
    disk_gb: float
    traffic_gb: float
    readable: bool

    @property
    def runs(self) -> bool:
        """Whether this version runs it."""
        return self.ours and self.readable

    @property
    def ours(self) -> bool:
        """Whether this version has the mode, for checkpoints that it can read."""
        return self.mode in RUNNABLE and self.degree in RUNNABLE_DEGREES


def download_gb(models: Sequence[ModelSizes]) -> float:
    return sum(m.download_bytes for m in models) / 1e9


def disk_gb(models: Sequence[ModelSizes]) -> float:
    """Disk to rent for one entry: its checkpoints and a margin."""
    return download_gb(models) + DISK_MARGIN_GB


def usd(offer: Offer, hours: float, traffic_gb: float, disk: float) -> float:
    """Hours x (price + disk x its price a month / 730 hours) + traffic."""
    return (
        hours * (offer.usd_per_hour + disk * offer.usd_per_gb_month / HOURS_PER_MONTH) + traffic_gb * offer.usd_per_gb
    )


def stages(offer: Offer, models: Sequence[ModelSizes], work: Work, degree: int) -> Stages:
    """Seconds of each stage: bytes over speed, operations over speed. GPUs share the network and the disk, not the bus."""
    read = sum(m.read_bytes for m in models) / 1e9
    speed = offer.tflops
    products = work.layer_flop / (speed.half if work.half else speed.single)
    products += work.lens_flop / (speed.tf32 if work.half else speed.single)
    return Stages(
        download=download_gb(models) * 8 / offer.gbit,
        disk=read / offer.disk_speed,
        pcie=read / (offer.pcie * degree),
        compute=products / 1e12 / degree,
    )


def degrees(models: Sequence[ModelSizes], gpus: int, *, alone: bool) -> list[int]:
    """Over how many of a machine's GPUs to split: as many as the models' heads allow; one, too, where `alone`."""
    valid = [n for n in range(1, gpus + 1)
             if all(degree_error(m.model_type, m.heads, m.kv_heads, n) is None for m in models)]  # fmt: skip
    return sorted({valid[-1], 1} if alone else {valid[-1]})


def options(
    offers: Sequence[Offer],
    models: Sequence[ModelSizes],
    work: Work,
    *,
    mode: str = "auto",
    cap_bytes: float | None = None,
    degree: int | None = None,
    kept: bool = True,
) -> list[Option]:
    """Every mode on every machine that it fits, cheapest first. models: base and sft, or one where both are the same.

    mode: the entry's; auto leaves all open. cap_bytes: the config's cap on device memory. degree: split over so many
    GPUs, which the models must allow; None takes as many of a machine's as they do. kept: whether what was fetched stays on the
    machine; with `weights: stream` sub-layer mode fetches all of it once more for every batch.
    """
    single = {(o.gpu, o.memory_mib) for o in offers if o.gpus == 1}
    found: list[Option] = []
    for offer in offers:
        if any(m.dtype == "bfloat16" for m in models) and not offer.bfloat16:
            continue
        if disk_gb(models) > offer.disk_gb:
            continue
        if degree is None:
            counts = degrees(models, offer.gpus, alone=(offer.gpu, offer.memory_mib) not in single)
        else:
            counts = [degree] if degree <= offer.gpus else []
        for count in counts:
            found += _on(offer, count, models, work, mode, cap_bytes, kept)
    return sorted(found, key=cost_order)


def _on(
    offer: Offer, degree: int, models: Sequence[ModelSizes], work: Work, mode: str, cap_bytes: float | None, kept: bool
) -> Iterator[Option]:
    shares = [rank_share(m.weights, degree) for m in models]

    def act(tile_bytes: int) -> Activations:
        return activations(work.walk, tile_bytes)

    room = min(offer.room_bytes, cap_bytes or float("inf"))
    once = stages(offer, models, work, degree)
    readable = all(m.stored in RUNNABLE_STORED for m in models)
    for name in MODES if mode == "auto" else (mode,):
        if name == "sub-layer" and degree > 1:
            continue
        fits = (w for w in ways(shares, name, act, LENS_TILE_BYTES, on_host=offer.here) if w.need.peak <= room)
        way = next(fits, None)
        if way is None:
            continue
        fetches = work.batches if name == "sub-layer" and not kept else 1
        times, traffic = replace(once, download=fetches * once.download), fetches * download_gb(models)
        hours = times.seconds(name, work.batches) / 3600
        disk = disk_gb(models)
        yield Option(
            offer, name, degree, way.need.weights, way.need.peak, times, hours,
            usd(offer, hours, traffic, disk), disk, traffic, readable,
        )  # fmt: skip


def cost_order(option: Option) -> tuple[float, float, int, int, int]:
    """Cheapest first; of equal ones the faster, then what `mode: auto` comes to, then the mode with more in memory."""
    auto = AUTO.index(option.mode) if option.mode in AUTO else len(AUTO)
    return (option.usd, option.hours, auto, list(MODES).index(option.mode), option.offer.gpus)


def split_order(option: Option) -> tuple[float, float, int, int, int]:
    """As cost_order, with a twentieth added to the price for every doubling of the GPUs that share the pair."""
    _, hours, auto, mode, gpus = cost_order(option)
    return (option.usd * (1 + 0.05 * math.log2(option.degree)), hours, auto, mode, gpus)


def time_order(option: Option) -> tuple[float, float]:
    return (option.hours, option.usd)
