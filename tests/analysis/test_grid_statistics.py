"""Statistics of grids and of whole runs, against numpy; hotspots in a defined order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from synthetic import COMPARISONS

from analysis import (
    QueryError,
    box_statistics,
    build_residual_grid,
    build_run_grid,
    correlate_grids,
    layer_statistics,
    run_metric_hotspots,
    token_statistics,
    top_metric_hotspots,
)
from analysis.select import Filters
from analysis.summaries import cells_sql, fetch_rows, prompt_hotspots_sql, statistics_sql


def test_layer_and_token_statistics_are_numpys(con: Any) -> None:
    grid = build_run_grid(con, "norm", pair="alpha", prompt=0)
    by_layer, by_token = layer_statistics(grid), token_statistics(grid)
    assert by_layer["layer"].tolist() == [-1, 0, 1, 2]
    assert by_token["token"].tolist() == list(grid.tokens)
    for axis, found in ((1, by_layer), (0, by_token)):
        for name, function in (
            ("mean", np.mean),
            ("median", np.median),
            ("min", np.min),
            ("max", np.max),
            ("std", np.std),
        ):
            assert np.allclose(found[name], function(grid.values, axis=axis))


def test_an_infinite_cell_is_left_out_as_a_report_does(con: Any) -> None:
    grid = build_run_grid(con, "norm", pair="alpha", prompt=0)
    values = grid.values.copy()
    values[1, 0] = np.inf
    values[2] = np.inf
    found = layer_statistics(replace(grid, values=values))
    for name in ("mean", "median", "min", "max", "std"):
        assert found[name][1] == pytest.approx(getattr(np, name)(values[1, 1:])), name
        assert np.isnan(found[name][2]), name


def test_statistics_leave_out_what_is_no_number(con: Any) -> None:
    grid = build_run_grid(con, "norm_delta", pair="alpha", prompt=0)
    assert np.isnan(layer_statistics(grid)["mean"][0])
    assert np.allclose(token_statistics(grid)["mean"], grid.values[1:].mean(axis=0))


def test_a_correlation_is_pearsons(con: Any) -> None:
    a = build_residual_grid(con, "norm_diff", pair="alpha", prompt=0)
    b = build_residual_grid(con, "kl_div", pair="alpha", prompt=0)
    x, y = a.values.ravel() - a.values.mean(), b.values.ravel() - b.values.mean()
    assert correlate_grids(a, b) == pytest.approx((x @ y) / np.sqrt((x @ x) * (y @ y)))
    assert correlate_grids(a, a) == pytest.approx(1)
    level = replace(a, values=np.full_like(a.values, 0.3))  # whose mean is rounded: it varies by 1e-17, as numpy has it
    assert np.isnan([correlate_grids(a, level), correlate_grids(level, a)]).all()
    others = (
        build_residual_grid(con, "norm_diff", pair="alpha", prompt=1),
        replace(a, layers=a.layers + 1),
        replace(a, positions=a.positions + 1),
    )
    for other in others:
        with pytest.raises(QueryError, match="different layers or positions"):
            correlate_grids(a, other)


def expected_hotspots(synthetic: Any, metric: str, top_n: int) -> list[tuple[Any, ...]]:
    """All of alpha's cells by falling absolute value."""
    found = []
    for (prompt, _, label), cells in synthetic.alpha.cells.items():
        if metric in cells:
            for (i, j), value in np.ndenumerate(cells[metric]):
                if np.isfinite(value):
                    found.append((prompt, label, i - 1, j, float(value)))
    return sorted(found, key=lambda h: -abs(h[4]))[:top_n]


def test_hotspots_are_the_cells_of_largest_absolute_value(con: Any, synthetic: Any) -> None:
    found = top_metric_hotspots(con, "norm_diff", 7, pair="alpha")
    keys = ("prompt_idx", "comparison", "layer", "position", "value")
    assert [tuple(h[k] for k in keys) for h in found] == expected_hotspots(synthetic, "norm_diff", 7)
    tokens = synthetic.alpha.tokens
    assert [h["token"] for h in found] == [tokens[h["prompt_idx"], "identity"][h["position"]] for h in found]
    found = run_metric_hotspots(con, "norm_delta", 7, pair="alpha")
    keys = ("prompt_idx", "run", "layer", "position", "value")
    assert [tuple(h[k] for k in keys) for h in found] == expected_hotspots(synthetic, "norm_delta", 7)
    assert min(h["value"] for h in found) < 0, "a fall can be a hotspot"


def test_hotspots_keep_to_the_filters(con: Any) -> None:
    found = top_metric_hotspots(con, "kl_divergence", 100, pair="alpha", prompt=1, comparison="BB-SB")
    assert {(h["prompt_idx"], h["comparison"]) for h in found} == {(1, "BB-SB")}
    assert len(found) == 4 * 3


def test_hotspots_per_prompt_break_ties_by_layer_and_position(con: Any) -> None:
    cells = (
        "SELECT 'p' AS pair, 'c' AS capture, 0 AS prompt_idx, 'v' AS variant, 'BB' AS label, layer, position, "
        "CASE WHEN layer = 1 THEN -2.0 ELSE 2.0 END::DOUBLE AS value FROM range(3) t(layer), range(2) u(position)"
    )
    rows = fetch_rows(con, prompt_hotspots_sql(cells, 3))
    assert [(r["layer"], r["position"], r["value"]) for r in rows] == [(0, 0, 2.0), (0, 1, 2.0), (1, 0, -2.0)]


@pytest.mark.parametrize("axis", ["layer", "token"])
def test_statistics_in_sql_are_those_of_the_grids(con: Any, axis: Any) -> None:
    from analysis.metrics import find_metric

    filters = Filters(pair="alpha", prompt=0, label="BS-SS")
    cells, values = cells_sql(find_metric("pairwise", "kl_reverse"), filters)
    rows = fetch_rows(con, statistics_sql(cells, axis), values)
    grid = build_residual_grid(con, "kl_reverse", pair="alpha", prompt=0, comparison="BS-SS")
    expected = layer_statistics(grid) if axis == "layer" else token_statistics(grid)
    for name in ("mean", "median", "min", "max", "std"):
        assert np.allclose([r[name] for r in rows], expected[name])
    assert [r["n"] for r in rows] == ([5] * 4 if axis == "layer" else [4] * 5)


def test_box_statistics_are_numpys(con: Any, synthetic: Any) -> None:
    rows = {r["comparison"]: r for r in box_statistics(con, "norm_diff", filters=Filters(pair="alpha"))}
    assert list(rows) == sorted(f"{a}-{b}" for a, b in COMPARISONS)
    for label, row in rows.items():
        values = np.concatenate([synthetic.alpha.cells[p, "identity", label]["norm_diff"].ravel() for p in (0, 1)])
        values = values.astype(np.float64)
        assert row["n"] == values.size
        expected = np.percentile(values, (0, 25, 50, 75, 100))
        assert np.allclose([row[k] for k in ("min", "q1", "median", "q3", "max")], expected)
        assert np.allclose([row["mean"], row["std"]], [values.mean(), values.std()])


def test_box_statistics_of_passes_count_only_cells_with_a_number(con: Any) -> None:
    (row,) = box_statistics(con, "entropy", "runs", Filters(pair="beta", label="SS", variant="identity"))
    assert (row["run"], row["n"]) == ("SS", 2)
