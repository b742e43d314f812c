"""The logit lens of a tile of rows: entropies, KL divergences, logit shifts and top-k lists, from logits in float32.

Shapes: S lens slots (distinct pairs of state and unembedding), R rows (tokens), V vocabulary, K top-k.
In a tensor-parallel group every rank has the logits of its own shard of the vocabulary: V is then the shard, and maxima, sums
and top-k candidates are reduced over the ranks; no rank ever holds all logits. Units: nats; logits raw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from capture.asked import Mask, asked, indices, places
from capture.divergence import Divergences, again, doubted, mean_shift, plain
from capture.lens_kernel import Kernel
from capture.lens_sums import Fused, Space, compared, largest_of, one_pass
from capture.logits import Logits
from capture.threads import alone, in_threads
from capture.topk import BLOCK, Search, TopK, Vocabulary, best_of, block_maxima, merged, settled

SMALL_KL = 1e-4  # nats: below this, differences of float32 logits may cost a KL its third digit
NEGLIGIBLE_KL = 1e-10  # nats: where both passes are as good as sure of one token; noise of 1e-6 in a logit adds 1e-12
LOSSY = 100.0  # `apart` over a KL, where noise of 1e-6 in the logits may cost it its fourth digit


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
    """Of one ordered pair of slots (a, b): KL(b || a), KL(a || b) [R] float64; shifts x_b - x_a up and down. lossy [R]: where
    the rounding of logits costs a KL digits (`lossy`)."""

    kl_ba: Tensor
    kl_ab: Tensor
    lossy: Tensor
    increased: TopK
    decreased: TopK


Statistics = tuple[list[SlotStats], dict[tuple[int, int], PairStats]]


def lens_tile(
    logits: Logits,
    pairs: Sequence[tuple[int, int]],
    next_R: Tensor,
    tracked_N: Tensor,
    vocabulary: Vocabulary,
    *,
    rows: int,
    at_once: int | None = None,
    exact: bool = False,
    kernel: Kernel | None = None,
    fused: Fused | None = None,
    spaces: Sequence[Space] = (),
) -> Statistics:
    """All statistics of one tile. pairs: ordered pairs of slots; next_R: id of the token that follows each row, or -1;
    tracked_N: ids. Every row is computed alone.

    kernel: the compiled way, where it takes these logits and the whole vocabulary is here. Else `rows` at a time, by way of `fused`
    where that is given and takes them, and of those
    `at_once` (all of them) where all of the vocabulary is gone through: so that it stays in cache. spaces: memory that is kept, one
    for each thread of a processor that rows go through side by side, where the whole vocabulary is here. exact: divergences pair by
    pair from the logits' own shifts, for rows that hardly differ.
    """
    if kernel is not None and vocabulary.group.size == 1 and kernel.takes(logits, min(vocabulary.k, vocabulary.n)):
        return _by_kernel(kernel, logits, pairs, next_R, tracked_N, vocabulary)
    spaces = spaces or [Space()]
    alone_here = vocabulary.group.size == 1 and logits.tensors[0].device.type == "cpu"
    n = min(len(spaces), logits.n_rows) if alone_here else 1
    parts: list[list[Statistics]] = [[] for _ in range(n)]

    def some_rows(thread: int, first: int, last: int) -> None:
        for start in range(first, last, rows):
            some = slice(start, min(start + rows, last))
            mine = logits.some(some), pairs, next_R[some], tracked_N, vocabulary
            parts[thread].append(_rows(*mine, exact, at_once or rows, spaces[thread], fused))

    if not alone_here or len(spaces) == 1:
        some_rows(0, 0, logits.n_rows)
    else:
        with alone():  # one row too: torch would sum it up in parts, in as many threads as there are
            in_threads(some_rows, logits.n_rows, n)
    return joined([p for of_thread in parts for p in of_thread])


def joined(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of consecutive rows as one."""
    slots = [join([p[0][s] for p in parts]) for s in range(len(parts[0][0]))]
    return slots, {pair: join([p[1][pair] for p in parts]) for pair in parts[0][1]}


