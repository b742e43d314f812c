"""Grids drawn in a terminal and as PNG."""

from __future__ import annotations

import builtins
import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from synthetic import alpha, keep_layers, write_capture

from analysis import QueryError, build_residual_grid, build_run_grid, open_run
from analysis.draw import DIVERGING, SEQUENTIAL, colour, colour_scale, draw, short_number, token_label, write_png
from analysis.grid import Grid, stack
from analysis.grids import build_stack
from analysis.metrics import find_metric
from analysis.select import Filters
from analysis.tables import fit


@pytest.fixture
def grid(con: Any) -> Grid:
    return build_residual_grid(con, "kl_divergence", pair="alpha", prompt=0)


def wide(grid: Grid, n: int) -> Grid:
    """The same grid with more tokens."""
    values = np.resize(grid.values, (len(grid.layers), n))
    return replace(grid, values=values, positions=np.arange(n), tokens=tuple(f"tok{i}" for i in range(n)))


def test_the_drawing_has_every_layer_token_and_number(grid: Grid) -> None:
    lines = draw(grid).plain.splitlines()
    assert lines[0] == "kl_divergence of BB-SS, pair alpha, prompt 0 [nats]"
    assert lines[1].split() == ["layer", "0", "1", "2", "3", "4"]
    assert lines[2].split() == ["<s>", "·a", "\\n", "·lon…", "界"]
    for layer, line in zip(grid.layers, lines[3:7], strict=True):
        head, *numbers = line.split()
        assert int(head) == layer
        assert np.allclose([float(n) for n in numbers], grid.values[layer + 1], rtol=0.05, atol=5e-4)


def test_the_final_norm_is_named_at_its_own_layer_and_only_where_the_grid_has_it(grid: Grid, tmp_path: Path) -> None:
    note = lambda g: draw(g, 200).plain.splitlines()[3 + len(g.layers)]  # noqa: E731
    assert note(grid) == "layer -1: what enters block 0; 0..1: after each block; 2: after the final norm"
    assert note(grid.filter_layers(lambda layer: layer < 2)) == "layer -1: what enters block 0; 0..1: after each block"
    assert "norm" not in note(replace(grid, n_layers=None))
    write_capture(tmp_path, keep_layers(alpha(), -1, 0))
    part = build_residual_grid(open_run(str(tmp_path)), "kl_divergence")
    assert (part.layers.tolist(), part.n_layers) == ([-1, 0], 2)
    assert note(part) == "layer -1: what enters block 0; 0..1: after each block"


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_the_rest_is_announced(grid: Grid, columns: int) -> None:
    lines = draw(wide(grid, 300), columns).plain.splitlines()
    assert max(cell_len(line) for line in lines) <= columns
    n = (columns - 5) // 6
    assert any(line.startswith(f"tokens 0..{n - 1} of 0..299 fit") for line in lines)
    assert lines[1].split()[-1] == str(n - 1)


def test_names_of_passes_and_variants_do_not_steer_the_terminal(grid: Grid) -> None:
    strange = replace(grid, label="B\x1b[32mB-SS", variant="two\nlines\u202e")
    first = draw(strange, 200).plain.splitlines()[0]
    assert first == "kl_divergence of B\\x1b[32mB-SS, pair alpha, prompt 0 (two\\nlines\\u202e) [nats]"
    assert repr(strange).isprintable()
    assert repr(stack((strange,))).isprintable()


def test_notes_are_wrapped_and_not_cut(grid: Grid) -> None:
    nothing = replace(wide(grid, 40), values=np.full((4, 40), np.nan), metric="kl_divergence", unit="nats")
    said = " ".join(draw(nothing, 60).plain.split("\n", 3)[3].split())
    assert "--metric norm_diff, or norm of a pass, needs none" in said
    assert "next: --positions 9:; all: -o FILE" in said


def test_colours_show_only_where_the_terminal_has_them(grid: Grid) -> None:
    for terminal, expected in ((True, True), (False, False)):
        console = Console(
            file=io.StringIO(), force_terminal=terminal, color_system="truecolor" if terminal else None, width=80
        )
        console.print(draw(grid))
        assert ("\x1b[" in console.file.getvalue()) is expected  # type: ignore[attr-defined]


