"""The logit lens of a tile of rows: entropies, KL divergences, logit shifts and top-k lists, from logits in float32.

Shapes: S lens slots (distinct pairs of state and unembedding), R rows (tokens of one layer), V vocabulary, K top-k.
In a tensor-parallel group every rank has the logits of its own shard of the vocabulary: V is then the shard, and maxima, sums
and top-k candidates are reduced over the ranks; no rank ever holds all logits.
Reference for all formulas: Cover and Thomas, Elements of Information Theory, 2nd ed., chapter 2. Units: nats; logits raw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from capture.group import ALONE, Group
from capture.logits import Logits

BLOCK = 64  # elements per block of the top-k search


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


@dataclass
class SlotStats:
    """Of one lens slot: entropy [R] and log-sum-exp [R] (float64), log-probability of the next token [R] (float64; NaN
    where there is none), logits of the tracked tokens [R, N], top-k."""

    entropy: Tensor
    logsumexp: Tensor
    next_logprob: Tensor
    tracked: Tensor
    top: TopK


@dataclass
class PairStats:
    """Of one ordered pair of slots (a, b): KL(b || a), KL(a || b) [R] float64; shifts x_b - x_a up and down."""

    kl_ba: Tensor
    kl_ab: Tensor
    increased: TopK
    decreased: TopK

    def put(self, where: Tensor, better: PairStats) -> None:
        """Take the given rows from another computation of them."""
        self.kl_ba[where], self.kl_ab[where] = better.kl_ba, better.kl_ab
        for mine, theirs in ((self.increased, better.increased), (self.decreased, better.decreased)):
            mine.ids[where], mine.values[where] = theirs.ids, theirs.values


def block_view(x_RV: Tensor, n: int) -> Tensor:
    """The first n logits, cut to whole blocks, as [R, BLOCK, C]: block c holds ids c, C + c, 2C + c, ...

    The maximum over the middle axis is then a run of vector maxima; over a short last axis it is seven times slower.
    """
    columns = n // BLOCK
    return x_RV[:, : columns * BLOCK].unflatten(1, (BLOCK, columns))


def top_k(x_RV: Tensor, v: Vocabulary, extremes_RC: Tensor, *, lowest: bool = False) -> TopK:
    """The k largest (or lowest) of the whole vocabulary, best first, ties by smaller id; exact.

    extremes_RC: maxima (minima) of block_view(x, v.n). Each rank sends its own k best; the best of those are the answer.
    """
    mine = local_top_k(x_RV, v.n, v.k, extremes_RC, lowest=lowest)
    if v.group.size == 1:
        return mine
    worst = torch.inf if lowest else -torch.inf
    missing = v.k - mine.ids.shape[1]
    values = v.group.gather(pad(mine.values, (0, missing), value=worst))
    ids = v.group.gather(pad(mine.ids + v.first, (0, missing), value=torch.iinfo(torch.int64).max))
    by_id = ids.sort(dim=1)
    best = values.gather(1, by_id.indices).sort(dim=1, descending=not lowest, stable=True)
    k = min(v.k, int(values[0].isfinite().sum()))
    return TopK(by_id.values.gather(1, best.indices[:, :k]), best.values[:, :k])


def local_top_k(x_RV: Tensor, n: int, k: int, maxima_RC: Tensor, *, lowest: bool = False) -> TopK:
    """The k largest (or lowest) of the first n entries of every row, best first, ties by smaller id; exact.

    maxima_RC [R, C] are the maxima (minima) of block_view(x, n). The k blocks of largest maxima hold the k largest
    entries of all blocks; with the few entries after the last whole block they are the candidates. A row where the k-th
    value also stands outside the choice is searched again in full, so that ties never depend on the order of the search.
    """
    k = min(k, n)
    columns = maxima_RC.shape[1]
    chosen = maxima_RC.topk(min(k, columns), dim=1, largest=not lowest).indices
    index = chosen[:, None, :].expand(-1, BLOCK, -1)
    values = block_view(x_RV, n).gather(2, index).flatten(1)
    ids = (index + torch.arange(BLOCK, device=x_RV.device)[None, :, None] * columns).flatten(1)
    first = columns * BLOCK
    if first < n:
        values = torch.cat([values, x_RV[:, first:n]], dim=1)
        ids = torch.cat([ids, torch.arange(first, n, device=x_RV.device).expand(x_RV.shape[0], -1)], dim=1)
    if lowest:
        values, maxima_RC = -values, -maxima_RC
    best, where = values.topk(k, dim=1)
    best_ids = ids.gather(1, where)
    threshold = best[:, -1:]
    ambiguous = ((values >= threshold).sum(1) > k) | ((maxima_RC >= threshold).sum(1) > k)
    for row in ambiguous.nonzero().flatten().tolist():
        x_V = -x_RV[row, :n] if lowest else x_RV[row, :n]
        best_ids[row] = _smallest_ids(x_V, threshold[row], k)
    best_ids = best_ids.sort(dim=1).values
    order = x_RV.gather(1, best_ids).sort(dim=1, descending=not lowest, stable=True)
    return TopK(best_ids.gather(1, order.indices), order.values)


def _smallest_ids(x_V: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Ids of the k largest entries of one row where ties straddle the k-th: all above it, then the smallest ids on it."""
    above = (x_V > threshold).nonzero().flatten()
    equal = (x_V == threshold).nonzero().flatten()
    return torch.cat([above, equal[: k - above.numel()]])


