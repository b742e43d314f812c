"""Logits of a tile of rows for all lens slots, and the shifts between them to full relative precision.

A float32 logit of a few units carries an error of about 1e-6, however it is computed. The shift between two slots, which a KL
near 1e-6 consists of, is then no better than 1e-3 if it is taken as the difference of two logits. Where a KL turns out small,
shifts are therefore computed once more as products of their own: between slots a and b of one unembedding W,
(h_b - h_a) W^T; between the first slots h_0, h_1 of two unembeddings, (h_1 - h_0) W_1^T + h_0 (W_1 - W_0)^T.

Shapes: R rows, D hidden size, V vocabulary (this rank's share of it), S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capture.config import Owner
from capture.lockstep import Pair
from capture.unembed import Space, head_is_linear, own_logits, shift_of_heads, shift_of_rows, some_logits

Take = Callable[[Tensor], Tensor]


def _whole(x_RV: Tensor) -> Tensor:
    return x_RV


@dataclass(frozen=True)
class Logits:
    """Logits of S slots as sums of tensors [R, V] float32, which slots may share: small shifts keep their digits that way.

    slots: for each slot the numbers of its tensors, from 1. A shift between two slots consists of the tensors that only one
    of them has.
    """

    tensors: Sequence[Tensor]
    slots: Sequence[tuple[int, ...]]

    @property
    def n_slots(self) -> int:
        return len(self.slots)

    @property
    def n_rows(self) -> int:
        return self.tensors[0].shape[0]

    def some(self, rows: slice) -> Logits:
        """The same for some of the rows."""
        return Logits([x[rows] for x in self.tensors], self.slots)

    def slot(self, s: int, take: Take = _whole) -> Tensor:
        """Logits [R, V] of one slot; read only. take: what to take out of them, of entries as they are."""
        return self._sum(self.slots[s], take)

    def shift_terms(self, a: int, b: int) -> tuple[int, ...]:
        """The tensors that take slot a to slot b: numbers from 1, negative where a tensor is taken off."""
        plus = [i for i in self.slots[b] if i not in self.slots[a]]
        return (*plus, *(-i for i in self.slots[a] if i not in self.slots[b]))

    def shift(self, a: int, b: int, take: Take = _whole) -> Tensor:
        """Logits of slot b minus those of slot a, [R, V]; read only. take: as for `slot`."""
        return self._sum(self.shift_terms(a, b), take)

    def _sum(self, terms: tuple[int, ...], take: Take) -> Tensor:
        if not terms:
            return torch.zeros_like(take(self.tensors[0]))
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


def tile_logits(pair: Pair, rows: Sequence[Tensor], heads: Sequence[Owner], space: Space | None = None) -> Logits:
    """Logits of every slot; slots that share an unembedding share one product.

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
    """Logits [R, n] float32 of each slot at some hundred places of the vocabulary (of this rank's share of it)."""
    return _by_head(rows, heads, lambda owner, states: some_logits(pair.models[owner], states))


def can_shift(pair: Pair, heads: Sequence[Owner]) -> bool:
    """True if shifts may be products: nothing but a factor follows the heads, the same in both models."""
    owners = set(heads)
    return all(head_is_linear(pair.models[o]) for o in owners) and (len(owners) == 1 or pair.same_scaling)


def shifted_logits(pair: Pair, rows: Sequence[Tensor], heads: Sequence[Owner]) -> Logits:
    """As tile_logits, for slots whose logits hardly differ; only where `can_shift`, and for finite rows."""
    first = {owner: list(heads).index(owner) for owner in dict.fromkeys(heads)}
    tensors = [own_logits(pair.models[heads[0]], rows[0])]
    slots: list[tuple[int, ...]] = [(1,)] * len(rows)
    for owner, lead in first.items():
        if lead:
            moved = rows[lead].float() - rows[0].float()
            tensors.append(shift_of_heads(pair.models[heads[0]], pair.models[owner], rows[0], moved))
            slots[lead] = (1, len(tensors))
        others = [i for i, h in enumerate(heads) if h == owner and i != lead]
        if others:
            moved = torch.cat([rows[i].float() - rows[lead].float() for i in others])
            for i, product in zip(others, shift_of_rows(pair.models[owner], moved).chunk(len(others)), strict=True):
                tensors.append(product)
                slots[i] = (*slots[lead], len(tensors))
    return Logits(tensors, slots)
