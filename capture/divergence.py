"""Entropies and KL divergences of several distributions over one vocabulary, all from one pass over their logits.

Shapes: S slots, R rows, V vocabulary (this rank's share of it). Units: nats. Reference for the definitions: Cover and Thomas,
Elements of Information Theory, 2nd ed., chapter 2.

With y = logits of slot 0 - their maximum, e = exp(y), x_s = logits of slot s - those of slot 0 - c_s, where c_s is the mean of that
shift under slot 0, and g_s = e expm1(x_s), the weights of slot s are e + g_s:

    Z_s = sum e + sum g_s,        log(Z_s / Z_0) = log1p(sum g_s / sum e) = u_s
    H_s = log Z_s - sum (e + g_s)(y + x_s) / Z_s
    KL(s || t) = sum (e + g_s)(x_s - x_t) / Z_s - u_s + u_t

So the products of [e, g_1, ...] with [1, y, x_1, ...], summed in float32 within blocks and in float64 between them, give
all entropies and all divergences: taking off the mean leaves sums of the order of the divergences themselves. A divergence of two slots that are close to each other and far from slot 0 loses digits
that way, and a row with a shift beyond FAR may leave the range of float32: such rows go through `plain`, pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from capture.asked import Mask, asked, indices, places
from capture.group import Group

if TYPE_CHECKING:
    from capture.logits import Logits

SUM_BLOCK = 512  # products added up in float32
FAR = 16.0  # rows with larger shifts of logits between slots take the plain way
SUM_ERROR = 2e-7  # of a mean shift of 1, as the sums have it; found by trial against float64
ENTROPY_ERROR = 4e-6  # nats: where an entropy may be off by more, its row takes the plain way
KL_ERROR = 2e-4  # relative error of a KL from which on it is computed the plain way
KL_FLOOR = 2e-10  # nats: what a smaller KL may be off by
PLAIN_PIECES = 16  # rows that are worked on at once go the plain way in so many pieces, should all of them have to
PAIR_PIECES = 4  # likewise for one pair of slots, which takes less
PLAIN_FAR = 60.0  # nats: beyond this shift exp() of the plain form may leave the range of float32

Pairs = Sequence[tuple[int, int]]


@dataclass
class Divergences:
    """float64. entropy, logsumexp: [S, R]; ba, ab: KL(b || a) and KL(a || b) of each pair (a, b), [pairs, R]."""

    entropy: Tensor
    logsumexp: Tensor
    ba: Tensor
    ab: Tensor


@dataclass
class Sums:
    """sums [S, S + 1, R]: of (e, g_1, ...) times (1, y, x_1, ...), float64, over the whole vocabulary. offsets [S, R] float64: what
    was taken off the logits of each slot. far [R]: rows whose sums mean nothing."""

    sums: Tensor
    offsets: Tensor
    far: Tensor


def divergences(
    logits: Logits, maxima_SR: Tensor, pairs: Pairs, group: Group, found: Sums, at_once: int
) -> Divergences:
    """Everything about S slots of logits [R, V], from their sums. maxima_SR: of each row, over all ranks. at_once: rows whose sums
    were made together; of those that have to go the plain way a fraction goes together, as each takes more."""
    of, *doubts = doubted(found, pairs)
    far, close = asked(*doubts)
    again(of, far, close, logits, maxima_SR, pairs, group, at_once)
    return of


def doubted(found: Sums, pairs: Pairs) -> tuple[Divergences, Tensor, Tensor]:
    """What the sums give; the rows [R] of which all of that may be wrong; the rows [pairs, R] of which one divergence may be."""
    of = _from_sums(found, pairs)
    far = found.far | _lossy(found.sums)
    return of, far, _unsure(found.sums, of, pairs) & ~far


def again(
    of: Divergences, far_R: Mask, close_PR: Mask, logits: Logits, maxima_SR: Tensor, pairs: Pairs, group: Group, at_once: int
) -> None:  # fmt: skip
    """The rows that `doubted` names, the plain way, into `of`. Others as for `divergences`."""
    device = maxima_SR.device
    for rows in _pieces(far_R, max(1, at_once // PLAIN_PIECES), device):
        take = partial(torch.index_select, dim=0, index=rows)
        slots = [logits.slot(s, take) for s in range(logits.n_slots)]
        shifts = (logits.shift(a, b, take) for a, b in pairs)  # one at a time
        better = plain(slots, maxima_SR[:, rows], pairs, group, shifts)
        for mine, theirs in zip(vars(of).values(), vars(better).values(), strict=True):
            mine[:, rows] = theirs
    for i in np.flatnonzero(close_PR.any(1)).tolist():
        for rows in _pieces(close_PR[i], max(1, at_once // PAIR_PIECES), device):
            of.ba[i, rows], of.ab[i, rows] = _of_pair(logits, pairs[i], rows, of.logsumexp[:, rows], group)


def _of_pair(
    logits: Logits, pair: tuple[int, int], rows: Tensor, logsumexp_SR: Tensor, group: Group
) -> tuple[Tensor, Tensor]:
    """Both divergences of one pair of slots (a, b) at some rows, whose log-sum-exp are known."""
    a, b = pair

    def probabilities(s: int, some: Tensor) -> Tensor:
        x = logits.slot(s, partial(torch.index_select, dim=0, index=rows[some]))
        return x.sub_(logsumexp_SR[s, some].float()[:, None]).exp_()

    every = torch.arange(len(rows), device=rows.device)
    shift = logits.shift(a, b, partial(torch.index_select, dim=0, index=rows))
    c = logsumexp_SR[b] - logsumexp_SR[a]
    return kl_both(shift, c, probabilities(a, every), partial(probabilities, b), group)


def _pieces(chosen_R: Mask, size: int, device: torch.device) -> Sequence[Tensor]:
    """Indices of the chosen rows, so many at a time: what `plain` takes for all at once may be more than all else."""
    rows = places(chosen_R, device)
    return rows.split(size) if len(rows) else ()


def _from_sums(found: Sums, pairs: Pairs) -> Divergences:
    sums = found.sums
    weights = sums.clone()
    weights[1:] += sums[0]  # of e + g_s
    z = weights[:, 0]
    shift = weights[:, 1:] / z[:, None]  # [s, t]: mean of (y, x_1, ...) under slot s
    u = torch.log1p(sums[:, 0] / sums[0, 0])
    u[0] = 0
    log_z = z[0].log() + u
    of_y = shift[:, 0].clone()
    shift[:, 0] = 0  # from slot 0 to itself
    own = shift.diagonal().T  # [s]: mean of x_s under slot s
    kl = (own[:, None] - shift - u[:, None] + u).clamp(min=0)  # [s, t]: of s || t
    a, b = _sides(pairs, kl.device)
    return Divergences(log_z - (of_y + own), log_z + found.offsets, kl[b, a], kl[a, b])


def _sides(pairs: Pairs, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the second slot of each pair, as indices."""
    return indices(tuple(a for a, _ in pairs), device), indices(tuple(b for _, b in pairs), device)


