"""docs/sql.md: thirty questions, and each query gives an answer."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import PASSES, alpha, beta, keep_layers, make_capture, write_attempt, write_capture

import analysis
from analysis.macros import NAMES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "sql.md").read_text(encoding="utf-8")
QUESTIONS = re.findall(r"^### (\d+)\. (.+?)\n(.*?)```sql\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pair of the page, with a noise floor, next to another."""
    out = tmp_path_factory.mktemp("sql")
    made = alpha()
    made.pair = "pydoc"
    path = write_capture(out, made) / "capture.json"
    floors = {p: {k: [0.1] * 4 for k in ("norm_diff", "norm_diff_relative", "cosine_distance")} for p in PASSES}
    noise = {"measured": True, "by_run_and_layer": floors}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"noise_floor": noise}))
    write_capture(out, beta())
    write_attempt(out, "1", entry="pydoc", state="complete", started="2025-01-01T00:00:01.000")
    with analysis.open(str(out)) as opened:
        yield opened


def test_there_are_thirty_questions_in_order() -> None:
    assert [int(n) for n, *_ in QUESTIONS] == list(range(1, 31))
    assert all(title.endswith("?") for _, title, *_ in QUESTIONS)


@pytest.mark.parametrize(("number", "query"), [(n, sql) for n, _, _, sql in QUESTIONS])
def test_a_query_of_the_page_has_an_answer(run: Any, number: str, query: str) -> None:
    table = run.arrow(query)
    assert table.num_rows > 0, query
    for name in table.column_names:
        nothing = table.column(name).null_count == table.num_rows
        assert not nothing or name in ("error", "error_class", "seconds", "n_tokens"), (
            f"{name} of question {number} is always null"
        )


def test_every_macro_that_is_asked_by_name_is_shown() -> None:
    shown = " ".join(sql for *_, sql in QUESTIONS)
    for name in NAMES:
        if name not in ("latest", "cells_source", "cells", "run_grid"):
            assert f"{name}(" in shown, name


def rounded(table: Any) -> list[dict[str, Any]]:
    """Rows with nine digits: sums are made in any order."""
    return [{k: float(f"{v:.9g}") if isinstance(v, float) else v for k, v in row.items()} for row in table.to_pylist()]


def test_an_older_capture_of_the_pair_changes_no_answer(run: Any, tmp_path: Path) -> None:
    """Other prompts, swept into the same directory before."""
    out = tmp_path / "out"
    shutil.copytree(run.out, out)  # with the times of the markers
    older = make_capture(
        "pydoc", "fffe", PASSES, 2, {(0, "identity"): ["<s>", "x"], (7, "other"): ["y"]}, set(range(-1, 3)), 9
    )
    path = write_capture(out, older)
    said = json.loads((path / "capture.json").read_text())
    noise = json.loads(next(out.glob(f"captures/*/capture={alpha().capture}/capture.json")).read_text())["noise_floor"]
    (path / "capture.json").write_text(json.dumps(said | {"noise_floor": noise}))
    os.utime(path / "_COMPLETE", (1_000_000, 1_000_000))
    with analysis.open(str(out)) as both, analysis.open(str(out), all_captures=True) as every:
        assert both.arrow("SELECT 1 FROM captures WHERE pair = 'pydoc'").num_rows == 2
        differ = []
        for number, title, _, query in QUESTIONS[2:]:  # the first two ask which captures and attempts there are
            expected = rounded(run.arrow(query))
            assert rounded(both.arrow(query)) == expected, f"{number}. {title}"
            differ += [number] if rounded(every.arrow(query)) != expected else []
    assert len(differ) > 20, "with all captures the older one is seen"


def test_a_question_about_one_prompt_is_about_one_variant_of_it(tmp_path: Path) -> None:
    answers = []
    for name, tokens in (("one", {}), ("two", {(0, "other"): ["x", "y", "z", "x", "y", "z"]})):
        both = {(0, "identity"): ["<s>", "a", "b"]} | tokens
        write_capture(tmp_path / name, make_capture("pydoc", "c", PASSES, 2, both, {-1, 0, 1, 2}, 1))
        with analysis.open(str(tmp_path / name)) as run:
            # ids alone: the vocabulary of a made-up capture is of all its prompts
            answers.append([run.arrow(sql.replace("coalesce(token, token_id::VARCHAR)", "token_id")).to_pylist()
                            for n, _, _, sql in QUESTIONS if int(n) in (4, 11, 12, 13, 24)])  # fmt: skip
    assert answers[0] == answers[1]


def test_the_cells_that_stand_out_in_one_comparison_are_as_many_as_asked_for(run: Any) -> None:
    (query,) = [sql for number, _, _, sql in QUESTIONS if number == "9"]
    found = run.sql(query).fetchall()
    assert len(found) == 20
    assert {label for label, *_ in found} == {"BB-SS"}


