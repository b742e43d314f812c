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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capture.asked import asked
from capture.config import Owner
from capture.ledger import free_memory, is_out_of_memory
from capture.lens import SMALL_KL, PairStats, SlotStats, Statistics, join, joined, lens_tile, put
from capture.lens_plan import LensPlan
from capture.lens_sums import Space as Workspace
from capture.lockstep import Pair
from capture.logits import Logits, can_shift, led_logits, sampled_logits, tile_logits
from capture.selfcheck import lens_check
from capture.unembed import Space, keeps_space

log = logging.getLogger(__name__)

Places = np.ndarray[Any, np.dtype[np.int64]]  # of rows
Ways = np.ndarray[Any, np.dtype[np.int64]]  # of each row SEPARATE, LED or SHIFTED

LIKELY_SMALL = 4 * SMALL_KL  # as seen on some of the vocabulary
SEPARATE, LED, SHIFTED = 0, 1, 2  # as in capture/logits.py, in the order of the digits that small divergences keep
MOST_LARGER = 2.0  # times that the states of a lead may be larger than those that it leads


@dataclass(frozen=True)
class Kind:
    """What rows must have in common to share a tile. heads: whose unembedding each of S slots has; leads: `leads_of` them; pairs:
    slots to be compared, in order; slot_of: each pass's slot, as items."""

    heads: tuple[Owner, ...]
    leads: tuple[int | None, ...]
    pairs: tuple[tuple[int, int], ...]
    slot_of: tuple[tuple[str, int], ...]

    def of_one_head(self, pair: tuple[int, int]) -> bool:
        """Whether two slots have the same unembedding."""
        return self.heads[pair[0]] == self.heads[pair[1]]


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
        # In main memory led logits cost no more than separate ones. On a GPU their products are in float32, the models' own may be 16-bit.
        self.led_at_once = pair.models["base"].device.type == "cpu"
        self.left_out_mass: dict[str, float] = {"base": 0.0, "sft": 0.0}
        self.check: dict[str, float] | None = None  # of the first tile: `lens_check`

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
            if self.check is None:
                self.check = self._checked(rows, found)
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
        """Every row by one of the three ways of capture/logits.py: at once by the one that it is likely to need, and where a
        divergence turns out to have lost digits, again by a further one."""
        ways, furthest = self._likely(rows)
        parts, order = [], []
        for way in (SEPARATE, LED, SHIFTED):
            if len(where := np.flatnonzero(ways == way)):
                found = self._by(way, rows if len(where) == len(rows) else _chosen(rows, where))
                self._again(found, rows, where, way, furthest[where])
                parts.append(found)
                order.append(where)
        if len(parts) == 1:
            return parts[0]
        back = torch.from_numpy(np.concatenate(order).argsort()).to(rows.following.device)
        return _reordered(joined(parts), back)

    def _again(self, found: Statistics, rows: Waiting, where: Places, way: int, furthest: Ways) -> None:
        """Divergences that lost digits, of the rows at `where`, by a further way: of one unembedding led, else shifted."""
        if not found[1] or (furthest == way).all():
            return
        lossy = dict(zip(found[1], asked(*(stats.lossy for stats in found[1].values())), strict=True))
        needed = np.full_like(furthest, way)
        for pair, lost in lossy.items():
            further = LED if rows.kind.of_one_head(pair) else SHIFTED
            needed = np.where(lost, np.maximum(needed, further), needed)
        needed = np.minimum(needed, furthest)
        mass = dict(self.left_out_mass)
        for further in (LED, SHIFTED):
            if further > way and len(again := np.flatnonzero(needed == further)):
                better = self._by(further, _finite(_chosen(rows, where[again])))
                for pair, stats in found[1].items():
                    which = np.flatnonzero(lossy[pair][again])
                    to, of = (torch.from_numpy(x).to(rows.following.device) for x in (again[which], which))
                    put(stats, to, join([better[1][pair]], of))
        self.left_out_mass.update(mass)  # was seen before, and of states that stand in for others it is not theirs

    def _checked(self, rows: Waiting, found: Statistics) -> dict[str, float]:
        """The first and the last row once more, by the plainest way: a product with so few rows costs what reading its weights does."""
        ends = sorted({0, len(rows) - 1})
        few = _chosen(rows, np.array(ends))
        logits = tile_logits(self.pair, few.states, few.kind.heads, self.space)
        common = [x[:, : self.lens.n_vocab] for x in logits.tensors]
        return lens_check(common, found, few.following, ends, self.lens.vocabulary)

    def _likely(self, rows: Waiting) -> tuple[Ways, Ways]:
        """The way of each row [R], and the furthest that it may go."""
        kind = rows.kind
        ways = np.full(len(rows), SEPARATE)
        if not kind.pairs or not can_shift(self.pair, kind.heads):
            return ways, ways
        finite = torch.stack([s.isfinite().all(1) for s in rows.states]).all(0)  # else one's overflow would take all
        of_one = [pair for pair in kind.pairs if kind.of_one_head(pair)]
        others = [pair for pair in kind.pairs if pair not in of_one]
        unlike = self.lens.vocabulary.group.max((~_alike(rows)).float()) > 0  # ranks take the same way
        good = finite & ~unlike
        likely = self._likely_close(rows, [[] if self.led_at_once else of_one, others]) & good
        (led, shifted), good_here = asked(likely, good)
        first = SHIFTED if self._whole(kind.heads) else LED  # the mass left out is seen in whole logits
        ways = np.where(shifted, first, np.where(good_here if self.led_at_once else led, LED, SEPARATE))
        return ways, np.full_like(ways, SHIFTED)

    def _likely_close(self, rows: Waiting, groups: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
        """For each group of pairs the rows [groups, R] where the KL of one of them is likely to be small, as half the variance of its
        shifts has it, seen on a sample of the vocabulary. Where that is wrong the row costs some more products, and no digit."""
        if not any(groups):
            return torch.zeros(len(groups), len(rows), dtype=torch.bool, device=rows.following.device)
        logits = sampled_logits(self.pair, rows.states, rows.kind.heads)
        far = logits[0].new_full((1, len(rows)), torch.inf)
        least = [
            torch.cat([far, *((logits[b] - logits[a]).var(1)[None] for a, b in pairs)]).amin(0) for pairs in groups
        ]
        return self.lens.vocabulary.group.max(-torch.stack(least) / 2).neg() < LIKELY_SMALL

    def _by(self, way: int, rows: Waiting) -> Statistics:
        kind = rows.kind
        exact = way == SHIFTED or (way == LED and not self.led_at_once)
        if way == SEPARATE:
            logits = tile_logits(self.pair, rows.states, kind.heads, self.space)
        else:
            shifted = way == SHIFTED
            logits = led_logits(self.pair, rows.states, kind.heads, kind.leads, self.space, shifted=shifted)
        if self._whole(kind.heads):
            return self._of(logits, rows, exact=exact)
        beyond = {} if way == SHIFTED else self._beyond(logits)  # these are good on the common rows alone
        found = self._of(Logits([x[:, : self.lens.n_vocab] for x in logits.tensors], logits.slots), rows, exact=exact)
        for s, logsumexp in beyond.items():
            mass = float((logsumexp - found[0][s].logsumexp).sigmoid().max())
            self.left_out_mass[kind.heads[s]] = max(self.left_out_mass[kind.heads[s]], mass)
        return found

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

    def _whole(self, heads: Sequence[Owner]) -> bool:
        """Whether both vocabularies have all the rows that the logits are over."""
        shards = (self.pair.models[o].head_shard()[1].shape[0] for o in heads)
        return all(size <= self.lens.n_vocab for size in shards)

    def _beyond(self, logits: Logits) -> dict[int, Tensor]:
        """Log-sum-exp [R] of the logits that only one vocabulary has, of the slots that have such."""
        n, at_once = self.lens.n_vocab, self.lens.at_once
        parts = [logits.some(slice(i, i + at_once)) for i in range(0, logits.n_rows, at_once)]
        wide = [s for s in range(logits.n_slots) if logits.tensors[s].shape[1] > n]
        return {s: torch.cat([p.slot(s, lambda x: x[:, n:]).logsumexp(1) for p in parts]) for s in wide}


def _together(parts: Sequence[Waiting]) -> Waiting:
    return Waiting(
        parts[0].kind,
        [torch.cat([p.states[s] for p in parts]) for s in range(len(parts[0].states))],
        torch.cat([p.following for p in parts]),
        np.concatenate([p.layer for p in parts]),
        np.concatenate([p.where for p in parts]),
    )


def _chosen(rows: Waiting, where: Places) -> Waiting:
    """Some rows, for their statistics only."""
    at = torch.from_numpy(where).to(rows.following.device, non_blocking=True)
    return replace(rows, states=[s[at] for s in rows.states], following=rows.following[at])


def _finite(rows: Waiting) -> Waiting:
    """Rows in which a finite state stands in for one that is not, of the same unembedding where there is one: shifts between the
    others keep their digits, and what comes of those with a stand-in is to be left."""
    states, heads = list(rows.states), rows.kind.heads
    finite = [s.isfinite().all(1, keepdim=True) for s in states]
    if torch.stack(finite).all():
        return rows
    for i, head in enumerate(heads):
        for j in sorted(range(len(heads)), key=lambda j: heads[j] != head):
            states[i] = torch.where(finite[i], states[i], states[j])
            finite[i] = finite[i] | finite[j]
    return replace(rows, states=states)


def _alike(rows: Waiting) -> Tensor:
    """Rows [R] none of whose states is much smaller than its lead: the logits of a sum are as rounded as the larger of its terms."""
    sizes = torch.stack([torch.linalg.vector_norm(s.float(), dim=1) for s in rows.states])
    led = [(lead, i) for i, lead in enumerate(rows.kind.leads) if lead is not None]
    alike = [sizes[lead] <= MOST_LARGER * sizes[i] for lead, i in led]
    return torch.stack(alike).all(0) if alike else torch.ones_like(sizes[0], dtype=torch.bool)


def _reordered(found: Statistics, order: Tensor) -> Statistics:
    slots: list[SlotStats] = [join([s], order) for s in found[0]]
    compared: dict[tuple[int, int], PairStats] = {pair: join([s], order) for pair, s in found[1].items()}
    return slots, compared
