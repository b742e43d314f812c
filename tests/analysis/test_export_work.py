"""An export: how often it reads the tables, and what is left of it when it is stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from synthetic import PASSES, alpha, make_capture, write_capture

import analysis.json_export
from analysis.json_export import _batches
from analysis.json_rows import hold
from pairscope import cli


@pytest.fixture
def many(tmp_path: Path) -> Path:
    tokens = {(i, "identity"): ["<s>", "a"] for i in range(12)}
    write_capture(tmp_path / "out", make_capture("p", "c", PASSES, 2, tokens, {-1, 0, 1, 2}, 0))
    return tmp_path / "out"


def test_the_tables_are_read_once_for_many_prompts(many: Path, call: Callable[..., Any], monkeypatch: Any) -> None:
    held = []

    def once(con: Any, names: Any, prompts: list[int]) -> None:
        hold(con, names, prompts)
        held.append(prompts)
        for name in ("runs", "runs_topk", "pairwise", "pairwise_topk"):
            con.execute(f"DROP TABLE IF EXISTS temp.{name}")
            con.execute(f"CREATE TEMP VIEW {name} AS SELECT error('read again') AS pair")

    monkeypatch.setattr(analysis.json_export, "hold", once)
    file = many.parent / "a.json"
    assert call("export-json", many, "-o", file).code == 0
    assert held == [list(range(12))]
    assert len(json.loads(file.read_text())) == 12


def test_prompts_are_read_together_up_to_some_hundred_tokens() -> None:
    prompts = [{"n_tokens": n} for n in (300, 200, 13, 900, 1, 2)]
    assert [[p["n_tokens"] for p in some] for some in _batches(prompts)] == [[300, 200], [13], [900], [1, 2]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["in a query", "between"])
def test_an_export_that_is_stopped_leaves_nothing(many: Path, number: signal.Signals, where: str) -> None:
    """The signal comes while the second record is written. A query that DuckDB's main thread has taken a large piece of hears it at the
    end of that: here after some ten seconds."""
    driver = many.parent / "driver.py"
    driver.write_text(f"""
import os, signal
import analysis.json_export as export
import pairscope
record = export._record
made = []
def slow(con, *rest):
    if made and {where == "in a query"}:
        import threading
        threading.Timer(0.3, lambda: os.kill(os.getpid(), {int(number)})).start()
        con.execute("SELECT count(*) FROM range(10_000_000) a, range(1_000) b WHERE a.range * 7 % 13 = b.range % 13").fetchall()
    elif made:
        os.kill(os.getpid(), {int(number)})
    made.append(1)
    yield from record(con, *rest)
export._record = slow
pairscope.main()
""")
    done = subprocess.run(
        [sys.executable, driver, "export-json", many, "-o", many.parent / "a.json"],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2], env={"PYTHONPATH": ".", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in many.parent.iterdir()) == ["driver.py", "out"]


def test_progress_says_which_of_several_files_it_is_of(many: Path, monkeypatch: Any) -> None:
    write_capture(many, alpha())
    monkeypatch.setattr("analysis.cli_json._progress", lambda what, unit, each: lambda done, all_: said.append(what))
    said: list[str] = []
    assert CliRunner().invoke(cli, ["export-json", str(many), "-o", str(many.parent / "files")]).exit_code == 0
    assert list(dict.fromkeys(said)) == ["alpha (1 of 2)", "p (2 of 2)"]
