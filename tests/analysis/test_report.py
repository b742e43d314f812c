"""The report verb: every metric, every option, and numbers that numpy agrees with."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from synthetic import TRACKED, make_capture, write_capture

from analysis import make_report, open_run
from analysis.report import ask

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
        "--metric2",
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
    assert section["correlation"] == pytest.approx(expected)
    assert section["n_tokens"] == 5
    assert section["metadata"]["base_model"] == "org/base"
    assert section["text"] == "<s> a\n long-token界"


def test_statistics_by_token_name_the_tokens(synthetic: Any, call: Callable[..., Any]) -> None:
    args = ("--pair", "alpha", "--prompt", 1, "--comparison", "BB-SS", "--axis", "token", "--json")
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
        diff = sft - base
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
    values = {"base": base, "sft": sft, "diff": sft - base}[source]
    assert part["metric"] == f"logit 9 {source}"
    assert np.allclose([r["max"] for r in part["statistics"]], values.max(axis=1))
    assert part["hotspots"][0]["value"] == pytest.approx(values.flat[np.argmax(np.abs(values))])


def test_exports_hold_every_cell_in_three_formats(synthetic: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    args = ("--pair", "alpha", "--comparison", "BB-SS", "--metric", "kl_div", "--metric2", "norm_base", "--token-id", 7)
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
        logits = (float(cells[p, "identity", n]["tracked_logits"][at][0]) for n in ("SS", "BB"))
        assert row["logit_7"] == next(logits) - next(logits)
    assert [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()] == rows
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [r["token"] for r in csv.DictReader(file)] == [r["token"] for r in rows]


def test_an_export_cannot_end_in_anything(synthetic: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    answer = call("report", synthetic.out, "--export", tmp_path / "rows.xlsx")
    assert (answer.code, "must end in" in answer.err) == (2, True)
    answer = call("report", synthetic.out, "--export", tmp_path / "none" / "rows.csv")
    assert (answer.code, "cannot write" in answer.err) == (1, True)


def test_the_text_has_an_overview_and_sections_and_says_what_is_left_out(
    synthetic: Any, call: Callable[..., Any]
) -> None:
    out = call("report", synthetic.out, "--limit", 2).out
    assert out.startswith("kl_divergence [nats]: ")
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


def test_a_metric_without_numbers_says_so(tmp_path: Path, call: Callable[..., Any]) -> None:
    write_capture(tmp_path, make_capture("p", "c", ("BB", "SS"), 1, {(0, "identity"): ["x"]}, set(), 0))
    out = call("report", tmp_path).out
    assert out.count("no cell has a number (was the lens on?)") == 2
    assert "no cell has a number" in call("grid", tmp_path).out


def test_sections_come_in_order_and_no_more_than_asked_for(con: Any) -> None:
    question = ask(con, "runs", "norm")
    sections = list(make_report(con, question))
    keys = [(s.pair, s.capture, s.prompt_idx, s.variant, s.label) for s in sections]
    assert keys == sorted(keys)
    assert len(keys) == len(set(keys)) == 4 * 2 + 2 * 2
    assert [s.label for s in make_report(con, question, 5)] == [k[-1] for k in keys[:5]]


def test_more_prompts_than_one_step_holds_are_all_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = {(i, "identity"): [f"t{i}"] for i in range(7)}
    made = make_capture("p", "c", ("BB",), 1, tokens, {1}, 0)
    write_capture(tmp_path, made)
    monkeypatch.setattr("analysis.report._BATCH", 3)
    con = open_run(str(tmp_path))
    sections = list(make_report(con, ask(con, "runs", "norm")))
    assert [s.prompt_idx for s in sections] == list(range(7))
    for s in sections:
        values = made.cells[s.prompt_idx, "identity", "BB"]["norm"]
        assert s.metrics[0].hotspots[0]["value"] == values.max()
        assert s.metrics[0].hotspots[0]["token"] == f"t{s.prompt_idx}"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--metric", "kl_dvi"), "Did you mean 'kl_div'"),
        (("--metric2", "nope"), "no metric 'nope'"),
        (("--record-type", "runs", "--metric", "norm_diff"), "It is a metric of --record-type pairwise"),
        (("--record-type", "runs", "--comparison", "BB-SS"), "--comparison is for --record-type pairwise"),
        (("--run", "BB"), "--run is for --record-type runs"),
        (("--token-id", "1"), "token 1 is not tracked"),
        (("--axis", "head"), "Invalid value for '--axis'"),
        (("--pair", "delta"), "no pair 'delta'"),
    ],
)
def test_a_wrong_call_exits_with_2(synthetic: Any, call: Callable[..., Any], args: tuple[str, ...], said: str) -> None:
    answer = call("report", synthetic.out, *args)
    assert answer.code == 2
    assert said in answer.err
