"""Statistics of grids. Cells without a finite number are left out, as in a report; standard deviations are those of a population."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.errors import QueryError
from analysis.grids import Grid


def layer_statistics(grid: Grid) -> dict[str, NDArray[Any]]:
    """Per layer, over tokens: arrays of equal length under layer, mean, median, min, max and std."""
    return {"layer": grid.layers} | _statistics(grid.values, axis=1)


def token_statistics(grid: Grid) -> dict[str, NDArray[Any]]:
    """Per token, over layers: arrays of equal length under position, token, mean, median, min, max and std."""
    return {"position": grid.positions, "token": np.array(grid.tokens, dtype=object)} | _statistics(grid.values, axis=0)


def _statistics(values: NDArray[np.float64], axis: int) -> dict[str, NDArray[Any]]:
    values = np.where(np.isfinite(values), values, np.nan)  # an overflow leaves infinities too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a row of NaN only gives NaN, as it should
        return {
            "mean": np.nanmean(values, axis=axis),
            "median": np.nanmedian(values, axis=axis),
            "min": np.nanmin(values, axis=axis),
            "max": np.nanmax(values, axis=axis),
            "std": np.nanstd(values, axis=axis),
        }


def correlate_grids(a: Grid, b: Grid) -> float:
    """Pearson correlation of two grids over the cells that both have; NaN where one of them does not vary."""
    if a.values.shape != b.values.shape or (a.layers != b.layers).any() or (a.positions != b.positions).any():
        raise QueryError(f"the grids '{a.title}' and '{b.title}' have different layers or positions")
    both = np.isfinite(a.values) & np.isfinite(b.values)
    x, y = a.values[both], b.values[both]
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
