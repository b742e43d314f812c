"""`pairscope sql`: rows as a table, JSON or CSV; nothing is written; errors say what is near."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from synthetic import alpha, write_capture

from analysis.cli import asking
from analysis.views import VIEWS

COUNT = "SELECT pair, count(*) AS n FROM runs GROUP BY pair ORDER BY pair"


def test_a_table_is_whole_and_aligned_when_piped(synthetic: Any, call: Callable[..., Any]) -> None:
    assert call("sql", synthetic.out, COUNT).out == "pair     n\nalpha  128\nbeta    24\n"
    lines = call("sql", synthetic.out, "SELECT * FROM runs").out.splitlines()
    assert len(lines) == 1 + 128 + 24
    assert "tracked_logits" in lines[0]


def test_json_gives_one_object_a_row(synthetic: Any, call: Callable[..., Any]) -> None:
    assert call("sql", synthetic.out, COUNT, "--json").rows == [{"pair": "alpha", "n": 128}, {"pair": "beta", "n": 24}]


def test_json_says_null_for_what_is_no_number_and_keeps_float32_short(synthetic: Any, call: Callable[..., Any]) -> None:
    sql = "SELECT 'nan'::DOUBLE AS a, 0.1::FLOAT AS b, [0.1::FLOAT] AS c, 0.1::DOUBLE AS d, TIMESTAMP '2025-01-02' AS e"
    assert call("sql", synthetic.out, sql, "--json").rows == [
        {"a": None, "b": 0.1, "c": [0.1], "d": 0.1, "e": "2025-01-02T00:00:00"}
    ]


def test_float32_in_json_and_csv_reads_back_as_the_same_float32(synthetic: Any, call: Callable[..., Any]) -> None:
    import numpy as np

    stored = np.sort(synthetic.alpha.cells[0, "identity", "BB"]["norm"].ravel())
    sql = "SELECT norm FROM runs WHERE pair = 'alpha' AND prompt_idx = 0 AND run = 'BB' ORDER BY norm"
    rows = call("sql", synthetic.out, sql, "--json").rows
    assert np.array_equal(np.float32([r["norm"] for r in rows]), stored)
    lines = call("sql", synthetic.out, sql, "--csv").out.splitlines()[1:]
    assert np.array_equal(np.float32(lines), stored)


def test_json_has_all_columns_of_which_several_have_one_name(synthetic: Any, call: Callable[..., Any]) -> None:
    query = "SELECT 1 AS norm, 2 AS norm, 3 AS norm_1, 4 AS norm, [5, 6] AS x"
    (row,) = call("sql", synthetic.out, "--json", query).rows
    assert row == {"norm": 1, "norm_2": 2, "norm_1": 3, "norm_3": 4, "x": [5, 6]}


def test_decimals_are_numbers(synthetic: Any, call: Callable[..., Any]) -> None:
    query = "SELECT 1.5 * 3 AS product, [0.5] AS list, {'a': 0.25} AS struct, 1234567.5 AS large"
    (row,) = call("sql", synthetic.out, "--json", query).rows
    assert row == {"product": 4.5, "list": [0.5], "struct": {"a": 0.25}, "large": 1234567.5}
    assert call("sql", synthetic.out, "SELECT 1.5 AS x UNION ALL SELECT 10.5 ORDER BY 1").out.split("\n")[1] == " 1.5"
    digits = "12345678901234567890.25"
    assert call("sql", synthetic.out, "--csv", f"SELECT {digits} AS x").out == f"x\n{digits}\n"


def test_csv_reads_back(synthetic: Any, call: Callable[..., Any]) -> None:
    sql = "SELECT position, token, NULL AS nothing, [1, 2] AS list, true AS yes FROM tokens WHERE pair = 'alpha' AND prompt_idx = 0"
    rows = list(csv.DictReader(io.StringIO(call("sql", synthetic.out, sql + " ORDER BY position", "--csv").out)))
    assert [r["token"] for r in rows] == ["<s>", " a", "\n", " long-token", "界"]
    assert rows[0] == {"position": "0", "token": "<s>", "nothing": "", "list": "[1, 2]", "yes": "true"}


def test_what_is_no_finite_number_is_told_from_nothing_in_csv(synthetic: Any, call: Callable[..., Any]) -> None:
    query = "SELECT 'inf'::FLOAT AS a, '-inf'::DOUBLE AS b, 'nan'::FLOAT AS c, NULL::FLOAT AS d, -0.0::DOUBLE AS e"
    assert call("sql", synthetic.out, query, "--csv").out == "a,b,c,d,e\ninf,-inf,nan,,-0.0\n"


def test_a_field_with_a_carriage_return_does_not_end_its_row_in_csv(synthetic: Any, call: Callable[..., Any]) -> None:
    odd = ["\r", "a\rb", "\n", "plain"]
    values = ", ".join(f"({i}, '{text}')" for i, text in enumerate(odd))
    out = call("sql", synthetic.out, f"SELECT * FROM (VALUES {values}) AS t(i, token) ORDER BY i", "--csv").out
    assert out == 'i,token\n0,"\r"\n1,"a\rb"\n2,"\n"\n3,plain\n'
    assert [r["token"] for r in csv.DictReader(io.StringIO(out, newline=""))] == odd


def test_a_dash_reads_the_query_from_stdin(synthetic: Any, call: Callable[..., Any]) -> None:
    assert call("sql", synthetic.out, "-", "--json", stdin=COUNT + ";\n").rows[0] == {"pair": "alpha", "n": 128}


def test_without_a_query_all_views_and_columns_are_listed(synthetic: Any, call: Callable[..., Any]) -> None:
    out = call("sql", synthetic.out).out
    for view in VIEWS:
        assert f"\n{view.name}: " in "\n" + out
        for column in view.columns:
            assert f"  {column.name} " in out
            assert column.doc in out
    rows = call("sql", synthetic.out, "--json").rows
    assert {"view": "pairwise", "column": "norm_diff"}.items() <= next(
        r for r in rows if r["column"] == "norm_diff"
    ).items()


@pytest.mark.parametrize(
    "query",
    [
        "COPY runs TO '/nonexistent/x.csv'",
        "CREATE TABLE t (a INT)",
        "DROP VIEW runs",
        "INSTALL httpfs",
        "SET threads = 1",
        "WITH x AS (COPY (SELECT 1 AS a) TO '/nonexistent/x.parquet' (FORMAT parquet)) SELECT * FROM x",
        "with x as (/* SELECT */ delete from captures returning *) select * from x",
        "WITH x AS (UPDATE captures SET pair = 'a' RETURNING *) FROM x",
        "WITH x AS MATERIALIZED (\n-- SELECT 1\nInsert INTO captures SELECT * FROM captures RETURNING *) FROM x;",
        "SELECT * FROM (WITH x AS (DELETE FROM captures RETURNING *) FROM x)",
        "SELECT 1 UNION ALL (WITH x AS (DELETE FROM captures RETURNING 1) FROM x)",
        "SELECT (WITH a AS (WITH b AS (DELETE FROM captures RETURNING 1) FROM b) FROM a)",
        "EXPLAIN ANALYZE WITH x AS (DELETE FROM captures RETURNING *) FROM x",
        "EXPLAIN ANALYZE (WITH x AS (DELETE FROM captures RETURNING ') SELECT 1 --') SELECT * FROM x)",
        "SUMMARIZE WITH x AS (DELETE FROM captures RETURNING *) FROM x",
        "FROM (DESCRIBE WITH x AS (DELETE FROM captures RETURNING *) FROM x)",
        "FROM hotspots('norm_diff', (WITH x AS (DELETE FROM captures RETURNING 1) FROM x))",
        "FROM json_execute_serialized_sql('{}')",
        "FROM query('FROM captures')",
        "SELECT * FROM captures, (SELECT * FROM \"Enable_Logging\"('QueryLog'))",
    ],
)
def test_what_is_not_a_query_is_refused(synthetic: Any, call: Callable[..., Any], query: str) -> None:
    answer = call("sql", synthetic.out, query)
    assert answer.code == 2
    assert "is not a query" in answer.err


def test_a_part_of_a_query_that_writes_leaves_the_captures_and_other_files_alone(
    tmp_path: Path, call: Callable[..., Any]
) -> None:
    file = write_capture(tmp_path / "out", alpha()) / "pairwise-00000.parquet"
    before, other = file.read_bytes(), tmp_path / "other.parquet"
    for target, more in ((file, ()), (other, ("--any-file",))):
        sql = f"WITH x AS (COPY (SELECT 1 AS a) TO '{target}' (FORMAT parquet)) SELECT * FROM x"
        assert call("sql", tmp_path / "out", sql, *more).code == 2
        plan = duckdb.execute("SELECT json_serialize_sql($1)", [sql]).fetchall()[0][0].replace("'", "''")
        assert call("sql", tmp_path / "out", f"FROM json_execute_serialized_sql('{plan}')", *more).code == 2
    log = f"FROM enable_logging('QueryLog', storage = 'file', storage_path = '{tmp_path / 'log'}')"
    assert call("sql", tmp_path / "out", log, "--any-file").code == 2
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def pairscope(*args: object, stdin: bytes = b"", encoding: str = "utf-8", **how: Any) -> Any:
    """The command in a process of its own, whose three streams are of an encoding."""
    return subprocess.run(
        [sys.executable, "-m", "pairscope", *map(str, args)], input=stdin, stderr=subprocess.PIPE, check=False,
        env=os.environ | {"PYTHONIOENCODING": encoding}, **({"stdout": subprocess.PIPE} | how),
    )  # fmt: skip


def test_a_locale_without_the_letters_of_a_token_shows_their_codes(synthetic: Any) -> None:
    done = pairscope("sql", synthetic.out, "SELECT '\u754c' AS x, '\xe9' AS y", encoding="latin-1")
    assert (done.returncode, done.stdout.split()) == (0, [b"x", b"y", b"\\u754c", b"\xe9"])
    done = pairscope("grid", synthetic.out, encoding="ascii")
    assert (done.returncode, b"\\u754c" in done.stdout) == (0, True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_an_answer_that_a_full_disk_does_not_take_is_one_line(synthetic: Any) -> None:
    for query in ("FROM captures", "FROM runs CROSS JOIN range(20)"):
        with open("/dev/full", "wb") as full:
            done = pairscope("sql", synthetic.out, "--csv", query, stdout=full)
        assert (done.returncode, done.stderr) == (
            1,
            b"pairscope: StoreError: cannot write the output: the disk is full\n",
        )


def test_a_query_in_another_encoding_is_a_users_error(synthetic: Any) -> None:
    done = pairscope("sql", synthetic.out, "-", stdin="SELECT 'é'".encode("latin-1"))
    assert (done.returncode, done.stderr) == (2, b"pairscope: QueryError: the query is not text in UTF-8\n")


_ENDLESS = "FROM range(10000000) AS a, range(1000000) AS b"


@pytest.mark.parametrize("query", [f"SELECT sum(a.range * b.range) {_ENDLESS}", f"SELECT a.range {_ENDLESS} WHERE a.range + b.range < 0"])  # fmt: skip
def test_ctrl_c_stops_a_long_query_and_no_file_is_blamed(tmp_path: Path, query: str) -> None:
    write_capture(tmp_path / "out", alpha())
    script = (
        "import os, signal, sys, threading, analysis.query as asked, analysis.damage as damage, pairscope\n"
        "check, damage.broken = asked.check_query, lambda *args, **kwargs: print('every file was read')\n"
        "def checked(*args):\n"
        "    check(*args)\n"
        "    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "asked.check_query = checked\n"
        "pairscope.main()\n"
    )
    command = [sys.executable, "-c", script, "sql", str(tmp_path / "out"), query]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "pairscope: stopped\n")


def test_ctrl_c_while_any_verb_asks_is_a_ctrl_c(synthetic: Any) -> None:
    def ask_and_interrupt() -> None:
        with asking(str(synthetic.out), False, False) as con:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            con.execute("SELECT sum(range * range % 7) FROM range(50000000)").fetchall()
            time.sleep(60)  # where it was quicker than that

    with pytest.raises(KeyboardInterrupt):
        ask_and_interrupt()


@pytest.mark.parametrize(
    "query", ["-- one\nSELECT 1 AS one", "--one, and x = 1\nSELECT 1 AS one", "--\nSELECT 1 AS one"]
)
def test_a_query_may_begin_with_a_comment(synthetic: Any, call: Callable[..., Any], query: str) -> None:
    for args in ((query, "--json"), ("--json", query), ("--json", "--", query)):
        assert call("sql", synthetic.out, *args).rows == [{"one": 1}]
    assert "No such option '--nope'" in call("sql", synthetic.out, "SELECT 1", "--nope=a b").err


@pytest.mark.skipif(os.name != "posix", reason="a shell that closes streams")
def test_a_stream_that_the_caller_closed_is_no_traceback(synthetic: Any) -> None:
    for verb, closed in (("sql", ">&-"), ("status", ">&-"), ("report", ">&-"), ("sql", "2>&-"), ("sql", "<&-")):
        asked = {"sql": ["-" if closed == "<&-" else "FROM captures"]}.get(verb, [])
        words = [sys.executable, "-m", "pairscope", verb, str(synthetic.out), *asked]
        done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *words], capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr
        assert done.returncode == (2 if closed == "<&-" else 0)


def test_a_long_query_that_is_told_to_end_ends(synthetic: Any) -> None:
    script = (
        "import os, signal, threading, analysis.query as asked, pairscope\n"
        "check = asked.check_query\n"
        "def checked(*args):\n"
        "    check(*args)\n"
        "    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "asked.check_query = checked\n"
        "pairscope.main()\n"
    )
    query = "SELECT count(*) FROM range(100000000000) AS a, range(1000) AS b"
    command = [sys.executable, "-c", script, "sql", str(synthetic.out), query]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")


def test_two_queries_or_none_are_refused(synthetic: Any, call: Callable[..., Any]) -> None:
    assert "expected one query, got 2" in call("sql", synthetic.out, "SELECT 1; DROP VIEW runs").err
    assert "expected one query, got 0" in call("sql", synthetic.out, "-", stdin="").err


@pytest.mark.parametrize(
    "query",
    [
        "DESCRIBE runs",
        "SUMMARIZE prompts",
        "FROM captures",
        "WITH a AS (SELECT 1) FROM a",
        "WITH RECURSIVE a AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM a WHERE i < 9) FROM a; -- counts",
        "SELECT 'WITH x AS (DELETE FROM captures)', '\"type\":\"COPY_QUERY_NODE\"'",
        "FROM HOTSPOTS('norm_diff', 3), unnest([1, 2]), range(2)",
        "SELECT " + "+".join(["1"] * 900),
        "PIVOT captures ON complete IN (true, false) USING first(bytes) GROUP BY pair",
        "FROM duckdb_columns()",
        "SHOW TABLES",
        "EXPLAIN SELECT 1",
        "EXPLAIN (ANALYZE, FORMAT json) SELECT 1",
    ],
)
def test_all_that_only_reads_is_allowed(synthetic: Any, call: Callable[..., Any], query: str) -> None:
    assert call("sql", synthetic.out, query).code == 0


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT kl_dvergence FROM pairwise", "'kl_divergence'"),
        ("SELECT norm_base FROM pairwise", "'norm_base' is a column of: pairwise_full."),
        ("SELECT p.entropy_delta FROM pairwise p", "'entropy_delta' is a column of: pairwise_full."),
        ("SELECT 1 FROM pairwis", "pairwise"),
        ("FROM hotspts('norm_diff', 3)", "'hotspots'"),
        ("SELEC 1", "syntax error"),
        ("SELECT token::INT FROM tokens", "Could not convert"),
    ],
)
def test_a_wrong_query_is_a_users_error_with_what_is_near(
    synthetic: Any, call: Callable[..., Any], query: str, said: str
) -> None:
    answer = call("sql", synthetic.out, query)
    assert answer.code == 2
    assert said in answer.err


def test_json_and_csv_exclude_each_other(synthetic: Any, call: Callable[..., Any]) -> None:
    assert call("sql", synthetic.out, COUNT, "--json", "--csv").code == 2


def test_partial_captures_only_on_request(synthetic: Any, call: Callable[..., Any]) -> None:
    sql = "SELECT pair FROM captures ORDER BY pair"
    assert [r["pair"] for r in call("sql", synthetic.out, sql, "--json").rows] == ["alpha", "beta"]
    rows = call("sql", synthetic.out, sql, "--json", "--include-partial").rows
    assert [r["pair"] for r in rows] == ["alpha", "beta", "gamma"]


def test_on_a_terminal_the_table_is_cut_and_says_what_is_left_out(monkeypatch: Any, capsys: Any) -> None:
    from analysis.tables import show_table

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    columns = ["pair", "layer", "metric_one", "metric_two", "metric_three"]
    show_table(columns, [["p", i, 0.5 * i, 0.25 * i, 2.0 * i] for i in range(3)], more=True)
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert all(len(line) <= 40 for line in out.splitlines())
    note = " ".join(out.split())
    assert "the first 3 rows" in note
    assert "in each row pair p" in note
    assert "without metric_three" in note
    assert "metric_two" in out.splitlines()[0]


@pytest.mark.parametrize(("columns", "shown"), [(80, True), (50, True), (34, False)])
def test_a_long_text_is_cut_to_the_room_there_is_before_its_column_is_left_out(
    monkeypatch: Any, capsys: Any, columns: int, shown: bool
) -> None:
    from analysis.tables import show_table

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = [[i, 40 + i, f"prompt {i}: " + "a word and " * 9] for i in range(3)]
    show_table(["prompt_idx", "n_tokens", "text"], rows)
    header, *lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert all(len(line) <= columns for line in (header, *lines))
    assert [f"prompt {i}: " in line for i, line in enumerate(lines[:3])] == [shown] * 3
    assert ("text" in header) is shown
    assert ("without text" in " ".join(lines)) is not shown


def test_control_characters_never_reach_the_terminal(synthetic: Any, call: Callable[..., Any]) -> None:
    out = call("sql", synthetic.out, "SELECT 'a' || chr(27) || '[31m' || chr(10) AS x").out
    assert out == "x\na\\x1b[31m\\n\n"
    assert json.dumps("\u001b")[1:-1] in call("sql", synthetic.out, "SELECT chr(27) AS x", "--json").out
