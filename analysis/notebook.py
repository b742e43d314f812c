"""What a notebook shows of a grid and of a run directory: HTML without a script."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from analysis.draw import colour, colour_scale, short_number

if TYPE_CHECKING:
    from analysis.grid import Grid
    from analysis.opened import Run

_MOST_TOKENS = 48
_STYLE = "font:11px/1.5 ui-monospace,monospace;border-collapse:collapse"


def grid_html(grid: Grid) -> str:
    """The grid as a coloured table; every cell's number is in its tooltip, and what is below the noise floor is struck out."""
    low, high, ramp = colour_scale(grid.values)
    shown = min(len(grid.positions), _MOST_TOKENS)
    head = "".join(
        f'<th title="{escape(repr(token))}" style="font-weight:400;max-width:4em;overflow:hidden">{escape(token.strip() or "·")}</th>'
        for token in grid.tokens[:shown]
    )
    below = grid.below_floor
    body = []
    for i, layer in enumerate(grid.layers.tolist()):
        cells = []
        for j in range(shown):
            value = float(grid.values[i, j])
            style = "text-align:right;padding:0 3px;"
            if np.isfinite(value):
                r, g, b = colour(value, low, high, ramp)
                dark = 0.3 * r + 0.6 * g + 0.1 * b < 110
                style += f"background:rgb({r},{g},{b});color:{'#fff' if dark else '#111'};"
            if below[i, j]:
                style += "text-decoration:line-through;"
            title = f"layer {layer}, token {grid.positions[j]}: {value:.8g}"
            cells.append(f'<td title="{title}" style="{style}">{short_number(value)}</td>')
        body.append(f'<tr><th style="text-align:right;padding-right:6px">{layer}</th>{"".join(cells)}</tr>')
    unit = f" [{escape(grid.unit)}]" if grid.unit not in ("", "1") else ""
    notes = [f"{shown} of {len(grid.positions)} tokens shown"] if shown < len(grid.positions) else []
    notes += [f"{int(below.sum())} cells not above the noise floor are struck out"] if below.any() else []
    note = f"<div>{'; '.join(notes)}</div>" if notes else ""
    return (
        f'<div style="overflow-x:auto"><b>{escape(grid.title)}{unit}</b><div>{escape(grid.doc)}</div>'
        f'<table style="{_STYLE}"><tr><th>layer</th>{head}</tr>{"".join(body)}</table>{note}</div>'
    )


def run_html(run: Run) -> str:
    """The captures of a run directory as a table."""
    names = ("pair", "capture", "newest", "base_model", "sft_model", "n_layers", "n_prompts", "n_tokens", "dtype")
    rows = run._con.execute(f"SELECT {', '.join(names)} FROM captures ORDER BY pair, written").fetchall()
    head = "".join(f"<th>{n}</th>" for n in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{'' if v is None else escape(str(v))}</td>" for v in row) + "</tr>" for row in rows
    )
    return f'<b>run directory {escape(run.out)}</b><table style="{_STYLE}"><tr>{head}</tr>{body}</table>'
