"""The plan of one entry: its sizes, its options and the chosen one; and of a sweep on 1 to N machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from capture.config import Entry
from capture.errors import CheckpointError, PairscopeError, UnsupportedModelError
from capture.footprint import LENS_TILE_BYTES, MODES, ModelBytes, Way, activations, needs, rank_share, ways
from cluster.offers import Offer, Tflops
from cluster.plan_asked import as_asked
from cluster.plan_hub import has_token
from cluster.plan_models import Models
from cluster.plan_options import DISK_MARGIN_GB, HOURS_PER_MONTH, Option, cost_order, options, split_order, time_order
from cluster.plan_sizes import ModelSizes
from cluster.plan_work import Work, token_counts, work_of
from cluster.schedule import Job, Schedule, schedule


@dataclass(frozen=True)
class EntryPlan:
    """One entry. models: base and sft, or one where both are the same. options: cheapest first. error: why there is none.

    modes: those that the entry's keys leave. degree: the GPUs that `tensor_parallel` splits it over, None where that is open."""

    name: str
    models: tuple[ModelSizes, ...] = ()
    work: Work | None = None
    options: tuple[Option, ...] = ()
    error: str | None = None
    warnings: tuple[str, ...] = ()
    modes: tuple[str, ...] = tuple(MODES)
    degree: int | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """The warnings, and what the facts say of the models."""
        return (*self.warnings, *dict.fromkeys(m.note for m in self.models if m.note))

    @property
    def choice(self) -> Option | None:
        """The cheapest option that this version runs. Where it runs none: the cheapest in a mode that it has, else of all.

        A split over several GPUs must save a twentieth for every doubling: it needs all of them at once, and their links.
        """
        return min(self.options, key=lambda o: (not o.runs, not o.ours, split_order(o)), default=None)

    @property
    def cheapest(self) -> Option | None:
        return min(self.options, key=cost_order, default=None)

    @property
    def fastest(self) -> Option | None:
        return min(self.options, key=time_order, default=None)

    @property
    def needs(self) -> dict[str, int]:
        """Bytes on one GPU by mode: weights, what loading adds, states and work with whole lens tiles."""
        assert self.work is not None
        act = activations(self.work.walk)
        return {mode: needs(self._shares, mode, act).peak for mode in self.modes}

    @property
    def _shares(self) -> list[ModelBytes]:
        return [rank_share(m.weights, self.degree or 1) for m in self.models]

    def least(self, mode: str) -> Way:
        """The way of a mode that needs least on one GPU."""
        assert self.work is not None
        walk = self.work.walk
        found = ways(self._shares, mode, lambda tile: activations(walk, tile), LENS_TILE_BYTES, on_host=False)
        return min(found, key=lambda way: way.need.peak)


@dataclass(frozen=True)
class Plan:
    """All entries in the config's order, and the sweep on 1 to `nodes` machines."""

    entries: tuple[EntryPlan, ...]
    sweeps: tuple[Schedule, ...] = ()
    assumptions: tuple[str, ...] = ()

    @property
    def failed(self) -> list[EntryPlan]:
        return [e for e in self.entries if e.error]


def plan_entry(
    entry: Entry,
    offers: Sequence[Offer],
    models: Models,
    *,
    here: Offer,
    prompts: int | None = None,
    tokens: int | None = None,
) -> EntryPlan:
    """One entry. here: this machine, for entries with `device: cpu`. An entry that cannot be planned has its error said."""
    try:
        base = _sizes(models, entry, "base")
        same = (entry.base_model, entry.base_revision) == (entry.sft_model, entry.sft_revision)
        pair = (base,) if same else (base, _sizes(models, entry, "sft"))
        _check(pair)
        asked = as_asked(entry, pair)
    except PairscopeError as error:
        return EntryPlan(entry.name, error=f"{type(error).__name__}: {error}")
    work = work_of(entry, pair, token_counts(entry, prompts, tokens))
    on = [_shared(here, asked.degree or 1)] if entry.device == "cpu" else offers
    cap = None if entry.device_memory_gib is None else entry.device_memory_gib * 2**30
    mode = asked.mode(entry)
    kept = entry.weights != "stream"
    found = tuple(options(on, asked.pair, work, mode=mode, cap_bytes=cap, degree=asked.degree, kept=kept))
    warnings = (*_warnings(pair), *asked.notes)
    made = EntryPlan(entry.name, asked.pair, work, found, warnings=warnings, modes=asked.modes, degree=asked.degree)
    return made if found else replace(made, error=f"DeviceMemoryError: {_why_none(made, on, mode, cap)}")


