"""Layer x token grids: values and labels, apart from how they are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.errors import QueryError
from analysis.metrics import Metric, RecordType, find_metric, logit_metric
from analysis.select import EVERYTHING, Filters, one_cell_set

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True, eq=False)
class Grid:
    """One number per layer and token of one prompt.

    values: float64 [layers, positions], NaN where there is no number. layers: int64, -1 is the state entering block 0, the
    largest the state after the final norm. positions: int64, from 0. tokens: their texts. label: comparison or pass.
    """

    values: NDArray[np.float64]
    layers: NDArray[np.int64]
    positions: NDArray[np.int64]
    tokens: tuple[str, ...]
    metric: str
    unit: str
    doc: str
    pair: str
    capture: str
    prompt_idx: int
    variant: str
    label: str

    @property
    def title(self) -> str:
        variant = "" if self.variant == "identity" else f" ({self.variant})"
        return f"{self.metric} of {self.label}, pair {self.pair}, prompt {self.prompt_idx}{variant}"

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per cell: layer, position, token, value (None for NaN)."""
        for i, layer in enumerate(self.layers.tolist()):
            for j, position in enumerate(self.positions.tolist()):
                value = float(self.values[i, j])
                yield {
                    "layer": layer,
                    "position": position,
                    "token": self.tokens[j],
                    self.metric: None if np.isnan(value) else value,
                }

    def at(self, start: int | None, stop: int | None) -> Grid:
        """The grid at positions start <= position < stop; None is an end."""
        keep = np.ones(len(self.positions), dtype=bool)
        keep &= self.positions >= (0 if start is None else start)
        if stop is not None:
            keep &= self.positions < stop
        if not keep.any():
            raise QueryError(f"no positions {start}:{stop}; the prompt has {len(self.positions)} tokens, from 0")
        tokens = tuple(t for t, k in zip(self.tokens, keep, strict=True) if k)
        kept: dict[str, Any] = {"values": self.values[:, keep], "positions": self.positions[keep], "tokens": tokens}
        return Grid(**(self.__dict__ | kept))

    def to_xarray(self) -> Any:
        """An xarray.DataArray with dimensions layer and position, and token as a coordinate; needs the extra `xarray`."""
        try:
            import xarray
        except ImportError:
            raise QueryError("to_xarray needs xarray: pip install 'pairscope[xarray]'") from None
        return xarray.DataArray(
            self.values,
            dims=("layer", "position"),
            coords={"layer": self.layers, "position": self.positions, "token": ("position", list(self.tokens))},
            name=self.metric,
            attrs={k: getattr(self, k) for k in ("unit", "doc", "pair", "capture", "prompt_idx", "variant", "label")},
        )


def grid_sql(metric: Metric) -> str:
    """The query of a grid's cells; its parameters are pair, capture, prompt, variant and comparison or pass."""
    return (
        f"SELECT layer, position, {metric.sql} AS value\n"
        f"FROM {metric.view}\n"
        f"WHERE pair = ? AND capture = ? AND prompt_idx = ? AND variant = ? AND {metric.label} = ?"
    )


def build_grid(con: duckdb.DuckDBPyConnection, metric: Metric, filters: Filters = EVERYTHING) -> Grid:
    """The grid of a metric; what the filters leave open is chosen as in select.one_cell_set."""
    chosen = one_cell_set(con, filters, metric)
    key = [chosen.pair, chosen.capture, chosen.prompt, chosen.variant]
    cells = con.execute(grid_sql(metric), [*key, chosen.label]).fetchnumpy()
    found = con.execute(
        "SELECT position, token FROM tokens WHERE pair = ? AND capture = ? AND prompt_idx = ? AND variant = ?", key
    ).fetchall()
    texts = dict(found)
    layers, rows = np.unique(cells["layer"], return_inverse=True)
    positions, columns = np.unique(cells["position"], return_inverse=True)
    values = np.full((len(layers), len(positions)), np.nan)
    values[rows, columns] = np.ma.filled(np.ma.asarray(cells["value"], dtype=np.float64), np.nan)
    return Grid(
        values=values,
        layers=layers.astype(np.int64),
        positions=positions.astype(np.int64),
        tokens=tuple(texts.get(p, "") for p in positions.tolist()),
        metric=metric.name,
        unit=metric.unit,
        doc=metric.doc,
        pair=str(chosen.pair),
        capture=str(chosen.capture),
        prompt_idx=int(chosen.prompt or 0),
        variant=str(chosen.variant),
        label=str(chosen.label),
    )


