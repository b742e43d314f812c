"""What capture/lens_sums.py finds out in one way through logits, on a GPU: the same results from two Triton kernels, which read the
logits once each, where the plain operations read and write them some seventy times.

The first looks for what is largest in each block and for the mean shifts under slot 0, the second makes the sums. Every program has
one row and a few thousand entries of its vocabulary, and what it finds is put together by plain operations; so neither the number
of rows nor their neighbours change a bit. Needs the package `triton`, which comes with torch for CUDA.

Shapes: as in capture/lens_sums.py; T tiles of TILE entries.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from capture.divergence import PLAIN_PIECES, SUM_BLOCK, Pairs, Sums, divergences
from capture.group import ALONE, Group
from capture.lens_sums import FUSED_SLOTS, FUSED_TILE, Pass, Space, compared, far_rows, one_pass
from capture.logits import Logits, separate
from capture.topk import BLOCK

TILE = FUSED_TILE
COLUMNS = TILE // BLOCK  # blocks of which one program of the first kernel finds the largest entries
PARTS = TILE // SUM_BLOCK  # sums over these that are made in float32
TRIED_ROWS, TRIED_VOCAB = 3, 2 * TILE + 77  # of the tile that the kernels are tried on
ENTROPY_APART, KL_APART = 1e-5, 1e-3  # nats, and of a KL: what the tests allow either way


@triton.jit
def _pick(i: tl.constexpr, a, b, c, d):
    """The i-th of four."""
    if i == 0:  # noqa: SIM116  Triton has no dictionaries
        return a
    elif i == 1:
        return b
    elif i == 2:
        return c
    else:
        return d


@triton.jit
def _exponential(x):
    """(exp(x) - 1, exp(x)) for |x| < 87; exp(x) is 0 below -87. x = n ln 2 + r, |r| < 0.35: with q = exp(r) - 1 from its Taylor series,
    2^n q + (2^n - 1) keeps the digits of small x, and 2^n q + 2^n those of small exp(x)."""
    n = tl.floor(x * 1.44269504 + 0.5)
    r = x - n * 0.693359375
    r = r + n * 2.12194440e-4
    p = r * (1.0 / 5040) + 1.0 / 720
    p = p * r + 1.0 / 120
    p = p * r + 1.0 / 24
    p = p * r + 1.0 / 6
    p = p * r + 0.5
    q = p * r * r + r
    whole = tl.minimum(tl.maximum(n, -126.0), 127.0).to(tl.int32)
    power = ((whole + 127) << 23).to(tl.float32, bitcast=True)
    return power * q + (power - 1.0), tl.where(x < -87.0, 0.0, power * q + power)


@triton.jit
def _read(i: tl.constexpr, SLOTS: tl.constexpr, x, at, there):
    """Entries of slot i; of one that is not there nothing is read."""
    if i < SLOTS:
        return tl.load(x + at, mask=there, other=0.0)
    else:
        return tl.zeros(there.shape, tl.float32)


@triton.jit
def _largest(
    x0, x1, x2, x3, s0, s1, s2, s3, maxima, parts, vocab, columns, main, tiles,
    SLOTS: tl.constexpr, SHIFTS: tl.constexpr, N_SHIFTS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of one row: `maxima` [N, R, columns] of its blocks, and in `parts` [R, T, 4 S] the largest logit of every slot; how far
    the leading shifts go up, and down; sum e, sum e x_s with e relative to the tile's own largest logit of slot 0; and how many
    logits are not finite. SHIFTS: the pairs, two bits a slot. Behind the `main` tiles of whole blocks come those of the rest."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n_rows = tl.num_programs(0)
    step = tl.arange(0, BLOCK)[:, None]
    lane = tl.arange(0, COLUMNS)[None, :]
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    is_main = tile < main
    places = tl.where(
        is_main,
        tile * COLUMNS + step * columns + lane,
        BLOCK * columns + (tile - main) * (BLOCK * COLUMNS) + step * COLUMNS + lane,
    )
    there = places < vocab
    there = there & (lane < tl.where(is_main, columns - tile * COLUMNS, COLUMNS))
    keep = column < tl.where(is_main, columns, 0)
    low = -float("inf")
    out = parts + (row * tiles + tile) * (4 * SLOTS)
    v0 = _read(0, SLOTS, x0, row * s0 + places, there)
    v1 = _read(1, SLOTS, x1, row * s1 + places, there)
    v2 = _read(2, SLOTS, x2, row * s2 + places, there)
    v3 = _read(3, SLOTS, x3, row * s3 + places, there)
    wrong = 0.0
    for s in tl.static_range(SLOTS):
        x = _pick(s, v0, v1, v2, v3)
        wrong += tl.sum(tl.where(tl.abs(x) < float("inf"), 0.0, 1.0))
        of_blocks = tl.max(tl.where(there, x, low), 0)
        tl.store(maxima + (s * n_rows + row) * columns + column, of_blocks, mask=keep)
        tl.store(out + s, tl.max(of_blocks, 0))
    _, e = _exponential(tl.where(there, v0 - tl.max(tl.where(there, v0, low)), -100.0))
    tl.store(out + 3 * SLOTS - 2, tl.sum(e))
    for s in tl.static_range(1, SLOTS):
        shift = _pick(s, v0, v1, v2, v3) - v0
        tl.store(out + SLOTS + s - 1, tl.max(tl.where(there, shift, low)))
        tl.store(out + 2 * SLOTS + s - 2, tl.max(tl.where(there, -shift, low)))
        tl.store(out + 3 * SLOTS - 2 + s, tl.sum(e * shift))
    tl.store(out + 4 * SLOTS - 2, wrong)
    for i in tl.static_range(N_SHIFTS):
        shift = _pick((SHIFTS >> (4 * i + 2)) & 3, v0, v1, v2, v3) - _pick((SHIFTS >> (4 * i)) & 3, v0, v1, v2, v3)
        up = tl.max(tl.where(there, shift, low), 0)
        down = tl.max(tl.where(there, -shift, low), 0)
        tl.store(maxima + ((SLOTS + i) * n_rows + row) * columns + column, up, mask=keep)
        tl.store(maxima + ((SLOTS + N_SHIFTS + i) * n_rows + row) * columns + column, down, mask=keep)


@triton.jit
def _shift(i: tl.constexpr, SLOTS: tl.constexpr, x, at, there, v0, offset):
    """(x_i, expm1(x_i)): the shift from slot 0 to slot i less its mean under slot 0."""
    if i < SLOTS:
        shift = tl.load(x + at, mask=there, other=0.0) - v0 - tl.load(offset)
        less, _ = _exponential(shift)
        return shift, less
    else:
        return v0, v0


@triton.jit
def _products(
    x0, x1, x2, x3, s0, s1, s2, s3, largest, offsets, sums, vocab, tiles,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one row: `sums` [R, T, S (S + 1)] float64 of (e, g_1, ...) times (1, y, x_1, ...), as capture/divergence.py has them,
    added up in float32 over SUM_BLOCK entries. largest [R]: of slot 0; offsets [S - 1, R]: to be taken off the shifts."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n_rows = tl.num_programs(0)
    places = (tile * PARTS + tl.arange(0, PARTS)[:, None]) * SUM_BLOCK + tl.arange(0, SUM_BLOCK)[None, :]
    there = places < vocab
    v0 = _read(0, SLOTS, x0, row * s0 + places, there)
    y = tl.where(there, v0 - tl.load(largest + row), 0.0)
    _, e = _exponential(y)
    e = tl.where(there, e, 0.0)
    c1, m1 = _shift(1, SLOTS, x1, row * s1 + places, there, v0, offsets + row)
    c2, m2 = _shift(2, SLOTS, x2, row * s2 + places, there, v0, offsets + n_rows + row)
    c3, m3 = _shift(3, SLOTS, x3, row * s3 + places, there, v0, offsets + 2 * n_rows + row)
    out = sums + (row * tiles + tile) * (SLOTS * (SLOTS + 1))
    for s in tl.static_range(SLOTS):
        weight = e * _pick(s, 1.0, m1, m2, m3)
        at = out + s * (SLOTS + 1)
        tl.store(at, tl.sum(tl.sum(weight, 1).to(tl.float64), 0))
        tl.store(at + 1, tl.sum(tl.sum(weight * y, 1).to(tl.float64), 0))
        for t in tl.static_range(1, SLOTS):
            tl.store(at + 1 + t, tl.sum(tl.sum(weight * _pick(t, y, c1, c2, c3), 1).to(tl.float64), 0))


def fused_pass(logits: list[Tensor], shifts: Pairs, listed: int, group: Group) -> Pass:
    """As lens_sums.one_pass, for S <= FUSED_SLOTS tensors [R, V] float32 of unit stride along V. Rows with a logit that is not
    finite go the plain way."""
    n_slots, (rows, vocab), n_shifts = len(logits), logits[0].shape, len(shifts)
    columns = listed // BLOCK
    main = -(-columns // COLUMNS)
    tiles = main + -(-(vocab - columns * BLOCK) // TILE)
    four = [*logits, *(4 - n_slots) * logits[:1]]
    slots = *four, *(x.stride(0) for x in four)
    new: Any = logits[0].new_empty
    maxima, parts = new(n_slots + 2 * n_shifts, rows, columns), new(rows, tiles, 4 * n_slots)
    code = sum((a | b << 2) << 4 * i for i, (a, b) in enumerate(shifts))
    with torch.cuda.device_of(logits[0]):  # Triton asks the current device
        _largest[rows, tiles](
            *slots, maxima, parts, vocab, columns, main, tiles,
            SLOTS=n_slots, SHIFTS=code, N_SHIFTS=n_shifts, BLOCK=BLOCK, COLUMNS=COLUMNS, enable_fp_fusion=False,
        )  # fmt: skip
    own, lead = parts[:, :, 0], n_slots - 1
    tops, up, down, masses, wrong, _ = parts.split([n_slots, lead, lead, n_slots, 1, 1], 2)
    largest = group.max(tops.amax(1).T.contiguous())
    each = (own - largest[0][:, None]).exp()[:, :, None]
    mean = group.sum((masses * each).sum(1).T.contiguous())
    offsets = mean[1:] / mean[0]
    n_parts = -(-vocab // TILE)
    sums = new(rows, n_parts, n_slots * (n_slots + 1), dtype=torch.float64)
    with torch.cuda.device_of(logits[0]):
        _products[rows, n_parts](
            *slots, largest[0].contiguous(), offsets.contiguous(), sums, vocab, n_parts,
            SLOTS=n_slots, PARTS=PARTS, SUM_BLOCK=SUM_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    made = group.sum(sums.sum(1).T.contiguous().view(n_slots, n_slots + 1, rows))
    bad = group.max(wrong.sum((1, 2))) > 0
    far = bad.clone()
    if lead:
        far |= far_rows(torch.stack([up.amax(1).T, down.amax(1).T]), offsets, group)
    taken_off = largest[0].double() + torch.cat([torch.zeros_like(largest[:1]), offsets])
    found = Pass(maxima, largest, Sums(made, taken_off, far))
    if len(where := bad.nonzero().flatten()):
        for some in where.split(max(1, rows // PLAIN_PIECES)):  # plain operations take more for each row
            _again(found, logits, shifts, listed, group, some)
    return found


def _again(found: Pass, logits: list[Tensor], shifts: Pairs, listed: int, group: Group, where: Tensor) -> None:
    """The rows at `where` by plain operations."""
    n = len(where)
    plain = one_pass(
        separate([x.index_select(0, where) for x in logits]), shifts, listed, group, at_once=n, space=Space()
    )
    found.maxima_NRB[:, where], found.largest_SR[:, where] = plain.maxima_NRB, plain.largest_SR
    mine, theirs = found.sums, plain.sums
    mine.sums[:, :, where], mine.offsets[:, where], mine.far[where] = theirs.sums, theirs.offsets, theirs.far


class Fused:
    """The kernels, tried on this device."""

    def takes(self, logits: Logits) -> bool:
        """Whether these logits can be given to `one_pass`."""
        few = logits.are_separate and logits.n_slots <= FUSED_SLOTS
        return few and all(x.dtype == torch.float32 and (x.stride(1) == 1 or x.shape[1] == 1) for x in logits.tensors)

    def one_pass(self, logits: Logits, shifts: Pairs, listed: int, group: Group) -> Pass:
        return fused_pass([logits.slot(s) for s in range(logits.n_slots)], shifts, listed, group)


def tried(device: torch.device) -> Fused | str:
    """The kernels, if they are built for this device and find on a small tile what plain operations find; else why not."""
    if not isinstance(_largest, triton.JITFunction):
        return "Triton's interpreter is on (TRITON_INTERPRET)"
    return differs(device) or Fused()


@torch.no_grad()
def differs(device: torch.device) -> str | None:
    """What the kernels find other than plain operations do on a small tile, in words; None where they agree."""
    generator = torch.Generator().manual_seed(0)
    first = 4 * torch.randn(TRIED_ROWS, TRIED_VOCAB, generator=generator)
    x = [first, *(first + scale * torch.randn(first.shape, generator=generator) for scale in (0.01, 0.3, 1))]
    x = [one.to(device) for one in x]
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    shifts = compared(4, pairs)
    plain = one_pass(separate(x), shifts, TRIED_VOCAB - 5, ALONE, at_once=TRIED_ROWS, space=Space())
    try:
        found = fused_pass(x, shifts, TRIED_VOCAB - 5, ALONE)
    except Exception as error:  # whatever a compiler or a driver says
        return f"Triton failed: {type(error).__name__}: {' '.join(str(error).split())[-300:]}"
    if not (torch.equal(found.maxima_NRB, plain.maxima_NRB) and torch.equal(found.largest_SR, plain.largest_SR)):
        return "the Triton kernels find other largest logits than plain operations do"
    a, b = (divergences(separate(x), p.largest_SR, pairs, ALONE, p.sums, TRIED_ROWS) for p in (found, plain))
    near = all((u - v).abs().max() < ENTROPY_APART for u, v in ((a.entropy, b.entropy), (a.logsumexp, b.logsumexp)))
    if not (near and all(((u - v).abs() <= KL_APART * v).all() for u, v in ((a.ba, b.ba), (a.ab, b.ab)))):
        return "the Triton kernels find other entropies or divergences than plain operations do"
    return None