def test_the_verb_draws_without_colours_into_a_pipe(synthetic: Any, call: Callable[..., Any]) -> None:
    out = call("grid", synthetic.out).out
    assert "\x1b" not in out
    assert out.startswith("kl_divergence of BB-SS")
    assert max(cell_len(line) for line in out.splitlines()) <= 80


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (1.0, "1"), (0.0123, "0.012"), (12.346, "12.35"), (-1.26, "-1.26"), (-0.0123, "-0.01"), (99999.0, "99999"),
        (123456.0, "1.2e5"), (0.00012, "1e-4"), (-0.00012, "-1e-4"), (-1e-12, "-0"), (1e300, "1e300"), (-1e300, "<-1e9"),
        (float("nan"), "."), (float("inf"), "inf"), (float("-inf"), "-inf"),
    ],
)  # fmt: skip
def test_numbers_are_the_nearest_that_fits_in_five_columns(value: float, text: str) -> None:
    assert short_number(value) == text


def test_five_columns_always_do() -> None:
    rng = np.random.default_rng(0)
    for value in np.concatenate(
        [rng.normal(size=500) * 10.0 ** rng.integers(-40, 40, 500), [-1e300, -1e-300, 0.1, -0.0999996]]
    ):
        assert len(short_number(float(value))) <= 5


def test_token_labels_show_spaces_and_controls_and_keep_their_width() -> None:
    assert token_label(" the") == "·the"
    assert token_label("\t") == "\\t"
    assert token_label("\x1b[2J") == "\\x1b…"
    assert cell_len(token_label("界界界")) <= 5
    assert token_label("") == ""


@pytest.mark.parametrize(
    "letters", ["界", "é", "ab界", "e\u0301", "👍🏽", "☁\ufe0f", "👨\u200d👩\u200d👧", "🇩🇪", "\u200b"]
)
def test_a_text_is_cut_to_the_longest_start_that_fits_however_long_it_is(letters: str) -> None:
    for columns in range(8):
        text = letters * 5
        longest = max((text[:n] for n in range(len(text)) if cell_len(text[:n]) < columns), key=len, default="")
        assert fit(text, columns) == (text if cell_len(text) <= columns else longest + "…")
    begun = time.perf_counter()
    assert cell_len(fit(letters * 64_000, 80)) <= 80
    assert time.perf_counter() - begun < 5  # s; some hundredths are usual


def test_the_scale_is_around_zero_where_there_are_negative_numbers() -> None:
    low, high, ramp = colour_scale(np.array([[-1.0, 0.5, 3.0, np.nan]]))
    assert (low, ramp) == (-high, DIVERGING)
    assert colour(0.0, low, high, ramp) == DIVERGING[2]
    low, high, ramp = colour_scale(np.concatenate([np.linspace(0, 1, 99), [1000.0]]))
    assert ramp is SEQUENTIAL
    assert high < 2, "one huge cell does not set the scale"
    assert colour(1000.0, low, high, ramp) == SEQUENTIAL[-1]
    assert colour_scale(np.array([np.nan]))[:2] == (0.0, 1.0)


def test_a_grid_of_one_value_is_drawn(grid: Grid) -> None:
    assert draw(replace(grid, values=np.zeros_like(grid.values))).plain.splitlines()[3].split() == ["-1", *["0"] * 5]


def test_a_figure_has_labels_units_and_a_title(grid: Grid) -> None:
    pytest.importorskip("matplotlib")
    figure = grid.plot()
    cells, bar = figure.axes
    assert figure.get_suptitle().replace("\n", " ") == "kl_divergence of BB-SS, pair alpha, prompt 0"
    assert [t.get_text() for t in cells.get_xticklabels()] == ["<s>", "·a", "\\n", "·long-token", "界"]
    assert [t.get_text() for t in cells.get_yticklabels()] == ["emb", "0", "1", "2"]
    assert cells.get_ylabel() == "layer"
    assert bar.get_ylabel() == "kl_divergence [nats]"
    np.testing.assert_array_equal(cells.images[0].get_array(), grid.values)
    assert cells.images[0].origin == "lower", "layers go up"
    assert grid.plot(title="").get_suptitle() == ""


