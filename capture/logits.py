"""Logits of a tile of rows for all lens slots, and the shifts between them to full relative precision.

A float32 logit of a few units carries an error of about 1e-6, however it is computed. The shift between two slots, which a KL
near 1e-6 consists of, is then no better than 1e-3 if it is taken as the difference of two logits. So there are three ways, each
with more shifts that are products of their own:
- separate: none; each slot's logits are a product.
- led: of the slots of one unembedding W one leads. Another one's logits are those of its lead h and the shift from there,
  (h_b - h) W^T: as many products as before. The shift between two that are led is made of such shifts: it keeps its digits unless both
  are much further from their leads than from each other.
- shifted: the first slot leads all. To that of another unembedding it is (h_1 - h_0) W_1^T + h_0 (W_1 - W_0)^T: one product more.

Shapes: R rows, D hidden size, V vocabulary (this rank's share of it), S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capture.config import Owner
from capture.lockstep import Pair
from capture.unembed import Space, heads_scale_alike, logits_and_shifts, own_logits, shifts_between, some_logits

Take = Callable[[Tensor], Tensor]
MOST_LED = 2  # slots that lead one another down to a last one: the compiled lens takes sums of three


def _whole(x_RV: Tensor) -> Tensor:
    return x_RV


@dataclass(frozen=True)
class Logits:
    """Logits of S slots as sums of tensors [R, V] float32, which slots may share: small shifts keep their digits that way.

    slots: for each slot the numbers of its tensors, from 1. A shift between two slots that share some consists of the tensors that
    only one of them has; else it is the difference of their logits as they are rounded, which a divergence's normalisation is of.
    """

    tensors: Sequence[Tensor]
    slots: Sequence[tuple[int, ...]]

    @property
    def n_slots(self) -> int:
        return len(self.slots)

    @property
    def n_rows(self) -> int:
        return self.tensors[0].shape[0]

    @property
    def are_separate(self) -> bool:
        """Whether every slot is a tensor of its own."""
        return all(len(terms) == 1 for terms in self.slots)

    def related(self, a: int, b: int) -> bool:
        """Whether the shift between two slots is more than the difference of their logits."""
        return not set(self.slots[a]).isdisjoint(self.slots[b])

    def some(self, rows: slice) -> Logits:
        """The same for some of the rows."""
        return Logits([x[rows] for x in self.tensors], self.slots)

    def slot(self, s: int, take: Take = _whole) -> Tensor:
        """Logits [R, V] of one slot; read only. take: what to take out of them, of entries as they are."""
        return self._sum(self.slots[s], take)

    def shift_terms(self, a: int, b: int) -> tuple[int, ...]:
        """The tensors that take slot a to slot b: numbers from 1, negative where a tensor is taken off. Empty where that is
        the difference of two sums."""
        if not self.related(a, b) and len(self.slots[a]) + len(self.slots[b]) > 2:
            return ()
        plus = [i for i in self.slots[b] if i not in self.slots[a]]
        return (*plus, *(-i for i in self.slots[a] if i not in self.slots[b]))

    def shift(self, a: int, b: int, take: Take = _whole) -> Tensor:
        """Logits of slot b minus those of slot a, [R, V]; read only. take: as for `slot`."""
        if terms := self.shift_terms(a, b):
            return self._sum(terms, take)
        return self.slot(b, take) - self.slot(a, take)

    def _sum(self, terms: tuple[int, ...], take: Take) -> Tensor:
        first, *rest = terms
        x = take(self.tensors[abs(first) - 1])
        if first < 0:
            x = -x
        for i, term in enumerate(rest):
            other = take(self.tensors[abs(term) - 1])
            out = x if i or first < 0 else None  # new memory once
            x = torch.add(x, other, alpha=1 if term > 0 else -1, out=out)
        return x


def separate(logits: Sequence[Tensor]) -> Logits:
    """Logits that stand for themselves; a shift is their difference."""
    return Logits(logits, [(s + 1,) for s in range(len(logits))])


def leads_of(heads: Sequence[Owner], models: Sequence[Owner]) -> tuple[int | None, ...]:
    """For each slot which earlier one leads it: of the same unembedding, and where there is one, of the same blocks: that is where
    passes differ least. None for the first slot of an unembedding. Shifted logits are sums of MOST_LED + 1 tensors at most."""
    found: list[int | None] = []
    led: list[int] = []  # how many tensors come before, where shifted
    for i, head in enumerate(heads):
        same = [j for j in range(i) if heads[j] == head]
        near = (j for j in same if models[j] == models[i] and led[j] < MOST_LED)
        lead = next(near, same[0] if same else None)
        found.append(lead)
        led.append(int(head != heads[0]) if lead is None else led[lead] + 1)
    return tuple(found)


def tile_logits(pair: Pair, rows: Sequence[Tensor], heads: Sequence[Owner], space: Space | None = None) -> Logits:
    """Logits of every slot, separate; slots that share an unembedding share one product.

    rows: S tensors [R, D] behind whatever norm they shall have; heads: whose unembedding each has; space: the logits are good
    until the next are made in it.
    """
    logits = _by_head(rows, heads, lambda owner, states: own_logits(pair.models[owner], states, space))
    return separate(logits)


def _by_head(
    rows: Sequence[Tensor], heads: Sequence[Owner], product: Callable[[Owner, Tensor], Tensor]
) -> list[Tensor]:
    """One product for all slots of an unembedding; what it gives for each slot."""
    found: dict[int, Tensor] = {}
    for owner in dict.fromkeys(heads):
        members = [i for i, h in enumerate(heads) if h == owner]
        logits = product(owner, torch.cat([rows[i] for i in members]))
        found |= dict(zip(members, logits.chunk(len(members)), strict=True))
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def sampled_logits(pair: Pair, rows: Sequence[Tensor], heads: Sequence[Owner]) -> list[Tensor]:
    """Logits [R, n] float32 of each slot at some hundred places of the vocabulary that both models have (of this rank's share of it)."""
    size = min(m.head_shard()[1].shape[0] for m in pair.unique())
    return _by_head(rows, heads, lambda owner, states: some_logits(pair.models[owner], states, size))


def can_shift(pair: Pair, heads: Sequence[Owner]) -> bool:
    """True if shifts may be products: nothing but a factor follows the heads, the same in both models."""
    return heads_scale_alike([pair.models[o] for o in dict.fromkeys(heads)])


def led_logits(
    pair: Pair, rows: Sequence[Tensor], heads: Sequence[Owner], leads: Sequence[int | None], space: Space | None = None,
    *, shifted: bool = False,
) -> Logits:  # fmt: skip
    """As tile_logits, led; only where `can_shift`, and for finite rows. leads: `leads_of` the slots. shifted: for slots of different
    unembeddings whose logits hardly differ, too; where these have different vocabularies, the sums are good on their common rows alone."""
    tensors: dict[int, Tensor] = {}
    for owner in dict.fromkeys(heads):
        members = [i for i, h in enumerate(heads) if h == owner]  # the first of them leads
        model, between = pair.models[owner], shifted and members[0] > 0
        operand = rows[0].new_empty(len(members) * len(rows[0]), rows[0].shape[1], dtype=torch.float32)
        for i, part in zip(members, operand.chunk(len(members)), strict=True):
            lead = 0 if leads[i] is None and between else leads[i]
            if lead is None or rows[i].dtype.itemsize < part.dtype.itemsize:
                part.copy_(rows[i])
                if lead is not None:
                    part.sub_(rows[lead])
            else:
                torch.sub(rows[i], rows[lead], out=part)
        if between:
            product = shifts_between(pair.models[heads[0]], model, rows[0], operand, space)
        else:
            product = logits_and_shifts(model, operand, len(rows[0]), space)
        tensors |= dict(zip(members, product.chunk(len(members)), strict=True))
    slots: list[tuple[int, ...]] = []
    for i, lead in enumerate(leads):
        before = 0 if lead is None and shifted and i else lead
        slots.append((i + 1,) if before is None else (*slots[before], i + 1))
    return Logits([tensors[i] for i in range(len(rows))], slots)
