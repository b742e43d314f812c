"""Draw a grid: as coloured numbers in a terminal, or as a PNG."""

from __future__ import annotations

import math
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.errors import QueryError
from analysis.grid import Grid, GridStack
from analysis.metrics import of_lens
from analysis.tables import fit, width
from capture.errors import StoreError
from capture.printable import escape

if TYPE_CHECKING:
    from rich.text import Text

CELL = 5  # columns of a number; one more parts it from the next
_LABEL = 5  # columns of a layer's number

RGB = tuple[int, int, int]
SEQUENTIAL: tuple[RGB, ...] = ((24, 20, 60), (38, 74, 120), (30, 130, 130), (110, 180, 90), (245, 225, 80))
DIVERGING: tuple[RGB, ...] = ((40, 90, 190), (140, 170, 215), (225, 225, 225), (225, 150, 130), (185, 45, 45))


def short_number(value: float, columns: int = CELL) -> str:
    """The text of so many columns that is nearest to a number: 0.012, 12.35, -1.2, 3e-7, 1e12; NaN is a dot."""
    if math.isnan(value):
        return "."
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    candidates = [f"{value:.{digits}f}" for digits in range(columns)]
    for digits in range(1, columns + 1):
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        candidates.append(f"{mantissa}e{int(exponent)}")
    fitting = [text for text in candidates if len(text) <= columns]
    if not fitting:  # a huge negative number: its sign leaves no room for the exponent
        return "<-1e9"
    return min(fitting, key=lambda text: (abs(float(text) - value), len(text)))


def token_label(token: str, columns: int = CELL) -> str:
    """A token for a column's head: spaces as a middle dot, control characters escaped, cut to fit."""
    return fit(escape(token).replace(" ", "·"), columns)


def colour_scale(values: np.ndarray) -> tuple[float, float, tuple[RGB, ...]]:
    """Low end, high end and ramp: around zero where there are negative numbers; ends at the 2nd and 98th percentile, so
    that one token of huge norm does not leave the rest dark.
    """
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0, SEQUENTIAL
    low, high = (float(q) for q in np.percentile(finite, (2, 98)))
    if finite.min() < 0:
        end = max(abs(low), abs(high)) or 1.0
        return -end, end, DIVERGING
    return low, high, SEQUENTIAL


