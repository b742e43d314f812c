"""Statistics of residual states, in float64 from the states' own values.

Shapes: R rows (tokens), D hidden size. All functions return float64 [R]. Units: residual units, or 1 for cosines. Some rows
at a time: every row is computed alone, and float64 copies of all would outweigh the states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from capture.footprint import STATISTICS_CELLS


def _in_pieces(statistic: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function of [R, D] tensors, so many rows at a time that each tensor has STATISTICS_CELLS numbers at most."""

    def whole(*tensors: Tensor) -> Tensor:
        rows = max(1, STATISTICS_CELLS // tensors[0].shape[1])
        return torch.cat([statistic(*pieces) for pieces in zip(*(t.split(rows) for t in tensors), strict=True)])

    whole.__doc__ = statistic.__doc__
    return whole


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
    a, b = a_RD.double(), b_RD.double()
    na, nb = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (a, b))
    unit_a, unit_b = a / na.where(na > 0, 1.0), b / nb.where(nb > 0, 1.0)
    distance = (unit_a - unit_b).square().sum(1) / 2
    one_zero = (na[:, 0] == 0) ^ (nb[:, 0] == 0)
    return torch.where(one_zero, 1.0, distance)
