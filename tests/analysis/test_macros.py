"""The table macros, against independent arithmetic on the numbers that were written."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import ALPHA, PASSES, alpha, write_capture

from analysis import open_run, relevant_logit_changes
from analysis.macros import MACROS, NAMES
from analysis.metrics import metrics


def rows_of(con: Any, sql: str) -> list[dict[str, Any]]:
    cursor = con.execute(sql)
    names = [d[0] for d in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def test_every_macro_says_what_it_gives() -> None:
    assert [m.name for m in MACROS] == list(NAMES)
    for macro in MACROS:
        assert len(macro.doc) > 40
        assert macro.signature.startswith(f"{macro.name}(")


@pytest.mark.parametrize("run", PASSES)
def test_a_run_grid_has_the_cells_of_its_pass(con: Any, synthetic: Any, run: str) -> None:
    rows = rows_of(con, f"FROM run_grid('alpha', 0, '{run}', 'norm')")
    expected = synthetic.alpha.cells[0, "identity", run]["norm"]
    assert [(r["layer"], r["position"]) for r in rows] == [(i - 1, j) for i in range(4) for j in range(5)]
    assert np.array_equal([r["value"] for r in rows], expected.astype(float).ravel())
    assert [r["token"] for r in rows[:5]] == synthetic.alpha.tokens[0, "identity"]


def test_a_pairwise_grid_takes_cheap_and_joined_metrics_variants_and_captures(con: Any, synthetic: Any) -> None:
    rows = rows_of(con, "FROM pairwise_grid('alpha', 1, 'BS-SB', 'kl_reverse')")
    expected = synthetic.alpha.cells[1, "identity", "BS-SB"]["kl_reverse"]
    assert np.array_equal([r["value"] for r in rows], expected.astype(float).ravel())
    rows = rows_of(con, f"FROM pairwise_grid('alpha', 1, 'BS-SB', 'norm_sft', capture := '{ALPHA}')")
    assert np.array_equal([r["value"] for r in rows], synthetic.alpha.cells[1, "identity", "SB"]["norm"].ravel())
    rows = rows_of(con, "FROM pairwise_grid('beta', 0, 'BB-SS', 'norm_diff', variant := 'mirror_halves')")
    assert np.array_equal(
        [r["value"] for r in rows], synthetic.beta.cells[0, "mirror_halves", "BB-SS"]["norm_diff"].ravel()
    )
    assert rows_of(con, "FROM pairwise_grid('alpha', 9, 'BB-SS', 'norm_diff')") == []


def test_every_metric_is_known_to_the_macros(con: Any) -> None:
    for record in ("runs", "pairwise"):
        for name in metrics(record):  # type: ignore[arg-type]
            con.execute(f"FROM hotspots('{name}', 1, record := '{record}')").fetchall()


def alpha_cells(synthetic: Any, metric: str, labels: Any) -> list[tuple[float, int, int, int, str]]:
    """(value, layer, position, prompt, label) of all finite cells."""
    found = []
    for (prompt, _, label), cells in synthetic.alpha.cells.items():
        if label in labels:
            found += [
                (float(v), i - 1, j, prompt, label) for (i, j), v in np.ndenumerate(cells[metric]) if np.isfinite(v)
            ]
    return found


def test_hotspots_come_by_size(con: Any, synthetic: Any) -> None:
    rows = rows_of(con, "FROM hotspots('norm_delta', 6, record := 'runs')")
    beta = [
        (float(v), i - 1, j, 0, label)
        for (_, _, label), cells in synthetic.beta.cells.items()
        if label in PASSES
        for (i, j), v in np.ndenumerate(cells["norm_delta"])
        if np.isfinite(v)
    ]
    expected = sorted(alpha_cells(synthetic, "norm_delta", PASSES) + beta, key=lambda c: -abs(c[0]))[:6]
    assert [(r["value"], r["layer"], r["position"], r["prompt_idx"], r["label"]) for r in rows] == expected


@pytest.mark.parametrize(
    "asked",
    ["hotspots('norm_diff', 10000)", "hotspots_z('norm_diff', 10000)", "token_profile('norm', record := 'runs')"],
)
def test_a_token_is_that_of_its_own_capture_prompt_and_place(con: Any, synthetic: Any, asked: str) -> None:
    rows = rows_of(con, f"FROM {asked}")
    assert {r["pair"] for r in rows} == {"alpha", "beta"}
    for r in rows:
        made = getattr(synthetic, r["pair"])
        assert r["token"] == made.tokens[r["prompt_idx"], r["variant"]][r["position"]], r


def test_hotspots_by_z_are_measured_against_their_own_layer(con: Any, synthetic: Any) -> None:
    rows = [r for r in rows_of(con, "FROM hotspots_z('norm_diff', 1000)") if r["pair"] == "alpha"]
    labels = {label for _, _, label in synthetic.alpha.cells if "-" in label}
    cells = alpha_cells(synthetic, "norm_diff", labels)
    z = {}
    for label in labels:
        for layer in (-1, 0, 1, 2):
            values = np.array([c[0] for c in cells if c[1] == layer and c[4] == label])
            for c in cells:
                if c[1] == layer and c[4] == label:
                    z[c[1:]] = (c[0] - values.mean()) / values.std()
    found = {(r["layer"], r["position"], r["prompt_idx"], r["label"]): r["z"] for r in rows}
    assert set(found) == set(z)
    assert all(found[k] == pytest.approx(z[k], rel=1e-9) for k in z)
    sizes = [abs(r["z"]) for r in rows]
    assert sizes == sorted(sizes, reverse=True)


def test_few_hotspots_by_z_are_the_largest_on_both_sides(tmp_path: Path) -> None:
    made = alpha()
    cells = {(prompt, run): made.cells[prompt, "identity", run]["norm_delta"] for prompt in (0, 1) for run in PASSES}
    cells[0, "SB"][2, 1] = -30
    cells[1, "BS"][3, 2] = 20
    write_capture(tmp_path, made)
    expected = []
    for run in PASSES:
        for i in (1, 2, 3):  # the first state has no norm_delta
            values = np.concatenate([cells[0, run][i], cells[1, run][i]]).astype(float)
            z = (values - values.mean()) / values.std()
            expected += [(z[j], i - 1, j if j < 5 else j - 5, int(j >= 5), run) for j in range(8)]
    expected = sorted(expected, key=lambda c: -abs(c[0]))[:5]
    assert min(e[0] for e in expected) < 0 < max(e[0] for e in expected)
    rows = rows_of(open_run(str(tmp_path)), "FROM hotspots_z('norm_delta', 5, record := 'runs')")
    assert [(r["layer"], r["position"], r["prompt_idx"], r["label"]) for r in rows] == [e[1:] for e in expected]
    assert [r["z"] for r in rows] == pytest.approx([e[0] for e in expected])


def test_masks_leave_out_first_positions_and_special_tokens(con: Any) -> None:
    for mask in ("skip_first := 1", "skip_special := true"):  # only token 0 is special
        rows = rows_of(con, f"FROM cells('norm', record := 'runs', {mask})")
        assert {r["position"] for r in rows if r["pair"] == "alpha"} == {1, 2, 3, 4}
    assert {r["position"] for r in rows_of(con, "FROM hotspots_z('norm_diff', 1000, skip_first := 3)")} == {3, 4}


def test_profiles_are_numpys(con: Any, synthetic: Any) -> None:
    rows = [
        r for r in rows_of(con, "FROM layer_profile('kl_divergence')") if (r["pair"], r["label"]) == ("alpha", "BB-SS")
    ]
    cells = synthetic.alpha.cells
    for row in rows:
        values = np.concatenate([cells[p, "identity", "BB-SS"]["kl_divergence"][row["layer"] + 1] for p in (0, 1)])
        values = values.astype(float)
        assert row["n"] == 8
        assert np.allclose([row[k] for k in ("mean", "std", "min", "max")],
                           [values.mean(), values.std(), values.min(), values.max()])  # fmt: skip
        assert np.allclose([row[k] for k in ("p10", "median", "p90")], np.percentile(values, (10, 50, 90)))
    assert [r["layer"] for r in rows] == [-1, 0, 1, 2]
    rows = rows_of(con, "FROM token_profile('norm', record := 'runs')")
    rows = [r for r in rows if (r["pair"], r["prompt_idx"], r["label"]) == ("alpha", 0, "SB")]
    values = cells[0, "identity", "SB"]["norm"].astype(float)
    assert [r["token"] for r in rows] == synthetic.alpha.tokens[0, "identity"]
    assert np.allclose([r["mean"] for r in rows], values.mean(axis=0))
    assert np.allclose([r["std"] for r in rows], values.std(axis=0))


def test_the_decomposition_of_a_metric_is_its_formula(con: Any, synthetic: Any) -> None:
    rows = [r for r in rows_of(con, "FROM decomposition('entropy')") if (r["pair"], r["prompt_idx"]) == ("alpha", 1)]
    bb, bs, sb, ss = (synthetic.alpha.cells[1, "identity", p]["entropy"].astype(float).ravel() for p in PASSES)
    assert len(rows) == 12
    assert np.allclose([r["embeddings"] for r in rows], ((sb - bb) + (ss - bs)) / 2, rtol=1e-12, atol=1e-12)
    assert np.allclose([r["blocks"] for r in rows], ((bs - bb) + (ss - sb)) / 2, rtol=1e-12, atol=1e-12)
    assert np.allclose([r["interaction"] for r in rows], ss - sb - bs + bb, rtol=1e-12, atol=1e-12)
    assert np.allclose([r["embeddings"] + r["blocks"] for r in rows], [r["total"] for r in rows])
    beta = [r for r in rows_of(con, "FROM decomposition('norm')") if r["pair"] == "beta"]
    assert all(r["interaction"] is None and r["total"] is not None for r in beta), "two passes alone"


def test_the_decomposition_of_states_is_that_of_the_vectors(tmp_path: Path) -> None:
    """From distances alone, the norms that the vectors themselves have."""
    rng = np.random.default_rng(5)
    made = alpha()
    states = {p: rng.normal(size=(4, 5, 16)) for p in PASSES}
    states["SS"] = states["SB"] + states["BS"] - states["BB"] + 0.1 * rng.normal(size=(4, 5, 16))
    for a, b in made.comparisons:
        distance = np.linalg.norm(states[b] - states[a], axis=-1)
        made.cells[0, "identity", f"{a}-{b}"]["norm_diff"] = distance.astype(np.float32)
    write_capture(tmp_path, made)
    rows = [r for r in rows_of(open_run(str(tmp_path)), "FROM decomposition_states()") if r["prompt_idx"] == 0]
    bb, bs, sb, ss = (states[p] for p in PASSES)
    expected = {
        "embeddings": ((sb - bb) + (ss - bs)) / 2, "blocks": ((bs - bb) + (ss - sb)) / 2, "interaction": ss - sb - bs + bb,
        "total": ss - bb,
    }  # fmt: skip
    for name, vectors in expected.items():
        assert np.allclose([r[name] for r in rows], np.linalg.norm(vectors, axis=-1).ravel(), rtol=1e-4), name


def test_the_edges_of_the_square_are_its_four_comparisons(con: Any, synthetic: Any) -> None:
    rows = [r for r in rows_of(con, "FROM edges('kl_divergence')") if (r["pair"], r["prompt_idx"]) == ("alpha", 0)]
    names = {"embeddings_under_base": "BB-SB", "embeddings_under_sft": "BS-SS", "blocks_over_base": "BB-BS",
             "blocks_over_sft": "SB-SS", "both": "BB-SS"}  # fmt: skip
    for column, comparison in names.items():
        expected = synthetic.alpha.cells[0, "identity", comparison]["kl_divergence"].astype(float)
        assert np.array_equal([r[column] for r in rows], expected.ravel())


def test_the_name_of_a_metric_is_the_same_in_capitals_as_a_column_is(con: Any) -> None:
    for metric in ("norm_diff", "norm_delta", "entropy_sft"):
        asked = "SELECT layer, position, value FROM pairwise_grid('alpha', 0, 'BB-SS', ?)"
        assert con.execute(asked, [metric.upper()]).fetchall() == con.execute(asked, [metric]).fetchall()


def test_an_unknown_metric_or_record_type_names_the_near_ones(con: Any, synthetic: Any, call: Any) -> None:
    answer = call("sql", synthetic.out, "FROM hotspots('norm_dif', 3)")
    assert answer.code == 2
    assert answer.err.startswith("no metric 'norm_dif'. Did you mean 'norm_diff'")
    assert "there are: runs, pairwise" in call("sql", synthetic.out, "FROM layer_profile('norm', record := 'run')").err
    assert "Did you mean" in call("sql", synthetic.out, "FROM hotspot('norm')").err


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (
            "FROM hotspots('norm', 3)",
            "'norm' is a metric of passes, and this asks for one of comparisons: record := 'runs'",
        ),
        ("FROM pairwise_grid('alpha', 0, 'BB-SS', 'entropy')", "'entropy' is a metric of passes"),
        ("FROM edges('cosine_prev')", "'cosine_prev' is a metric of passes"),
        (
            "FROM hotspots('norm_diff', 3, record := 'runs')",
            "'norm_diff' is a metric of comparisons, and this asks for one",
        ),
        ("FROM run_grid('alpha', 0, 'BB', 'kl_div')", "'kl_div' is a metric of comparisons"),
        ("FROM decomposition('norm_diff')", "'norm_diff' is a metric of comparisons"),
    ],
)
def test_a_metric_of_the_other_record_type_is_called_so(synthetic: Any, call: Any, query: str, said: str) -> None:
    answer = call("sql", synthetic.out, query)
    assert answer.code == 2
    assert answer.err.startswith(said)


def test_the_noise_floor_marks_differences_that_are_none(tmp_path: Path) -> None:
    import json

    made = alpha()
    values = made.cells[0, "identity", "BS-SB"]["norm_diff"]
    values[0, 0], values[1, 2] = 0.0, 0.5  # just at the floor
    path = write_capture(tmp_path, made) / "capture.json"
    floors = {p: {"norm_diff": [0.0, 0.5, 1.0, 2.0 + i], "norm_diff_relative": [0.0] * 4, "cosine_distance": [0.0] * 4}
              for i, p in enumerate(PASSES)}  # fmt: skip
    said = {"measured": True, "by_run_and_layer": floors}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"noise_floor": said}))
    con = open_run(str(tmp_path))
    assert con.execute("SELECT layer, norm_diff FROM noise WHERE run = 'SB' ORDER BY layer").fetchall() == [
        (-1, 0.0), (0, 0.5), (1, 1.0), (2, 4.0),
    ]  # fmt: skip
    rows = con.execute(
        "SELECT layer, position, norm_diff_floor, below_floor FROM pairwise_floor "
        "WHERE prompt_idx = 0 AND comparison = 'BS-SB' ORDER BY ALL"
    ).fetchall()
    assert [r[2] for r in rows] == [f for f in (0.0, 0.5, 1.0, 4.0) for _ in range(5)], "the larger of the two passes'"
    assert [r[3] for r in rows] == [bool(values[r[0] + 1, r[1]] <= r[2]) for r in rows]
    assert {r[3] for r in rows} == {True, False}
    assert {(0, 2), (-1, 0)} < {r[:2] for r in rows if r[3]}, (
        "what equals its floor is not above it, and nor is nothing"
    )
    from analysis import build_residual_grid

    grid = build_residual_grid(con, "norm_diff", comparison="BS-SB")
    assert grid.floor is not None
    assert grid.floor.tolist() == [0.0, 0.5, 1.0, 4.0]
    assert grid.below_floor.ravel().tolist() == [r[3] for r in rows]
    assert "line-through" in grid._repr_html_()


@pytest.mark.parametrize("unknown", [float("nan"), None])  # older captures have the first
@pytest.mark.parametrize("first", [True, False])
def test_beside_a_floor_that_is_no_number_no_difference_is_called_none(
    tmp_path: Path, first: bool, unknown: float | None
) -> None:
    import json

    made = alpha()
    values = made.cells[0, "identity", "BB-SS"]["norm_diff"]
    values[2, 0], values[3, 0] = np.inf, np.inf
    path = write_capture(tmp_path, made) / "capture.json"
    odd, plain = [0.0, 100.0, unknown, float("inf")], [0.0, 100.0, 0.0, 0.0]
    floors = {
        p: {"norm_diff": mine, "norm_diff_relative": plain, "cosine_distance": mine}
        for p in PASSES
        for mine in [odd if (p == "BB") is first else plain]
    }
    said = {"measured": True, "by_run_and_layer": floors}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"noise_floor": said}))
    con = open_run(str(tmp_path))
    rows = con.execute(
        "SELECT layer, position, below_floor FROM pairwise_floor WHERE prompt_idx = 0 AND comparison = 'BB-SS' ORDER BY ALL"
    ).fetchall()
    assert {below for layer, _, below in rows if layer > 0} == {None}
    assert [below for layer, _, below in rows if layer == 0] == [True] * 5
    of_cosines = "SELECT DISTINCT layer, cosine_distance_floor FROM pairwise_floor WHERE comparison = 'BB-SS'"
    floor_of = dict(con.execute(of_cosines).fetchall())
    assert floor_of[0] == 100
    assert floor_of[1] is None or np.isnan(floor_of[1])
    from analysis import build_residual_grid

    grid = build_residual_grid(con, "norm_diff", comparison="BB-SS")
    assert grid.below_floor.ravel().tolist() == [bool(below) for *_, below in rows]


def test_without_a_measured_floor_nothing_is_below_it(con: Any) -> None:
    from analysis import build_residual_grid

    assert con.execute("SELECT DISTINCT below_floor FROM pairwise_floor").fetchall() == [(None,)]
    grid = build_residual_grid(con, "norm_diff")
    assert grid.floor is None
    assert not grid.below_floor.any()


def twins(out: Path) -> None:
    """A capture whose lens says the same at L-1 and L, with its largest values there."""
    import json

    made = alpha()
    for (_, _, label), cells in made.cells.items():
        for name in ("kl_divergence", "norm_diff") if "-" in label else ("entropy", "tracked_logits"):
            cells[name][2] += 100
            cells[name][3] = cells[name][2]
    path = write_capture(out, made) / "capture.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"lens": {"norm": "final", "layers": [-1, 0, 1, 2]}}))


@pytest.mark.parametrize("macro", ["hotspots", "hotspots_z"])
def test_of_two_layers_of_which_the_lens_says_the_same_one_is_a_hotspot(tmp_path: Path, macro: str) -> None:
    twins(tmp_path)
    con = open_run(str(tmp_path))
    assert con.execute("SELECT twin_layer FROM captures").fetchall() == [(2,)]
    asked = "SELECT DISTINCT layer FROM {}('{}', 30{}) ORDER BY layer"
    for metric, record in (("kl_divergence", ""), ("KL_Div", ""), ("entropy", ", record := 'runs'")):
        layers = [layer for (layer,) in con.execute(asked.format(macro, metric, record)).fetchall()]
        assert 1 in layers
        assert 2 not in layers
    assert 2 in [layer for (layer,) in con.execute(asked.format(macro, "norm_diff", "")).fetchall()], (
        "a state is another"
    )
    assert (2,) in con.execute("SELECT DISTINCT layer FROM layer_profile('kl_divergence')").fetchall()


def test_a_report_has_one_of_two_equal_layers_among_the_largest_cells(tmp_path: Path, call: Callable[..., Any]) -> None:
    twins(tmp_path / "out")
    for metric, expected in (("kl_divergence", {1}), ("norm_diff", {1, 2})):
        file = tmp_path / "hotspots.csv"
        asked = ("report", tmp_path / "out", "--metric", metric, "--top-n", 3)
        (part,) = call(*asked, "--json").rows[0]["metrics"]
        assert {row["layer"] for row in part["hotspots"]} == expected
        assert {row["layer"] for row in part["statistics"]} == {-1, 0, 1, 2}
        overview = call(*asked).out.split("of all\n")[1].splitlines()[1:4]
        assert {int(line.split()[3]) for line in overview} == expected
        assert call(*asked, "--export", file, "--export-rows", "hotspots").code == 0
        with file.open(newline="") as stream:
            assert {int(row["layer"]) for row in csv.DictReader(stream)} == expected


def test_a_report_has_one_of_two_equal_layers_among_the_logits_that_changed(
    tmp_path: Path, call: Callable[..., Any]
) -> None:
    twins(tmp_path / "out")
    file = tmp_path / "changes.csv"
    asked = ("report", tmp_path / "out", "--comparison", "BB-SS", "--min-logit", 0)
    changes = [row for section in call(*asked, "--top-n", 99, "--json").rows for row in section["changes"]]
    assert {row["layer"] for row in changes} == {-1, 0, 1}
    assert call(*asked, "--export", file, "--export-rows", "changes").code == 0
    with file.open(newline="") as stream:
        assert [int(row["layer"]) for row in csv.DictReader(stream)] == [row["layer"] for row in changes]
    everything = relevant_logit_changes(open_run(str(tmp_path / "out")), min_abs_logit=0, comparison="BB-SS")
    assert {row["layer"] for row in everything} == {-1, 0, 1, 2}, "who asks for all cells gets them"


@pytest.mark.parametrize("layers", [[-1, 0, 2], [-1, 0, 1], None])
def test_without_a_twin_the_last_layer_stays(tmp_path: Path, layers: list[int] | None) -> None:
    from analysis.captures import _twin_layer

    assert _twin_layer({"n_layers": 2, "lens": {"norm": "final", "layers": layers}}) is None
    assert _twin_layer({"n_layers": 2, "lens": {"norm": "none", "layers": [-1, 0, 1, 2]}}) is None


def test_the_macro_and_the_report_know_the_same_metrics_of_the_lens() -> None:
    import re

    from analysis.metrics import of_lens

    (statement,) = (m.statement for m in MACROS if m.name == "cells")
    listed = set(re.findall(r"'(\w+)'", statement.split("lower(metric) IN (")[1].split(")")[0]))
    known = [m for record in ("runs", "pairwise") for m in metrics(record).values()]
    assert listed == {m.name for m in known if of_lens(m.name, m.unit)}
