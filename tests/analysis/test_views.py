"""Every view says what it declares, and what independent arithmetic says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from synthetic import ALPHA, COMPARISONS, PASSES, TRACKED, make_capture, write_capture

from analysis import open_run, write_catalog
from analysis.grids import grid_sql
from analysis.logits import changes_sql, membership_sql
from analysis.macros import NAMES
from analysis.metrics import find_metric, logit_metric
from analysis.select import Filters
from analysis.summaries import box_sql, cells_sql, correlation_sql, hotspots_sql, prompt_hotspots_sql, statistics_sql
from analysis.views import DERIVED, DUCKDB_TYPES, SQL_VIEWS, STORED_VIEWS, VIEWS, doc, stored_sql, view_sql

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("view", VIEWS, ids=lambda v: v.name)
def test_a_view_has_the_columns_and_types_it_declares(con: Any, view: Any) -> None:
    found = [(row[0], row[1]) for row in con.execute(f"DESCRIBE {view.name}").fetchall()]
    assert found == [(c.name, DUCKDB_TYPES[c.type]) for c in view.columns]


def test_every_column_carries_its_doc_in_a_catalog(synthetic: Any, tmp_path: Path) -> None:
    con = duckdb.connect(str(write_catalog(str(synthetic.out), str(tmp_path / "c.duckdb"))), read_only=True)
    sql = "SELECT table_name, column_name, comment FROM duckdb_columns() WHERE NOT internal"
    found = {(t, c): comment for t, c, comment in con.execute(sql).fetchall()}
    for view in VIEWS:
        for column in view.columns:
            assert found[view.name, column.name] == doc(column)


def test_only_complete_captures_are_in_the_tables(con: Any, synthetic: Any) -> None:
    for view in STORED_VIEWS:
        found = con.execute(f"SELECT DISTINCT pair FROM {view.name} ORDER BY 1").fetchall()
        written = any(synthetic.out.rglob(f"{view.name}*.parquet"))
        assert found == ([("alpha",), ("beta",)] if written else [])


def test_a_capture_id_of_digits_stays_text(con: Any) -> None:
    assert con.execute("SELECT DISTINCT capture FROM runs WHERE pair = 'alpha'").fetchall() == [(ALPHA,)]


def grid_of(con: Any, sql: str, shape: tuple[int, int]) -> np.ndarray:
    """The third column of rows (layer, position, number), as an array."""
    out = np.full(shape, np.nan)
    rows = con.execute(sql).fetchall()
    assert len(rows) == shape[0] * shape[1]
    for layer, position, value in rows:
        out[layer + 1, position] = np.nan if value is None else value
    return out


@pytest.mark.parametrize("run", PASSES)
def test_runs_hold_what_was_written_and_the_cosine(con: Any, synthetic: Any, run: str) -> None:
    cells = synthetic.alpha.cells[0, "identity", run]
    where = f"FROM runs WHERE pair = 'alpha' AND prompt_idx = 0 AND run = '{run}'"
    for name in ("norm", "norm_delta", "entropy", "next_token_logprob"):
        assert np.array_equal(
            grid_of(con, f"SELECT layer, position, {name} {where}", (4, 5)), cells[name], equal_nan=True
        )
    expected = 1 - cells["cosine_distance_prev"].astype(np.float64)
    assert np.array_equal(
        grid_of(con, f"SELECT layer, position, cosine_prev {where}", (4, 5)), expected, equal_nan=True
    )


@pytest.mark.parametrize(("a", "b"), COMPARISONS)
def test_pairwise_full_joins_each_side_with_its_own_pass(con: Any, synthetic: Any, a: str, b: str) -> None:
    cells = synthetic.alpha.cells
    p, base, sft = ({k: v.astype(np.float64) for k, v in cells[1, "identity", n].items()} for n in (f"{a}-{b}", a, b))
    expected = {
        "cosine_sim": 1 - p["cosine_distance"],
        "kl_div": p["kl_divergence"],
        "norm_base": base["norm"],
        "norm_sft": sft["norm"],
        "norm_delta": base["norm"] - sft["norm"],
        "norm_diff_relative": p["norm_diff"] / base["norm"],
        "entropy_base": base["entropy"],
        "entropy_sft": sft["entropy"],
        "entropy_delta": base["entropy"] - sft["entropy"],
        "base_cosine_prev": 1 - base["cosine_distance_prev"],
        "sft_cosine_prev": 1 - sft["cosine_distance_prev"],
        "base_norm_delta": base["norm_delta"],
        "sft_norm_delta": sft["norm_delta"],
    }
    joined = {c.name for v in SQL_VIEWS if v.name == "pairwise_full" for c in v.columns if c.name in v.derived}
    assert joined == {*expected, "comparison"}
    for name, values in expected.items():
        sql = (
            f"SELECT layer, position, {name} FROM pairwise_full "
            f"WHERE pair = 'alpha' AND prompt_idx = 1 AND comparison = '{a}-{b}'"
        )
        assert np.allclose(grid_of(con, sql, (4, 3)), values, rtol=1e-15, atol=0, equal_nan=True), name


def test_joins_neither_lose_nor_repeat_a_row(con: Any) -> None:
    def count(view: str) -> int:
        return int(con.execute(f"SELECT count(*) FROM {view}").fetchall()[0][0])

    assert count("pairwise") == 6 * 4 * (5 + 3) + 2 * 3 * 2
    assert count("pairwise_full") == count("pairwise")
    assert count("tracked_pairwise") == len(TRACKED) * count("pairwise")


def test_tracked_logits_have_a_row_per_token_and_their_difference(con: Any, synthetic: Any) -> None:
    base, sft = (synthetic.alpha.cells[0, "identity", n]["tracked_logits"].astype(np.float64) for n in ("BS", "SB"))
    for slot, (token, spelling, label) in enumerate(TRACKED):
        where = f"WHERE pair = 'alpha' AND prompt_idx = 0 AND token_id = {token}"
        one = grid_of(con, f"SELECT layer, position, logit FROM tracked {where} AND run = 'BS'", (4, 5))
        assert np.array_equal(one, base[..., slot])
        for column, expected in (("base", base), ("sft", sft), ("diff", base - sft)):
            sql = f"SELECT layer, position, {column} FROM tracked_pairwise {where} AND comparison = 'BS-SB'"
            assert np.array_equal(grid_of(con, sql, (4, 5)), expected[..., slot])
        names = con.execute(f"SELECT DISTINCT token, label FROM tracked {where}").fetchall()
        assert names == [(spelling, label)]


def test_cells_without_a_lens_have_no_tracked_rows_in_runs_and_nulls_in_comparisons(con: Any) -> None:
    layers = "SELECT DISTINCT layer FROM {} WHERE pair = 'beta' AND {} IS NOT NULL"
    assert con.execute(layers.format("tracked", "logit")).fetchall() == [(1,)]
    assert con.execute(layers.format("tracked_pairwise", "diff")).fetchall() == [(1,)]


def test_top_k_lists_explode_by_rank_with_text_where_it_is_known(con: Any, synthetic: Any) -> None:
    cells = synthetic.alpha.cells[0, "identity", "SS"]
    rows = con.execute(
        "SELECT rank, token_id, token, logit FROM topk "
        "WHERE pair = 'alpha' AND prompt_idx = 0 AND run = 'SS' AND layer = 1 AND position = 2 ORDER BY rank"
    ).fetchall()
    ids, logits = cells["ids"][2, 2].tolist(), cells["logits"][2, 2].tolist()
    texts = {10 * p + i: t for (p, _), ts in synthetic.alpha.tokens.items() for i, t in enumerate(ts)}
    tracked = {token: spelling for token, spelling, _ in TRACKED}
    assert rows == [
        (r + 1, i, texts.get(i, tracked.get(i)), v) for r, (i, v) in enumerate(zip(ids, logits, strict=True))
    ]


def test_top_k_shifts_explode_both_ways(con: Any, synthetic: Any) -> None:
    cells = synthetic.alpha.cells[1, "identity", "BB-SS"]
    rows = con.execute(
        "SELECT direction, rank, token_id, shift FROM topk_shift WHERE pair = 'alpha' AND prompt_idx = 1 "
        "AND comparison = 'BB-SS' AND layer = 0 AND position = 1 ORDER BY direction DESC, rank"
    ).fetchall()
    expected = [
        (way, r + 1, int(cells[f"{way}_ids"][1, 1, r]), float(cells[way][1, 1, r]))
        for way in ("increased", "decreased")
        for r in range(3)
    ]
    assert rows == expected


@pytest.mark.parametrize("view", ["topk", "topk_shift"])
def test_the_text_of_a_listed_token_is_its_own_captures(con: Any, view: str) -> None:
    decoded: dict[tuple[str, int], set[str]] = {}
    for pair, token_id, text in con.execute(
        "SELECT pair, token_id, token FROM tokens UNION ALL SELECT pair, token_id, token FROM vocabulary"
    ).fetchall():
        decoded.setdefault((pair, token_id), set()).add(text)
    spelled = con.execute("SELECT pair, token_id, token FROM tracked_tokens WHERE token <> ''").fetchall()
    spelling = {(pair, token_id): text for pair, token_id, text in spelled}
    listed = con.execute(f"SELECT DISTINCT pair, token_id, token FROM {view}").fetchall()
    for pair, token_id, text in listed:
        assert text in decoded.get((pair, token_id), {spelling.get((pair, token_id))}), (pair, token_id)
    ids = {pair: {token_id for p, token_id, _ in listed if p == pair} for pair in ("alpha", "beta")}
    both = ids["alpha"] & ids["beta"]
    assert any(decoded.get(("alpha", i), set()).isdisjoint(decoded.get(("beta", i), {"?"})) for i in both)


def test_where_a_state_overflowed_no_token_is_among_the_largest(tmp_path: Path) -> None:
    made = make_capture("p", "c", ("BB", "SS"), 1, {(0, "identity"): ["x", "y"]}, {-1, 0, 1}, 0)
    for label, lists in (("SS", ("logits",)), ("BB-SS", ("increased", "decreased"))):
        for name in lists:
            made.cells[0, "identity", label][name][1, 0] = np.nan  # layer 0, position 0
    write_capture(tmp_path, made)
    with open_run(str(tmp_path)) as con:
        cell = "(layer = 0 AND position = 0)"
        counts = f"count(*) FILTER ({cell}), count(*) FILTER (NOT {cell})"
        assert con.execute(f"SELECT {counts} FROM topk WHERE run = 'SS'").fetchall() == [(0, 15)]
        assert con.execute(f"SELECT {counts} FROM topk WHERE run = 'BB'").fetchall() == [(3, 15)]
        assert con.execute(f"SELECT {counts} FROM topk_shift").fetchall() == [(0, 30)]


def golden_queries() -> dict[str, str]:
    """Every piece of SQL that is put together in Python."""
    where = Filters(pair="p", capture="c", prompt=3, variant="identity", label="BB-SS", between=(0, 9))
    cheap, joined = find_metric("pairwise", "kl_div"), find_metric("pairwise", "norm_base")
    both, _ = cells_sql(cheap, where, joined)
    few, _ = cells_sql(find_metric("runs", "norm"), Filters(label="BB"))
    return {
        "runs_empty": stored_sql("runs"),
        "runs_files": stored_sql("runs", ["/a/it's.parquet", "/b/2.parquet"]),
        "pairwise_source": stored_sql("pairwise", ["x"], source="_files_pairwise"),
        "prompts_relocatable": stored_sql("prompts", ["/captures/1.parquet"], root="run_directory()"),
        "logit_changes": changes_sql(where, [7, 9], per_prompt=5)[0],
        "membership": membership_sql(where, [7])[0],
        "grid_cheap": grid_sql(cheap),
        "grid_joined": grid_sql(joined),
        "grid_logit": grid_sql(logit_metric("pairwise", 7, "sft")),
        "cells_two_metrics": both,
        "statistics_by_token": statistics_sql(few, "token"),
        "prompt_hotspots": prompt_hotspots_sql(few, 5),
        "hotspots": hotspots_sql(few, 5),
        "box": box_sql(few),
        "correlation": correlation_sql(both),
    }


@pytest.mark.parametrize("name", golden_queries())
def test_the_sql_is_the_golden_sql(name: str) -> None:
    """PAIRSCOPE_WRITE_GOLDEN=1 writes it anew; then read the difference."""
    path, sql = GOLDEN / f"{name}.sql", golden_queries()[name] + "\n"
    if os.environ.get("PAIRSCOPE_WRITE_GOLDEN"):
        path.write_text(sql)
    assert path.read_text() == sql


def test_each_view_over_several_tables_and_each_macro_has_its_sql_file_and_no_file_is_left_over() -> None:
    from analysis.views import SQL_DIR

    assert sorted(p.stem for p in SQL_DIR.glob("*.sql")) == sorted([*(v.name for v in SQL_VIEWS), *NAMES])
    assert all(view_sql(v.name) for v in SQL_VIEWS)
    assert set(DERIVED) <= {v.name for v in STORED_VIEWS}
