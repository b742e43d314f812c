"""The report verb: every metric, every option, and numbers that numpy agrees with."""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from pyarrow import parquet
from synthetic import TRACKED, make_capture, write_capture

from analysis import make_report, open_run
from analysis.logits import membership_sql
from analysis.report import ask
from analysis.select import Filters
from analysis.summaries import fetch_rows

RUNS = ("norm", "norm_delta", "cosine_prev", "entropy")
PAIRWISE = (
    "norm_diff", "cosine_sim", "kl_div", "norm_base", "norm_sft", "entropy_base", "entropy_sft", "entropy_delta",
    "base_cosine_prev", "base_norm_delta", "sft_cosine_prev", "sft_norm_delta",
)  # fmt: skip


@pytest.mark.parametrize(
    ("record_type", "metric"), [*(("runs", m) for m in RUNS), *(("pairwise", m) for m in PAIRWISE)]
)
def test_every_metric_has_a_report(synthetic: Any, call: Callable[..., Any], record_type: str, metric: str) -> None:
    answer = call(
        "report", synthetic.out, "--record-type", record_type, "--metric", metric, "--pair", "alpha", "--json"
    )
    sections = answer.rows
    assert len(sections) == (4 if record_type == "runs" else 6) * 2
    for section in sections:
        (part,) = section["metrics"]
        assert part["metric"] == metric
        assert len(part["hotspots"]) == 5
        assert {"mean", "median", "min", "max", "std", "layer", "n"} <= set(part["statistics"][0])


def test_a_section_agrees_with_numpy(synthetic: Any, call: Callable[..., Any]) -> None:
    args = (
        "--pair",
        "alpha",
        "--prompt",
        0,
        "--comparison",
        "BS-SB",
        "--metric",
        "norm_diff",
        "--metric",
        "kl_reverse",
    )
    (section,) = call("report", synthetic.out, *args, "--top-n", 3, "--json").rows
    cells = synthetic.alpha.cells[0, "identity", "BS-SB"]
    first, second = section["metrics"]
    for part, name in ((first, "norm_diff"), (second, "kl_reverse")):
        values = cells[name].astype(np.float64)
        assert np.allclose([r["mean"] for r in part["statistics"]], values.mean(axis=1))
        assert np.allclose([r["std"] for r in part["statistics"]], values.std(axis=1))
        order = np.argsort(-np.abs(values), axis=None)[:3]
        found = [(h["layer"] + 1, h["position"]) for h in part["hotspots"]]
        assert found == [tuple(int(i) for i in np.unravel_index(o, values.shape)) for o in order]
    expected = np.corrcoef(cells["norm_diff"].ravel().astype(float), cells["kl_reverse"].ravel().astype(float))[0, 1]
    (found,) = section["correlations"]
    assert (found["metric"], found["with"]) == ("norm_diff", "kl_reverse")
    assert found["correlation"] == pytest.approx(expected)
    assert section["n_tokens"] == 5
    assert section["metadata"]["base_model"] == "org/base"
    assert section["text"] == "<s> a\n long-token界"


def test_statistics_by_token_name_the_tokens(synthetic: Any, call: Callable[..., Any]) -> None:
    args = (
        "--pair",
        "alpha",
        "--prompt",
        1,
        "--comparison",
        "BB-SS",
        "--axis",
        "token",
        "--metric",
        "kl_div",
        "--json",
    )
    (section,) = call("report", synthetic.out, *args).rows
    rows = section["metrics"][0]["statistics"]
    assert [(r["position"], r["token"]) for r in rows] == [(0, "<s>"), (1, " b"), (2, "c")]
    values = synthetic.alpha.cells[1, "identity", "BB-SS"]["kl_divergence"].astype(float)
    assert np.allclose([r["median"] for r in rows], np.median(values, axis=0))


