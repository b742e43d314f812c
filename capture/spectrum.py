"""How many dimensions a difference between two passes has: singular values of the token x hidden difference matrix.

For one layer, one comparison and one variant of the prompts, X [N, D] holds for every token the state of sft_run minus that of
base_run, in float64. A fine-tune that pushes all tokens one way has one large singular value; one that does something else
on every token has many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capture.config import Comparison

MEASURES = ("effective_rank", "participation_ratio", "mean_shift_share")


def singular_values(x_ND: Tensor) -> Tensor:
    """The min(N, D) singular values of X [N, D] (float64), largest first.

    They are the roots of the eigenvalues of the smaller of X X^T and X^T X, in float64: accurate to about 1e-8 of the largest.
    """
    gram = x_ND @ x_ND.T if x_ND.shape[0] <= x_ND.shape[1] else x_ND.T @ x_ND
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def effective_rank(values_K: Tensor) -> float:
    """exp(-sum p ln p) with p = s / sum s, of singular values s: Roy and Vetterli, "The effective rank" (2007). NaN for X = 0."""
    total = values_K.sum()
    if total == 0:
        return float("nan")
    p = values_K / total
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def participation_ratio(values_K: Tensor) -> float:
    """(sum s^2)^2 / sum s^4: how many directions share the variance evenly. NaN for X = 0."""
    square = (values_K / values_K[:1].clamp(min=torch.finfo(torch.float64).tiny)).square()
    return float(square.sum() ** 2 / square.square().sum()) if values_K[0] > 0 else float("nan")


def mean_shift_share(x_ND: Tensor) -> float:
    """N |mean of rows|^2 / sum of |row|^2: the share of the difference that is one shift common to all tokens. NaN for X = 0."""
    total = x_ND.square().sum()
    return float(x_ND.shape[0] * x_ND.mean(0).square().sum() / total) if total > 0 else float("nan")


class Spectra:
    """Gathers the differences of one layer, batch by batch, and keeps what `columns` of the collector keeps.

    arrays: "singular_values" [C, L+2, variants, K] and MEASURES [C, L+2, variants], float32, NaN where nothing was computed or
    where a variant has fewer than K. variant_of: [N] the variant of each token of the capture.
    """

    def __init__(
        self, comparisons: Sequence[Comparison], n_layers: int, hidden: int, variant_of: Any, n_variants: int
    ) -> None:
        self.comparisons, self.variant_of, self.n_variants = comparisons, variant_of, n_variants
        most = int(np.bincount(variant_of, minlength=n_variants).max())
        shape = (len(comparisons), n_layers + 2, n_variants)
        self.arrays = {name: np.full(shape, np.nan, np.float32) for name in MEASURES}
        self.arrays["singular_values"] = np.full((*shape, min(most, hidden)), np.nan, np.float32)
        self._rows: dict[tuple[int, int], list[Tensor]] = {}
        self._where: list[Any] = []

    def take(self, layer: int, rows: Sequence[Tensor], slot_of: dict[str, int], where: Any, *, last: bool) -> None:
        """Take one batch of a layer. rows: [R, D] of each slot; where: [R] among the N tokens; last: no batch follows."""
        keys = [(slot_of[c.base_run], slot_of[c.sft_run]) for c in self.comparisons]
        for a, b in dict.fromkeys(keys):
            if a != b:
                self._rows.setdefault((a, b), []).append(rows[b].double() - rows[a].double())
        self._where.append(where)
        if not last:
            return
        variant = self.variant_of[np.concatenate(self._where)]
        for key in dict.fromkeys(keys):
            parts = self._rows.pop(key, None)
            x = None if parts is None else torch.cat(parts)
            del parts
            for v in range(self.n_variants):
                self._store([c for c, k in enumerate(keys) if k == key], layer, v, x, variant == v)
        self._where.clear()

    def _store(self, which: list[int], layer: int, variant: int, x_ND: Tensor | None, mask: Any) -> None:
        """Keep one spectrum for all comparisons of equal slots; None: the states are equal, X is zero."""
        n, values = int(mask.sum()), self.arrays["singular_values"]
        at = (layer + 1, variant)
        if x_ND is None:
            for c in which:
                values[c][at][: min(n, values.shape[-1])] = 0.0
            return
        x = x_ND[torch.from_numpy(mask).to(x_ND.device)]
        if not bool(x.isfinite().all()):
            return  # a state overflowed: nothing can be said
        s = singular_values(x)
        measures = (effective_rank(s), participation_ratio(s), mean_shift_share(x))
        for c in which:
            values[c][at][: len(s)] = s.cpu().numpy()
            for name, value in zip(MEASURES, measures, strict=True):
                self.arrays[name][c][at] = value
