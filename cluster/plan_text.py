"""A plan on a terminal: one line an entry, the sweep on 1 to N machines, the assumptions; or one entry in detail."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from capture.degrees import valid_degrees
from capture.footprint import lens_bytes, state_bytes
from cluster.plan import EntryPlan, Plan
from cluster.plan_options import Option, cost_order, download_gb
from cluster.schedule import Schedule
from cluster.table import print_table

PLANNED = "planned, not yet run by this version"
WIDTH = 100


def console() -> Console:
    """Standard output, 100 columns wide where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, highlight=False)


def show(plan: Plan, out: Console, *, verbose: bool, cluster: Sequence[str] = ()) -> None:
    """Print a whole plan. cluster: lines that say what it asks of the cluster's YAML."""
    good = [e for e in plan.entries if not e.error]
    if good:
        left = _overview(good, out)
        layer = "" if "layer" in left else "layer: one in memory; "
        out.print(f"GB: download of both; {layer}memory: needed / usable of a GPU; $: with the download", style="dim")
        if left:
            out.print(f"without {', '.join(left)}, for which there is no room; --json or a pipe has all", style="dim")
        if any(e.choice and not e.choice.runs for e in good):
            out.print(f"* {PLANNED}", style="dim")
    if not verbose:
        for note in dict.fromkeys(note for e in good for note in e.warnings):
            names = ", ".join(e.name for e in good if note in e.warnings)
            out.print(f"{names}: {note}", style="dim")
    if verbose:
        for entry in good:
            out.print()
            detail(entry, out)
    if plan.sweeps:
        out.print()
        _sweeps(plan.sweeps, out)
        for line in cluster:
            out.print(line)
    if plan.assumptions:
        out.print("\nassumed:")
        for line in plan.assumptions:
            out.print(Padding(Text(line, style="dim"), (0, 0, 0, 2), expand=False))


def _overview(entries: Sequence[EntryPlan], out: Console) -> list[str]:
    columns = (("entry", False), ("GB", True), ("layer", True), ("mode", False), ("machine", False),
               ("memory", True), ("time", True), ("$", True), ("bound by", False))  # fmt: skip
    rows = []
    for entry in entries:
        choice = entry.choice
        if choice is not None:
            rows.append([
                entry.name, _gb(1e9 * download_gb(entry.models)), _gb(max(entry.models[0].weights.layers)),
                choice.mode + ("" if choice.runs else " *"), choice.offer.title + _split(choice),
                f"{_gb(choice.need_bytes)}/{_gb(choice.offer.room_bytes)}",
                hours(choice.hours), f"{choice.usd:.2f}", choice.stages.bottleneck,
            ])  # fmt: skip
    return print_table(out, columns, rows, ("layer", "bound by"))


def _split(option: Option) -> str:
    """What a machine's number of GPUs does not say: over how many of them the capture is split."""
    return f", {option.degree} used" if option.degree != option.offer.gpus else ""


def _gb(size: float) -> str:
    """Bytes in GB: 1,623.4, 0.55, 0.012."""
    gb = size / 1e9
    if not size:
        return "0"
    return f"{gb:,.1f}" if gb >= 1 else f"{gb:.2f}" if gb >= 0.1 else f"{gb:.3f}"


def hours(value: float) -> str:
    """A time in the unit that fits: 42 s, 12.3 min, 4.5 h."""
    if value * 3600 < 100:
        return f"{value * 3600:.0f} s" if value * 3600 >= 10 else f"{value * 3600:.1f} s"
    return f"{value * 60:.1f} min" if value < 2 else f"{value:.1f} h"


