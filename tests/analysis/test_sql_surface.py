"""Attempts to make `sql` do more than read its run directory. Each must be refused, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from synthetic import alpha, write_capture

from analysis import open_run
from analysis.errors import QueryError
from analysis.query import answer

SECRET = "planted-9f8e7d"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surface")
    write_capture(folder / "out", alpha())
    (folder / "secret.txt").write_text(SECRET)
    (folder / "secret.csv").write_text(f"a\n{SECRET}\n")
    (folder / "secret.json").write_text(f'{{"a": "{SECRET}"}}')
    return folder / "out"


@pytest.fixture(scope="module")
def sandboxed(out: Path) -> Iterator[Any]:
    """What the verb asks."""
    with closing(open_run(str(out), sandbox=True)) as con:
        yield con


ESCAPES = [
    # files outside
    "FROM read_text('{up}/secret.txt')", "FROM read_blob('{up}/secret.txt')", "FROM read_csv('{up}/secret.csv')", "FROM '{up}/secret.csv'",
    "FROM read_json('{up}/secret.json')", "FROM read_text('{out}/../secret.txt')", "FROM read_text('/etc/passwd')", "FROM glob('/etc/*')",
    "FROM sniff_csv('{up}/secret.csv')", "FROM parquet_metadata('{up}/x.parquet')", "FROM read_text('file://{up}/secret.txt')",
    "SELECT * FROM read_text(['{out}/captures/pair=alpha', '{up}/secret.txt'])", "FROM query('FROM read_text(''{up}/secret.txt'')')",
    "FROM query_table('{up}/secret.csv')", "SELECT (SELECT content FROM read_text('{up}/secret.txt'))", "FROM duckdb_secrets()",
    "WITH x AS (FROM read_text('{up}/secret.txt')) FROM x", "SELECT 1 WHERE EXISTS (FROM read_text('{up}/secret.txt') WHERE content LIKE 'p%')",
    # environment, network, extensions
    "SELECT getenv('PLANTED')", "FROM read_text('http://127.0.0.1:9/x')", "FROM read_parquet('s3://bucket/x')", "INSTALL httpfs", "LOAD httpfs",
    "FROM read_text('https://127.0.0.1:9/?' || (SELECT getenv('PLANTED')))", "INSTALL x FROM 'http://127.0.0.1:9'", "FORCE INSTALL json",
    # writes
    "COPY (SELECT 1) TO '{out}/pwned.csv'", "COPY captures TO '{up}/pwned.parquet'", "EXPORT DATABASE '{up}/pwned'", "ATTACH '{up}/pwned.db'",
    "ATTACH '{out}/pwned.db' AS x", "CREATE TABLE pwned AS SELECT 1", "CREATE MACRO pwned() AS 1", "CREATE OR REPLACE VIEW runs AS SELECT 1",
    "INSERT INTO captures SELECT * FROM captures", "UPDATE captures SET pair = 'x'", "DELETE FROM captures", "DROP VIEW runs", "TRUNCATE captures",
    "WITH x AS (DELETE FROM captures RETURNING *) FROM x", "WITH x AS (COPY (SELECT 1) TO '{out}/pwned.csv') SELECT 1", "CHECKPOINT", "VACUUM",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}/pwned.csv'", "EXPLAIN ANALYZE DELETE FROM captures", "EXPLAIN (ANALYZE) DELETE FROM captures",
    "EXPLAIN (FORMAT json, ANALYZE) COPY (SELECT 1) TO '{out}/pwned.csv'", "EXPLAIN ANALYZE EXPLAIN ANALYZE DELETE FROM captures",
    # settings and control
    "SET enable_external_access = true", "SET lock_configuration = false", "RESET lock_configuration", "PRAGMA enable_profiling",
    "SET VARIABLE x = 1", "SET allowed_directories = ['/']", "PRAGMA database_list", "CALL pragma_version()", "BEGIN", "COMMIT", "USE memory",
    "PREPARE x AS DELETE FROM captures", "EXECUTE x", "CREATE SECRET (TYPE s3, KEY_ID 'a', SECRET 'b')", "FROM write_log('x')",
    "FROM enable_logging()", "FROM set_config('threads', 1)", "FROM checkpoint()", "FROM force_checkpoint()", "SELECT set_config('a', 'b')",
    # several statements, and comments that hide them
    "SELECT 1; DELETE FROM captures", "SELECT 1; SELECT 2", ";", "", "--", "/* */", "SELECT 1 -- \n; DROP VIEW runs", "SELECT 1;;COPY captures TO 'x'",
    "/* */ COPY (SELECT 1) TO '{out}/pwned.csv'", "\ufeffCOPY (SELECT 1) TO '{out}/pwned.csv'", "SELECT 1\x00; DROP VIEW runs",
]  # fmt: skip


@pytest.mark.parametrize("query", ESCAPES)
def test_no_query_gets_out(out: Path, sandboxed: Any, monkeypatch: pytest.MonkeyPatch, query: str) -> None:
    monkeypatch.setenv("PLANTED", SECRET)
    before = sorted(p for p in out.parent.rglob("*"))
    query = query.replace("{up}", str(out.parent)).replace("{out}", str(out))
    with pytest.raises(QueryError) as caught:
        list(answer(sandboxed, query)[1])
    assert SECRET not in str(caught.value)
    assert sorted(p for p in out.parent.rglob("*")) == before


WORDS = [
    "SELECT",
    "FROM",
    "WHERE",
    "captures",
    "runs",
    "pairwise",
    "pair",
    "layer",
    "(",
    ")",
    ",",
    ";",
    "*",
    "1",
    "'x'",
    '"',
    "''",
    "--",
    "/*",
    "*/",
    "WITH",
    "AS",
    "EXPLAIN",
    "ANALYZE",
    "PIVOT",
    "ON",
    "USING",
    "UNPIVOT",
    "DESCRIBE",
    "SUMMARIZE",
    "SHOW",
    "VALUES",
    "UNION",
    "ALL",
    "ORDER",
    "BY",
    "LIMIT",
    "OFFSET",
    "NULL",
    "CASE",
    "WHEN",
    "END",
    "::",
    "[",
    "]",
    "{",
    "}",
    "?",
    "$1",
    "@",
    "#",
    "\\",
    "\x00",
    "é",
    "🙂",
    "e'\\x00'",
    "1e999",
    "INTERVAL",
    "count(",
    "sum(",
    "COLUMNS(*)",
    "EXCLUDE",
    "LATERAL",
    "unnest(",
    "range(10)",
    "struct_pack(",
    "lambda",
    "x:",
    "OVER",
    "PARTITION",
    "QUALIFY",
    "TABLESAMPLE",
    "GROUPING",
    "SETS",
]


@settings(
    derandomize=True, deadline=None, database=None, max_examples=150, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.one_of(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), st.text(max_size=30)))
def test_any_text_is_answered_or_a_users_error(con: Any, query: str) -> None:
    try:
        _, rows = answer(con, query)
        for _ in zip(range(5), rows, strict=False):
            pass
    except QueryError as error:
        text = str(error)
    else:
        return
    assert text


@pytest.mark.parametrize(
    "query",
    [
        "SELECT " + "(" * 5_000 + "1" + ")" * 5_000,
        "SELECT " + "1+" * 50_000 + "1",
        "SELECT '" + "x" * 1_000_000 + "'",
        "SELECT \ud800",
    ],
)
def test_deep_and_long_queries_end(out: Path, call: Callable[..., Any], query: str) -> None:
    assert call("sql", out, query).code in (0, 2)