def slot_stats(x_RV: Tensor, next_R: Tensor, tracked_N: Tensor, v: Vocabulary) -> tuple[SlotStats, Tensor]:
    """Entropy H = log Z - sum(e t) / Z with t = x - max, e = exp(t), Z = sum(e); and the probabilities e / Z [R, V].

    Sums are float32 within a row (pairwise summation), float64 from there on. Ids that no token uses are left out of
    the top-k only; probabilities are over all V. next_R: id of the token that
    follows, or -1.
    """
    maxima = block_view(x_RV, v.n).amax(1)
    rest = x_RV[:, maxima.shape[1] * BLOCK :]
    largest = v.group.max(torch.cat([maxima, rest], dim=1).amax(1, keepdim=True))
    next_logit = v.pick(x_RV, next_R.clamp(min=0)[:, None])[:, 0].double()
    tracked = v.pick(x_RV, tracked_N)
    t = x_RV - largest
    p = t.exp()
    z = v.group.sum(p.sum(1).double())
    mean_t = v.group.sum(t.mul_(p).sum(1).double()) / z
    p.mul_((1 / z).float()[:, None])
    logsumexp = z.log() + largest[:, 0].double()
    next_logprob = torch.where(next_R >= 0, next_logit - logsumexp, torch.nan)
    return SlotStats(z.log() - mean_t, logsumexp, next_logprob, tracked, top_k(x_RV, v, maxima)), p


FAR = 60.0  # nats: beyond this shift exp() of the fast form may leave the range of float32


def kl_both(
    shift_RV: Tensor, c_R: Tensor, pa_RV: Tensor, pb_RV: Tensor, highest_R: Tensor, group: Group
) -> tuple[Tensor, Tensor]:
    """KL(b || a) and KL(a || b) [R] float64 from the logit shift x_b - x_a; exact zeros for equal slots, never negative.

    With d = log p_b - log p_a = shift - c, c = logZ_b - logZ_a and W = expm1(d) = p_b / p_a - 1:
        KL(a || b) = sum p_a (W - d)            (the terms p_b - p_a = p_a W add up to zero over the vocabulary)
        KL(b || a) = sum p_a (W d - (W - d))
    Every term is >= 0 and keeps its relative accuracy at small shifts, which p (log p - log q) loses. Where some d is
    above FAR (highest_R is the largest), p_a may underflow while p_b does not, so the larger of the two leads instead. An
    error e in c changes a KL by e^2 / 2 only; one in the shift counts in full.
    """
    d = shift_RV - c_R.float()[:, None]
    if bool((highest_R - c_R > FAR).any()):
        ba, ab = _kl_far(d, pa_RV, pb_RV)
    else:
        w = torch.expm1(d)
        z = w - d
        y = d.mul_(w).sub_(z)
        ba, ab = y.mul_(pa_RV).sum(1).double(), z.mul_(pa_RV).sum(1).double()
    return group.sum(ba).clamp_(min=0), group.sum(ab).clamp_(min=0)


