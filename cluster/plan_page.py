"""The page docs/hardware.md, made from the plan: `make docs`."""

from __future__ import annotations

from collections.abc import Sequence

from capture.config import load_config
from capture.footprint import MODES
from cluster.offers import prices
from cluster.plan import EntryPlan, Plan
from cluster.plan_facts import CONFIGS
from cluster.plan_guide import TOKENS, Cell, cells
from cluster.plan_make import make_plan
from cluster.plan_options import Option, download_gb
from cluster.plan_text import PLANNED, hours
from cluster.schedule import Schedule

PROMPTS, LENGTH = 4, 100

INTRO = """# Hardware

Made by `make docs` from `pairscope plan configs/hardware_table.yaml`; do not edit by hand.

What each of 18 pairs takes, from small to very large, for {prompts} prompts of {length} tokens, four passes, every statistic and the lens
at every layer. Nothing on this page was measured on the machines it names: it is the plan's arithmetic, from exact sizes of the
weights and assumed prices and speeds. Ask for your own numbers:

```sh
pairscope plan configs/hardware_table.yaml
pairscope plan configs/hardware_table.yaml --entries llama-3.1-405b --offers live
```

A pair is walked layer by layer, both models side by side, so a few layers are in memory and not two models. What counts is then
the network: every pair is bound by its download. A cheap card on a fast network beats an expensive one on a slow network, and
the traffic's price per GB can exceed the card's. Prices and speeds are those of configs/prices.yaml ({as_of}): change them there,
or give offers with `--offers`.
"""

MODES_TEXT = """
## Memory by mode

{modes}
GB on one GPU, states and the lens included, and the smallest machine of up to 8 GPUs that it fits. Where several GPUs are named,
the capture is split over them, which it can be where their number divides both query and key-value heads; the GB are those
without a split.

"""

GUIDE = """
## The earlier guide, cell by cell

This project began with a table of machines for each pair and prompt length. It keeps both models whole in GPU memory. Of its
72 cells, {impossible} cannot hold the weights as they are stored, {tight} hold them but not the work beside them, and {split} name a number of GPUs
that the model cannot be split over. *Impossible*: the weights alone are more than the memory as sold. *Too tight*: they are
more than tensors can use of it, with one prompt's work. *No valid split*: query or key-value heads do not divide by the number of
GPUs.

"""


def _plan(gbit: float, prompts: int, tokens: int, nodes: int = 4) -> Plan:
    config = load_config(CONFIGS / "hardware_table.yaml", {})
    return make_plan(config, nodes=nodes, prompts=prompts, tokens=tokens, gbit=gbit, offline=True)


def guide_cells() -> dict[str, list[Cell]]:
    """The earlier guide's cells by entry."""
    plans = {tokens: _plan(1, 1, tokens) for tokens in TOKENS}
    names = [e.name for e in plans[TOKENS[0]].entries]
    return {
        name: cells({t: next(e for e in plan.entries if e.name == name) for t, plan in plans.items()}) for name in names
    }


