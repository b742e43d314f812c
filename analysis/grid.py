"""A layer x token grid: values, labels, units and where they come from, apart from how they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.errors import QueryError, near_label
from capture.printable import escape


@dataclass(frozen=True, eq=False)
class Grid:
    """One number per layer and token of one prompt.

    values: float64 [layers, positions], NaN where there is no number. layers: int64, -1 is the state entering block 0, 0 to
    L-1 what leaves each block, L the state after the final norm; a capture may have only some of them. n_layers: L, or None
    where the capture does not say. positions: int64, from 0. tokens: their texts; special: which of them are the
    tokenizer's special ones. label: comparison or pass. floor: float64 [layers], the capture's noise floor of this metric,
    or None where there is none: a value that is not above it is no difference. provenance: models, revisions, dtype and the
    like, from capture.json. sql: the query that gives the same cells.
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
    special: tuple[bool, ...] = ()
    n_layers: int | None = None
    floor: NDArray[np.float64] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sql: str = ""

    @property
    def title(self) -> str:
        variant = "" if self.variant == "identity" else f" ({self.variant})"
        return f"{self.metric} of {self.label}, pair {self.pair}, prompt {self.prompt_idx}{variant}"

    @property
    def below_floor(self) -> NDArray[np.bool_]:
        """[layers, positions]: true where the value is not above the noise floor; false where none is known, or it is no number."""
        if self.floor is None:
            return np.zeros(self.values.shape, dtype=bool)
        return (np.abs(self.values) <= self.floor[:, None]) & np.isfinite(self.floor)[:, None]

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
        """The grid at positions start <= position < stop, counted from 0; None is an end."""
        for end in (start, stop):
            if end is not None and end < 0:
                raise QueryError(f"no position {end}: they count from 0, to {len(self.positions) - 1} here")
        keep = self.positions >= (0 if start is None else start)
        if stop is not None:
            keep &= self.positions < stop
        if not keep.any():
            asked = ":".join("" if end is None else str(end) for end in (start, stop))
            raise QueryError(f"no positions {asked}; the prompt has {len(self.positions)} tokens, from 0")
        return self._columns(keep)

    def filter_tokens(self, keep: Callable[[int, str], bool]) -> Grid:
        """The tokens for which keep(position, token) is true, such as lambda position, token: position > 0."""
        chosen = [bool(keep(p, t)) for p, t in zip(self.positions.tolist(), self.tokens, strict=True)]
        return self._columns(np.array(chosen, dtype=bool))

    def filter_layers(self, keep: Callable[[int], bool]) -> Grid:
        """The layers for which keep(layer) is true, such as lambda layer: 4 <= layer < 8."""
        chosen = np.array([bool(keep(layer)) for layer in self.layers.tolist()], dtype=bool)
        floor = None if self.floor is None else self.floor[chosen]
        return replace(self, values=self.values[chosen], layers=self.layers[chosen], floor=floor)

    def mask(self, *, first: int = 0, special: bool = False) -> Grid:
        """Without the first so many positions, and without the tokenizer's special tokens, whose states dwarf the rest."""
        keep = self.positions >= first
        if special:
            keep &= ~np.array(self.special, dtype=bool)
        return self._columns(keep)

    def _columns(self, keep: NDArray[np.bool_]) -> Grid:
        def pick(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(v for v, k in zip(values, keep, strict=True) if k)

        return replace(
            self,
            values=self.values[:, keep],
            positions=self.positions[keep],
            tokens=pick(self.tokens),
            special=pick(self.special) if self.special else (),
        )

    def z_scores(self) -> NDArray[np.float64]:
        """[layers, positions]: (value - mean) / std within each layer of this grid; NaN where a layer does not vary.

        The macro hotspots_z scores over all prompts; this one over the tokens at hand.
        """
        finite = np.isfinite(self.values)
        values = np.where(finite, self.values, 0.0)
        n = np.maximum(finite.sum(axis=1, keepdims=True), 1)
        mean = values.sum(axis=1, keepdims=True) / n
        std = np.sqrt((np.where(finite, values - mean, 0.0) ** 2).sum(axis=1, keepdims=True) / n)
        # the mean of equal values is rounded, and the std then is not 0 but the error of that
        lowest = np.where(finite, self.values, np.inf).min(axis=1, keepdims=True, initial=np.inf)
        highest = np.where(finite, self.values, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(finite & (std > 0) & (highest > lowest), (self.values - mean) / std, np.nan)

    def to_xarray(self) -> Any:
        """An xarray.DataArray with dimensions layer and position, and token as a coordinate; needs the extra `xarray`."""
        return _xarray().DataArray(
            self.values,
            dims=("layer", "position"),
            coords={"layer": self.layers, "position": self.positions, "token": ("position", list(self.tokens))},
            name=self.metric,
            attrs={k: getattr(self, k) for k in ("unit", "doc", "pair", "capture", "prompt_idx", "variant", "label")},
        )

    def to_pandas(self) -> Any:
        """A pandas.DataFrame, a row per layer and a column per (position, token); needs pandas."""
        try:
            import pandas
        except ImportError:
            raise QueryError("to_pandas needs pandas: pip install 'pairscope[xarray]', which brings it") from None
        columns = pandas.MultiIndex.from_arrays([self.positions, list(self.tokens)], names=["position", "token"])
        return pandas.DataFrame(self.values, index=pandas.Index(self.layers, name="layer"), columns=columns)

    def plot(self, **options: Any) -> Any:
        """A matplotlib figure of the grid; options as of analysis.draw.plot. Needs the extra `plots`."""
        from analysis.draw import plot

        return plot(self, **options)

    def save(self, file: str | Path) -> Path:
        """Write a row per cell (layer, position, token, value) to FILE.csv, .json or .parquet."""
        from analysis.tables import export_rows

        return export_rows(list(self.rows()), file)

    def __repr__(self) -> str:
        rows, columns = self.values.shape
        return f"<Grid {escape(self.title)}: {rows} layers x {columns} tokens{_unit(self.unit)}>"

    def _repr_html_(self) -> str:
        from analysis.notebook import grid_html

        return grid_html(self)


@dataclass(frozen=True, eq=False)
class GridStack:
    """Several grids of one metric and prompt, such as the six comparisons, as one labelled array.

    values: float64 [labels, layers, positions], NaN where one of them has no such cell. The grids keep the rest.
    """

    grids: tuple[Grid, ...]
    values: NDArray[np.float64]
    layers: NDArray[np.int64]
    positions: NDArray[np.int64]
    tokens: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(g.label for g in self.grids)

    @property
    def metric(self) -> str:
        return self.grids[0].metric

    def __getitem__(self, label: str) -> Grid:
        for grid in self.grids:
            if grid.label == label:
                return grid
        raise QueryError(f"no '{label}' in this stack. {near_label(label, self.labels)}")

    def __iter__(self) -> Iterator[Grid]:
        return iter(self.grids)

    def __len__(self) -> int:
        return len(self.grids)

    def at(self, start: int | None, stop: int | None) -> GridStack:
        """As Grid.at, for all."""
        return stack(tuple(g.at(start, stop) for g in self.grids))

    def filter_layers(self, keep: Callable[[int], bool]) -> GridStack:
        """As Grid.filter_layers, for all."""
        return stack(tuple(g.filter_layers(keep) for g in self.grids))

    def filter_tokens(self, keep: Callable[[int, str], bool]) -> GridStack:
        """As Grid.filter_tokens, for all."""
        return stack(tuple(g.filter_tokens(keep) for g in self.grids))

    def mask(self, *, first: int = 0, special: bool = False) -> GridStack:
        """As Grid.mask, for all."""
        return stack(tuple(g.mask(first=first, special=special) for g in self.grids))

    def plot(self, **options: Any) -> Any:
        """A matplotlib figure with a panel per grid and one colour scale; options as of analysis.draw.plot."""
        from analysis.draw import plot

        return plot(self, **options)

    def to_xarray(self) -> Any:
        """An xarray.DataArray with dimensions comparison, layer and position, and token as a coordinate."""
        first = self.grids[0]
        return _xarray().DataArray(
            self.values,
            dims=("comparison", "layer", "position"),
            coords={
                "comparison": list(self.labels),
                "layer": self.layers,
                "position": self.positions,
                "token": ("position", list(self.tokens)),
            },
            name=self.metric,
            attrs={k: getattr(first, k) for k in ("unit", "doc", "pair", "capture", "prompt_idx", "variant")},
        )

    def __repr__(self) -> str:
        names = escape(", ".join(self.labels))
        return f"<GridStack {self.metric} of {names}: {' x '.join(map(str, self.values.shape))}>"

    def _repr_html_(self) -> str:
        return "".join(grid._repr_html_() for grid in self.grids)


def stack(grids: tuple[Grid, ...]) -> GridStack:
    """Grids of one metric and prompt as one array over the layers and positions that any of them has."""
    if not grids:
        raise QueryError("there is no grid to stack")
    first = grids[0]
    for other in grids[1:]:
        for name in ("metric", "pair", "capture", "prompt_idx", "variant"):
            if getattr(other, name) != getattr(first, name):
                raise QueryError(
                    f"grids of one stack share their {name}: '{getattr(first, name)}' and '{getattr(other, name)}'"
                )
    layers = np.unique(np.concatenate([g.layers for g in grids]))
    texts = {p: t for g in grids for p, t in zip(g.positions.tolist(), g.tokens, strict=True)}
    positions = np.array(sorted(texts), dtype=np.int64)
    values = np.full((len(grids), len(layers), len(positions)), np.nan)
    for i, g in enumerate(grids):
        values[i][np.ix_(np.searchsorted(layers, g.layers), np.searchsorted(positions, g.positions))] = g.values
    return GridStack(grids, values, layers, positions, tuple(texts[p] for p in positions.tolist()))


def _xarray() -> Any:
    try:
        import xarray
    except ImportError:
        raise QueryError("to_xarray needs xarray: pip install 'pairscope[xarray]'") from None
    return xarray


def _unit(unit: str) -> str:
    return f" [{escape(unit)}]" if unit not in ("", "1") else ""