def _lossy(sums: Tensor) -> Tensor:
    """Rows where some slot's sums are small differences of large ones, [R]: where slot 0 has much weight that it has not."""
    of = [sums[0, 1].abs()] + [
        (sums[0, 1].abs() + sums[s, 1].abs()) + (sums[0, 1 + s].abs() + sums[s, 1 + s].abs())
        for s in range(1, len(sums))
    ]
    own = torch.stack(of)
    z = sums[:, 0].clone()
    z[1:] += sums[0, 0]
    return (SUM_ERROR * own > ENTROPY_ERROR * z).any(0)


def _unsure(sums: Tensor, found: Divergences, pairs: Pairs) -> Tensor:
    """Rows where the sums' own rounding may be more than KL_ERROR of a pair's divergence and more than KL_FLOOR, [pairs, R].

    A sum of products with shifts x carries an error in proportion to x: to the mean of x under slot 0, and its spread.
    """
    z = sums[0, 0]
    mean = (sums[0, 1:] / z).abs()
    spread = (sums[:, 1:].diagonal().T.abs() / z).sqrt()
    scale = mean + spread
    scale[0] = 0
    a, b = _sides(pairs, scale.device)
    of_both = scale[a] + scale[b]
    return SUM_ERROR * of_both > KL_FLOOR + KL_ERROR * torch.minimum(found.ba, found.ab)