def test_scales_are_around_zero_logarithmic_or_given(grid: Grid) -> None:
    pytest.importorskip("matplotlib")
    norm = lambda g, **options: g.plot(**options).axes[0].images[0].norm  # noqa: E731
    assert norm(grid, low=0, high=3).vmax == 3
    assert type(norm(grid, log=True)).__name__ == "LogNorm"
    signed = replace(grid, values=np.array(grid.values) - np.median(grid.values))
    assert norm(signed).vmin == -norm(signed).vmax
    assert norm(signed)(0.0) == pytest.approx(0.5)
    assert norm(signed, log=True)(0.0) == pytest.approx(0.5)
    assert norm(replace(grid, values=np.full_like(grid.values, np.nan))).vmax == 1
    assert norm(replace(grid, values=np.zeros_like(grid.values))).vmax > 0
    with pytest.raises(QueryError, match="no logarithmic scale"):
        replace(grid, values=-np.array(grid.values)).plot(log=True)


def test_nothing_left_to_draw_is_an_error(grid: Grid) -> None:
    pytest.importorskip("matplotlib")
    for nothing in (grid.mask(first=99), grid.filter_layers(lambda layer: False)):
        with pytest.raises(QueryError, match="no cell is left to draw"):
            nothing.plot()


def test_comparisons_share_one_scale(con: Any) -> None:
    pytest.importorskip("matplotlib")
    stack = build_stack(con, find_metric("pairwise", "norm_diff"), Filters("alpha", prompt=0))
    *panels, bar = stack.plot().axes
    assert [p.get_title() for p in panels] == ["BB-BS", "BB-SB", "BB-SS", "BS-SB", "BS-SS", "SB-SS"]
    assert len({id(p.images[0].norm) for p in panels}) == 1
    assert bar.get_ylabel() == "norm_diff [residual]"


def test_a_comparison_that_lacks_layers_and_tokens_is_drawn_at_its_place(con: Any) -> None:
    pytest.importorskip("matplotlib")
    whole = build_stack(con, find_metric("pairwise", "norm_diff"), Filters("alpha", prompt=0))
    first, *_, last = whole
    cut = replace(last.filter_layers(lambda layer: layer in (0, 2)).at(1, 3), floor=np.array([0.5, 1.0]))
    *panels, _bar = stack((cut, first, last)).plot().axes
    drawn = panels[0].images[0].get_array()
    assert drawn.shape == (4, 5)
    assert np.argwhere(~np.ma.getmaskarray(drawn)).tolist() == [[1, 1], [1, 2], [3, 1], [3, 2]]
    assert np.array_equal(drawn.compressed(), cut.values.ravel())
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["emb", "0", "1", "2"]
    dots = panels[0].collections[0].get_offsets()
    assert np.array_equal(np.sort(dots[:, 0]), np.sort(np.nonzero(cut.below_floor)[1] + 1))


def test_figures_are_written(synthetic: Any, call: Callable[..., Any], tmp_path: Path, con: Any) -> None:
    pytest.importorskip("matplotlib")
    starts = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    for option, name in (("-o", "png"), ("--png", "pdf"), ("--png", "svg")):
        file = tmp_path / f"g.{name}"
        assert call("grid", synthetic.out, option, file).code == 0
        assert file.read_bytes().startswith(starts[name])
    done = call("grid", synthetic.out, "--metric", "norm_diff", "--png", tmp_path / "all.png", "--all", "--log")
    assert (done.code, done.out) == (0, "")
    for wrong, why in (
        (["--log"], "--png FILE"),
        (["--all", "--comparison", "BB-SS", "--png", "x.png"], "leave out --comparison"),
        (["--png", "x.gif"], "must end in .png, .pdf, .svg"),
        (["--png", tmp_path / "no" / "x.png"], "cannot write"),
    ):
        done = call("grid", synthetic.out, *wrong)
        assert done.code != 0
        assert why in done.err
    price = replace(build_run_grid(con, "norm_delta", pair="alpha", prompt=0), tokens=("$x", "$", "_{", "\\frac", "^"))
    write_png(price, tmp_path / "dollars.png")


def test_without_matplotlib_the_error_says_what_to_install(
    grid: Grid, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = builtins.__import__

    def no_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(QueryError, match=r"pip install 'pairscope\[plots\]'"):
        write_png(grid, tmp_path / "g.png")
