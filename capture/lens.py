"""The logit lens of a tile of rows: entropies, KL divergences, logit shifts and top-k lists, from logits in float32.

Shapes: S lens slots (distinct pairs of state and unembedding), R rows (tokens), V vocabulary, K top-k.
In a tensor-parallel group every rank has the logits of its own shard of the vocabulary: V is then the shard, and maxima, sums
and top-k candidates are reduced over the ranks; no rank ever holds all logits. Units: nats; logits raw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from capture.divergence import Space, divergences, plain
from capture.logits import Logits
from capture.topk import BLOCK, Search, TopK, Vocabulary, search, top_k


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


def lens_tile(
    logits: Logits,
    pairs: Sequence[tuple[int, int]],
    next_R: Tensor,
    tracked_N: Tensor,
    vocabulary: Vocabulary,
    *,
    rows: int,
    exact: bool = False,
) -> tuple[list[SlotStats], dict[tuple[int, int], PairStats]]:
    """All statistics of one tile. pairs: ordered pairs of slots; next_R: id of the token that follows each row, or -1;
    tracked_N: ids. `rows` only keeps the working set in cache: every row is computed alone. exact: divergences pair by pair
    from the logits' own shifts, for rows that hardly differ.
    """
    parts, space = [], Space()
    for start in range(0, logits.n_rows, rows):
        some = slice(start, start + rows)
        parts.append(_rows(logits, some, pairs, next_R[some], tracked_N, vocabulary, exact, space))
    slots = [join([p[0][s] for p in parts]) for s in range(logits.n_slots)]
    return slots, {pair: join([p[1][pair] for p in parts]) for pair in pairs}


def _rows(
    logits: Logits, some: slice, pairs: Sequence[tuple[int, int]], next_R: Tensor, tracked_N: Tensor, v: Vocabulary,
    exact: bool, space: Space,
) -> tuple[list[SlotStats], dict[tuple[int, int], PairStats]]:  # fmt: skip
    x = [logits.slot(s, some) for s in range(logits.n_slots)]
    shifts = [logits.shift(a, b, some) for a, b in pairs]
    searches = [search(one, v.n) for one in x]
    for shift in shifts:
        searches += [search(shift, v.n), search(shift, v.n, lowest=True)]
    found = top_k(searches, v)
    maxima = v.group.max(torch.stack([_largest(one, s) for one, s in zip(x, searches, strict=False)]))
    d = plain(x, maxima, pairs, v.group, shifts) if exact else divergences(x, maxima, pairs, v.group, space)
    slots = []
    for s, one in enumerate(x):
        next_logit = v.pick(one, next_R.clamp(min=0)[:, None])[:, 0].double()
        next_logprob = torch.where(next_R >= 0, next_logit - d.logsumexp[s], torch.nan)
        slots.append(SlotStats(d.entropy[s], d.logsumexp[s], next_logprob, v.pick(one, tracked_N), found[s]))
    lists = found[len(x) :]
    return slots, {pair: PairStats(d.ba[i], d.ab[i], lists[2 * i], lists[2 * i + 1]) for i, pair in enumerate(pairs)}


def _largest(x_RV: Tensor, found: Search) -> Tensor:
    """The largest entry of each row [R], with what the search knows already."""
    rest = x_RV[:, found.maxima_RC.shape[1] * BLOCK :]
    return torch.cat([found.maxima_RC, rest], dim=1).amax(1)


Stats = TypeVar("Stats", SlotStats, PairStats, TopK)


def join(parts: Sequence[Stats]) -> Stats:
    """The statistics of consecutive rows as one."""
    fields: dict[str, Any] = {}
    for name in parts[0].__dataclass_fields__:
        values = [getattr(p, name) for p in parts]
        fields[name] = join(values) if isinstance(values[0], TopK) else torch.cat(values)
    return type(parts[0])(**fields)