def plain(
    logits: Sequence[Tensor], maxima_SR: Tensor, pairs: Pairs, group: Group, shifts: Iterable[Tensor]
) -> Divergences:
    """The same, slot by slot and pair by pair, at any distance. shifts: logits of b minus a [R, V] for each pair, which may be known
    better than as the difference of two logits."""
    slots = [_slot(x, m, group) for x, m in zip(logits, maxima_SR, strict=True)]
    both = []
    for (a, b), shift in zip(pairs, shifts, strict=True):
        both.append(kl_both(shift, slots[b][1] - slots[a][1], slots[a][2], slots[b][2].__getitem__, group))
    none = maxima_SR.new_empty(0, maxima_SR.shape[1], dtype=torch.float64)
    return Divergences(
        torch.stack([s[0] for s in slots]),
        torch.stack([s[1] for s in slots]),
        torch.stack([k[0] for k in both]) if both else none,
        torch.stack([k[1] for k in both]) if both else none.clone(),
    )


def _slot(x_RV: Tensor, largest_R: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy H = log Z - sum(e t) / Z with t = x - max, e = exp(t), Z = sum(e); log-sum-exp; probabilities e / Z [R, V].

    Sums are float32 within a row (pairwise summation), float64 from there on.
    """
    t = x_RV - largest_R[:, None]
    p = t.exp()
    z = group.sum(p.sum(1).double())
    mean_t = group.sum(t.mul_(p).sum(1).double()) / z
    p.mul_((1 / z).float()[:, None])
    return z.log() - mean_t, z.log() + largest_R.double(), p


def mean_shift(a_RV: Tensor, b_RV: Tensor, lse_a_R: Tensor, lse_b_R: Tensor, group: Group) -> Tensor:
    """sum over V of max(p_a, p_b) |log p_b - log p_a|, [R] float64, from logits, which are spent, and their log-sum-exp."""
    log_a, log_b = a_RV.sub_(lse_a_R.float()[:, None]), b_RV.sub_(lse_b_R.float()[:, None])
    larger = torch.maximum(log_a, log_b).exp_()
    return group.sum(larger.mul_(log_b.sub_(log_a).abs_()).sum(1).double())


def kl_both(
    shift_RV: Tensor, c_R: Tensor, pa_RV: Tensor, pb_of: Callable[[Tensor], Tensor], group: Group
) -> tuple[Tensor, Tensor]:
    """KL(b || a) and KL(a || b) [R] float64 from the logit shift x_b - x_a; exact zeros for equal slots, never negative. pb_of: p_b
    of some rows, which few need.

    With d = log p_b - log p_a = shift - c, c = logZ_b - logZ_a and W = expm1(d) = p_b / p_a - 1:
        KL(a || b) = sum p_a (W - d)            (the terms p_b - p_a = p_a W add up to zero over the vocabulary)
        KL(b || a) = sum p_a (W d - (W - d))
    Every term is >= 0 and keeps its relative accuracy at small shifts, which p (log p - log q) loses. Where some d is above
    PLAIN_FAR, p_a may underflow while p_b does not, so the larger of the two leads instead.

    c is off by an e where Z_b is of logits that were rounded and the shift was not. That adds e^2 / 2 to both (up to 1e-10 where
    logits reach hundreds), and leaves sum p_a W = expm1(e), so that it can be taken off.
    """
    d = shift_RV - c_R.float()[:, None]
    far = (group.max(d.amax(1)) > PLAIN_FAR).nonzero().flatten()  # each row for itself, whatever its neighbours are
    led = _kl_far(d[far], pa_RV[far], pb_of(far)) if len(far) else None
    w = torch.expm1(d)
    z = w - d
    y = d.mul_(w).sub_(z)
    ba, ab, off = (x.mul_(pa_RV).sum(1).double() for x in (y, z, w))
    if led is not None:
        ba[far], ab[far], off[far] = *led, 0.0
    extra = group.sum(off).square_() / 2
    return group.sum(ba).sub_(extra).clamp_(min=0), group.sum(ab).sub_(extra).clamp_(min=0)


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