def _kl_far(d: Tensor, pa: Tensor, pb: Tensor) -> tuple[Tensor, Tensor]:
    """As kl_both for any d: with u = |d|, w = expm1(-u), hi = max(p_a, p_b): KL(hi || lo) has the terms hi (u + w), and
    KL(lo || hi) the terms -hi (u w + u + w)."""
    u = d.abs()
    w = torch.expm1(-u)
    hi = torch.maximum(pa, pb)
    down = hi * (u + w)
    up = -hi * (u * w + u + w)
    b_leads = d >= 0
    return torch.where(b_leads, down, up).sum(1).double(), torch.where(b_leads, up, down).sum(1).double()


def pair_stats(shift: Tensor, a: tuple[SlotStats, Tensor], b: tuple[SlotStats, Tensor], v: Vocabulary) -> PairStats:
    """KL divergences and logit shifts [R, V] of slot b against slot a; each slot is (its stats, its p [R, V])."""
    (sa, pa), (sb, pb) = a, b
    blocks = block_view(shift, v.n)
    maxima = blocks.amax(1)
    rest = shift[:, maxima.shape[1] * BLOCK :]
    highest = v.group.max(torch.cat([maxima, rest], dim=1).amax(1)).double()
    increased = top_k(shift, v, maxima)
    decreased = top_k(shift, v, blocks.amin(1), lowest=True)
    ba, ab = kl_both(shift, sb.logsumexp - sa.logsumexp, pa, pb, highest, v.group)
    return PairStats(ba, ab, increased, decreased)


def lens_tile(
    logits: Logits,
    pairs: Sequence[tuple[int, int]],
    next_R: Tensor,
    tracked_N: Tensor,
    vocabulary: Vocabulary,
    *,
    rows: int,
) -> tuple[list[SlotStats], dict[tuple[int, int], PairStats]]:
    """All statistics of one tile. pairs: ordered pairs of slots; next_R: id of the token that follows each row, or -1;
    tracked_N: ids. `rows` only keeps the working set in cache: every row is computed alone.
    """
    slots: list[list[SlotStats]] = [[] for _ in range(logits.n_slots)]
    found: dict[tuple[int, int], list[PairStats]] = {pair: [] for pair in pairs}
    for start in range(0, logits.n_rows, rows):
        some = slice(start, start + rows)
        part = [slot_stats(logits.slot(s, some), next_R[some], tracked_N, vocabulary) for s in range(logits.n_slots)]
        for s, (stats, _) in enumerate(part):
            slots[s].append(stats)
        for a, b in pairs:
            found[(a, b)].append(pair_stats(logits.shift(a, b, some), part[a], part[b], vocabulary))
    return [join(s) for s in slots], {pair: join(parts) for pair, parts in found.items()}


Stats = TypeVar("Stats", SlotStats, PairStats, TopK)


def join(parts: Sequence[Stats]) -> Stats:
    """The statistics of consecutive rows as one."""
    fields: dict[str, Any] = {}
    for name in parts[0].__dataclass_fields__:
        values = [getattr(p, name) for p in parts]
        fields[name] = join(values) if isinstance(values[0], TopK) else torch.cat(values)
    return type(parts[0])(**fields)
