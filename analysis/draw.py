"""Draw a grid: as coloured numbers in a terminal, or as a PNG."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.errors import QueryError
from analysis.grids import Grid
from analysis.tables import escape, fit, width
from capture.errors import StoreError

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
    text.append(fit(f"{grid.title}{f' [{grid.unit}]' if grid.unit not in ('', '1') else ''}", columns) + "\n", "bold")
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
    for line in _notes(grid, n):
        text.append(fit(line, columns) + "\n", "dim")
    text.rstrip()
    return text


def _notes(grid: Grid, shown: int) -> list[str]:
    last = int(grid.layers.max()) if len(grid.layers) else 0
    notes = [f"layer -1: what enters block 0; 0..{last - 1}: after each block; {last}: after the final norm"]
    if not np.isfinite(grid.values).any():
        notes.append("no cell has a number: was the lens on, and is the token's layer among lens.layers?")
    if shown < len(grid.tokens):
        first, stop = int(grid.positions[0]), int(grid.positions[shown - 1]) + 1
        notes.append(
            f"tokens {first}..{stop - 1} of {first}..{int(grid.positions[-1])} fit; next: --positions {stop}:; all: -o FILE"
        )
    return notes


def write_png(grid: Grid, file: str | Path) -> Path:
    """Draw the grid into a PNG; needs the extra `plots`."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise QueryError("a PNG needs matplotlib: pip install 'pairscope[plots]'") from None
    from matplotlib.colors import LinearSegmentedColormap

    path = Path(file).expanduser().absolute()
    low, high, ramp = colour_scale(grid.values)
    cmap = LinearSegmentedColormap.from_list("ramp", [tuple(c / 255 for c in rgb) for rgb in ramp])
    rows, columns = grid.values.shape
    size = (min(max(6.0, 0.32 * columns + 2), 60.0), min(max(3.5, 0.2 * rows + 1.6), 40.0))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    try:
        image = axes.imshow(
            grid.values, aspect="auto", cmap=cmap, vmin=low, vmax=max(high, low + 1e-30), origin="lower"
        )
        step = max(1, math.ceil(columns / (size[0] * 5)))  # about five labels to the inch
        ticks = list(range(0, columns, step))
        # a dollar sign would start mathematics
        axes.set_xticks(ticks, [token_label(grid.tokens[i], 12).replace("$", r"\$") for i in ticks], rotation=90)
        step = max(1, math.ceil(rows / (size[1] * 6)))
        axes.set_yticks(range(0, rows, step), [str(layer) for layer in grid.layers[::step]])
        axes.set_ylabel("layer")
        axes.set_title(grid.title.replace("$", r"\$"))
        figure.colorbar(image, ax=axes, extend="both", label=grid.unit if grid.unit not in ("", "1") else grid.metric)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a token of another script shows as a box
            figure.savefig(path, dpi=130, format="png")
    except OSError as error:
        raise StoreError(f"cannot write '{path}': {error.strerror or error}") from error
    finally:
        pyplot.close(figure)
    return path
