"""Statistics of residual states, in float64 from the states' own values.

Shapes: R rows (tokens), D hidden size. All functions return float64 [R]. Units: residual units, or 1 for cosines. Some rows
at a time: every row is computed alone, and float64 copies of all would outweigh the states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capture.footprint import STATISTICS_CELLS, STATISTICS_CELLS_ON_CPU
from capture.lens_kernel import Kernel

Block = tuple[Sequence[Tensor], Sequence[Tensor]]  # states [R, D], and the states before them


def _in_pieces(statistic: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function of [R, D] tensors, some rows at a time."""

    def whole(*tensors: Tensor) -> Tensor:
        return torch.cat([statistic(*(t[some] for t in tensors)) for some in _pieces(tensors[0])])

    whole.__doc__ = statistic.__doc__
    return whole


@dataclass(frozen=True)
class Residuals:
    """float64 [n, R] each: norm of every state; change of the norm and cosine distance for every turn from a previous state to a
    state; cosine distance and norm of the difference for every pair of states."""

    norm: Tensor
    norm_delta: Tensor
    turned: Tensor
    distance: Tensor
    difference: Tensor


def residuals(
    blocks: Sequence[Block], turns: Sequence[tuple[int, int]], pairs: Sequence[tuple[int, int]], kernel: Kernel | None = None
) -> Residuals:  # fmt: skip
    """All statistics of the rows of some blocks, one after the other, as `norm`, `norm_of_difference` and `cosine_distance` have them
    one by one: norms and directions are made once. turns: (index of a previous state, of a state), sorted; pairs: (a, b) of
    states. kernel: the compiled way, where it takes these states."""
    if kernel is not None and all(kernel.takes_states(tensors) for block in blocks for tensors in block):
        return Residuals(*kernel.residuals(blocks, turns, pairs))
    states, previous = (_together(tensors) for tensors in zip(*blocks, strict=True))
    parts = [_some(states, previous, turns, pairs, some) for some in _pieces(states[0])]
    none = states[0].new_empty(0, len(states[0]), dtype=torch.float64)
    columns = [
        torch.stack([torch.cat(pieces) for pieces in zip(*(p[i] for p in parts), strict=True)]) if parts[0][i] else none
        for i in range(5)
    ]
    return Residuals(*columns)


def _together(blocks: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """Each tensor's rows of all blocks."""
    return blocks[0] if len(blocks) == 1 else [torch.cat(rows) for rows in zip(*blocks, strict=True)]


def _some(
    states: Sequence[Tensor], previous: Sequence[Tensor], turns: Sequence[tuple[int, int]], pairs: Sequence[tuple[int, int]],
    some: slice,
) -> list[list[Tensor]]:  # fmt: skip
    """The fields of Residuals of some rows, as lists."""
    now = [_direction(x[some].double()) for x in states]
    delta, turned = [], []
    before, at = None, -1
    for a, b in turns:
        if a != at or before is None:
            before, at = _direction(previous[a][some].double()), a
        delta.append(now[b][0] - before[0])
        turned.append(_between(before, now[b]))
    before = None
    distance = [_between(now[a], now[b]) for a, b in pairs]
    far = [torch.linalg.vector_norm(_difference(states[a][some], states[b][some]), dim=1) for a, b in pairs]
    return [[n for n, _ in now], delta, turned, distance, far]


def _pieces(x_RD: Tensor) -> list[slice]:
    """Rows as equal pieces of no more numbers than are worked on at a time."""
    rows, size = x_RD.shape
    most = max(1, (STATISTICS_CELLS if x_RD.is_cuda else STATISTICS_CELLS_ON_CPU) // size)
    n = max(1, -(-rows // most))
    return [slice(i * rows // n, (i + 1) * rows // n) for i in range(n)]


def _direction(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Norms [R], and x / |x| [R, D], zero where x is."""
    size = torch.linalg.vector_norm(x_RD, dim=1)
    return size, x_RD / size.where(size > 0, 1.0)[:, None]


def _difference(a_RD: Tensor, b_RD: Tensor) -> Tensor:
    """b - a in float64, in new memory: what is float64 already must not be written to."""
    return b_RD.to(torch.float64, copy=True).sub_(a_RD)


def _between(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """The cosine distance of two directions, [R]."""
    distance = torch.linalg.vector_norm(a[1] - b[1], dim=1).square() / 2
    return torch.where((a[0] == 0) ^ (b[0] == 0), 1.0, distance)


@_in_pieces
def norm(x_RD: Tensor) -> Tensor:
    """Euclidean norm of each row."""
    return torch.linalg.vector_norm(x_RD.double(), dim=1)


@_in_pieces
def norm_of_difference(a_RD: Tensor, b_RD: Tensor) -> Tensor:
    """|b - a|, subtracted before the norm: a Gram matrix of a and b would lose small differences altogether."""
    return torch.linalg.vector_norm(b_RD.double() - a_RD.double(), dim=1)


@_in_pieces
def cosine_distance(a_RD: Tensor, b_RD: Tensor) -> Tensor:
    """1 - cos(a, b) = |a/|a| - b/|b||^2 / 2, which keeps its relative accuracy near 0 where 1 - (a.b)/(|a||b|) has none.

    A zero vector has no direction: its distance is 1 from any other vector and 0 from another zero vector.
    """
    return _between(_direction(a_RD.double()), _direction(b_RD.double()))
