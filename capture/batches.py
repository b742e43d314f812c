"""Put prompts together into batches, always the same way for the same prompts: the composition of a batch changes a
bfloat16 residual as much as a light fine-tune does, so it is part of a capture's identity.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from capture.config import Batching


@dataclass(frozen=True)
class Batch:
    """Some prompts, run together. items: their indices; ids_BT: token ids; mask_BT, positions_BT: None without padding.

    keep_BT: True at real tokens (None: all are). probe: a prompt run alone, only to measure what batching changes.
    """

    items: tuple[int, ...]
    ids_BT: Tensor
    mask_BT: Tensor | None = None
    positions_BT: Tensor | None = None
    keep_BT: Tensor | None = None
    probe: bool = False

    def rows(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [R, D]: the rows of real tokens, prompt after prompt."""
        every = x_BTD.flatten(0, 1)
        return every if self._kept is None else every.index_select(0, self._kept)

    @cached_property
    def _kept(self) -> Tensor | None:
        """Where the rows of real tokens are; found out once, as a device must be waited for to tell."""
        return None if self.keep_BT is None else self.keep_BT.flatten().nonzero().flatten()

    def part(self, some: slice) -> Batch:
        """Some of the prompts, at the batch's own width."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[some]

        ids, mask, positions, keep = self.ids_BT[some], cut(self.mask_BT), cut(self.positions_BT), cut(self.keep_BT)
        return Batch(self.items[some], ids, mask, positions, keep, self.probe)


def halves(batch: Batch, n: int) -> list[slice]:
    """A batch's prompts in n parts, as equal as can be, the larger ones first. 1 <= n <= prompts of the batch."""
    size, more = divmod(len(batch.items), n)
    starts = [i * size + min(i, more) for i in range(n + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(starts)]


def make_batches(ids: Sequence[Sequence[int]], batching: Batching, device: torch.device, *, probe: bool) -> list[Batch]:
    """Batches of prompts, by falling length; prompts of equal length only, unless padding is asked for.

    With probe, one more batch at the end holds the first prompt of the fullest batch alone, where that batch has others.
    """
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    groups: list[list[int]] = []
    for i in order:
        last = groups[-1] if groups else None
        longest = len(ids[last[0]]) if last else 0
        fits = last is not None and longest * (len(last) + 1) <= batching.max_tokens
        if last is not None and fits and (batching.padding != "none" or len(ids[i]) == longest):
            last.append(i)
        else:
            groups.append([i])
    batches = [_batch([ids[i] for i in g], tuple(g), batching.padding, device) for g in groups]
    fullest = max(groups, key=len)
    if probe and len(fullest) > 1:
        first = fullest[-1] if batching.padding != "none" else fullest[0]  # the shortest is the one padded most
        batches.append(_batch([ids[first]], (first,), "none", device, probe=True))
    return batches


def _batch(
    ids: list[Sequence[int]], items: tuple[int, ...], padding: str, device: torch.device, *, probe: bool = False
) -> Batch:
    longest = max(len(i) for i in ids)
    padded = torch.zeros(len(ids), longest, dtype=torch.long)
    keep = torch.zeros(len(ids), longest, dtype=torch.bool)
    for row, one in enumerate(ids):
        start = longest - len(one) if padding == "left" else 0
        padded[row, start : start + len(one)] = torch.tensor(one)
        keep[row, start : start + len(one)] = True
    padded = padded.to(device)
    if bool(keep.all()):
        return Batch(items, padded, probe=probe)
    keep = keep.to(device)
    mask = keep.long()
    # The library's default positions do not follow the mask: gpt2 is garbage under left padding without these.
    return Batch(items, padded, mask, (mask.cumsum(-1) - 1).clamp(min=0), keep, probe)
