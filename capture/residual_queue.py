"""Residual states that wait for their statistics: the small operations that these are made of cost the same for few rows as for
many, so the rows of several batches and layers go through them together. Every row is computed alone; waiting changes no number.

Shapes: B batch rows, T tokens, D hidden size; P passes, C comparisons, L+2 layers, N tokens of the whole capture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from capture import footprint, statistics
from capture.batches import Batch
from capture.config import Comparison, Pass
from capture.download import Download
from capture.lens_kernel import Kernel
from capture.lockstep import State

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Waiting:
    """One batch behind one layer. slots, previous: states and those before the layer, [B, T, D] each; slot_of, previous_slot_of: pass
    -> which of them; column, where: the layer's place among L+2, the rows' among N."""

    batch: Batch
    slots: list[Tensor]
    slot_of: dict[str, int]
    previous: list[Tensor]
    previous_slot_of: dict[str, int]
    column: int
    where: Any

    def like(self, other: _Waiting) -> bool:
        """Whether the same statistics are wanted of both."""
        same = self.slot_of == other.slot_of and self.previous_slot_of == other.previous_slot_of
        return same and len(self.previous) == len(other.previous)

    def rows(self) -> statistics.Block:
        return [self.batch.rows(s) for s in self.slots], [self.batch.rows(s) for s in self.previous]


@dataclass(frozen=True)
class _Plan:
    """What is computed, as `statistics.residuals` takes it, and which of it each pass and each comparison gets."""

    turns: list[tuple[int, int]]
    pairs: list[tuple[int, int]]
    slots: list[int]
    turned: list[int]
    compared: list[int]  # behind the last of `pairs`: a slot with itself


class ResidualQueue:
    """`put` states, `flush` before what is stored is read.

    runs: norm, norm_delta, cosine_distance_prev [P, L+2, N]; pairwise: cosine_distance, norm_diff [C, L+2, N]; both are
    written to. kernel: the compiled way, where there is one.
    """

    def __init__(
        self, passes: Sequence[Pass], comparisons: Sequence[Comparison], runs: Columns, pairwise: Columns, download: Download,
        kernel: Kernel | None,
    ) -> None:  # fmt: skip
        self.passes = [p.name for p in passes]
        self.sides = [(c.base_run, c.sft_run) for c in comparisons]
        self.runs, self.pairwise, self.download, self.kernel = runs, pairwise, download, kernel
        self.waiting: list[_Waiting] = []
        self.cells = 0  # numbers of a slot that wait

    def put(self, state: State, batch: Batch, where: Any) -> None:
        """Let a state wait: no more numbers of a slot than footprint.WAITING_CELLS, or those of one batch. where: its rows' places."""
        previous, cells = state.previous or [], state.slots[0].numel()
        new = _Waiting(batch, state.slots, state.slot_of, previous, state.previous_slot_of, state.layer + 1, where)
        if self.waiting and (self.cells + cells > footprint.WAITING_CELLS or not new.like(self.waiting[0])):
            self.flush()
        self.waiting.append(new)
        self.cells += cells
        if self.cells + cells > footprint.WAITING_CELLS:  # there is no room for another like this
            self.flush()

    def flush(self) -> None:
        """Work off all that waits."""
        if not self.waiting:
            return
        some, self.waiting, self.cells = self.waiting, [], 0
        plan = self._plan(some[0])
        at = (some[0].column, some[0].where) if len(some) == 1 else _cells(some)
        found = statistics.residuals([w.rows() for w in some], plan.turns, plan.pairs, self.kernel)
        self.download.put(list(vars(found).values()), partial(self._store, plan, at))

    def _plan(self, of: _Waiting) -> _Plan:
        moved = [(of.previous_slot_of[p], of.slot_of[p]) for p in self.passes] if of.previous else []
        sides = [(of.slot_of[a], of.slot_of[b]) for a, b in self.sides]
        turns = sorted(set(moved))
        pairs = list(dict.fromkeys((a, b) for a, b in sides if a != b))
        compared = [pairs.index((a, b)) if a != b else len(pairs) for a, b in sides]
        return _Plan(turns, pairs, [of.slot_of[p] for p in self.passes], [turns.index(m) for m in moved], compared)

    def _store(self, plan: _Plan, at: tuple[Any, Any], numbers: list[Tensor]) -> None:
        norm, delta, turned, distance, difference = (x.numpy() for x in numbers)
        column, where = at
        self.runs["norm"][:, column, where] = norm[plan.slots]
        if plan.turned:
            self.runs["norm_delta"][:, column, where] = delta[plan.turned]
            self.runs["cosine_distance_prev"][:, column, where] = turned[plan.turned]
        none = np.zeros((1, norm.shape[1]))
        for name, found in (("cosine_distance", distance), ("norm_diff", difference)):
            self.pairwise[name][:, column, where] = np.concatenate([found, none])[plan.compared]


def _cells(some: list[_Waiting]) -> tuple[np.ndarray, np.ndarray]:
    """Column and place of every row."""
    places = [np.arange(w.where.start, w.where.stop) if isinstance(w.where, slice) else w.where for w in some]
    return np.repeat([w.column for w in some], list(map(len, places))), np.concatenate(places)
