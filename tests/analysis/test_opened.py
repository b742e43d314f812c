"""analysis.open: lazy relations, Arrow tables, grids and stacks; nothing can be written, no other file be read."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from synthetic import ALPHA, alpha, write_capture

import analysis
from analysis import QueryError, open_run, stack
from analysis.grid import Grid


@pytest.fixture(scope="module")
def run(synthetic: Any) -> Any:
    with analysis.open(str(synthetic.out)) as opened:
        yield opened


def test_a_view_is_a_lazy_relation(run: Any) -> None:
    relation = run.pairwise.filter("pair = 'alpha'").aggregate("comparison, count(*) AS n").order("comparison")
    assert relation.limit(1).fetchall() == [("BB-BS", 4 * 8)]
    assert run.sql("FROM hotspots('norm_diff', 3)").shape == (3, 9)
    with pytest.raises(AttributeError, match=r"no view 'pairwis'. Did you mean 'pairwise'"):
        run.pairwis  # noqa: B018
    assert "pairwise_full" in dir(run)
    assert "2 captures of 2 pairs" in repr(run)
    assert "alpha" in run._repr_html_()


def test_answers_come_as_arrow(run: Any) -> None:
    table = run.arrow("SELECT norm, layer FROM runs WHERE pair = 'alpha' AND prompt_idx = 0 AND run = 'BB'")
    assert isinstance(table, pa.Table)
    assert table.schema.field("norm").type == pa.float32()
    assert run.arrow("prompts").num_rows == 4


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("COPY runs TO 'x.csv'", "is not a query"),
        ("CREATE TABLE t (a INT)", "is not a query"),
        ("EXPLAIN ANALYZE COPY runs TO 'x.csv'", "is not a query"),
        ("EXPLAIN (ANALYZE) COPY runs TO 'x.csv'", "is not a query"),
        ("WITH x AS (COPY runs TO 'x.csv') SELECT * FROM x", "is not a query"),
        ("FROM (with x AS (/* */ delete FROM captures RETURNING *) FROM x)", "is not a query"),
        ("WITH x AS (UPDATE captures SET pair = 'a' RETURNING *) FROM x", "is not a query"),
        ("WITH x AS (INSERT INTO captures FROM captures RETURNING *) FROM x", "is not a query"),
        ("WITH x AS (CREATE TABLE t AS SELECT 1) FROM x", "CTE body must be"),
        ("FROM checkpoint()", "is not a query"),
        ("SELECT 1; SELECT 2", "expected one query"),
        ("FROM read_text('/etc/hostname')", "Only files of the run directory"),
        ("FROM '/etc/hostname'", "does not exist"),
        ("FROM local", "does not exist"),
        ("FROM read_csv('/etc/passwd')", "Only files of the run directory"),
        ("FROM hotspots('nrm', 1)", "no metric 'nrm'"),
    ],
)
def test_nothing_is_written_and_no_other_file_is_read(run: Any, query: str, said: str) -> None:
    local = pa.table({"a": [1]})
    assert local.num_rows == 1
    with pytest.raises(QueryError, match=said):
        run.arrow(query)


def test_settings_are_locked_and_files_of_the_run_can_be_read(run: Any, synthetic: Any) -> None:
    import duckdb

    with pytest.raises(duckdb.Error, match="locked"):
        run._con.execute("SET enable_external_access = true")
    (file,) = (synthetic.out / "captures" / "pair=alpha").rglob("prompts.parquet")
    assert run.arrow(f"FROM read_parquet('{str(file).replace(chr(39), chr(39) * 2)}')").num_rows == 2


def test_other_files_are_read_where_that_is_asked_for(synthetic: Any, tmp_path: Path, call: Any) -> None:
    (tmp_path / "more.csv").write_text("a,b\n1,2\n")
    query = f"SELECT b FROM read_csv('{tmp_path / 'more.csv'}')"
    assert call("sql", synthetic.out, query).code == 2
    assert call("sql", synthetic.out, query, "--any-file", "--json").rows == [{"b": 2}]
    with analysis.open(str(synthetic.out), any_file=True) as opened:
        assert opened.sql(query).fetchall() == [(2,)]


@pytest.mark.parametrize("below", ["captures", "captures/pair=alpha", f"captures/pair=alpha/capture={ALPHA}"])
def test_captures_that_lie_on_another_disk_behind_a_link_can_be_asked(
    synthetic: Any, tmp_path: Path, call: Any, below: str
) -> None:
    out, disk = tmp_path / "out", tmp_path / "disk"
    shutil.copytree(synthetic.out, out)
    (out / below).rename(disk)
    (out / below).symlink_to(disk)
    secret = tmp_path / "elsewhere" / "more.csv"
    secret.parent.mkdir()
    secret.write_text("a,b\n1,2\n")
    (out / "captures" / "pair=beta" / "capture=none").symlink_to(secret.parent)
    asked = "SELECT count(*) AS n FROM runs WHERE pair = 'alpha'"
    assert call("sql", out, asked, "--json").rows == call("sql", synthetic.out, asked, "--json").rows
    for more in ((), ("--include-partial",)):
        assert call("sql", out, f"FROM read_csv('{secret}')", *more).code == 2, (
            "a link to what is no capture opens nothing"
        )


def test_what_does_not_fit_in_memory_still_spills_in_the_sandbox(run: Any) -> None:
    import duckdb

    sql = "SELECT m FROM (SELECT md5(i::VARCHAR) AS m FROM range(800000) t(i)) ORDER BY m LIMIT 1 OFFSET 700000"
    for spills in (True, False):
        con = open_run(run.out)
        con.execute("SET memory_limit = '20MB'")
        con.execute("SET threads = 1")
        if not spills:
            con.execute("SET max_temp_directory_size = '0KB'")
        con.execute("SET enable_external_access = false")
        if spills:
            assert len(con.execute(sql).fetchall()) == 1
        else:
            with pytest.raises(duckdb.OutOfMemoryException):
                con.execute(sql)


def test_grids_of_comparisons_passes_and_tracked_tokens(run: Any, synthetic: Any) -> None:
    cells = synthetic.alpha.cells
    assert np.array_equal(
        run.grid("norm_diff", prompt=0, pair="alpha").values, cells[0, "identity", "BB-SS"]["norm_diff"]
    )
    assert np.array_equal(run.grid(run="SB", pair="alpha").values, cells[0, "identity", "SB"]["norm"])
    assert run.grid("entropy", pair="alpha").label == "BB"
    logit = run.grid(token_id=9, source="sft", pair="alpha", prompt=0)
    assert np.array_equal(logit.values, cells[0, "identity", "SS"]["tracked_logits"][..., 1])
    for wrong in ({"metric": "norm", "token_id": 9}, {"comparison": "BB-SS", "run": "BB"}, {"token_id": 1}):
        with pytest.raises(QueryError):
            run.grid(**wrong)


def test_a_grid_knows_where_it_comes_from_and_its_query_gives_it_again(run: Any) -> None:
    grid = run.grid("norm_delta", comparison="BS-SB", pair="alpha", prompt=1)
    assert grid.provenance["base_model"] == "org/base"
    assert grid.provenance["dtype"] == "float32"
    again = run.arrow(grid.sql).to_pylist()
    assert {(r["layer"], r["position"]): r["value"] for r in again} == {
        (layer, position): grid.values[i, j]
        for i, layer in enumerate(grid.layers)
        for j, position in enumerate(grid.positions)
    }
    assert repr(grid) == "<Grid norm_delta of BS-SB, pair alpha, prompt 1: 4 layers x 3 tokens [residual]>"


def test_filters_keep_values_labels_and_masks_together(run: Any) -> None:
    grid = run.grid("norm_diff", pair="alpha", prompt=0)
    part = grid.filter_layers(lambda layer: 0 <= layer < 2).filter_tokens(lambda position, token: token.strip() != "")
    assert part.layers.tolist() == [0, 1]
    assert part.tokens == ("<s>", " a", " long-token", "界")
    assert np.array_equal(part.values, grid.values[1:3][:, [0, 1, 3, 4]])
    assert grid.special == (True, False, False, False, False)
    assert grid.mask(special=True).positions.tolist() == [1, 2, 3, 4]
    assert grid.mask(first=3, special=True).positions.tolist() == [3, 4]
    z = grid.z_scores()
    assert np.allclose(z.mean(axis=1), 0)
    assert np.allclose(z.std(axis=1), 1)


@pytest.mark.parametrize("n", range(2, 12))
def test_equal_values_have_no_z_score_however_their_mean_is_rounded(run: Any, n: int) -> None:
    values = np.array([[0.1] * n + [np.nan], [np.nan] * (n + 1), [0.0] * n + [1.0]])
    grid = run.grid("norm_diff", pair="alpha", prompt=0)
    z = replace(grid, values=values, layers=np.arange(3), positions=np.arange(n + 1)).z_scores()
    assert np.isnan(z[:2]).all()
    assert np.isfinite(z[2]).all()


def test_a_grid_becomes_pandas_and_a_file(run: Any, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    grid = run.grid("norm_diff", pair="alpha", prompt=1)
    frame = grid.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc[1, (2, "c")] == grid.values[2, 2]
    assert grid.save(tmp_path / "g.csv").read_text().splitlines()[0] == "layer,position,token,norm_diff"
    with pytest.raises(QueryError, match="must end in"):
        grid.save(tmp_path / "g.xlsx")


def test_the_six_comparisons_are_one_labelled_array(run: Any, synthetic: Any) -> None:
    pytest.importorskip("xarray")
    six = run.stack("norm_diff", pair="alpha", prompt=0)
    assert six.labels == ("BB-BS", "BB-SB", "BB-SS", "BS-SB", "BS-SS", "SB-SS")
    assert six.values.shape == (6, 4, 5)
    array = six.to_xarray()
    assert array.dims == ("comparison", "layer", "position")
    expected = synthetic.alpha.cells[0, "identity", "BS-SB"]["norm_diff"]
    assert np.array_equal(array.sel(comparison="BS-SB"), expected)
    assert array.sel(layer=-1, position=2, comparison="SB-SS").token == "\n"
    assert np.array_equal(six["BS-SB"].values, expected)
    assert six.mask(first=1).filter_layers(lambda layer: layer == 1).values.shape == (6, 1, 4)
    assert len(list(six)) == len(six) == 6
    with pytest.raises(QueryError, match="no 'BS' in this stack"):
        six["BS"]
    two = run.stack("norm_diff", pair="alpha", comparisons=("BB-SS", "BB-BS"))
    assert two.labels == ("BB-SS", "BB-BS")
    with pytest.raises(QueryError, match="no comparison 'XX' here"):
        run.stack("norm_diff", comparisons=("XX",))
    with pytest.raises(QueryError, match="share their prompt_idx"):
        stack((run.grid("norm_diff", prompt=0, pair="alpha"), run.grid("norm_diff", prompt=1, pair="alpha")))
    with pytest.raises(QueryError, match="no grid to stack"):
        stack(())


def test_a_notebook_shows_a_grid_with_its_texts_as_text(tmp_path: Path) -> None:
    made = alpha()
    made.tokens[0, "identity"][1] = "<script>alert(1)</script>"
    write_capture(tmp_path, made)
    with analysis.open(str(tmp_path)) as opened:
        grid: Grid = opened.grid("norm_diff", prompt=0)
        html = grid._repr_html_()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert html.count("<td") == 4 * 5
    assert grid.capture == ALPHA


def test_what_is_damaged_is_named_and_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    write_capture(tmp_path, alpha())
    path = next((tmp_path / "captures").rglob("pairwise-00000.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    with analysis.open(str(tmp_path), lenient=True) as opened:
        assert len(opened.left_out) == 1
        assert "pairwise-00000.parquet" in opened.left_out[0]
        assert opened.runs.aggregate("count(*)").fetchall() == [(4 * 4 * 8,)]
        assert opened.pairwise.aggregate("count(*)").fetchall() == [(0,)]


def test_a_store_that_is_not_local_answers_the_same_in_its_sandbox(
    run: Any, synthetic: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capture.layout import RunDir

    here = run.arrow("FROM hotspots('norm_diff', 5)")
    monkeypatch.setattr(RunDir, "is_local", False)
    with analysis.open(str(synthetic.out)) as remote:
        assert remote.arrow("FROM hotspots('norm_diff', 5)") == here
        assert np.array_equal(remote.grid("norm_diff").values, run.grid("norm_diff").values)
        with pytest.raises(QueryError, match="Only files of the run directory"):
            remote.arrow("FROM read_text('/etc/hostname')")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompt": "x"}, "prompt='x' is no index of a prompt"),
        ({"prompt": 1.5}, "prompt=1.5 is no index of a prompt"),
        ({"pair": 3}, "pair=3 is no name"),
        ({"comparison": 3}, "comparison or run=3 is no name"),
        ({"token_id": "z", "metric": None}, "token_id='z' is no id of a token"),
    ],
)
def test_an_argument_of_another_type_is_a_wrong_question(synthetic: Any, wrong: dict[str, Any], says: str) -> None:
    with analysis.open(str(synthetic.out)) as run:
        assert run.grid("norm_diff", pair="alpha", prompt=np.int64(1)).prompt_idx == 1
        with pytest.raises(QueryError, match=says):
            run.grid(**({"metric": "norm_diff"} | wrong))
