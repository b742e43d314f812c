"""Rows that wait for the lens: a product with the unembedding costs its weights however few rows it has, so the rows of several
layers go through it together.

Which rows share a product follows from the capture alone (LensPlan.layers_at_once), never from where a walk was cut or taken
up: a product of another height may round otherwise. A walk commits only where nothing waits.

Shapes: S lens slots, R rows, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from capture.config import Owner
from capture.ledger import free_memory, is_out_of_memory
from capture.lens import SMALL_KL, PairStats, SlotStats, Statistics, join, joined, lens_tile, put
from capture.lens_plan import LensPlan
from capture.lens_sums import Space as Workspace
from capture.lockstep import Pair
from capture.logits import Logits, can_shift, sampled_logits, separate, shifted_logits, tile_logits
from capture.unembed import Space, keeps_space

log = logging.getLogger(__name__)

LIKELY_SMALL = 4 * SMALL_KL  # as seen on some of the vocabulary


@dataclass(frozen=True)
class Kind:
    """What rows must have in common to share a tile. heads: whose unembedding each of S slots has; pairs: slots to be compared,
    in order; slot_of: each pass's slot, as items."""

    heads: tuple[Owner, ...]
    pairs: tuple[tuple[int, int], ...]
    slot_of: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Waiting:
    """Rows of one batch at one layer. states: S tensors [R, D] behind whatever norm they shall have; following [R]: the ids of
    the next tokens, or -1; layer, where [R]: whose they are, and where they stand among the capture's tokens."""

    kind: Kind
    states: Sequence[Tensor]
    following: Tensor
    layer: np.ndarray
    where: np.ndarray

    def __len__(self) -> int:
        return len(self.where)

    def part(self, rows: slice) -> Waiting:
        return replace(
            self, states=[s[rows] for s in self.states], following=self.following[rows], layer=self.layer[rows],
            where=self.where[rows],
        )  # fmt: skip


Store = Callable[[Waiting, Statistics], None]


