"""Grids: values, labels, defaults, and the grid verb."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from synthetic import ALPHA, TRACKED, alpha, make_capture, write_capture

from analysis import (
    QueryError,
    build_logit_grid,
    build_residual_grid,
    build_run_grid,
    build_run_logit_grid,
    build_topk_delta_grid,
    open_run,
    tracked_token_trajectory,
)


def test_a_residual_grid_is_what_was_written(con: Any, synthetic: Any) -> None:
    grid = build_residual_grid(con, "norm_diff", pair="alpha", prompt=0, comparison="BS-SB")
    assert np.array_equal(grid.values, synthetic.alpha.cells[0, "identity", "BS-SB"]["norm_diff"])
    assert grid.values.dtype == np.float64
    assert grid.layers.tolist() == [-1, 0, 1, 2]
    assert grid.positions.tolist() == [0, 1, 2, 3, 4]
    assert grid.tokens == ("<s>", " a", "\n", " long-token", "界")
    assert (grid.unit, grid.label, grid.capture) == ("residual", "BS-SB", ALPHA)
    assert grid.title == "norm_diff of BS-SB, pair alpha, prompt 0"


def test_a_joined_metric_makes_a_grid(con: Any, synthetic: Any) -> None:
    cells = synthetic.alpha.cells
    grid = build_residual_grid(con, "entropy_delta", pair="alpha", prompt=1, comparison="SB-SS")
    expected = cells[1, "identity", "SB"]["entropy"].astype(float) - cells[1, "identity", "SS"]["entropy"]
    assert np.allclose(grid.values, expected, rtol=1e-15)


def test_a_yes_or_no_metric_is_one_or_zero(con: Any, synthetic: Any) -> None:
    grid = build_residual_grid(con, "top1_agree", pair="alpha", prompt=0, comparison="BB-SS")
    assert np.array_equal(grid.values, synthetic.alpha.cells[0, "identity", "BB-SS"]["top1_agree"].astype(float))


def test_a_run_grid_has_nan_where_there_is_no_number(con: Any, synthetic: Any) -> None:
    grid = build_run_grid(con, "norm_delta", pair="alpha", prompt=0, run="SB")
    assert np.array_equal(grid.values, synthetic.alpha.cells[0, "identity", "SB"]["norm_delta"], equal_nan=True)
    assert np.isnan(grid.values[0]).all()
    assert next(iter(grid.rows())) == {"layer": -1, "position": 0, "token": "<s>", "norm_delta": None}


@pytest.mark.parametrize("slot", range(len(TRACKED)))
def test_logit_grids_of_either_side_and_their_difference(con: Any, synthetic: Any, slot: int) -> None:
    token = TRACKED[slot][0]
    base, sft = (
        synthetic.alpha.cells[0, "identity", n]["tracked_logits"][..., slot].astype(float) for n in ("BB", "BS")
    )
    for source, expected in (("base", base), ("sft", sft), ("diff", base - sft)):
        grid = build_logit_grid(con, token, source, pair="alpha", prompt=0, label="BB-BS")
        assert np.array_equal(grid.values, expected)
    one = build_logit_grid(con, token, record_type="runs", pair="alpha", prompt=0, label="BS")
    assert np.array_equal(one.values, sft)
    for made in (synthetic.alpha, synthetic.beta):
        for (prompt, variant, run), cells in made.cells.items():
            if "-" not in run:
                which = {"pair": made.pair, "prompt": prompt, "run": run, "variant": variant, "capture": made.capture}
                wanted = cells["tracked_logits"][..., slot].astype(float)
                for named in (which, which | {"capture": None}):
                    found = build_run_logit_grid(con, token, **named).values
                    assert np.array_equal(found, wanted[~np.isnan(wanted).all(axis=1)]), named


def test_top_k_delta_grids_hold_a_tokens_shift_where_it_is_in_the_list(con: Any, synthetic: Any) -> None:
    cells = synthetic.alpha.cells[0, "identity", "BB-SS"]
    for direction in ("increase", "decrease"):
        ids, shifts = cells[f"{direction}d_ids"], cells[f"{direction}d"]
        token = int(ids[1, 2, 1])
        grid = build_topk_delta_grid(con, token, direction, pair="alpha", prompt=0)
        first = np.argmax(ids == token, axis=-1)  # a made-up list may name a token twice
        picked = np.take_along_axis(shifts, first[..., None], axis=-1)[..., 0]
        expected = np.where((ids == token).any(axis=-1), picked.astype(float), np.nan)
        assert np.array_equal(grid.values, expected, equal_nan=True)
        assert np.isfinite(grid.values[1, 2])
    with pytest.raises(QueryError, match="no direction 'up'"):
        build_topk_delta_grid(con, 1, "up")  # type: ignore[arg-type]


def test_the_defaults_are_the_first_pair_and_prompt_and_bb_ss(con: Any) -> None:
    grid = build_residual_grid(con)
    assert (grid.metric, grid.pair, grid.prompt_idx, grid.variant, grid.label) == (
        "norm_diff",
        "alpha",
        0,
        "identity",
        "BB-SS",
    )
    assert build_run_grid(con, pair="beta").label == "BB"


def test_without_bb_ss_the_first_comparison_is_taken(tmp_path: Path) -> None:
    write_capture(tmp_path, make_capture("p", "c", ("BS", "SB"), 1, {(2, "reverse_sentences"): ["x"]}, {1}, 0))
    grid = build_residual_grid(open_run(str(tmp_path)))
    assert (grid.label, grid.prompt_idx, grid.variant) == ("BS-SB", 2, "reverse_sentences")


def test_the_sql_of_a_grid_gives_its_cells_where_a_name_has_a_question_mark_or_quote(tmp_path: Path) -> None:
    write_capture(tmp_path, make_capture("p", "c", ("BB", "SS"), 1, {(0, "what? it's"): ["x", "y"]}, {1}, 0))
    con = open_run(str(tmp_path))
    grid = build_residual_grid(con, "norm_diff")
    assert grid.sql
    cells = con.execute(f"{grid.sql} ORDER BY layer, position").fetchall()
    assert [value for _, _, value in cells] == grid.values.ravel().tolist()


def test_of_two_captures_of_a_pair_the_newer_is_taken_or_the_one_asked_for(tmp_path: Path) -> None:
    old, new = alpha(), alpha()
    new.capture = "ffff"
    for capture, time in ((old, 1_000_000), (new, 2_000_000)):
        os.utime(write_capture(tmp_path, capture) / "_COMPLETE", (time, time))
    con = open_run(str(tmp_path), all_captures=True)
    assert build_residual_grid(con).capture == "ffff"
    assert build_residual_grid(con, capture=ALPHA[:4]).capture == ALPHA
    with pytest.raises(QueryError, match=r"no capture '0012' here\. It is an older one .* all_captures=True"):
        build_residual_grid(open_run(str(tmp_path)), capture=ALPHA[:4])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"metric": "norm_dif"}, "no metric 'norm_dif'.*'norm_diff'"),
        ({"metric": "norm"}, "It is a metric of --record-type runs"),
        ({"pair": "alfa"}, "no pair 'alfa' here. Did you mean 'alpha'"),
        ({"pair": "alpha", "prompt": 9}, "no prompt '9' here. There are 0 to 1"),
        ({"pair": "alpha", "variant": "mirror"}, "no variant 'mirror' here. There are: identity"),
        ({"pair": "beta", "comparison": "BB-SB"}, "no comparison 'BB-SB' here. There are: BB-SS."),
        ({"capture": "zz"}, "no capture 'zz' here"),
    ],
)
def test_a_wrong_choice_says_what_there_is(con: Any, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(QueryError, match=said):
        build_residual_grid(con, **wrong)


def test_a_token_that_is_not_tracked_says_which_are(con: Any) -> None:
    with pytest.raises(QueryError, match=r"token 8 is not tracked. There are 7 \(agrees\), 9 \(no\)"):
        build_logit_grid(con, 8)
    with pytest.raises(QueryError, match="no logit source 'both'"):
        build_logit_grid(con, 7, "both")


def test_the_logit_of_a_token_is_of_a_capture_that_tracks_it(tmp_path: Path, call: Callable[..., Any]) -> None:
    first, old, new = alpha(), alpha(), alpha()
    first.pair, old.pair, new.pair = "a", "b", "b"
    first.capture, old.capture, new.capture = "c1", "c2", "c3"
    del first.tokens[1, "identity"]
    old.tracked = (TRACKED[0], (11, "maybe", "maybe"))
    for taken, time in ((first, 1_000_000), (old, 2_000_000), (new, 3_000_000)):
        os.utime(write_capture(tmp_path, taken) / "_COMPLETE", (time, time))
    con = open_run(str(tmp_path), all_captures=True)
    for options in ({}, {"pair": "b"}, {"capture": "c2"}, {"prompt": 1}):
        grid = build_logit_grid(con, 11, "base", **options)
        assert (grid.pair, grid.capture) == ("b", "c2")
        logits = alpha().cells[grid.prompt_idx, "identity", "BB"]["tracked_logits"][..., 1]
        assert np.array_equal(grid.values, logits)
    assert build_logit_grid(con, 7).capture == "c1"
    assert build_logit_grid(con, 9, prompt=1).capture == "c3"
    rows = tracked_token_trajectory(con, 11)
    assert [row["logit_base"] for row in rows] == build_logit_grid(con, 11, "base").values.ravel().tolist()
    answer = call("grid", tmp_path, "--token-id", 11)
    assert "capture c2, of the 2 of this pair the newest that tracks token 11;" in answer.out
    assert "capture c3, the newest of 2 of this pair;" in call("grid", tmp_path, "--pair", "b").out
    first.tracked, first.capture = ((12, "other", "other"),), "c4"
    write_capture(tmp_path, first)
    with pytest.raises(QueryError, match="no capture of these tracks token 12; of all captures: c4 of pair 'a'"):
        build_logit_grid(open_run(str(tmp_path), all_captures=True), 12, prompt=1)


def test_a_grid_of_an_older_capture_is_not_called_that_of_the_newest(tmp_path: Path, call: Callable[..., Any]) -> None:
    newer = make_capture("alpha", "ffff", ("SS",), 2, {(0, "identity"): ["x"]}, {0, 1, 2}, 0)
    for taken, time in ((alpha(), 1_000_000), (newer, 2_000_000)):
        os.utime(write_capture(tmp_path, taken) / "_COMPLETE", (time, time))
    assert (
        f"capture {ALPHA}, of the 2 of this pair the newest that has what is asked for;" in call("grid", tmp_path).out
    )
    assert f"capture {ALPHA}, of the 2 of" in call("grid", tmp_path, "--run", "SS", "--prompt", 1).out
    assert "capture ffff, the newest of 2 of this pair;" in call("grid", tmp_path, "--run", "SS").out


def test_an_empty_run_directory_says_so(tmp_path: Path) -> None:
    (tmp_path / "captures").mkdir()
    with pytest.raises(QueryError, match="no complete capture"):
        build_residual_grid(open_run(str(tmp_path)))


def test_positions_cut_values_and_tokens_together(con: Any) -> None:
    whole = build_residual_grid(con, pair="alpha", prompt=0)
    part = whole.at(1, 3)
    assert part.tokens == (" a", "\n")
    assert np.array_equal(part.values, whole.values[:, 1:3])
    assert whole.at(None, None).tokens == whole.tokens
    with pytest.raises(QueryError, match="no positions 7:; the prompt has 5 tokens"):
        whole.at(7, None)
    with pytest.raises(QueryError, match="no positions :0;"):
        whole.at(None, 0)
    for ends in ((-3, None), (None, -1)):
        with pytest.raises(QueryError, match=rf"no position {min(e for e in ends if e)}: they count from 0, to 4 here"):
            whole.at(*ends)


def test_two_figures_are_drawn_where_two_are_named(synthetic: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    answer = call("grid", synthetic.out, "--png", tmp_path / "a.png", "-o", tmp_path / "b.svg")
    assert (answer.code, answer.out) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.svg"]
    assert answer.err.count("wrote ") == 2


def test_a_grid_becomes_an_xarray(con: Any) -> None:
    pytest.importorskip("xarray")
    array = build_run_grid(con, "norm", pair="alpha").to_xarray()
    assert array.dims == ("layer", "position")
    assert float(array.sel(layer=-1, position=0)) == build_run_grid(con, "norm", pair="alpha").values[0, 0]
    assert array.token.values.tolist()[0] == "<s>"


def test_the_verb_prints_one_json_object_a_cell(synthetic: Any, call: Callable[..., Any]) -> None:
    rows = call("grid", synthetic.out, "--json").rows
    assert len(rows) == 4 * 5
    assert list(rows[0]) == ["layer", "position", "token", "kl_divergence"]


def test_the_verb_writes_csv_json_and_parquet_with_the_same_rows(
    synthetic: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    args = ("grid", synthetic.out, "--metric", "norm_delta", "--run", "SS", "--positions", "1:3")
    expected = call(*args, "--json").rows
    for ending in ("csv", "json", "parquet"):
        answer = call(*args, "-o", tmp_path / f"g.{ending}")
        assert (answer.code, answer.out) == (0, "")
        assert "wrote" in answer.err
    assert parquet.read_table(tmp_path / "g.parquet").to_pylist() == expected
    assert [json.loads(line) for line in (tmp_path / "g.json").read_text().splitlines()] == expected
    with (tmp_path / "g.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["token"] for r in rows] == [r["token"] for r in expected]
    assert [float(r["norm_delta"]) if r["norm_delta"] else None for r in rows] == [r["norm_delta"] for r in expected]


def test_a_grid_without_a_number_has_a_column_of_doubles_in_parquet_too(tmp_path: Path) -> None:
    write_capture(tmp_path / "out", make_capture("p", "c", ("BB", "SS"), 1, {(0, "identity"): ["x"]}, set(), 0))
    grid = build_residual_grid(open_run(str(tmp_path / "out")), "kl_divergence")
    assert np.isnan(grid.values).all()
    table = parquet.read_table(grid.save(tmp_path / "g.parquet"))
    assert str(table.schema.field("kl_divergence").type) == "double"
    assert table["kl_divergence"].null_count == len(table) == 3


def test_a_metric_of_passes_alone_shows_a_pass(synthetic: Any, call: Callable[..., Any]) -> None:
    assert call("grid", synthetic.out, "--metric", "entropy").out.startswith("entropy of BB, pair alpha, prompt 0")
    assert call("grid", synthetic.out, "--run", "SB").out.startswith("norm of SB, pair alpha")
    assert call("grid", synthetic.out, "--token-id", 9).out.startswith("logit 9 diff of BB-SS, pair alpha")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--comparison", "BB-SS", "--run", "BB"), "exclude each other"),
        (("--metric", "norm", "--comparison", "BB-SS"), "a metric of passes, and --comparison is not: --run BB"),
        (("--metric", "kl_div", "--run", "BB"), "a metric of comparisons, and --run is not: --comparison BB-SS"),
        (("--metric", "norm", "--token-id", "7"), "exclude each other"),
        (("--positions", "x:y"), "is not A:B"),
        (("--positions", "-3:"), "no position -3: they count from 0, to 4 here"),
        (("-o", "grid.txt"), "must end in .csv, .json, .parquet, .png"),
        (("--metric", "kl"), "no metric 'kl'"),
        (("--prompt", "9" * 44), "There are 0 to 1."),
        (("--prompt", "-" + "9" * 44), "There are 0 to 1."),
    ],
)
def test_a_wrong_call_exits_with_2(synthetic: Any, call: Callable[..., Any], args: tuple[str, ...], said: str) -> None:
    answer = call("grid", synthetic.out, *args)
    assert answer.code == 2
    assert said in answer.err
