"""Run the engine's walk on a tiny pair and keep every state: what the exactness tests compare with the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tiny import PairPaths

from capture.batches import Batch, make_batches
from capture.checkpoint import StreamedModel
from capture.config import FOUR_PASSES, Batching, Pass
from capture.group import Group
from capture.ledger import Ledger
from capture.lockstep import Pair

CPU = torch.device("cpu")
Walked = dict[str, dict[int, list[torch.Tensor]]]  # pass -> layer -> states [T, H] by prompt


def open_pair(
    paths: PairPaths, passes: Sequence[Pass] = FOUR_PASSES, *, dtype: str = "auto", group: Group | None = None
) -> Pair:
    """Both models on meta, with one ledger."""
    ledger = Ledger()

    def opened(label: str, path: object) -> StreamedModel:
        return StreamedModel(
            str(path), label=label, dtype=dtype, device=CPU, model_kwargs={}, ledger=ledger, group=group
        )

    base = opened("base", paths.base)
    return Pair(base, base if paths.sft == paths.base else opened("sft", paths.sft), passes)


def walk(
    pair: Pair,
    prompts: Sequence[Sequence[int]],
    *,
    streamed: bool = True,
    mode: str | None = None,
    batching: Batching | None = None,
) -> Walked:
    """States of every pass, layer and prompt. mode: when left out, streamed or resident."""
    batches: list[Batch] = make_batches(prompts, batching or Batching(), CPU, probe=False)
    pair.begin(batches, mode=mode or ("streamed" if streamed else "resident"))
    found: Walked = {p.name: {} for p in pair.passes}
    for state in pair.walk():
        batch = batches[state.batch]
        for name, slot in state.slot_of.items():
            by_prompt = found[name].setdefault(state.layer, [torch.empty(0)] * len(prompts))
            for row, item in enumerate(batch.items):
                one = state.slots[slot][row]
                by_prompt[item] = one.clone() if batch.keep_BT is None else one[batch.keep_BT[row]]
    return found