class LensQueue:
    """`put` rows, `flush` before what is stored is read. store: given each tile with its statistics."""

    def __init__(self, pair: Pair, lens: LensPlan, tracked: Tensor, store: Store) -> None:
        self.pair, self.lens, self.tracked, self.store = pair, lens, tracked, store
        self.waiting: list[Waiting] = []
        self.space = Space()
        self.workspaces: list[Workspace] = []
        self.left_out_mass: dict[str, float] = {"base": 0.0, "sft": 0.0}

    def __len__(self) -> int:
        return sum(map(len, self.waiting))

    def put(self, rows: Waiting) -> None:
        """Let rows wait; full tiles are worked off at once."""
        if self.waiting and self.waiting[0].kind != rows.kind:
            self.flush()
        self.waiting.append(rows)
        while len(self) >= self._tile_rows():
            self._tile()

    def flush(self) -> None:
        """Work off all that waits."""
        while self.waiting:
            self._tile()

    def _tile_rows(self) -> int:
        return self.lens.tile_rows(len(self.waiting[0].kind.heads)) if self.waiting else 1

    def _tile(self) -> None:
        """The first rows that wait: a tile of them, or as many as there are."""
        size = min(len(self), self._tile_rows())
        taken: list[Waiting] = []
        left = size
        while left:
            first = self.waiting.pop(0)
            taken.append(first.part(slice(left)))
            if len(first) > left:
                self.waiting.insert(0, first.part(slice(left, None)))
            left -= len(taken[-1])
        rows = taken[0] if len(taken) == 1 else _together(taken)
        del taken, first  # a part of a batch holds all of it
        if (found := self._or_smaller(rows)) is None:
            self.waiting.insert(0, rows)
        else:
            self.store(rows, found)

    def _or_smaller(self, rows: Waiting) -> Statistics | None:
        """A tile's statistics; or None where memory ran out: all tiles have half as many rows from now on.

        Ranks of a group cannot do this: they reduce over the vocabulary together, tile by tile.
        """
        n = len(rows)
        try:
            return self._statistics(rows)
        except RuntimeError as error:
            if not is_out_of_memory(error) or n == 1 or self.lens.vocabulary.group.size > 1:
                raise
            why = str(error).splitlines()[0]
        self.space, self.workspaces = Space(), []
        free_memory()  # outside of the handler: the traceback holds what the tile had made
        log.warning("lens: %s; going on with tiles of %d rows instead of %d", why, n // 2, n)
        self.lens.tile_bytes = n // 2 * len(rows.kind.heads) * self.lens.n_vocab * 4
        return None

    # -- one tile ------------------------------------------------------------------------------------------------------

    def _statistics(self, rows: Waiting) -> Statistics:
        """Rows whose slots hardly differ go through products of their differences at once; the others if they turn out to."""
        heads = rows.kind.heads
        if not rows.kind.pairs or not can_shift(self.pair, heads):
            return self._plain(rows)
        finite = torch.stack([s.isfinite().all(1) for s in rows.states]).all(
            0
        )  # else one slot's overflow would take all
        close = self._likely_close(rows) & finite
        if close.all():
            return self._shifted(rows, close.nonzero().flatten())
        far = (~close).nonzero().flatten()
        found = self._plain(_chosen(rows, far) if close.any() else rows)
        lossy = torch.stack([s.lossy for s in found[1].values()]).any(0)
        again = (lossy & finite[far]).nonzero().flatten()
        if len(again):
            _replace(found, again, self._shifted(rows, far[again]))
        if not close.any():
            return found
        near = close.nonzero().flatten()
        order = torch.cat([far, near]).argsort()
        both = joined([found, self._shifted(rows, near)])
        return _reordered(both, order)

    def _likely_close(self, rows: Waiting) -> Tensor:
        """Rows [R] where the KL of some pair is likely to be small, as half the variance of its shifts has it, seen on a sample of
        the vocabulary. Where that is wrong the row costs some more products, and no digit."""
        logits = sampled_logits(self.pair, rows.states, rows.kind.heads)
        least = torch.stack([(logits[b] - logits[a]).var(1) for a, b in rows.kind.pairs]).amin(0)
        return self.lens.vocabulary.group.max(-least / 2).neg() < LIKELY_SMALL

    def _plain(self, rows: Waiting) -> Statistics:
        return self._of(
            self._common(tile_logits(self.pair, rows.states, rows.kind.heads, self.space), rows.kind.heads),
            rows,
            exact=False,
        )

    def _shifted(self, rows: Waiting, where: Tensor) -> Statistics:
        """Of the rows at `where`, from shifts that are products of their own: in new memory, so that what is kept for statistics goes,
        and where they are many, what is kept for logits."""
        self.workspaces = []
        if len(where) > self.lens.beside_rows(len(rows)):
            self.space = Space()
        parts = []
        for some in where.split(self.lens.refine_rows(len(rows), len(rows.kind.heads))):
            few = _chosen(rows, some)
            parts.append(self._of(shifted_logits(self.pair, few.states, rows.kind.heads), few, exact=True))
        return parts[0] if len(parts) == 1 else joined(parts)

    def _of(self, logits: Logits, rows: Waiting, *, exact: bool) -> Statistics:
        return lens_tile(
            logits, rows.kind.pairs, rows.following, self.tracked, self.lens.vocabulary,
            rows=self.lens.statistics_rows(exact=exact), at_once=self.lens.at_once, exact=exact, kernel=self.lens.kernel,
            fused=self.lens.fused, spaces=self._workspaces(),
        )  # fmt: skip

    def _workspaces(self) -> Sequence[Workspace]:
        """One for each thread, kept where the logits are."""
        made = self.workspaces or [Workspace() for _ in range(torch.get_num_threads())]
        model = self.pair.models[self.pair.owners[0]]
        if keeps_space(model.head_shard()[1].shape[0], model.device):
            self.workspaces = made
        return made

    def _common(self, logits: Logits, heads: Sequence[Owner]) -> Logits:
        """Logits over the rows that both vocabularies have."""
        n = self.lens.n_vocab
        whole = all(self.pair.models[o].head_shard()[1].shape[0] == n for o in heads)
        if whole or self.pair.same_scaling:
            return logits
        common = []
        for s, owner in enumerate(heads):
            x = logits.slot(s)
            if x.shape[1] > n:
                mass = (x[:, n:].logsumexp(1) - x.logsumexp(1)).exp().max()
                self.left_out_mass[owner] = max(self.left_out_mass[owner], float(mass))
            common.append(x[:, :n])
        return separate(common)


def _together(parts: Sequence[Waiting]) -> Waiting:
    return Waiting(
        parts[0].kind,
        [torch.cat([p.states[s] for p in parts]) for s in range(len(parts[0].states))],
        torch.cat([p.following for p in parts]),
        np.concatenate([p.layer for p in parts]),
        np.concatenate([p.where for p in parts]),
    )


def _chosen(rows: Waiting, where: Tensor) -> Waiting:
    """Some rows, for their statistics only."""
    return replace(rows, states=[s[where] for s in rows.states], following=rows.following[where])


def _replace(found: Statistics, where: Tensor, better: Statistics) -> None:
    for pair, stats in found[1].items():
        put(stats, where, better[1][pair])


def _reordered(found: Statistics, order: Tensor) -> Statistics:
    slots: list[SlotStats] = [join([s], order) for s in found[0]]
    compared: dict[tuple[int, int], PairStats] = {pair: join([s], order) for pair, s in found[1].items()}
    return slots, compared
