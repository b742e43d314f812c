"""A pair that was captured again with other prompts into the same directory: which capture an answer is of, and that it is said."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from synthetic import ALPHA, alpha, beta, gamma, make_capture, write_capture

import analysis

COUNT = "SELECT pair, count(*) AS n FROM prompts GROUP BY pair ORDER BY pair"
OLDER = "ffff000000000000"  # by its id it would be the last


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """alpha twice, the older one of other prompts; beta once."""
    older = make_capture("alpha", OLDER, ("BB", "SS"), 1, {(i, "identity"): ["x"] for i in range(7)}, {1}, 4)
    for capture, time in ((older, 1_000_000), (alpha(), 2_000_000)):
        os.utime(write_capture(tmp_path, capture) / "_COMPLETE", (time, time))
    write_capture(tmp_path, beta())
    return tmp_path


def test_sql_asks_the_newest_capture_and_says_so(out: Path, call: Callable[..., Any]) -> None:
    answer = call("sql", out, COUNT, "--json")
    assert answer.rows == [{"pair": "alpha", "n": 2}, {"pair": "beta", "n": 2}]
    assert answer.err == "note: the newest of several captures, of pair 'alpha' (2); --all-captures adds the others\n"
    macro = call("sql", out, "SELECT DISTINCT capture FROM hotspots('norm_diff', 1000) WHERE pair = 'alpha'", "--json")
    assert [row["capture"] for row in macro.rows] == [ALPHA]
    assert "the newest of several captures" in macro.err, "a macro asks tables too"


def test_the_newest_is_the_one_that_was_complete_last_in_whatever_order_they_were_copied(
    out: Path, call: Callable[..., Any]
) -> None:
    for capture, finished in ((OLDER, "2026-01-01T00:00:00.000"), (ALPHA, "2026-01-01T00:00:01.000")):
        marker = out / f"captures/pair=alpha/capture={capture}/_COMPLETE"
        said = json.loads(marker.read_text()) | {"finished": finished}
        marker.write_text(json.dumps(said))
        copied = 2_000_000 if capture == ALPHA else 3_000_000
        os.utime(marker, (copied, copied))
    rows = call("sql", out, "SELECT capture, newest, written FROM captures WHERE pair = 'alpha'", "--json").rows
    assert {row["capture"]: (row["newest"], row["written"]) for row in rows} == {
        OLDER: (False, "2026-01-01T00:00:00"),
        ALPHA: (True, "2026-01-01T00:00:01"),
    }
    assert call("sql", out, COUNT, "--json").rows[0] == {"pair": "alpha", "n": 2}


@pytest.mark.parametrize("finished", [None, 7, "yesterday", "", [], "9999-99-99", "0001-01-01T00:00+14:00"])
def test_a_marker_that_says_no_time_has_that_of_its_file(out: Path, call: Callable[..., Any], finished: object) -> None:
    marker = out / f"captures/pair=alpha/capture={ALPHA}/_COMPLETE"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"finished": finished}))
    os.utime(marker, (2_000_000, 2_000_000))
    rows = call("sql", out, "SELECT written FROM captures WHERE pair = 'alpha' AND newest", "--json").rows
    assert rows == [{"written": "1970-01-24T03:33:20"}]


def test_all_captures_are_there_on_request_and_not_to_be_pooled(out: Path, call: Callable[..., Any]) -> None:
    answer = call("sql", out, COUNT, "--json", "--all-captures")
    assert answer.rows == [{"pair": "alpha", "n": 9}, {"pair": "beta", "n": 2}]
    assert (
        answer.err == "note: several captures in the tables, of pair 'alpha' (2): group by capture too, or choose one\n"
    )
    with analysis.open(str(out), all_captures=True) as run:
        assert run.arrow(COUNT)["n"].to_pylist() == [9, 2]


def test_the_table_of_captures_has_all_without_a_note(out: Path, call: Callable[..., Any]) -> None:
    answer = call("sql", out, "SELECT capture, newest FROM captures WHERE pair = 'alpha' ORDER BY written", "--json")
    assert answer.rows == [{"capture": OLDER, "newest": False}, {"capture": ALPHA, "newest": True}]
    assert answer.err == ""
    assert call("sql", out, "SELECT 1 AS one").err == ""


def test_a_partial_capture_that_is_asked_for_is_beside_the_newest(out: Path, call: Callable[..., Any]) -> None:
    begun = gamma()
    begun.pair = "alpha"
    write_capture(out, begun, marker=False)
    answer = call("sql", out, COUNT, "--json", "--include-partial")
    assert answer.rows[0] == {"pair": "alpha", "n": 3}
    assert "several captures in the tables, of pair 'alpha' (2)" in answer.err
    assert "--all-captures adds the others" in answer.err


def test_a_catalog_holds_the_newest_or_all(out: Path, call: Callable[..., Any], tmp_path: Path) -> None:
    for options, n in (([], 2), (["--all-captures"], 9)):
        file = tmp_path / "catalog.duckdb"
        assert call("catalog", out, "-o", file, *options).code == 0
        with duckdb.connect(str(file), read_only=True) as con:
            assert con.sql(COUNT).fetchall() == [("alpha", n), ("beta", 2)]


def test_verbs_that_tell_captures_apart_have_all(out: Path, call: Callable[..., Any]) -> None:
    rows = call("report", out, "--pair", "alpha", "--comparison", "BB-SS", "--json").rows
    assert {row["capture"] for row in rows} == {ALPHA, OLDER}
    assert call("grid", out, "--pair", "alpha", "--capture", "ffff", "--prompt", 6, "--metric", "norm_diff").code == 0
    top = call("report", out, "--pair", "alpha", "--limit", "1").out.split("of all")[1].splitlines()[1]
    assert top.split()[:3] == ["pair", "capture", "prompt_idx"], "cells of two captures stand in one list"


def test_status_says_that_there_are_several(out: Path, call: Callable[..., Any]) -> None:
    last = call("status", out).out.splitlines()[-1]
    assert last.startswith("(alpha: 2 captures, with other prompts or settings")
    assert "beta:" not in call("status", out).out