def test_tracked_logits_show_their_means_and_largest_change(synthetic: Any, call: Callable[..., Any]) -> None:
    args = ("--pair", "alpha", "--prompt", 0, "--json")
    cells = synthetic.alpha.cells
    (section,) = call("report", synthetic.out, *args, "--comparison", "BB-SS").rows
    for slot, row in enumerate(section["tracked"]):
        base, sft = (cells[0, "identity", n]["tracked_logits"][..., slot].astype(float) for n in ("BB", "SS"))
        diff = base - sft
        assert (row["token_id"], row["name"]) == (TRACKED[slot][0], TRACKED[slot][2])
        assert np.allclose([row["base"], row["sft"], row["diff"]], [base.mean(), sft.mean(), diff.mean()])
        i, j = np.unravel_index(np.argmax(np.abs(diff)), diff.shape)
        assert (row["layer"] + 1, row["position"], row["largest"]) == (i, j, pytest.approx(diff[i, j]))
    (section,) = call("report", synthetic.out, *args, "--record-type", "runs", "--run", "SS").rows
    logits = cells[0, "identity", "SS"]["tracked_logits"][..., 0].astype(float)
    row = section["tracked"][0]
    assert np.allclose([row["mean"], row["min"], row["max"]], [logits.mean(), logits.min(), logits.max()])


@pytest.mark.parametrize("source", ["base", "sft", "diff"])
def test_a_token_id_adds_the_statistics_of_its_logit(synthetic: Any, call: Callable[..., Any], source: str) -> None:
    args = (
        "--pair",
        "alpha",
        "--prompt",
        0,
        "--comparison",
        "BB-SS",
        "--token-id",
        9,
        "--logit-source",
        source,
        "--json",
    )
    (section,) = call("report", synthetic.out, *args).rows
    part = section["metrics"][1]
    base, sft = (synthetic.alpha.cells[0, "identity", n]["tracked_logits"][..., 1].astype(float) for n in ("BB", "SS"))
    values = {"base": base, "sft": sft, "diff": base - sft}[source]
    assert part["metric"] == f"logit 9 {source}"
    assert np.allclose([r["max"] for r in part["statistics"]], values.max(axis=1))
    assert part["hotspots"][0]["value"] == pytest.approx(values.flat[np.argmax(np.abs(values))])