def hardware_page() -> str:
    """The whole page as Markdown."""
    slow, fast = (_plan(gbit, PROMPTS, LENGTH) for gbit in (1, 10))
    guide = guide_cells()
    every = [c for row in guide.values() for c in row]
    parts = [
        INTRO.format(prompts=PROMPTS, length=LENGTH, as_of=prices()["as_of"]),
        "\n## The table\n\nTime and dollars of the recommended choice at 1 and at 10 Gbit/s, without the minutes until a machine is up. "
        "The last columns are the earlier guide's machine for 100 tokens, and why ours is another.\n\n",
        _table(
            ("pair", "download GB", "mode", "machine", "GB of GB", "1 Gbit/s", "10 Gbit/s", "earlier guide", "why"),
            [_row(a, b, guide[a.name]) for a, b in zip(slow.entries, fast.entries, strict=True)],
        ),
        f"\n{_star([a.choice for a in slow.entries if a.choice])}",
        _notes(slow.entries),
        "\n## The whole sweep\n\nOn so many machines at a time, the longest pair first, each on its recommended kind of machine.\n\n",
        _table(
            ("machines", "1 Gbit/s", "10 Gbit/s"), [_sweep(a, b) for a, b in zip(slow.sweeps, fast.sweeps, strict=True)]
        ),
        MODES_TEXT.format(modes="".join(f"- {mode}: {text}\n" for mode, text in MODES.items())),
        _table(("pair", *MODES), [_needs(e) for e in slow.entries]),
        GUIDE.format(
            impossible=sum(c.impossible for c in every),
            tight=sum(c.too_tight for c in every),
            split=sum(c.split is not None for c in every),
        ),
        _table(
            ("pair", *(f"{t} tokens" for t in TOKENS)),
            [
                (name, *(f"{c.name}{f', **{c.verdict}**' if c.verdict else ''}" for c in row))
                for name, row in guide.items()
            ],
        ),
        "\n## What is assumed\n\n",
        *(f"- {line}\n" for line in slow.assumptions),
    ]
    return "".join(parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (heads, ["---"] * len(heads), *rows))


def _row(slow: EntryPlan, fast: EntryPlan, guide: Sequence[Cell]) -> tuple[str, ...]:
    choice = slow.choice
    assert choice is not None
    same = next(
        o for o in fast.options if (o.mode, o.offer.title, o.degree) == (choice.mode, choice.offer.title, choice.degree)
    )
    cell = guide[TOKENS.index(100)]
    return (
        slow.name, f"{download_gb(slow.models):,.1f}", choice.mode + ("" if choice.runs else " \\*"), choice.offer.title,
        f"{choice.need_bytes / 1e9:.1f} of {choice.offer.room_bytes / 1e9:.1f}", _cost(choice), _cost(same), cell.name,
        _why(slow, choice, cell),
    )  # fmt: skip


def _star(choices: Sequence[Option]) -> str:
    """What a star says; empty where no row has one."""
    return "" if all(choice.runs for choice in choices) else f"\\* {PLANNED}.\n\n"


def _cost(option: Option) -> str:
    return f"{hours(option.hours)}, ${option.usd:.2f}"


def _why(entry: EntryPlan, choice: Option, cell: Cell) -> str:
    weights, need = f"{cell.weights_gb:,.0f} GB of weights", choice.need_bytes / 1e9
    if cell.impossible:
        return f"{weights} do not go into {cell.memory_gb:,.0f} GB"
    if cell.too_tight:
        return f"{weights} leave nothing of {cell.usable_gb:,.0f} GB for the work"
    if choice.mode == "resident":
        return f"both models and the work take {need:.1f} GB, {need / cell.usable_gb:.0%} of that card"
    return f"{cell.need_gb:,.0f} GB with both models whole, {need:.1f} GB streamed"


def _notes(entries: Sequence[EntryPlan]) -> str:
    lines = []
    for entry in entries:
        for model in entry.models[:1]:
            said = [f"access on the hub: {model.gated}"] if model.gated != "none" else []
            said += ["float8 checkpoints, bfloat16 in memory"] if model.stored == "float8" else []
            said += [model.note] if model.note else []
            if said:
                lines.append(f"- {entry.name}: {'; '.join(said)}\n")
    return "".join(lines)


def _sweep(slow: Schedule, fast: Schedule) -> tuple[str, ...]:
    return (str(slow.nodes), *(f"{hours(s.makespan)}, ${s.usd:.2f}" for s in (slow, fast)))


def _needs(entry: EntryPlan) -> tuple[str, ...]:
    row = [entry.name]
    for mode, need in entry.needs.items():
        fits = [o for o in entry.options if o.mode == mode]
        small = min(fits, key=lambda o: (o.degree, o.offer.memory_mib), default=None)
        row.append(f"{need / 1e9:,.1f}: {'none' if small is None else small.offer.title}")
    return tuple(row)
