"""Opening a run directory: what is there, what is not, what is broken, and the catalog."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from synthetic import ALPHA, BETA, GAMMA, alpha, beta, gamma, make_capture, write_attempt, write_capture

from analysis import QueryError, open_run, write_catalog
from analysis.views import STORED_VIEWS
from capture.errors import StoreError
from capture.layout import RunDir


def test_a_missing_run_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match=r"no run directory '.*nothing'.*pairscope sweep") as error:
        open_run(str(tmp_path / "nothing"))
    assert error.value.exit_code == 2


def test_a_directory_of_something_else_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="neither captures/ nor manifest/"):
        open_run(str(tmp_path))


def test_a_run_directory_without_captures_has_empty_typed_views(tmp_path: Path) -> None:
    write_attempt(tmp_path, "1", entry="alpha", state="running")
    con = open_run(str(tmp_path))
    for view in STORED_VIEWS:
        assert con.execute(f"SELECT count(*) FROM {view.name}").fetchall() == [(0,)]
    assert con.execute("SELECT avg(entropy_delta) FROM pairwise_full").fetchall() == [(None,)]
    assert con.execute("SELECT entry, state, seconds FROM manifest").fetchall() == [("alpha", "running", None)]


def test_partial_captures_show_only_when_asked_for_and_are_marked(synthetic: Any) -> None:
    con = open_run(str(synthetic.out), include_partial=True)
    rows = con.execute("SELECT pair, capture, complete FROM captures ORDER BY pair").fetchall()
    assert rows == [("alpha", ALPHA, True), ("beta", BETA, True), ("gamma", GAMMA, False)]
    assert con.execute("SELECT count(*) > 0 FROM runs WHERE pair = 'gamma'").fetchall() == [(True,)]


def test_captures_say_what_capture_json_says(con: Any) -> None:
    rows = con.execute(
        "SELECT base_model, sft_revision, tokenizer, dtype, lens_norm, n_layers, seconds, mode, written IS NOT NULL, bytes > 0, "
        "json_extract_string(json, '$.models.sft.model') FROM captures WHERE pair = 'alpha'"
    ).fetchall()
    assert rows == [("org/base", "def", "org/sft", "float32", "final", 2, 3.5, None, True, True, "org/sft")]


def test_a_missing_or_broken_capture_json_leaves_nulls(tmp_path: Path) -> None:
    (write_capture(tmp_path, alpha()) / "capture.json").unlink()
    (write_capture(tmp_path, beta()) / "capture.json").write_text("{")
    con = open_run(str(tmp_path))
    assert con.execute("SELECT pair, base_model, json FROM captures ORDER BY 1").fetchall() == [
        ("alpha", None, None),
        ("beta", None, None),
    ]


def test_another_schema_version_is_an_error_that_names_it(tmp_path: Path) -> None:
    marker = write_capture(tmp_path, alpha()) / "_COMPLETE"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"schema_version": 99}))
    with pytest.raises(StoreError, match="schema version 99"):
        open_run(str(tmp_path))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    write_capture(tmp_path, beta())
    path = write_capture(tmp_path, alpha()) / "pairwise-00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"pair=alpha.*pairwise-00000\.parquet.*cannot be read.*--force"):
        open_run(str(tmp_path))


def test_a_missing_column_is_named_with_its_table_and_file(tmp_path: Path) -> None:
    path = write_capture(tmp_path, alpha()) / "runs-00000.parquet"
    parquet.write_table(parquet.read_table(path).drop_columns(["entropy"]), path)
    with pytest.raises(StoreError, match=r"runs-00000\.parquet' lacks the column 'entropy' of table 'runs'"):
        open_run(str(tmp_path))


def test_a_manifest_row_of_a_wrong_type_names_the_field(tmp_path: Path) -> None:
    write_attempt(tmp_path, "1", entry="alpha", state="failed", seconds="long")
    with pytest.raises(StoreError, match=r"'manifest'.*'seconds'"):
        open_run(str(tmp_path))


def test_a_store_that_is_not_local_gives_the_same_rows(
    synthetic: Any, con: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDir, "is_local", False)
    remote = open_run(str(synthetic.out))
    for view in ("runs", "pairwise_full", "tracked_pairwise", "topk", "topk_shift", "tokens", "captures"):
        sql = f"SELECT * FROM {view} WHERE pair = 'alpha' ORDER BY ALL"
        assert remote.execute(sql).fetchall() == con.execute(sql).fetchall()
    with pytest.raises(QueryError, match="say with -o where"):
        write_catalog(str(synthetic.out))


def test_several_files_of_a_table_are_one_view(tmp_path: Path) -> None:
    path = write_capture(tmp_path, alpha())
    marker = json.loads((path / "_COMPLETE").read_text())
    table = parquet.read_table(path / "runs-00000.parquet")
    parquet.write_table(table.slice(0, 10), path / "runs-00000.parquet")
    parquet.write_table(table.slice(10), path / "runs-00001.parquet")
    parquet.write_table(table, path / "runs-00002.parquet")  # no part of the capture: the marker does not name it
    marker["files"].append({"name": "runs-00001.parquet", "rows": 1, "bytes": 1, "sha256": ""})
    (path / "_COMPLETE").write_text(json.dumps(marker))
    assert open_run(str(tmp_path)).execute("SELECT count(*) FROM runs").fetchall() == [(table.num_rows,)]


def test_a_catalog_opens_in_a_bare_client(tmp_path: Path, call: Callable[..., Any], monkeypatch: Any) -> None:
    write_capture(tmp_path / "out", alpha())
    write_capture(tmp_path / "out", gamma(), marker=False)
    monkeypatch.chdir(tmp_path)
    assert call("catalog", "out").out.strip() == str(tmp_path / "out" / "catalog.duckdb")
    monkeypatch.chdir("/")
    with duckdb.connect(str(tmp_path / "out" / "catalog.duckdb"), read_only=True) as con:
        assert con.execute("SELECT count(*) FROM pairwise_full").fetchall() == [(6 * 4 * 8,)]
        assert con.execute("SELECT pair, complete FROM captures").fetchall() == [("alpha", True)]
    assert [p.name for p in (tmp_path / "out").iterdir() if "duckdb" in p.name] == ["catalog.duckdb"]


def test_a_catalog_is_replaced_and_may_lie_elsewhere(tmp_path: Path, call: Callable[..., Any]) -> None:
    write_capture(tmp_path / "out", alpha())
    file = tmp_path / "views.duckdb"
    assert call("catalog", tmp_path / "out", "-o", file).code == 0
    write_capture(tmp_path / "out", beta())
    assert call("catalog", tmp_path / "out", "-o", file).code == 0
    with duckdb.connect(str(file), read_only=True) as con:
        assert con.execute("SELECT pair FROM captures ORDER BY 1").fetchall() == [("alpha",), ("beta",)]


def test_a_catalog_that_cannot_be_written_is_an_error(tmp_path: Path, call: Callable[..., Any]) -> None:
    write_capture(tmp_path / "out", alpha())
    answer = call("catalog", tmp_path / "out", "-o", tmp_path / "no" / "such" / "c.duckdb")
    assert answer.code == 1
    assert "cannot write the catalog" in answer.err
    write_capture(tmp_path / "run?x", alpha())  # DuckDB takes what follows a question mark for options
    answer = call("catalog", tmp_path / "run?x")
    assert (answer.code, "cannot write the catalog" in answer.err) == (1, True)
    assert [p.name for p in (tmp_path / "run?x").iterdir()] == ["captures"]
    assert call("catalog", tmp_path / "run?x", "-o", tmp_path / "c.duckdb").code == 0


@pytest.mark.parametrize(
    ("verb", "ending"),
    [
        (("catalog", "-o"), "duckdb"),
        (("html", "-o"), "html"),
        (("report", "--export"), "csv"),
        (("grid", "-o"), "json"),
        (("export-json", "--pair", "alpha", "-o"), "json"),
    ],
)
def test_what_a_file_system_does_not_take_is_one_line_and_leaves_nothing(
    synthetic: Any, tmp_path: Path, call: Callable[..., Any], verb: tuple[str, ...], ending: str
) -> None:
    # both are refused to who removes what is half written too, as on a file system that is only read
    (tmp_path / "file").touch()
    for name in ("x" * 240 + f".{ending}", "x" * 300 + f".{ending}", f"file/x.{ending}"):
        answer = call(verb[0], synthetic.out, *verb[1:], tmp_path / name)
        assert (answer.code, answer.err.count("cannot write")) == (1, 1), answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_arrow_table_of_rows_without_values_is_typed(synthetic: Any) -> None:
    from analysis.captures import manifest_table

    table = manifest_table(RunDir(str(synthetic.out)))
    assert table.schema.field("finished").type == pa.timestamp("us")
    assert table.schema.field("dollars").type == pa.float64()


def damage(path: Path) -> None:
    """Turn over bytes of the data and leave the footer as it is: it shows only when the data is read."""
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(255 - b for b in data[4:400])
    path.write_bytes(data)


def test_damage_that_shows_in_the_middle_of_an_answer_names_the_file(tmp_path: Path, call: Callable[..., Any]) -> None:
    write_capture(tmp_path, beta())
    path = write_capture(tmp_path, alpha()) / "runs-00000.parquet"
    damage(path)
    answer = call("sql", tmp_path, "SELECT DISTINCT pair FROM runs ORDER BY 1")
    assert answer.code == 1
    assert f"'{path}' is not what was written" in answer.err
    assert "--lenient" in answer.err
    answer = call("sql", tmp_path, "SELECT DISTINCT pair FROM runs ORDER BY 1", "--lenient", "--json")
    assert (answer.code, answer.rows) == (0, [{"pair": "beta"}])
    assert f"left out: '{path}'" in answer.err
    answer = call("grid", tmp_path, "--run", "BB", "--lenient")
    assert (answer.code, "pair beta" in answer.out) == (0, True)
    answer = call("grid", tmp_path, "--run", "BB", "--lenient", "--pair", "alpha")
    assert (answer.code, "no run 'BB' here" in answer.err) == (2, True)
    for verb in ("report", "grid"):
        args = ("--record-type", "runs") if verb == "report" else ("--run", "BB", "--pair", "alpha")
        answer = call(verb, tmp_path, *args)
        assert answer.code == 1
        assert "runs-00000.parquet' is not what was written" in answer.err


def test_two_schema_versions_are_an_error_or_one_is_left_out(tmp_path: Path, call: Callable[..., Any]) -> None:
    write_capture(tmp_path, beta())
    marker = write_capture(tmp_path, alpha()) / "_COMPLETE"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"schema_version": 99}))
    answer = call("sql", tmp_path, "FROM captures")
    assert answer.code == 1
    assert "schema version 99" in answer.err
    answer = call("sql", tmp_path, "SELECT pair FROM captures", "--lenient", "--json")
    assert answer.rows == [{"pair": "beta"}]
    assert "left out" in answer.err
    assert "schema version 99" in answer.err


def test_the_default_pair_is_one_that_is_whole_where_another_is_left_out(
    tmp_path: Path, call: Callable[..., Any]
) -> None:
    write_capture(tmp_path, beta())
    damage(write_capture(tmp_path, alpha()) / "pairwise-00000.parquet")
    for more in ((), ("--comparison", "BB-SS")):
        answer = call("grid", tmp_path, "--metric", "norm_diff", "--lenient", *more)
        assert (answer.code, "pair beta" in answer.out) == (0, True)
    answer = call("grid", tmp_path, "--metric", "norm_diff", "--lenient", "--pair", "alpha")
    assert (answer.code, "pair 'alpha' has no comparison" in answer.err) == (2, True)


def test_a_catalog_goes_with_its_run_directory(tmp_path: Path) -> None:
    write_capture(tmp_path / "out", alpha())
    write_catalog(str(tmp_path / "out"))
    (tmp_path / "out").rename(tmp_path / "moved")
    with duckdb.connect(str(tmp_path / "moved" / "catalog.duckdb"), read_only=True) as con:
        with pytest.raises(duckdb.IOException, match="No files found"):
            con.execute("FROM runs LIMIT 1").fetchall()
        con.execute(f"SET VARIABLE run_directory = '{tmp_path / 'moved'}'")
        assert con.execute("SELECT count(*) FROM pairwise_full").fetchall() == [(6 * 4 * 8,)]
        assert len(con.execute("FROM hotspots('norm_diff', 3)").fetchall()) == 3
        assert con.execute("SELECT count(*) FROM duckdb_functions() WHERE comment LIKE 'hotspots(%'").fetchall() == [
            (1,)
        ]


@pytest.mark.parametrize("name", ["out[1]", "out*", "out?"])
def test_a_path_with_the_characters_of_a_pattern_means_itself_alone(
    tmp_path: Path, call: Callable[..., Any], name: str
) -> None:
    odd, plain = tmp_path / name, tmp_path / "out1"
    first, second = (make_capture("p", "c0ffee0000000000", ("BB", "SS"), 1, {(0, "identity"): ["x", "y"]}, {1}, n) for n in (1, 2))  # fmt: skip
    write_capture(odd, first)
    write_capture(plain, second)
    expected = np.sort(first.cells[0, "identity", "BB"]["norm"].ravel()).tolist()
    sql = "SELECT norm FROM runs WHERE run = 'BB' ORDER BY norm"
    for sandbox in (False, True):
        found = open_run(str(odd), sandbox=sandbox).execute(sql).fetchall()
        assert [n for (n,) in found] == expected
    assert call("grid", odd, "--metric", "norm", "--run", "BB").out != call("grid", plain, "--metric", "norm", "--run", "BB").out  # fmt: skip
    assert call("sql", odd, f"FROM '{plain}/captures/pair=p/capture=c0ffee0000000000/runs-00000.parquet'").code == 2
    write_catalog(str(odd), str(tmp_path / "catalog.duckdb"))
    write_catalog(str(plain), str(tmp_path / "plain.duckdb"))
    for file, said in (("catalog", None), ("plain", odd)):
        with duckdb.connect(str(tmp_path / f"{file}.duckdb"), read_only=True) as con:
            if said:
                con.execute(f"SET VARIABLE run_directory = '{said}'")
            assert [n for (n,) in con.execute(sql).fetchall()] == expected


def test_a_catalog_over_a_store_needs_the_reader_of_stores(
    synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDir, "is_local", False)
    monkeypatch.setattr("analysis.run._load_httpfs", lambda con, out: con.execute("LOAD no_such_extension"))
    with pytest.raises((QueryError, StoreError)):
        write_catalog(str(synthetic.out), str(tmp_path / "c.duckdb"))
    monkeypatch.undo()
    monkeypatch.setattr(RunDir, "is_local", False)
    with duckdb.connect() as con:
        try:
            con.execute("LOAD httpfs")
        except duckdb.Error:
            with pytest.raises(QueryError, match=r"needs DuckDB's extension httpfs.*pairscope sql"):
                write_catalog(str(synthetic.out), str(tmp_path / "c.duckdb"))
    assert not (tmp_path / "c.duckdb").exists()


def test_a_uri_of_a_local_file_system_is_opened(synthetic: Any, con: Any) -> None:
    from urllib.parse import quote as percent

    remote = open_run("file://" + percent(str(synthetic.out)))
    sql = "SELECT * FROM pairwise ORDER BY ALL LIMIT 20"
    assert remote.execute(sql).fetchall() == con.execute(sql).fetchall()
