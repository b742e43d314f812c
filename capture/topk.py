"""The k largest and smallest entries of many long rows at once: exact, best first, equal values by smaller id.

Shapes: R rows, V vocabulary, n <= V entries that may be listed, K top-k, BLOCK entries a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from capture.asked import Mask
from capture.group import ALONE, Group

BLOCK = 16  # entries per block
FEW = 4  # blocks per block of blocks
MISSING = torch.iinfo(torch.int64).max  # an id that no rank has


@dataclass(frozen=True)
class Vocabulary:
    """What of the vocabulary a rank has, and what may be listed.

    first: id of its first row. n: how many of its rows may be in top-k lists (the tokenizer's ids). k: length of the lists.
    """

    n: int
    k: int
    first: int = 0
    group: Group = ALONE

    def pick(self, x_RV: Tensor, ids: Tensor) -> Tensor:
        """x at the given ids [R, N] or [N], wherever in the group they are: [R, N]."""
        ids = ids.expand(x_RV.shape[0], -1) - self.first
        mine = (ids >= 0) & (ids < x_RV.shape[1])
        return self.group.sum(x_RV.gather(1, ids.clamp(0, x_RV.shape[1] - 1)).where(mine, 0.0))


@dataclass
class TopK:
    """ids [R, K] int64 and values [R, K] float32, best first; equal values by smaller id."""

    ids: Tensor
    values: Tensor


def block_view(x_RN: Tensor, block: int = BLOCK) -> Tensor:
    """The entries of whole blocks as [..., block, C], C = N // block: block c holds entries c, C + c, 2C + c, ...

    The maximum over the middle axis is then a run of vector maxima; over a short last axis it is seven times slower.
    """
    columns = x_RN.shape[-1] // block
    return x_RN[..., : columns * block].unflatten(-1, (block, columns))


@dataclass
class Search:
    """One search in rows x [R, V]: for the largest of the first n entries or, with `lowest`, for the smallest.

    entries(take): what `take` takes out of x, of entries as they are; so x need not be in memory.
    """

    entries: Callable[[Callable[[Tensor], Tensor]], Tensor]
    lowest: bool = False


def block_maxima(x_RV: Tensor, n: int, *, lowest: bool = False) -> Tensor:
    """What a search needs, [R, B]: the maxima of block_view(x[:, :n]); for `lowest` of -x."""
    blocks = block_view(x_RV[:, :n])
    return -blocks.amin(1) if lowest else blocks.amax(1)


@dataclass
class Best:
    """The m best of N searches in R rows, not settled. ids and values [N * R, m], best first, the values of `lowest` negated.
    ties [N * R]: rows where two of the values are equal, and which of them stand here is by chance. k: how many are wanted; n, how
    many may be listed."""

    ids: Tensor
    values: Tensor
    ties: Tensor
    n: int
    k: int


def merged(mine: list[TopK], searches: Sequence[Search], v: Vocabulary) -> list[TopK]:
    """The k best over the whole vocabulary, from each rank's own k best, which are sent to all."""
    if v.group.size == 1:
        return mine
    return [_merge(one, s.lowest, v) for one, s in zip(mine, searches, strict=True)]


def _merge(mine: TopK, lowest: bool, v: Vocabulary) -> TopK:
    worst = torch.inf if lowest else -torch.inf
    missing = v.k - mine.ids.shape[1]
    values = v.group.gather(pad(mine.values, (0, missing), value=worst))
    ids = v.group.gather(pad(mine.ids + v.first, (0, missing), value=MISSING))
    by_id = ids.sort(dim=1)
    best = values.gather(1, by_id.indices).sort(dim=1, descending=not lowest, stable=True)
    k = min(v.k, int((by_id.values[0] < MISSING).sum()))
    return TopK(by_id.values.gather(1, best.indices[:, :k]), best.values[:, :k])


def best_of(searches: Sequence[Search], maxima_NRB: Tensor, n: int, k: int) -> Best:
    """The k best of the first n entries for each of N searches, for `settled`; fewer where n is smaller. maxima: `block_maxima` of each.

    The m blocks of largest maxima hold the m largest entries of all blocks, up to the choice among equal ones. The few entries
    after the last whole block are candidates too. All searches go down together with m = k + 1: where no two of those m values
    are equal, the first k are the answer.
    """
    k = min(k, n)
    m = min(k + 1, n)
    rows = maxima_NRB.shape[1]
    ids = _within(_largest(maxima_NRB.flatten(0, 1), m, ordered=False)[1], BLOCK, n)
    parts = [s.entries(partial(_at, ids=i)) for s, i in zip(searches, ids.split(rows), strict=True)]
    values = torch.cat([-x if s.lowest else x for s, x in zip(searches, parts, strict=True)])
    best, where = _largest(values, m)
    return Best(ids.gather(1, where), best, (best[:, :-1] == best[:, 1:]).any(1), n, k)


def settled(best: Best, searches: Sequence[Search], ties: Mask) -> list[TopK]:
    """The answer to each search. ties: those of `best`; such a row is searched again in full, so that ties never depend on the order
    of the search."""
    ids, values, k = best.ids, best.values, best.k
    rows = len(ids) // len(searches)
    for row in np.flatnonzero(ties).tolist():
        s = searches[row // rows]
        x_V = s.entries(partial(_first, row=row % rows, n=best.n))
        ids[row, :k], values[row, :k] = _with_ties(-x_V if s.lowest else x_V, values[row, k - 1], k)
    answers = zip(searches, ids.split(rows), values.split(rows), strict=True)
    return [TopK(i[:, :k], -x[:, :k] if s.lowest else x[:, :k]) for s, i, x in answers]


def _at(x_RV: Tensor, ids: Tensor) -> Tensor:
    return x_RV.gather(1, ids)


def _first(x_RV: Tensor, row: int, n: int) -> Tensor:
    return x_RV[row, :n]


def _largest(x_RN: Tensor, m: int, *, ordered: bool = True) -> tuple[Tensor, Tensor]:
    """Values and places of the m largest entries of each row, best first if `ordered`: by blocks of few, their blocks, and so on,
    because `topk` takes longer the longer rows are."""
    n = x_RN.shape[1]
    if n < 2 * FEW * max(1, m):
        best = x_RN.topk(min(m, n), dim=1, sorted=ordered)
        return best.values, best.indices
    places = _within(_largest(block_view(x_RN, FEW).amax(1), m, ordered=False)[1], FEW, n)
    best = x_RN.gather(1, places).topk(m, dim=1, sorted=ordered)
    return best.values, places.gather(1, best.indices)


def _within(blocks_RM: Tensor, block: int, n: int) -> Tensor:
    """Of n entries in blocks of so many, the places of those in the given blocks and after the last whole one: [R, M * block + rest]."""
    columns = n // block
    steps = torch.arange(0, block * columns, columns or 1, device=blocks_RM.device)
    inside = (blocks_RM[:, :, None] + steps).flatten(1)
    rest = torch.arange(columns * block, n, device=blocks_RM.device).expand(blocks_RM.shape[0], -1)
    return torch.cat([inside, rest], dim=1) if columns * block < n else inside


def _with_ties(x_V: Tensor, threshold: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and values of the k largest entries of one row: all above the k-th value, as `topk` has what is no number, then the
    smallest ids at it."""
    above = (~(x_V <= threshold)).nonzero().flatten()
    equal = (x_V == threshold).nonzero().flatten()
    ids = torch.cat([above, equal[: k - above.numel()]]).sort().values
    order = x_V[ids].sort(descending=True, stable=True)
    return ids[order.indices], order.values
