"""Statistics of residual states, in float64 from the states' own values.

Shapes: R rows (tokens), D hidden size. All functions return float64 [R]. Units: residual units, or 1 for cosines.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norm(x_RD: Tensor) -> Tensor:
    """Euclidean norm of each row."""
    return torch.linalg.vector_norm(x_RD.double(), dim=1)


def norm_of_difference(a_RD: Tensor, b_RD: Tensor) -> Tensor:
    """|b - a|, subtracted before the norm: a Gram matrix of a and b would lose small differences altogether."""
    return torch.linalg.vector_norm(b_RD.double() - a_RD.double(), dim=1)


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