def _by_kernel(
    kernel: Kernel, logits: Logits, pairs: Sequence[tuple[int, int]], next_R: Tensor, tracked_N: Tensor, v: Vocabulary,
) -> Statistics:  # fmt: skip
    found = kernel.tile(logits, pairs, v.n, v.k)
    d = found.divergences
    lossy = _lossy(found.apart, d.ba, d.ab) & torch.from_numpy(_unrelated(logits, pairs))
    statistics = _statistics(
        logits, d, lossy, found.slots, pairs, found.increased, found.decreased, next_R, tracked_N, v
    )
    for row in (~found.finite).nonzero().flatten().tolist():  # rare: an overflow is told by what is not finite
        some = slice(row, row + 1)
        slots, compared = _rows(logits.some(some), pairs, next_R[some], tracked_N, v, True, 1, Space())
        for mine, better in zip(statistics[0], slots, strict=True):
            put(mine, some, better)
        for pair in pairs:
            put(statistics[1][pair], some, compared[pair])
    return statistics


def _rows(
    logits: Logits, pairs: Sequence[tuple[int, int]], next_R: Tensor, tracked_N: Tensor, v: Vocabulary, exact: bool,
    at_once: int, space: Space, fused: Fused | None = None,
) -> Statistics:  # fmt: skip
    n_slots, n_pairs, unrelated = logits.n_slots, len(pairs), _unrelated(logits, pairs)
    doubts: list[Any] = []  # masks of rows that `again` is for
    if exact:
        shifts = list(pairs)
        maxima_NRB, d = _exactly(logits, pairs, v, max(1, at_once // 2))  # shifts take as much again
    else:
        shifts = compared(n_slots, pairs)
        if fused is not None and fused.takes(logits):
            found = fused.one_pass(logits, shifts, v.n, v.group)
        else:
            found = one_pass(logits, shifts, v.n, v.group, at_once=at_once, space=space)
        maxima_NRB = found.maxima_NRB
        d, *doubts = doubted(found.sums, pairs)
    asked_for = [shifts.index(pair) for pair in pairs]
    which = [*range(n_slots), *(n_slots + i for i in asked_for), *(n_slots + len(shifts) + i for i in asked_for)]
    searches = [Search(partial(logits.slot, s)) for s in range(n_slots)]
    searches += [Search(partial(logits.shift, a, b), lowest) for lowest in (False, True) for a, b in pairs]
    if len(which) < len(maxima_NRB):
        maxima_NRB = maxima_NRB[indices(tuple(which), maxima_NRB.device)]
    best = best_of(searches, maxima_NRB, v.n, v.k)
    small, ties, *to_redo = asked(_small(d.ba, d.ab), best.ties, *doubts)
    if any(mask.any() for mask in to_redo):
        far, close = to_redo
        again(d, far, close, logits, found.largest_SR, pairs, v.group, at_once)
        (small,) = asked(_small(d.ba, d.ab))
    lossy = _rounded(logits, d, pairs, v, at_once, small & unrelated)
    lists = merged(settled(best, searches, ties), searches, v)
    top, up, down = lists[:n_slots], lists[n_slots : n_slots + n_pairs], lists[n_slots + n_pairs :]
    return _statistics(logits, d, lossy, top, pairs, up, down, next_R, tracked_N, v)


def _exactly(
    logits: Logits, pairs: Sequence[tuple[int, int]], v: Vocabulary, at_once: int
) -> tuple[Tensor, Divergences]:
    """Block maxima as `Pass` has them, and divergences pair by pair, from the logits' own shifts."""
    maxima, parts = [], []
    for start in range(0, logits.n_rows, at_once):
        some = logits.some(slice(start, start + at_once))
        x, shifts = [some.slot(s) for s in range(some.n_slots)], [some.shift(a, b) for a, b in pairs]
        of_slots, behind = [block_maxima(one, v.n) for one in x], v.n // BLOCK * BLOCK
        largest = v.group.max(torch.stack([largest_of(m, one[:, behind:]) for m, one in zip(of_slots, x, strict=True)]))
        of_shifts = [block_maxima(one, v.n, lowest=lowest) for lowest in (False, True) for one in shifts]
        maxima.append(torch.stack(of_slots + of_shifts))
        parts.append(vars(plain(x, largest, pairs, v.group, shifts)))
    return torch.cat(maxima, 1), Divergences(**{name: torch.cat([p[name] for p in parts], 1) for name in parts[0]})


def _rounded(
    logits: Logits, d: Divergences, pairs: Sequence[tuple[int, int]], v: Vocabulary, at_once: int, small_PR: Mask
) -> Tensor:
    """`lossy` of every pair, [pairs, R], from logits [R, V]: the small ones only are looked at once more."""
    device = d.ba.device
    lossy = torch.zeros(small_PR.shape, dtype=torch.bool, device=device)
    for i in np.flatnonzero(small_PR.any(1)).tolist():
        a, b = pairs[i]
        for some in places(small_PR[i], device).split(at_once):
            take = partial(torch.index_select, dim=0, index=some)
            two = logits.slot(a, take), logits.slot(b, take)
            apart = mean_shift(*two, d.logsumexp[a, some], d.logsumexp[b, some], v.group)
            lossy[i, some] = _lossy(apart, d.ba[i, some], d.ab[i, some])
    return lossy


def _unrelated(logits: Logits, pairs: Sequence[tuple[int, int]]) -> Mask:
    """The pairs, [pairs, 1], whose shifts are as rounded as the logits."""
    return np.array([not logits.related(a, b) for a, b in pairs], dtype=bool)[:, None]


def _statistics(
    logits: Logits, d: Divergences, lossy: Tensor, top: Sequence[TopK], pairs: Sequence[tuple[int, int]], increased: Sequence[TopK],
    decreased: Sequence[TopK], next_R: Tensor, tracked_N: Tensor, v: Vocabulary,
) -> Statistics:  # fmt: skip
    slots = []
    for s in range(logits.n_slots):
        next_logit = logits.slot(s, lambda x: v.pick(x, next_R.clamp(min=0)[:, None])[:, 0]).double()
        next_logprob = torch.where(next_R >= 0, next_logit - d.logsumexp[s], torch.nan)
        tracked = logits.slot(s, lambda x: v.pick(x, tracked_N))
        slots.append(SlotStats(d.entropy[s], d.logsumexp[s], next_logprob, tracked, top[s]))
    return slots, {
        pair: PairStats(d.ba[i], d.ab[i], lossy[i], increased[i], decreased[i]) for i, pair in enumerate(pairs)
    }


def _small(*kls: Tensor) -> Tensor:
    return torch.stack([(kl < SMALL_KL) & (kl > NEGLIGIBLE_KL) for kl in kls]).any(0)


def _lossy(apart: Tensor, ba: Tensor, ab: Tensor) -> Tensor:
    """Where the rounding of logits costs a KL digits: noise e in each changes KL(b || a) by e times the mean of |d - KL| at most,
    d = log p_b - log p_a. Where both passes are sure of one token and d is large elsewhere, a KL may be small and exact."""
    return torch.stack([_small(kl) & (apart > LOSSY * kl) for kl in (ba, ab)]).any(0)


Stats = TypeVar("Stats", SlotStats, PairStats, TopK)


def join(parts: Sequence[Stats], order: Tensor | None = None) -> Stats:
    """The statistics of consecutive rows as one; order: of all rows, which comes first, second, ..."""
    fields: dict[str, Any] = {}
    for name in parts[0].__dataclass_fields__:
        values = [getattr(p, name) for p in parts]
        if isinstance(values[0], TopK):
            fields[name] = join(values, order)
        else:
            whole = values[0] if len(values) == 1 else torch.cat(values)
            fields[name] = whole if order is None else whole[order]
    return type(parts[0])(**fields)


def tensors_of(found: Statistics) -> list[Tensor]:
    """All that statistics consist of, in an order that `statistics_of` knows."""
    every: list[SlotStats | PairStats] = [*found[0], *found[1].values()]
    return [x for stats in every for x in _tensors(stats)]


def _tensors(stats: SlotStats | PairStats | TopK) -> Iterator[Tensor]:
    for value in vars(stats).values():
        if isinstance(value, TopK):
            yield from _tensors(value)
        else:
            yield value


def statistics_of(like: Statistics, tensors: Sequence[Tensor]) -> Statistics:
    """Statistics of the given tensors, in the place of those of others."""
    rest = iter(tensors)
    slots = [_rebuilt(stats, rest) for stats in like[0]]
    return slots, {pair: _rebuilt(stats, rest) for pair, stats in like[1].items()}


def _rebuilt(like: Stats, rest: Iterator[Tensor]) -> Stats:
    fields: dict[str, Any] = {
        n: _rebuilt(v, rest) if isinstance(v, TopK) else next(rest) for n, v in vars(like).items()
    }
    return type(like)(**fields)


def put(mine: Stats, where: Tensor | slice, better: Stats) -> None:
    """Take the given rows from another computation of them."""
    for name in mine.__dataclass_fields__:
        ours, theirs = getattr(mine, name), getattr(better, name)
        if isinstance(ours, TopK):
            put(ours, where, theirs)
        else:
            ours[where] = theirs