def test_exports_hold_every_cell_in_three_formats(synthetic: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    args = ("--pair", "alpha", "--comparison", "BB-SS", "--metric", "kl_div", "--metric", "norm_base", "--token-id", 7)
    for ending in ("csv", "json", "parquet"):
        assert call("report", synthetic.out, *args, "--export", tmp_path / f"rows.{ending}").code == 0
    rows = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert list(rows[0]) == [
        "pair", "capture", "prompt_idx", "variant", "comparison", "layer", "position", "token", "kl_div", "norm_base", "logit_7",
    ]  # fmt: skip
    assert len(rows) == 4 * (5 + 3)
    cells = synthetic.alpha.cells
    for row in rows:
        at = row["layer"] + 1, row["position"]
        p = row["prompt_idx"]
        assert row["kl_div"] == cells[p, "identity", "BB-SS"]["kl_divergence"][at]
        assert row["norm_base"] == cells[p, "identity", "BB"]["norm"][at]
        logits = (float(cells[p, "identity", n]["tracked_logits"][at][0]) for n in ("BB", "SS"))
        assert row["logit_7"] == next(logits) - next(logits)
    assert [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()] == rows
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [r["token"] for r in csv.DictReader(file)] == [r["token"] for r in rows]


def test_an_export_is_whole_where_nobody_reads_the_text(synthetic: Any, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does once it has its lines
    try:
        words = ["report", str(synthetic.out), "--export", str(tmp_path / "rows.csv")]
        done = subprocess.run(
            [sys.executable, "-m", "pairscope", *words], stdout=writer, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr.decode()) == (1, f"wrote {tmp_path / 'rows.csv'}\n")
    rows = list(csv.reader((tmp_path / "rows.csv").open(newline="")))
    assert len(rows) == 1 + 6 * 4 * (5 + 3) + 2 * 3 * 2


def test_what_is_no_finite_number_is_null_in_json(tmp_path: Path, call: Callable[..., Any]) -> None:
    capture = make_capture("p", "c", ("BB", "SS"), 1, {(0, "identity"): ["a", "b"]}, {-1, 0, 1}, 3)
    capture.cells[0, "identity", "SS"]["norm"][0, 1] = capture.cells[0, "identity", "BB-SS"]["norm_diff"][1, 0] = np.inf
    write_capture(tmp_path / "out", capture)
    for metric in ("norm_diff", "norm_delta"):
        report = ("report", tmp_path / "out", "--metric", metric, "--export", tmp_path / "rows.json")
        grid = ("grid", tmp_path / "out", "--metric", metric, "-o", tmp_path / "grid.json")
        for verb, file in ((report, "rows.json"), (grid, "grid.json")):
            assert call(*verb).code == 0
            text = (tmp_path / file).read_text()
            assert "nfinity" not in text, "which other readers of JSON refuse"
            rows = [json.loads(line) for line in text.splitlines()]
            assert len(rows) == 3 * 2
            assert sum(row[metric] is None for row in rows) == 1


def test_an_export_cannot_end_in_anything(synthetic: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    answer = call("report", synthetic.out, "--export", tmp_path / "rows.xlsx")
    assert (answer.code, "must end in" in answer.err) == (2, True)
    assert answer.out == "", "it is said before the report is made"
    answer = call("report", synthetic.out, "--export", tmp_path / "none" / "rows.csv")
    assert answer.out == ""
    assert (answer.code, "cannot write" in answer.err) == (1, True)


def test_the_text_has_an_overview_and_sections_and_says_what_is_left_out(
    synthetic: Any, call: Callable[..., Any]
) -> None:
    out = call("report", synthetic.out, "--limit", 2).out
    assert out.startswith("norm_diff [residual]: ")
    assert out.count("\n== ") == 2
    assert "(sections 1 to 2; --limit 0 shows all" in out
    assert call("report", synthetic.out, "--limit", 0).out.count("\n== ") == 6 * 2 + 1 * 2
    one = call("report", synthetic.out, "--pair", "alpha", "--prompt", 1, "--comparison", "BB-SS").out
    assert "== alpha, prompt 1, BB-SS: 3 tokens, trimmed from 5 ==" in one
    assert "sections 1 to" not in one
    assert '"<s> b"' not in one
    assert '  "<s> bc"' in one
    assert "tracked logits" in one
    assert "(mirror_halves)" in call("report", synthetic.out, "--pair", "beta").out


def test_the_largest_cells_of_all_name_the_variant_where_there_are_several(
    synthetic: Any, call: Callable[..., Any]
) -> None:
    lines = call("report", synthetic.out, "--pair", "beta", "--top-n", "12").out.splitlines()
    at = lines.index("  largest |norm_diff| of all")
    cells = [dict(zip(lines[at + 1].split(), line.split(), strict=True)) for line in lines[at + 2 : at + 14]]
    for cell in cells:
        i = synthetic.beta.layers.index(int(cell["layer"]))
        value = synthetic.beta.cells[0, cell["variant"], "BB-SS"]["norm_diff"][i, int(cell["position"])]
        assert float(cell["value"]) == pytest.approx(value, rel=1e-5)
    assert {cell["variant"] for cell in cells} == {"identity", "mirror_halves"}
    assert "variant" not in call("report", synthetic.out, "--pair", "alpha").out


def test_a_metric_without_numbers_says_so(tmp_path: Path, call: Callable[..., Any]) -> None:
    write_capture(tmp_path, make_capture("p", "c", ("BB", "SS"), 1, {(0, "identity"): ["x"]}, set(), 0))
    out = call("report", tmp_path, "--metric", "kl_div").out
    assert out.count("no cell has a number (was the lens on?)") == 2
    assert "no cell has a number" in call("grid", tmp_path).out


def test_sections_come_in_order_and_no_more_than_asked_for(con: Any) -> None:
    question = ask(con, "runs", ["norm"])
    sections = list(make_report(con, question))
    keys = [(s.pair, s.capture, s.prompt_idx, s.variant, s.label) for s in sections]
    assert keys == sorted(keys)
    assert len(keys) == len(set(keys)) == 4 * 2 + 2 * 2
    assert [s.label for s in make_report(con, question, 5)] == [k[-1] for k in keys[:5]]


def test_a_comparison_that_another_pair_alone_has_makes_no_sections_of_this_one(
    synthetic: Any, call: Callable[..., Any]
) -> None:
    rows = call("report", synthetic.out, "--comparison", "BB-BS", "--json").rows
    assert [(row["pair"], row["prompt_idx"]) for row in rows] == [("alpha", 0), ("alpha", 1)]
    assert "no cell" not in call("report", synthetic.out, "--record-type", "runs", "--run", "SB").out


def test_more_prompts_than_one_step_holds_are_all_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = {(i, "identity"): [f"t{i}"] for i in range(7)}
    made = make_capture("p", "c", ("BB",), 1, tokens, {1}, 0)
    write_capture(tmp_path, made)
    monkeypatch.setattr("analysis.report._BATCH", 3)
    con = open_run(str(tmp_path))
    sections = list(make_report(con, ask(con, "runs", ["norm"])))
    assert [s.prompt_idx for s in sections] == list(range(7))
    for s in sections:
        values = made.cells[s.prompt_idx, "identity", "BB"]["norm"]
        assert s.metrics[0].hotspots[0]["value"] == values.max()
        assert s.metrics[0].hotspots[0]["token"] == f"t{s.prompt_idx}"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--metric", "kl_dvi"), "Did you mean 'kl_div'"),
        (("--metric", "kl_div", "--metric", "nope"), "no metric 'nope'"),
        (("--record-type", "runs", "--metric", "norm_diff"), "It is a metric of --record-type pairwise"),
        (("--record-type", "runs", "--comparison", "BB-SS"), "--comparison is for --record-type pairwise"),
        (("--run", "BB"), "--run is for --record-type runs"),
        (("--token-id", "7", "--token-id", "1"), "token 1 is not tracked"),
        (
            ("--record-type", "runs", "--export", "x.csv", "--export-rows", "changes"),
            "logit changes are of comparisons",
        ),
        (("--axis", "head"), "Invalid value for '--axis'"),
        (("--top-n", "1000000"), "Invalid value for '--top-n'"),
        (("--min-logit", "nan"), "--min-logit nan is no size"),
        (("--min-logit", "1e999", "--token-id", "7"), "--min-logit inf is no size"),
        (("--prompt", "9" * 44), "There are 0 to 1."),
        (("--pair", "delta"), "no pair 'delta'"),
    ],
)
def test_a_wrong_call_exits_with_2(synthetic: Any, call: Callable[..., Any], args: tuple[str, ...], said: str) -> None:
    answer = call("report", synthetic.out, *args)
    assert answer.code == 2
    assert said in answer.err


def test_logit_changes_are_the_largest_of_each_section(synthetic: Any, call: Callable[..., Any]) -> None:
    args = ("--pair", "alpha", "--prompt", 0, "--comparison", "BB-SS", "--token-id", 9, "--top-n", 4, "--json")
    (section,) = call("report", synthetic.out, *args).rows
    cells = synthetic.alpha.cells
    base, sft = (cells[0, "identity", n]["tracked_logits"][..., 1].astype(float) for n in ("BB", "SS"))
    diff = base - sft
    order = np.argsort(-np.abs(diff), axis=None)[:4]
    places = [tuple(int(i) for i in np.unravel_index(o, diff.shape)) for o in order]
    assert [(r["layer"] + 1, r["position"]) for r in section["changes"]] == places
    for row, place in zip(section["changes"], places, strict=True):
        assert row["logit_diff"] == diff[place]
        assert row["norm_diff"] == cells[0, "identity", "BB-SS"]["norm_diff"][place]
        assert (row["token_id"], row["name"]) == (9, "no")
    assert all(abs(r["logit_diff"]) >= 0.5 for r in section["changes"])
    (section,) = call("report", synthetic.out, *args, "--min-logit", 99).rows
    assert section["changes"] == []


def test_a_token_id_says_how_often_it_is_among_the_largest_shifts(tmp_path: Path, call: Callable[..., Any]) -> None:
    made = make_capture("p", "c", ("BB", "SS"), 1, {(0, "identity"): ["x", "y"]}, {-1, 0, 1}, 0)
    cells = made.cells[0, "identity", "BB-SS"]
    cells["increased_ids"][:] = 1
    cells["increased_ids"][1, 0, 2] = cells["increased_ids"][2, 1, 0] = 7
    cells["decreased_ids"][:] = 2
    write_capture(tmp_path, made)
    (section,) = call("report", tmp_path, "--token-id", 7, "--json").rows
    (row,) = section["membership"]
    assert (row["token_id"], row["direction"], row["cells"]) == (7, "increased", 2)
    assert (row["layer"], row["position"]) in [(0, 0), (1, 1)]
    assert "among the largest shifts" in call("report", tmp_path, "--token-id", 7).out


def test_a_shift_that_is_no_number_is_not_among_the_largest(tmp_path: Path, call: Callable[..., Any]) -> None:
    made = make_capture("p", "c", ("BB", "SS"), 1, {(0, "identity"): ["x", "y"]}, {-1, 0, 1}, 0)
    cells = made.cells[0, "identity", "BB-SS"]
    cells["increased_ids"][:], cells["decreased_ids"][:] = [7, 1, 2], [1, 2, 3]
    cells["increased"][1:] = cells["decreased"][1:] = np.nan  # from layer 0 on the states overflowed
    write_capture(tmp_path, made)
    (section,) = call("report", tmp_path, "--token-id", 7, "--json").rows
    (row,) = section["membership"]
    assert (row["cells"], row["largest"]) == (2, cells["increased"][0, :, 0].max())


def test_of_equal_shifts_the_lower_layer_is_told_in_whatever_order_the_rows_come() -> None:
    # two layers that are the same to the lens have equal ones, and several threads read a long prompt
    con = duckdb.connect()
    con.execute(
        "CREATE TABLE topk_shift AS SELECT 'p' AS pair, 'c' AS capture, 0 AS prompt_idx, 'identity' AS variant, 'BB-SS' AS comparison, "
        "'decreased' AS direction, 7 AS token_id, layer::SMALLINT AS layer, position::INTEGER AS position, -2.5::FLOAT AS shift "
        "FROM range(3) AS a(layer), range(4) AS b(position) ORDER BY layer DESC, position DESC"
    )
    sql, values = membership_sql(Filters(), [7])
    assert fetch_rows(con, sql, values)[0].items() >= {"cells": 12, "largest": -2.5, "layer": 0, "position": 0}.items()


@pytest.mark.parametrize("kind", ["hotspots", "statistics", "changes"])
def test_the_rows_of_the_sections_are_exported_too(
    synthetic: Any, call: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    args = ("--pair", "alpha", "--prompt", 0, "--comparison", "BB-SS", "--metric", "norm_diff", "--metric", "kl_div")
    file = tmp_path / "rows.parquet"
    assert call("report", synthetic.out, *args, "--export", file, "--export-rows", kind).code == 0
    rows = parquet.read_table(file).to_pylist()
    (section,) = call("report", synthetic.out, *args, "--json").rows
    if kind == "changes":
        assert [r["logit_diff"] for r in rows][: len(section["changes"])] == [
            r["logit_diff"] for r in section["changes"]
        ]
        return
    expected = [{"metric": part["metric"], **row} for part in section["metrics"] for row in part[kind]]
    assert [{k: r[k] for k in e} for r, e in zip(rows, expected, strict=True)] == expected


def test_hand_made_numbers_give_the_report_that_is_worked_out_by_hand(tmp_path: Path, call: Callable[..., Any]) -> None:
    """Two layers, three tokens, numbers that halves hold exactly: every metric, statistic and hotspot is known."""
    from seed_files import write

    def cell(token: str, a: float) -> dict[str, Any]:
        return {
            "token": token, "top_k_increased": {"indices": [42], "values": [a]},
            "top_k_decreased": {"indices": [9], "values": [-a]}, "entropy_base": 2 * a, "entropy_sft": a,
            "kl_div": a / 2, "tracked_token_logits": {"42": {"base": a, "sft": -a}}, "cosine_sim": 1 - a / 16,
            "norm_base": 4 * a, "norm_sft": a, "norm_diff": 3 * a, "base_cosine_prev": 1 - a / 64,
            "base_norm_delta": a, "sft_cosine_prev": 1 - a / 32, "sft_norm_delta": -a,
        }  # fmt: skip

    numbers = {"0": {"0": 1.0, "1": 2.0, "2": 6.0}, "1": {"0": 24.0, "1": 4.0, "2": 8.0}}
    record = {
        "prompt": "abc", "tokens": ["a", "b", "c"], "metadata": {"prompt_idx": 0},
        "layers": {k: {i: cell("abc"[int(i)], a) for i, a in by.items()} for k, by in numbers.items()},
    }  # fmt: skip
    write(tmp_path / "f.json", [record])
    assert call("import-json", tmp_path / "f.json", "--out", tmp_path / "out", "--pair", "p").code == 0
    values = {  # of (layer 0: a = 1, 2, 6; last layer: a = 24, 4, 8), by the definitions of the report
        "norm_diff": (3, 6, 18, 72, 12, 24), "cosine_sim": (0.9375, 0.875, 0.625, -0.5, 0.75, 0.5),
        "kl_div": (0.5, 1, 3, 12, 2, 4), "norm_base": (4, 8, 24, 96, 16, 32), "norm_sft": (1, 2, 6, 24, 4, 8),
        "norm_delta": (3, 6, 18, 72, 12, 24), "entropy_base": (2, 4, 12, 48, 8, 16),
        "entropy_sft": (1, 2, 6, 24, 4, 8), "entropy_delta": (1, 2, 6, 24, 4, 8),
        "base_cosine_prev": (0.984375, 0.96875, 0.90625, 0.625, 0.9375, 0.875),
        "sft_cosine_prev": (0.96875, 0.9375, 0.8125, 0.25, 0.875, 0.75),
        "base_norm_delta": (1, 2, 6, 24, 4, 8), "sft_norm_delta": (-1, -2, -6, -24, -4, -8),
    }  # fmt: skip
    flags = [flag for metric in values for flag in ("--metric", metric)]
    (section,) = call("report", tmp_path / "out", *flags, "--token-id", 42, "--json").rows
    values["logit 42 diff"] = (2, 4, 12, 48, 8, 16)  # base - sft
    _agrees(section, values)
    first = next(p for p in section["metrics"] if p["metric"] == "norm_diff")["statistics"]
    assert [(r["mean"], r["median"], r["min"], r["max"]) for r in first] == [(9, 6, 3, 18), (36, 24, 12, 72)]
    assert [r["std"] for r in first] == pytest.approx([math.sqrt(42), math.sqrt(672)])
    (token,) = call("report", tmp_path / "out", "--axis", "token", "--json").rows
    by_token = token["metrics"][0]["statistics"]
    assert [(r["token"], r["mean"], r["std"], r["min"], r["max"]) for r in by_token] == [
        ("a", 37.5, 34.5, 3, 72),
        ("b", 9, 3, 6, 12),
        ("c", 21, 3, 18, 24),
    ]
    assert [c["correlation"] for c in section["correlations"] if c["with"] == "norm_base"] == [pytest.approx(1)]
    (tracked,) = section["tracked"]
    assert (tracked["base"], tracked["sft"], tracked["diff"], tracked["largest"]) == (7.5, -7.5, 15, 48)
    assert [r["logit_diff"] for r in section["changes"]] == [48, 16, 12, 8, 4]
    assert [(r["direction"], r["cells"], r["largest"]) for r in section["membership"]] == [("increased", 6, 24)]
    of_passes = {
        "BB": {"norm": values["norm_base"], "norm_delta": values["base_norm_delta"],
               "cosine_prev": values["base_cosine_prev"], "entropy": values["entropy_base"]},
        "SS": {"norm": values["norm_sft"], "norm_delta": values["sft_norm_delta"],
               "cosine_prev": values["sft_cosine_prev"], "entropy": values["entropy_sft"]},
    }  # fmt: skip
    flags = [flag for metric in RUNS for flag in ("--metric", metric)]
    runs = call("report", tmp_path / "out", "--record-type", "runs", *flags, "--json").rows
    assert [s["run"] for s in runs] == list(of_passes)
    for section in runs:
        _agrees(section, of_passes[section["run"]])


def _agrees(section: dict[str, Any], values: dict[str, tuple[float, ...]]) -> None:
    """All statistics and hotspots of a section are those of the values of three tokens, at layer 0 and at the last."""
    parts = {p["metric"]: p for p in section["metrics"]}
    assert set(parts) == set(values)
    places = [(0, 0, "a"), (0, 1, "b"), (0, 2, "c"), (2, 0, "a"), (2, 1, "b"), (2, 2, "c")]
    for metric, six in values.items():
        assert len(parts[metric]["statistics"]) == 2
        for row, layer, three in zip(parts[metric]["statistics"], (0, 2), (six[:3], six[3:]), strict=True):
            exact = {"layer": layer, "n": 3, "median": statistics.median(three), "min": min(three), "max": max(three)}
            assert {k: row[k] for k in exact} == exact, metric
            assert row["mean"] == pytest.approx(statistics.fmean(three), rel=1e-12), metric
            assert row["std"] == pytest.approx(statistics.pstdev(three), rel=1e-12), metric
            assert row["mean"] != row["median"], "numbers that tell the two apart"
        spots = sorted(((v, *place) for v, place in zip(six, places, strict=True)), key=lambda s: -abs(s[0]))[:5]
        found = [(h["value"], h["layer"], h["position"], h["token"]) for h in parts[metric]["hotspots"]]
        assert found == spots, metric


@pytest.fixture
def one_pass(tmp_path: Path) -> Path:
    write_capture(tmp_path, make_capture("p", "c", ("SS",), 1, {(0, "identity"): ["x", "y"]}, {0, 1}, 0))
    return tmp_path


def test_of_passes_alone_the_verbs_say_how_to_see_them(one_pass: Path, call: Callable[..., Any]) -> None:
    answer = call("report", one_pass)
    assert (answer.code, answer.err) == (
        2, "no comparison in what is asked for, passes alone: --record-type runs is of them",
    )  # fmt: skip
    assert call("report", one_pass, "--record-type", "runs").code == 0
    answer = call("grid", one_pass)
    assert (answer.code, answer.err) == (
        2,
        "pair 'p' has no comparison, passes alone: --run SS shows one (in Python run='SS')",
    )
    assert call("grid", one_pass, "--run", "SS").code == 0


def test_only_a_metric_of_the_lens_asks_for_the_lens(tmp_path: Path, call: Callable[..., Any]) -> None:
    made = make_capture("p", "c", ("BB", "SS"), 1, {(0, "identity"): ["x", "y"]}, set(), 0)
    made.cells[0, "identity", "BB-SS"]["norm_diff"][:] = np.inf
    write_capture(tmp_path, made)
    for metric, asks in (("norm_diff", False), ("kl_div", True), ("entropy_delta", True)):
        said = call("report", tmp_path, "--metric", metric).out
        assert ("was the lens on?" in said) is asks, metric
        assert "no cell has a number" in said, metric