def _shared(here: Offer, degree: int) -> Offer:
    """This machine as the processes of a group see it: its memory and its cores are divided among them."""
    speed = here.tflops
    each = Tflops(speed.half / degree, speed.tf32 / degree, speed.single / degree)
    return replace(here, gpus=degree, memory_mib=here.memory_mib / degree, tflops=each)


def _sizes(models: Models, entry: Entry, owner: str) -> ModelSizes:
    model, revision = getattr(entry, f"{owner}_model"), getattr(entry, f"{owner}_revision")
    return models.sizes(model, revision, entry.dtype, entry.model_kwargs.get("token"))


def _check(pair: Sequence[ModelSizes]) -> None:
    base, sft = pair[0], pair[-1]
    for what in ("model_type", "n_layers", "hidden", "dtype"):
        a, b = getattr(base, what), getattr(sft, what)
        if a != b:
            raise UnsupportedModelError(f"base and sft differ in {what}: {a} against {b}")
    if min(base.n_layers, sft.n_layers) < 1:
        raise CheckpointError(f"'{base.model}' has no layers")


def _warnings(pair: Sequence[ModelSizes]) -> tuple[str, ...]:
    found = []
    if gated := [m.gated for m in pair if m.gated not in ("none", "False")]:
        login = (
            "a login is here"
            if has_token()
            else "no login is here: accept the terms on the model pages, then hf auth login"
        )
        found.append(f"gated ({gated[0]}); {login}")
    if any(m.stored == "float8" for m in pair):
        found.append("float8 checkpoints: on disk and on the wire as stored, in memory as bfloat16")
    if any(m.source == "directory" for m in pair):
        found.append("directories are taken to be on the machine already")
    return tuple(found)


def _why_none(plan: EntryPlan, offers: Sequence[Offer], mode: str, cap: float | None) -> str:
    """Why no machine will do: the smallest need against the largest memory."""
    modes = [mode] if mode != "auto" else plan.modes
    way = min((plan.least(one) for one in modes), key=lambda w: w.need.peak)
    split = plan.degree or 1
    each = "on one GPU" if split == 1 else f"on each of {split} GPUs"
    need = f"mode {way.mode} needs {way.need.peak / 1e9:.1f} GB {each}"
    if cap is not None and way.need.peak > cap:
        return f"{need}; device_memory_gib allows {cap / 1e9:.1f} GB"
    if not offers:
        return "no machine is offered"
    offers = [o for o in offers if o.gpus >= split]
    if not offers:
        return f"{need}, and no machine with {split} GPUs is offered"
    largest = max(offers, key=lambda o: o.room_bytes)
    disk = sum(m.download_bytes for m in plan.models) / 1e9
    return (
        f"{need}, and {disk:.0f} GB of disk; the largest GPU offered ({largest.title}) has {largest.room_bytes / 1e9:.1f} GB for it, the "
        f"largest disk {max(o.disk_gb for o in offers):.0f} GB"
    )


def plan_sweeps(entries: Sequence[EntryPlan], nodes: int, boot_hours: float) -> tuple[Schedule, ...]:
    """The entries that have a choice, each on its choice's kind of machine, on 1 to `nodes` machines at a time.

    More machines than entries are not simulated, nor more than one where all entries run on this machine.
    """
    jobs, disk, here = [], float("inf"), True
    for entry in entries:
        choice = entry.choice
        if choice is not None:
            offer = choice.offer
            here &= offer.here
            traffic = choice.traffic_gb * offer.usd_per_gb
            disk = min(disk, offer.disk_gb)
            jobs.append(
                Job(
                    entry.name,
                    offer.title,
                    choice.hours,
                    0.0 if offer.here else boot_hours,
                    offer.usd_per_hour,
                    offer.usd_per_gb_month / HOURS_PER_MONTH,
                    choice.disk_gb - DISK_MARGIN_GB,
                    traffic,
                    DISK_MARGIN_GB,
                )
            )
    most = 1 if here else min(nodes, len(jobs))
    return tuple(schedule(jobs, n, disk) for n in range(1, most + 1)) if jobs else ()
