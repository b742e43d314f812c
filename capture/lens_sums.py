"""One way through the logits of some rows: the block maxima of all top-k searches, and the sums that capture/divergence.py makes
entropies and divergences of. Few rows at a time, so that what is made of them stays in a processor's cache, in memory that is
kept; what is small is done for all of them together.

Shapes: S slots, R rows, V vocabulary (this rank's share of it), C compared pairs of slots, N = S + 2 C searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capture.divergence import FAR, SUM_BLOCK, Pairs, Sums
from capture.group import Group
from capture.topk import BLOCK, block_view


@dataclass
class Pass:
    """maxima_NRB: of blocks, for `local_top_k`: of the slots, of the shifts b - a of every compared pair (a, b), and of the
    negatives of these. largest_SR: the largest logit of each row, over all ranks."""

    maxima_NRB: Tensor
    largest_SR: Tensor
    sums: Sums


class Space:
    """Memory for the logits of a few rows at work, kept, with the views of it that are used: fresh memory costs as much as the
    arithmetic, and a view a microsecond.

    weights (e, g_1, ...) [S, R, V] and factors (1, y, x_1, ...) [S + 1, R, V] are what is multiplied: `left` and `right` in blocks
    of SUM_BLOCK entries, weights zero behind V, [R * blocks, S, SUM_BLOCK] and [R * blocks, SUM_BLOCK, S + 1]. spare [S, R, V]: for
    what does not stay.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()

    def take(self, n_slots: int, rows: int, size: int, like: Tensor) -> None:
        """Memory for so many slots and rows, of what is there already if it is as large."""
        if self.shape == (n_slots, rows, size):
            return
        self.shape = (n_slots, rows, size)
        self.n_blocks = max(2, -(-size // SUM_BLOCK))  # two: one matrix alone is multiplied otherwise
        all_of = like.new_zeros(3 * n_slots + 1, rows, self.n_blocks * SUM_BLOCK)
        weights, factors, spare = all_of.split([n_slots, n_slots + 1, n_slots])
        factors[0] = 1
        self.e, self.g = weights[0, :, :size], weights[1:, :, :size]
        self.y, self.x = factors[1, :, :size], factors[2:, :, :size]
        self.spare = spare[..., :size]
        self.left = weights.view(n_slots, -1, SUM_BLOCK).permute(1, 0, 2)
        self.right = factors.view(n_slots + 1, -1, SUM_BLOCK).permute(1, 2, 0)

    def products(self, n_weights: int) -> Tensor:
        """Sums over blocks of the first weights times every factor, [R, blocks, n_weights, S + 1]."""
        return torch.bmm(self.left[:, :n_weights], self.right).unflatten(0, (self.shape[1], self.n_blocks))


def compared(n_slots: int, pairs: Pairs) -> list[tuple[int, int]]:
    """The pairs whose shifts are looked at: each slot's from slot 0, which the sums are made of, and the others asked for."""
    return [(0, s) for s in range(1, n_slots)] + [(a, b) for a, b in pairs if a]


def one_pass(logits: Sequence[Tensor], shifts: Pairs, listed: int, group: Group, *, at_once: int, space: Space) -> Pass:
    """logits: S tensors [R, V]; shifts: as `compared` has them; listed: of V, the entries that may be in top-k lists."""
    n_slots, n_lead, (rows, size) = len(logits), len(logits) - 1, logits[0].shape
    n_others = len(shifts) - n_lead
    maxima_NRB = logits[0].new_empty(n_slots + 2 * len(shifts), rows, listed // BLOCK)
    in_blocks = [block_view(x[:, :listed]).split(at_once) for x in logits]
    products, offsets, rests = [], [], []
    for i, (x, maxima) in enumerate(
        zip(zip(*(x.split(at_once) for x in logits), strict=True), maxima_NRB.split(at_once, 1), strict=True)
    ):
        space.take(n_slots, x[0].shape[0], size, logits[0])
        of_slots, *of_shifts = maxima.split([n_slots, n_lead, n_others, n_lead, n_others])
        for blocks, out in zip(in_blocks, of_slots, strict=True):
            torch.amax(blocks[i], 1, out=out)
        for at in range(0, n_others, n_slots):
            few = slice(at, at + n_slots)
            _shifts(x, shifts[n_lead:][few], space.spare, listed, of_shifts[1][few], of_shifts[3][few])
        _shifts(x, shifts[:n_lead], space.x, listed, of_shifts[0], of_shifts[2])
        if listed % BLOCK or listed < size:
            rest = space.x[..., listed // BLOCK * BLOCK :]
            rests.append(torch.stack([rest.amax(2), -rest.amin(2)]))
        torch.sub(x[0], group.max(largest_of(of_slots[0], x[0]))[:, None], out=space.y)
        torch.exp(space.y, out=space.e)
        of_one, _, *of_shift = group.sum(space.products(1).sum((1, 2)).T)
        offsets.append(torch.stack(of_shift) / of_one)
        space.x.sub_(offsets[-1][:, :, None])
        _expm1(space.x, space.g, space.spare).mul_(space.e)
        products.append(space.products(n_slots).sum(1, dtype=torch.float64))
    maxima_NRB[n_slots + len(shifts) :].neg_()  # of minima
    largest = group.max(torch.stack([largest_of(m, x) for m, x in zip(maxima_NRB, logits, strict=False)]))
    sums = torch.cat(products).permute(1, 2, 0)
    offsets_SR = torch.cat(offsets, 1)
    far = ~largest.isfinite().all(0)
    if n_lead:
        both = maxima_NRB[n_slots:].unflatten(0, (2, -1))[:, :n_lead]
        reach = torch.cat([both, torch.cat(rests, 2)[..., None]], 3) if rests else both
        far |= _far(reach.amax(3), offsets_SR, group)
    taken_off = largest[0].double() + torch.cat([torch.zeros_like(largest[:1]), offsets_SR])
    return Pass(maxima_NRB, largest, Sums(group.sum(sums), taken_off, far))


def _shifts(x: Sequence[Tensor], pairs: Pairs, out: Tensor, listed: int, highest: Tensor, lowest: Tensor) -> None:
    """Logits of b minus those of a for every pair (a, b), and their block maxima and minima."""
    for one, (a, b) in zip(out, pairs, strict=False):
        torch.sub(x[b], x[a], out=one)
    if pairs:
        blocks = block_view(out[: len(pairs), :, :listed])
        torch.amax(blocks, 2, out=highest)
        torch.amin(blocks, 2, out=lowest)


def _expm1(x: Tensor, out: Tensor, spare: Tensor) -> Tensor:
    """exp(x) - 1 as tanh(x / 2) (exp(x) + 1), to 1.5e-7 of it: on a processor expm1 takes twice as long as all of these."""
    if x.device.type != "cpu":
        return torch.expm1(x, out=out)
    torch.mul(x, 0.5, out=out).tanh_()
    return out.addcmul_(out, torch.exp(x, out=spare[1:]))


def largest_of(maxima_RB: Tensor, x_RV: Tensor) -> Tensor:
    """The largest entry of each row [R], where the maxima of its first blocks are known."""
    rest = x_RV[:, maxima_RB.shape[1] * BLOCK :]
    return (torch.cat([maxima_RB, rest], dim=1) if rest.shape[1] else maxima_RB).amax(1)


def _far(reach_2SR: Tensor, offsets_SR: Tensor, group: Group) -> Tensor:
    """Rows [R] with a shift from slot 0 beyond FAR, behind its mean, or with none that is a number. reach: the largest shifts up
    and down."""
    most = torch.maximum(reach_2SR[0] - offsets_SR, reach_2SR[1] + offsets_SR).amax(0)
    rounded = offsets_SR.abs().amax(0)  # a shift of logits is rounded before its mean is taken off
    return ~group.max((most + rounded).nan_to_num(torch.inf)).le(FAR)
