"""Logits of a tile of rows for all lens slots, and the shifts between them to full relative precision.

A float32 logit of a few units carries an error of about 1e-6, however it is computed. The shift between two slots, which a KL
near 1e-6 consists of, is then no better than 1e-3 if it is taken as the difference of two logits. Where a KL turns out small,
shifts are therefore computed once more as products of their own: between slots a and b of one unembedding W,
(h_b - h_a) W^T; between the first slots h_0, h_1 of two unembeddings, (h_1 - h_0) W_1^T + h_0 (W_1 - W_0)^T.

Shapes: R rows, D hidden size, V vocabulary (this rank's share of it), S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from capture.config import Owner
from capture.lockstep import Pair
from capture.unembed import head_is_linear, own_logits, shift_of_heads, shift_of_rows


class Logits(Protocol):
    """What the statistics ask for, some rows at a time; every result is new memory or read only."""

    n_slots: int
    n_rows: int

    def slot(self, s: int, some: slice) -> Tensor:
        """Logits [R, V] float32 of one slot."""
        ...

    def shift(self, a: int, b: int, some: slice) -> Tensor:
        """Logits of slot b minus those of slot a, [R, V] float32; new memory."""
        ...


class PlainLogits:
    """Logits that stand for themselves; a shift is their difference."""

    def __init__(self, logits: Sequence[Tensor]) -> None:
        self.logits, self.n_slots, self.n_rows = logits, len(logits), logits[0].shape[0]

    def slot(self, s: int, some: slice) -> Tensor:
        return self.logits[s][some]

    def shift(self, a: int, b: int, some: slice) -> Tensor:
        return self.logits[b][some] - self.logits[a][some]


class ShiftedLogits:
    """root [R, V]: logits of slot 0. parts[s]: tensors [R, V] whose sum takes slot 0 to slot s; slots share what they can."""

    def __init__(self, root: Tensor, parts: Sequence[tuple[Tensor, ...]]) -> None:
        self.root, self.parts, self.n_slots, self.n_rows = root, parts, len(parts), root.shape[0]

    def slot(self, s: int, some: slice) -> Tensor:
        x = self.root[some]
        for part in self.parts[s]:
            x = x + part[some]
        return x

    def shift(self, a: int, b: int, some: slice) -> Tensor:
        shared = {id(p) for p in self.parts[a]} & {id(p) for p in self.parts[b]}
        plus = [p[some] for p in self.parts[b] if id(p) not in shared]
        minus = [p[some] for p in self.parts[a] if id(p) not in shared]
        if not plus:
            return -sum(minus[1:], start=minus[0]) if minus else torch.zeros_like(self.root[some])
        x = plus[0] + plus[1] if len(plus) > 1 else plus[0] - minus.pop() if minus else plus[0].clone()
        for part in minus:
            x.sub_(part)
        return x


def tile_logits(pair: Pair, rows: Sequence[Tensor], heads: Sequence[Owner]) -> PlainLogits:
    """Logits of every slot; slots that share an unembedding share one product.

    rows: S tensors [R, D] behind whatever norm they shall have; heads: whose unembedding each has.
    """
    out: dict[int, Tensor] = {}
    for owner in dict.fromkeys(heads):
        members = [i for i, h in enumerate(heads) if h == owner]
        logits = own_logits(pair.models[owner], torch.cat([rows[i] for i in members]))
        out |= dict(zip(members, logits.chunk(len(members)), strict=True))
    return PlainLogits([out[i] for i in range(len(rows))])


def can_shift(pair: Pair, heads: Sequence[Owner]) -> bool:
    """True if shifts may be products: nothing but a factor follows the heads, the same in both models."""
    owners = set(heads)
    return all(head_is_linear(pair.models[o]) for o in owners) and (len(owners) == 1 or pair.same_scaling)


def shifted_logits(pair: Pair, rows: Sequence[Tensor], heads: Sequence[Owner]) -> ShiftedLogits:
    """As tile_logits, for slots whose logits hardly differ; only where `can_shift`, and for finite rows."""
    owners = list(dict.fromkeys(heads))
    first = {o: list(heads).index(o) for o in owners}
    root = own_logits(pair.models[heads[0]], rows[0])
    parts: list[tuple[Tensor, ...]] = [()] * len(rows)
    for owner in owners:
        others = [i for i, h in enumerate(heads) if h == owner and i != first[owner]]
        lead = rows[first[owner]].float()
        moved = [rows[i].float() - lead for i in others]
        if owner != heads[0]:
            moved.insert(0, lead - rows[0].float())
        products = list(shift_of_rows(pair.models[owner], torch.cat(moved)).chunk(len(moved))) if moved else []
        common: tuple[Tensor, ...] = ()
        if owner != heads[0]:
            cross = shift_of_heads(pair.models[heads[0]], pair.models[owner], rows[0])
            common = (cross.add_(products.pop(0)),)
        parts[first[owner]] = common
        for i, product in zip(others, products, strict=True):
            parts[i] = (*common, product)
    return ShiftedLogits(root, parts)
