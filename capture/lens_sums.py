"""One way through the logits of some rows: the block maxima of all top-k searches, and the sums that capture/divergence.py makes
entropies and divergences of. Few rows at a time, so that what is made of them stays in a processor's cache, in memory that is
kept; what is small is done for all of them together.

Shapes: S slots, R rows, V vocabulary (this rank's share of it), C compared pairs of slots, N = S + 2 C searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from math import prod
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from capture.divergence import FAR, SUM_BLOCK, Pairs, Sums
from capture.group import Group
from capture.topk import BLOCK, block_view

if TYPE_CHECKING:
    from capture.logits import Logits


@dataclass
class Pass:
    """maxima_NRB: of blocks, for `best_of`: of the slots, of the shifts b - a of every compared pair (a, b), and of the
    negatives of these. largest_SR: the largest logit of each row, over all ranks."""

    maxima_NRB: Tensor
    largest_SR: Tensor
    sums: Sums


FUSED_SLOTS = 4  # most slots that these kernels take
FUSED_TILE = 2048  # entries of a vocabulary that one program of the kernels in capture/lens_triton.py has


class Fused(Protocol):
    """What is found out in one way through logits, on a device: capture/lens_triton.py."""

    def takes(self, logits: Logits) -> bool: ...

    def one_pass(self, logits: Logits, shifts: Pairs, listed: int, group: Group) -> Pass: ...


VIEWS = ("e", "g", "y", "x", "spare", "led", "in_blocks", "left", "first", "right")


def fused_bytes(n_slots: int, size: int) -> int:
    """What the kernels take for a row beside what they find: 4 S numbers of every tile, and S (S + 1) sums in float64."""
    return (-(-size // FUSED_TILE) + 1) * (16 * n_slots + 8 * n_slots * (n_slots + 1))


class Space:
    """Memory for the logits of a few rows at work, kept, with the views of it that are used: fresh memory costs as much as the
    arithmetic, and a view a microsecond.

    weights (e, g_1, ...) [S, R, V] and factors (1, y, x_1, ...) [S + 1, R, V] are what is multiplied: `left` and `right` in blocks
    of SUM_BLOCK entries, weights zero behind V, [R * blocks, S, SUM_BLOCK] and [R * blocks, SUM_BLOCK, S + 1]. led [led slots, R, V]:
    logits that are sums. spare [R, V]: for what does not stay.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.flat: dict[str, Tensor] = {}

    def take(self, n_slots: int, n_led: int, rows: int, size: int, listed: int, like: Tensor) -> None:
        """Memory for so many slots and rows, of what is there already if it is as large."""
        if self.shape == (n_slots, n_led, rows, size, listed):
            return
        self.shape = ()
        for view in VIEWS:  # else what they are of stays beside what is asked for
            self.__dict__.pop(view, None)
        self.n_blocks = _blocks(size)
        all_of = self._memory("rows", (2 * n_slots + 2 + n_led, rows, self.n_blocks * SUM_BLOCK), like).zero_()
        weights, factors, spare, led = all_of.split([n_slots, n_slots + 1, 1, n_led])
        factors[0] = 1
        self.e, *self.g = weights[:, :, :size].unbind()
        _, self.y, *self.x = factors[:, :, :size].unbind()
        self.spare = spare[0, :, :size]
        self.led = led[:, :, :size].unbind()
        self.in_blocks = {out: block_view(out[:, :listed]) for out in (self.spare, *self.x, *self.led)}
        self.left = weights.view(n_slots, -1, SUM_BLOCK).permute(1, 0, 2)
        self.first = self.left[:, :1]
        self.right = factors.view(n_slots + 1, -1, SUM_BLOCK).permute(1, 2, 0)
        self.each = (rows, self.n_blocks, -1, n_slots + 1)
        self.shape = (n_slots, n_led, rows, size, listed)

    def maxima(self, n_searches: int, rows: int, listed: int, like: Tensor) -> Tensor:
        """Memory for block maxima [N, R, B]."""
        return self._memory("maxima", (n_searches, rows, listed // BLOCK), like)

    def _memory(self, key: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        size = prod(shape)
        if key not in self.flat or self.flat[key].numel() < size:
            self.flat.pop(key, None)
            self.flat[key] = like.new_empty(size)
        return self.flat[key][:size].view(shape)

    def products(self, left: Tensor) -> Tensor:
        """Sums over blocks of weights times every factor, [R, blocks, weights, S + 1]. left: as `self.left`, or `self.first` of it."""
        return torch.bmm(left, self.right).view(self.each)


def _blocks(size: int) -> int:
    return max(2, -(-size // SUM_BLOCK))  # two: one matrix alone is multiplied otherwise


def space_bytes(n_slots: int, n_led: int, n_searches: int, size: int, listed: int, *, rows: int, at_once: int) -> int:
    """What a Space comes to hold for logits of so many entries."""
    return 4 * ((2 * n_slots + 2 + n_led) * at_once * _blocks(size) * SUM_BLOCK + n_searches * rows * (listed // BLOCK))


def compared(n_slots: int, pairs: Pairs) -> list[tuple[int, int]]:
    """The pairs whose shifts are looked at: each slot's from slot 0, which the sums are made of, and the others asked for."""
    return [(0, s) for s in range(1, n_slots)] + [(a, b) for a, b in pairs if a]


def one_pass(logits: Logits, shifts: Pairs, listed: int, group: Group, *, at_once: int, space: Space) -> Pass:
    """logits: of S slots [R, V]; shifts: as `compared` has them; listed: of V, the entries that may be in top-k lists."""
    n_slots, n_lead, (like, *_) = logits.n_slots, logits.n_slots - 1, logits.tensors
    (rows, size), whole = like.shape, listed // BLOCK * BLOCK
    n_others = len(shifts) - n_lead
    led = [s for s, terms in enumerate(logits.slots) if len(terms) > 1]
    terms = [logits.shift_terms(a, b) for a, b in shifts]
    maxima_NRB = space.maxima(n_slots + 2 * len(shifts), rows, listed, like)
    steps = list(zip(*(x.split(at_once) for x in logits.tensors), strict=True))
    in_blocks = list(zip(*(block_view(x[:, :listed]).split(at_once) for x in logits.tensors), strict=True))
    products, offsets, rests, tops = [], [], [], []
    for of, blocks_of, maxima in zip(steps, in_blocks, maxima_NRB.split(at_once, 1), strict=True):
        space.take(n_slots, len(led), of[0].shape[0], size, listed, like)
        for s, out in zip(led, space.led, strict=True):
            _added(of, logits.slots[s], out)
        x = [space.led[led.index(s)] if s in led else of[t[0] - 1] for s, t in enumerate(logits.slots)]
        of_slots, of_shifts = (found := maxima.unbind())[:n_slots], found[n_slots:]
        for s, (one, out) in enumerate(zip(x, of_slots, strict=True)):
            torch.amax(space.in_blocks[one] if s in led else blocks_of[logits.slots[s][0] - 1], 1, out=out)
        outs = [*space.x, *repeat(space.spare, n_others)]
        for i in (*range(n_lead, len(shifts)), *range(n_lead)):  # the leading ones last: they are needed below
            a, b = shifts[i]
            if terms[i]:
                _added(of, terms[i], outs[i])
            else:
                torch.sub(x[b], x[a], out=outs[i])
            torch.amax(space.in_blocks[outs[i]], 1, out=of_shifts[i])
            torch.amin(space.in_blocks[outs[i]], 1, out=of_shifts[len(shifts) + i])
        if n_lead and (listed % BLOCK or listed < size):
            rest = torch.stack([x[:, whole:] for x in space.x])
            rests.append(torch.stack([rest.amax(2), -rest.amin(2)]))
        most = [largest_of(m, one[:, whole:]) for m, one in zip(of_slots, x, strict=True)]
        tops.append(group.max(torch.stack(most)))
        torch.sub(x[0], tops[-1][0][:, None], out=space.y)
        torch.exp(space.y, out=space.e)
        mean = group.sum(space.products(space.first).sum((1, 2)).T.contiguous())
        offsets.append(mean[2:] / mean[0])
        for shift, offset, out in zip(space.x, offsets[-1][:, :, None].unbind(), space.g, strict=True):
            shift.sub_(offset)
            _expm1(shift, out, space.spare).mul_(space.e)
        products.append(space.products(space.left).sum(1, dtype=torch.float64))
    maxima_NRB[n_slots + len(shifts) :].neg_()  # of minima
    largest = torch.cat(tops, 1)
    sums = torch.cat(products).permute(1, 2, 0).contiguous()  # as reductions over GPUs want it
    offsets_SR = torch.cat(offsets, 1)
    far = ~largest.isfinite().all(0)
    if n_lead:
        both = maxima_NRB[n_slots:].unflatten(0, (2, -1))[:, :n_lead]
        reach = torch.cat([both, torch.cat(rests, 2)[..., None]], 3) if rests else both
        far |= far_rows(reach.amax(3), offsets_SR, group)
    taken_off = largest[0].double() + torch.cat([torch.zeros_like(largest[:1]), offsets_SR])
    return Pass(maxima_NRB, largest, Sums(group.sum(sums), taken_off, far))


def _added(of: Sequence[Tensor], terms: Sequence[int], out: Tensor) -> None:
    """A sum as Logits has it, in the same order."""
    first, *rest = terms
    if first < 0:
        torch.neg(of[-first - 1], out=out)
    elif rest:
        second, *rest = rest
        torch.add(of[first - 1], of[abs(second) - 1], alpha=1 if second > 0 else -1, out=out)
    else:
        out.copy_(of[first - 1])
    for term in rest:
        out.add_(of[abs(term) - 1], alpha=1 if term > 0 else -1)


def _expm1(x: Tensor, out: Tensor, spare: Tensor) -> Tensor:
    """exp(x) - 1 as tanh(x / 2) (exp(x) + 1), to 1.5e-7 of it: on a processor expm1 takes twice as long as all of these."""
    if x.device.type != "cpu":
        return torch.expm1(x, out=out)
    torch.mul(x, 0.5, out=out).tanh_()
    return out.addcmul_(out, torch.exp(x, out=spare))


def largest_of(maxima_RB: Tensor, rest_RN: Tensor) -> Tensor:
    """The largest entry of each row [R], from the maxima of its first blocks and the entries behind these."""
    most = [part.amax(1) for part in (maxima_RB, rest_RN) if part.shape[1]]
    return torch.maximum(*most) if len(most) == 2 else most[0]


def far_rows(reach_2SR: Tensor, offsets_SR: Tensor, group: Group) -> Tensor:
    """Rows [R] with a shift from slot 0 beyond FAR, behind its mean, or with none that is a number. reach: the largest shifts up
    and down."""
    most = torch.maximum(reach_2SR[0] - offsets_SR, reach_2SR[1] + offsets_SR).amax(0)
    rounded = offsets_SR.abs().amax(0)  # a shift of logits is rounded before its mean is taken off
    return ~group.max((most + rounded).nan_to_num(torch.inf)).le(FAR)
