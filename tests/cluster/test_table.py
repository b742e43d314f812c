"""Tables on terminals of any width: no number is cut or broken."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.table import print_table

COLUMNS = [("id", True), ("gpus", False), ("dollars per hour", True), ("place", False)]
ROWS = [["12345678", "1x RTX 3060", "0.0712", "Sweden, SE"], ["8211", "8x A100 SXM4", "13.105", "Czechia, CZ"]]


def printed(width: int, *spare: str) -> tuple[list[str], list[str]]:
    out = io.StringIO()
    left = print_table(Console(file=out, width=width), COLUMNS, ROWS, spare)
    return out.getvalue().splitlines(), left


@pytest.mark.parametrize("width", [200, 60, 40, 30, 10])
def test_a_row_has_its_numbers_whole_on_its_first_line(width: int) -> None:
    """An id that was folded was typed without its end, to destroy a machine."""
    lines, _ = printed(width)
    for row in ROWS:
        assert sum({row[0], row[2]} <= set(line.split()) for line in lines) == 1
    assert all(part in "\n".join(lines) for part in ("Sweden", "Czechi")), "texts fold, and lose nothing"
    assert max(map(len, lines)) <= max(width, 38)


def test_what_can_be_spared_goes_first_and_is_told() -> None:
    assert printed(60, "place")[1] == []
    lines, left = printed(45, "place")
    assert left == ["place"]
    assert "8211  8x A100 SXM4" in "\n".join(lines), "nothing folds where that was enough"