def colour(value: float, low: float, high: float, ramp: tuple[RGB, ...]) -> RGB:
    """The ramp's colour of a value, interpolated."""
    share = 0.0 if high <= low else min(max((value - low) / (high - low), 0.0), 1.0)
    place = share * (len(ramp) - 1)
    i = min(int(place), len(ramp) - 2)
    a, b = ramp[i], ramp[i + 1]
    return tuple(round(x + (y - x) * (place - i)) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def draw(grid: Grid, columns: int = 80) -> Text:
    """The grid as rich text of at most so many columns; tokens that do not fit are left out, and a line says so.

    Rich drops the colours where the output is no terminal; the numbers stay.
    """
    from rich.style import Style
    from rich.text import Text

    n = max(1, min(len(grid.tokens), (columns - _LABEL) // (CELL + 1)))
    low, high, ramp = colour_scale(grid.values)
    text = Text(no_wrap=True)
    unit = f" [{grid.unit}]" if grid.unit not in ("", "1") else ""
    text.append(fit(escape(grid.title) + unit, columns) + "\n", "bold")
    text.append("layer".ljust(_LABEL) + "".join(f" {p:>{CELL}}" for p in grid.positions[:n]) + "\n", "dim")
    labels = [token_label(t) for t in grid.tokens[:n]]
    text.append(" " * _LABEL + "".join(" " + " " * (CELL - width(t)) + t for t in labels) + "\n")
    for i, layer in enumerate(grid.layers):
        text.append(f"{layer:>{_LABEL}}", "dim")
        for value in grid.values[i, :n]:
            style = Style()
            if np.isfinite(value):
                rgb = colour(float(value), low, high, ramp)
                dark = 0.3 * rgb[0] + 0.6 * rgb[1] + 0.1 * rgb[2] < 110
                style = Style.parse(f"{'white' if dark else 'black'} on rgb({rgb[0]},{rgb[1]},{rgb[2]})")
            text.append(" ")
            text.append(short_number(float(value)).rjust(CELL), style)
        text.append("\n")
    for note in _notes(grid, n):
        for line in textwrap.wrap(note, columns, subsequent_indent="  "):
            text.append(line + "\n", "dim")
    text.rstrip()
    return text


def _notes(grid: Grid, shown: int) -> list[str]:
    last = grid.n_layers
    blocks = "0 and on" if last is None else f"0..{last - 1}"
    after_norm = "" if last is None or last not in grid.layers else f"; {last}: after the final norm"
    notes = [f"layer -1: what enters block 0; {blocks}: after each block{after_norm}"]
    if not np.isfinite(grid.values).any():
        lens = (
            ": was the lens on, and is the layer among lens.layers? --metric norm_diff, or norm of a pass, needs none"
        )
        notes.append("no cell has a number" + (lens if of_lens(grid.metric, grid.unit) else ""))
    if shown < len(grid.tokens):
        first, stop = int(grid.positions[0]), int(grid.positions[shown - 1]) + 1
        notes.append(
            f"tokens {first}..{stop - 1} of {first}..{int(grid.positions[-1])} fit; next: --positions {stop}:; all: -o FILE"
        )
    return notes


# What papers get: light to dark, and blue to orange around zero; both are told apart by the colour-blind and in grey.
PAPER = ("#f4f1ea", "#d3e3d8", "#93c4c0", "#4d9bad", "#2a6d94", "#1d4474", "#16234a")
PAPER_SIGNED = ("#164a80", "#4f8cc0", "#a9cbe2", "#f2efe9", "#f0bf8e", "#cf7a32", "#87400c")
FIGURES = (".png", ".pdf", ".svg")
_COLUMN, _ROW = 0.17, 0.125  # inches of a token and of a layer
_SMALL = 7.0  # points


def plot(
    grid: Grid | GridStack,
    *,
    log: bool = False,
    low: float | None = None,
    high: float | None = None,
    title: str | None = None,
) -> Any:
    """A matplotlib Figure of a grid, or of a stack with a panel each and one colour scale for all; needs the extra `plots`.

    log: a logarithmic scale; where there are negative numbers, linear within a thousandth of zero. low, high: ends of the
    scale, to share it between figures; by default the 1st and 99th percentile, around zero where there are negative numbers.
    title: in place of metric, pair and prompt; "" for none. Cells without a number are hatched, cells not above the noise
    floor dotted.
    """
    try:
        from matplotlib import pyplot  # noqa: F401  (teaches notebooks to show a figure)
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
    except ImportError:
        raise QueryError("a figure needs matplotlib: pip install 'pairscope[plots]'") from None

    panels = _panels(grid) if isinstance(grid, GridStack) else [grid]
    first = panels[0]
    if first.values.size == 0:
        raise QueryError("no cell is left to draw: the masks and filters leave no token or no layer")
    finite = np.concatenate([p.values[np.isfinite(p.values)] for p in panels])
    norm, signed = _norm(finite, log, low, high)
    cmap = LinearSegmentedColormap.from_list("pairscope", PAPER_SIGNED if signed else PAPER)
    rows, columns = first.values.shape
    wide = min(max(_COLUMN * columns + 0.5, 2.6), 40.0)
    across = 1 if len(panels) == 1 else max(1, min(3, len(panels), int(14 / wide)))
    down = math.ceil(len(panels) / across)
    tall = min(max(_ROW * rows, 1.2), 20.0)
    # not pyplot's: that would keep every figure, and choose a window system
    figure = Figure(figsize=(wide * across + 0.9, (tall + 0.25) * down + 1.1), layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        axis.set_facecolor("white")
        axis.patch.set(hatch="////", edgecolor="#c8c8c8", linewidth=0)
        axis.imshow(panel.values, aspect="auto", cmap=cmap, norm=norm, origin="lower", interpolation="nearest")
        if panel.floor is not None and (panel.floor > 0).any():
            at_row, at_column = np.nonzero(panel.below_floor)
            axis.scatter(at_column, at_row, s=1.5, c="#555555", linewidths=0)
        step = max(1, math.ceil(columns * 0.11 / wide))
        # a dollar sign would start mathematics
        labels = [token_label(panel.tokens[i], 14).replace("$", r"\$") for i in range(0, columns, step)]
        axis.set_xticks(range(0, columns, step), labels, rotation=90, fontsize=_SMALL, family="monospace")
        step = max(1, math.ceil(rows * 0.12 / tall))
        names = ["emb" if layer < 0 else str(layer) for layer in panel.layers[::step]]
        axis.set_yticks(range(0, rows, step), names, fontsize=_SMALL)
        axis.tick_params(length=2, width=0.5)
        axis.spines[:].set_visible(False)
        if len(panels) > 1:
            axis.set_title(panel.label, fontsize=_SMALL + 2)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("layer", fontsize=_SMALL + 1)
    if title is None:
        variant = "" if first.variant == "identity" else f" ({first.variant})"
        of = "" if len(panels) > 1 else f" of {first.label}"
        title = f"{first.metric}{of}, pair {first.pair}, prompt {first.prompt_idx}{variant}"
    if title:
        lines = textwrap.wrap(title, max(20, int(figure.get_figwidth() / 0.078)))
        figure.suptitle("\n".join(lines).replace("$", r"\$"), fontsize=_SMALL + 3)
    if finite.size:
        ends = {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}
        extend = ends[bool(finite.min() < norm.vmin), bool(finite.max() > norm.vmax)]
        bar = figure.colorbar(ScalarMappable(norm, cmap), ax=axes, extend=extend, pad=0.01, aspect=25, fraction=0.05)
        bar.set_label(
            f"{first.metric} [{first.unit}]" if first.unit not in ("", "1") else first.metric, fontsize=_SMALL + 1
        )
        bar.ax.tick_params(labelsize=_SMALL, length=2, width=0.5)
        bar.outline.set_visible(False)
    return figure


def _panels(stack: GridStack) -> list[Grid]:
    """The grids of a stack, each over the layers and positions of all: that in which a file breaks off lacks some."""
    panels = []
    for grid, values in zip(stack, stack.values, strict=True):
        floor = None
        if grid.floor is not None:
            floor = np.full(len(stack.layers), np.nan)
            floor[np.searchsorted(stack.layers, grid.layers)] = grid.floor
        panels.append(
            replace(
                grid,
                values=values,
                layers=stack.layers,
                positions=stack.positions,
                tokens=stack.tokens,
                special=(),
                floor=floor,
            )
        )
    return panels


def _norm(finite: np.ndarray, log: bool, low: float | None, high: float | None) -> tuple[Any, bool]:
    """matplotlib's scale of some finite values, and whether it is around zero."""
    from matplotlib.colors import LogNorm, Normalize, SymLogNorm

    if finite.size == 0:
        return Normalize(0, 1), False
    signed = bool(finite.min() < 0 < finite.max())
    if signed:
        end = float(np.percentile(np.abs(finite), 99))
        low, high = -end if low is None else low, end if high is None else high
    else:
        low, high = (
            float(np.percentile(finite, share)) if given is None else given for given, share in ((low, 1), (high, 99))
        )
    if not high > low:
        high = low + (abs(low) or 1.0)
    if not log:
        return Normalize(low, high), signed
    if signed:
        return SymLogNorm(linthresh=max(-low, high) / 1000, vmin=low, vmax=high), True
    positive = finite[finite > 0]
    if positive.size == 0 or high <= 0:
        raise QueryError("no logarithmic scale: nothing is positive")
    if low <= 0 or low < high / 1e6:  # a few tiny cells do not take half of the ramp
        low = max(float(np.percentile(positive, 5)), high / 1e6)
    return LogNorm(low if low < high else high / 10, high, clip=True), False


def write_png(grid: Grid | GridStack, file: str | Path, **options: Any) -> Path:
    """Draw into FILE.png (200 dpi), .pdf or .svg; options as of plot."""
    path = Path(file).expanduser().absolute()
    if path.suffix not in FIGURES:
        raise QueryError(f"cannot draw into '{file}': the name must end in {', '.join(FIGURES)}")
    figure = plot(grid, **options)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a token of another script shows as a box
            figure.savefig(path, dpi=200, format=path.suffix[1:])
    except OSError as error:
        raise StoreError(f"cannot write '{path}': {error.strerror or error}") from error
    return path