def test_passes_make_up_their_mind_at_a_layer_that_the_lens_reads(tmp_path: Path) -> None:
    made = make_capture("pydoc", "c", ("BB",), 6, {(0, "identity"): ["a", "b"]}, {0, 3, 6}, 1)
    made = keep_layers(made, 0, 3, 6)
    made.cells[0, "identity", "BB"]["ids"][:, :, 0] = [[1, 2], [7, 2], [7, 2]]  # from layer 3 on, and from layer 0 on
    write_capture(tmp_path / "out", made)
    (query,) = [sql for number, _, _, sql in QUESTIONS if number == "28"]
    with analysis.open(str(tmp_path / "out")) as run:
        assert run.sql(query).fetchall() == [("pydoc", "BB", 1.5, 1.5)]


def test_a_pass_whose_last_states_overflow_has_not_made_up_its_mind(tmp_path: Path) -> None:
    made = make_capture("pydoc", "c", ("BB",), 2, {(0, "identity"): ["a", "b", "c"]}, {-1, 0, 1, 2}, 1)
    cells = made.cells[0, "identity", "BB"]
    cells["ids"][:, :, 0] = 7
    cells["logits"][2:, 0] = np.nan  # the first token from layer 1 on
    cells["logits"][1, 1] = np.nan  # the second at layer 0 alone: what it said there is not known
    write_capture(tmp_path / "out", made)
    (query,) = [sql for number, _, _, sql in QUESTIONS if number == "28"]
    with analysis.open(str(tmp_path / "out")) as run:
        assert run.sql(query).fetchall() == [("pydoc", "BB", 0, 0)]  # of the second 1, of the third -1


def test_one_state_that_overflows_does_not_take_the_mean_of_its_layer(tmp_path: Path) -> None:
    made = make_capture("pydoc", "c", ("BB", "SS"), 1, {(0, "identity"): ["a", "b", "c"]}, {-1, 0, 1}, 1)
    both, sft = made.cells[0, "identity", "BB-SS"], made.cells[0, "identity", "SS"]
    sft["norm"][1, 0] = both["norm_diff"][1, 0] = both["cosine_distance"][1, 0] = np.inf
    write_capture(tmp_path / "out", made)
    queries = {number: sql for number, _, _, sql in QUESTIONS}
    with analysis.open(str(tmp_path / "out")) as run:
        delta, turned = run.sql(queries["16"]).fetchall()[1][1:]
        (differ,) = [row[3] for row in run.sql(queries["30"]).fetchall() if row[2] == 0]
    norms = made.cells[0, "identity", "BB"]["norm"][1, 1:].astype(float) - sft["norm"][1, 1:]
    assert delta == pytest.approx(norms.mean())
    assert turned == pytest.approx(both["cosine_distance"][1, 1:].mean(), rel=1e-6)
    assert differ == pytest.approx(both["norm_diff"][1, 1:].mean(), rel=1e-6)


def test_prompts_are_ranked_at_the_last_layer_that_the_lens_reads(tmp_path: Path) -> None:
    tokens = {(0, "identity"): ["a", "b"], (1, "identity"): ["c"]}
    made = make_capture("pydoc", "c", ("BB", "SS"), 3, tokens, {0, 2}, 1)
    for prompt, size in ((0, 1), (1, 2)):
        made.cells[prompt, "identity", "BB-SS"]["kl_divergence"][3] = size  # layer 2 of -1 to 3
    write_capture(tmp_path / "out", made)
    (query,) = [sql for number, _, _, sql in QUESTIONS if number == "15"]
    with analysis.open(str(tmp_path / "out")) as run:
        assert [row[:3] for row in run.sql(query).fetchall()] == [("pydoc", 1, 2), ("pydoc", 0, 1)]


def test_the_depth_at_which_pairs_differ_is_between_0_and_1(tmp_path: Path) -> None:
    for pair, most in (("entry", 0), ("third", 1), ("end", 3)):
        made = make_capture(pair, f"c{most}", ("BB", "SS"), 2, {(0, "identity"): ["a", "b"]}, {-1, 0, 1, 2}, 1)
        made.cells[0, "identity", "BB"]["norm"][:] = 1
        made.cells[0, "identity", "BB-SS"]["norm_diff"][most] = 100
        write_capture(tmp_path / "out", made)
    (query,) = [sql for number, _, _, sql in QUESTIONS if number == "29"]
    with analysis.open(str(tmp_path / "out")) as run:
        depths = {pair: depth for pair, _, depth in run.sql(query).fetchall()}
    assert depths == {"entry": 0, "third": pytest.approx(1 / 3), "end": 1}


def test_the_depth_is_a_share_of_the_model_where_its_last_layers_are_left_out(tmp_path: Path) -> None:
    made = make_capture("pair", "c", ("BB", "SS"), 7, {(0, "identity"): ["a", "b"]}, {-1, 1, 3}, 1)
    made = keep_layers(made, -1, 1, 3)
    made.cells[0, "identity", "BB"]["norm"][:] = 1
    made.cells[0, "identity", "BB-SS"]["norm_diff"][2] = 100
    write_capture(tmp_path / "out", made)
    (query,) = [sql for number, _, _, sql in QUESTIONS if number == "29"]
    with analysis.open(str(tmp_path / "out")) as run:
        assert [depth for _, _, depth in run.sql(query).fetchall()] == [0.5]
