"""A table on a terminal of any width, in which no number is cut: half a price or id would be read as another one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_TEXT = 6  # columns that a text folds to at least


def print_table(
    out: Console, columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]], spare: Sequence[str] = ()
) -> list[str]:
    """Print rows of text. columns: name, and whether it holds numbers, which stand on the right.

    Where there is no room, columns of `spare` are left out, those that stand first first, and their names returned; then texts fold,
    the longest first; then heads of numbers stand word below word; and where even that is too wide the terminal wraps the lines.
    """
    from rich import box
    from rich.table import Table

    cells = [max((len(row[i]) for row in rows), default=0) for i in range(len(columns))]
    widths = {name: max(len(name), cells[i]) for i, (name, _) in enumerate(columns)}
    shown, left = [name for name, _ in columns], []
    for name in spare:
        if _sum(widths[n] for n in shown) > out.width:
            shown.remove(name)
            left.append(name)
    kept = [(i, name, numbers) for i, (name, numbers) in enumerate(columns) if name in shown]
    need = {name: widths[name] for name in shown}
    folds = set()
    for _, name, _ in sorted((k for k in kept if not k[2]), key=lambda k: -widths[k[1]]):
        if _sum(need.values()) > out.width:
            folds.add(name)
            need[name] = min(need[name], _TEXT)
    stacked = _sum(need.values()) > out.width
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for i, name, numbers in kept:
        if stacked and numbers:
            need[name] = max(cells[i], *map(len, name.split()))
        head = name.replace(" ", "\n") if stacked and numbers else name
        table.add_column(head, justify="right" if numbers else "left", overflow="fold", no_wrap=name not in folds)
    for row in rows:
        table.add_row(*(row[i] for i, _, _ in kept))
    before = out.width
    out.width = max(before, _sum(need.values()))
    out.print(table)
    out.width = before
    return left


def _sum(widths: Iterable[int]) -> int:
    """Columns that a row of cells takes, two between each."""
    each = list(widths)
    return sum(each) + 2 * (len(each) - 1)