def detail(entry: EntryPlan, out: Console) -> None:
    """One entry: sizes, memory, every mode with the GPUs that it fits, stage times, the cheapest and the fastest."""
    assert entry.work is not None
    base, sft, walk = entry.models[0], entry.models[-1], entry.work.walk
    pair = base.model if len(entry.models) == 1 else f"{base.model} -> {sft.model}"
    out.print(f"{entry.name}: {pair}", style="bold", soft_wrap=True)
    shape = base.weights
    degrees = ", ".join(map(str, valid_degrees(base.model_type, base.heads, base.kv_heads)))
    for line in (
        f"{base.model_type}, {base.parameters:,} parameters, {base.n_layers} layers, heads {base.heads} / {base.kv_heads}; "
        f"sizes from {base.source}",
        f"download {download_gb(entry.models):,.1f} GB of both ({base.stored}); in memory ({base.quantized or base.dtype}) {shape.total / 1e9:,.1f} GB each: "
        f"layer {max(shape.layers) / 1e9:.2f}, embedding {shape.embedding / 1e9:.2f}, "
        f"unembedding {'tied' if shape.tied else f'{shape.head / 1e9:.2f}'}",
        f"{entry.work.prompts} prompts of at most {entry.work.longest} tokens, {walk.tokens:,} in all, {walk.passes} passes: states "
        f"{state_bytes(walk) / 1e9:.2f} GB, lens {lens_bytes(walk) / 1e9:.2f} GB, {(entry.work.layer_flop + entry.work.lens_flop) / 1e12:,.0f} TFLOP",
        *([] if entry.degree else [f"GPUs that one capture can be split over: {degrees}"]),
        *entry.notes,
    ):
        out.print(f"  {line}", soft_wrap=True)
    rows = []
    for mode, bytes_needed in entry.needs.items():
        found = [o for o in entry.options if o.mode == mode]
        best = min(found, key=lambda o: (not o.runs, cost_order(o)), default=None)
        name = mode + ("" if best is None or best.runs else " *")
        need = f"{bytes_needed / 1e9:,.1f}"
        if best is None:
            rows.append([name, need, "no machine offered", "", "", ""])
        else:
            rows.append(
                [name, need, _kinds(found), best.offer.title + _split(best), hours(best.hours), f"{best.usd:.2f}"]
            )
    columns = (("mode", False), ("GB on 1 GPU", True), ("fits", False), ("cheapest", False), ("time", True), ("$", True))  # fmt: skip
    print_table(out, columns, rows)
    if any(not o.runs for o in entry.options):
        out.print(f"* {PLANNED}", style="dim")
    words: dict[Option, str] = {}
    for word, option in (("recommended", entry.choice), ("cheapest", entry.cheapest), ("fastest", entry.fastest)):
        if option is not None:
            words[option] = f"{words[option]}, {word}" if option in words else word
    for option, word in words.items():
        out.print(_one(word, option), soft_wrap=True)


def _one(word: str, option: Option) -> str:
    s = option.stages
    times = ", ".join(f"{k} {hours(getattr(s, k) / 3600)}" for k in ("download", "disk", "pcie", "compute"))
    return (
        f"{word}: {option.mode} on {option.offer.title}{_split(option)}{f' (offer {option.offer.offer_id})' if option.offer.offer_id else ''}, "
        f"{hours(option.hours)}, ${option.usd:.2f}: {times}; bound by {s.bottleneck}{'' if option.runs else ' (' + PLANNED + ')'}"
    )


def _kinds(found: Iterable[Option]) -> str:
    """Each kind of GPU with the fewest of them that the mode fits on."""
    fewest: dict[tuple[float, str], int] = {}
    for o in found:
        kind = (o.offer.memory_mib, o.offer.gpu)
        fewest[kind] = min(fewest.get(kind, o.degree), o.degree)
    names = [
        f"{n}x {name}{f' {mib / 1024:.0f}G' if name.startswith('A100') else ''}"
        for (mib, name), n in sorted(fewest.items())
    ]
    return ", ".join(names)


def _sweeps(sweeps: Sequence[Schedule], out: Console) -> None:
    rows = []
    for one in sweeps:
        kinds: dict[str, int] = {}
        for machine in one.machines:
            kinds[machine.kind] = kinds.get(machine.kind, 0) + 1
        rented = ", ".join(f"{kind} ({n})" if n > 1 else kind for kind, n in kinds.items())
        disk = f"{max(m.disk_gb for m in one.machines):,.0f} GB"
        rows.append([str(one.nodes), hours(one.makespan), f"{one.usd:.2f}", rented, disk])
    columns = (("machines", True), ("makespan", True), ("$", True), ("rented", False), ("largest disk", True))  # fmt: skip
    print_table(out, columns, rows)