def build_residual_grid(
    con: duckdb.DuckDBPyConnection,
    metric: str = "norm_diff",
    *,
    pair: str | None = None,
    prompt: int | None = None,
    comparison: str | None = None,
    variant: str | None = None,
    capture: str | None = None,
) -> Grid:
    """The grid of a pairwise metric: by default BB-SS of the first pair's first prompt."""
    return build_grid(con, find_metric("pairwise", metric), Filters(pair, capture, prompt, variant, comparison))


def build_run_grid(
    con: duckdb.DuckDBPyConnection,
    metric: str = "norm",
    *,
    pair: str | None = None,
    prompt: int | None = None,
    run: str | None = None,
    variant: str | None = None,
    capture: str | None = None,
) -> Grid:
    """The grid of a pass's metric: by default BB of the first pair's first prompt."""
    return build_grid(con, find_metric("runs", metric), Filters(pair, capture, prompt, variant, run))


def build_logit_grid(
    con: duckdb.DuckDBPyConnection,
    token_id: int,
    source: str = "diff",
    *,
    record_type: RecordType = "pairwise",
    pair: str | None = None,
    prompt: int | None = None,
    label: str | None = None,
    variant: str | None = None,
    capture: str | None = None,
) -> Grid:
    """The grid of a tracked token's lens logit. source: base, sft or diff (sft - base); of no effect for a pass.

    label: the comparison, or the pass with record_type "runs". Raises QueryError for a token that is not tracked.
    """
    filters = Filters(pair, capture, prompt, variant, label)
    check_tracked(con, token_id, filters)
    return build_grid(con, logit_metric(record_type, token_id, source), filters)


def check_tracked(con: duckdb.DuckDBPyConnection, token_id: int, filters: Filters) -> None:
    """Raise a QueryError if no capture that the filters leave tracks this token."""
    where, values = Filters(filters.pair, filters.capture).where("''")
    rows = con.execute(f"SELECT DISTINCT token_id, label FROM tracked_tokens {where} ORDER BY 1", values).fetchall()
    if token_id not in [i for i, _ in rows]:
        there = f"There are {', '.join(f'{i} ({label})' for i, label in rows)}." if rows else "No tokens are."
        raise QueryError(f"token {token_id} is not tracked. {there} Name it in tracked_token_ids and capture again.")


def build_topk_delta_grid(
    con: duckdb.DuckDBPyConnection,
    direction: Literal["increased", "decreased"] = "increased",
    statistic: Literal["largest", "mean"] = "largest",
    *,
    pair: str | None = None,
    prompt: int | None = None,
    comparison: str | None = None,
    variant: str | None = None,
    capture: str | None = None,
) -> Grid:
    """The grid of the logit shifts in pairwise_topk: the largest of a cell's k shifts, or their mean.

    Falls are negative: the largest fall is the most negative shift.
    """
    if direction not in ("increased", "decreased") or statistic not in ("largest", "mean"):
        raise QueryError("direction is increased or decreased, statistic is largest or mean")
    metric = Metric(
        name=f"{statistic} {direction}",
        record_type="pairwise",
        view="(SELECT *, base_run || '-' || sft_run AS comparison FROM pairwise_topk)",
        sql=f"{direction}[1]::DOUBLE" if statistic == "largest" else f"list_avg({direction})::DOUBLE",
        label="comparison",
        unit="logit",
        doc=f"{statistic} of the k logit shifts that {direction} most, sft_run - base_run",
    )
    return build_grid(con, metric, Filters(pair, capture, prompt, variant, comparison))
