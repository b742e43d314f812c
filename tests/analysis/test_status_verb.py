"""`pairscope status`: every entry, its state, its error in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic import ALPHA, alpha, beta, gamma, write_attempt, write_capture

from analysis.status import status_rows, table_lines
from capture.layout import RunDir


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """alpha failed and then succeeded, beta has no attempt, gamma is partial."""
    write_capture(tmp_path, alpha())
    write_capture(tmp_path, beta())
    write_capture(tmp_path, gamma(), marker=False)
    write_attempt(tmp_path, "1", entry="alpha", state="failed", started="2025-01-01T00:00:01.000", error_class="DeviceError",
                  error="no\n  CUDA")  # fmt: skip
    write_attempt(tmp_path, "2", entry="alpha", capture=ALPHA, state="complete", started="2025-01-01T00:00:02.000",
                  seconds=3.5, n_tokens=8, mode="streamed", gpu="cpu", peak_memory_bytes=2**30)  # fmt: skip
    return tmp_path


def states(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(r["entry"], r["state"]) for r in rows]


def test_the_last_attempt_of_each_entry_counts(out: Path, call: Callable[..., Any]) -> None:
    answer = call("status", out, "--json")
    assert answer.code == 0
    assert states(answer.rows) == [("alpha", "complete"), ("beta", "complete"), ("gamma", "partial")]
    assert answer.rows[0]["peak_memory_bytes"] == 2**30


def test_where_the_last_attempt_found_it_complete_the_one_counts_that_made_it(
    out: Path, call: Callable[..., Any]
) -> None:
    """Of two sweeps at a time the second waits for what the first one makes."""
    write_attempt(out, "3", entry="alpha", capture=ALPHA, state="complete", started="2025-01-01T00:00:03.000",
                  seconds=0.01)  # fmt: skip
    rows = call("status", out, "--json").rows
    assert [(r["attempt"], r["seconds"], r["n_tokens"]) for r in rows if r["entry"] == "alpha"] == [("2", 3.5, 8)]
    assert [r["attempt"] for r in call("status", out, "--all", "--json").rows[:3]] == ["1", "2", "3"]


def test_all_attempts_show_on_request(out: Path, call: Callable[..., Any]) -> None:
    answer = call("status", out, "--all", "--json")
    assert answer.code == 0, "the last attempt succeeded"
    assert states(answer.rows)[:2] == [("alpha", "failed"), ("alpha", "complete")]


def test_the_table_has_one_line_an_entry(out: Path, call: Callable[..., Any]) -> None:
    lines = call("status", out, "--all").out.splitlines()
    assert lines[0].split() == ["entry", "state", "seconds", "tokens", "mode", "gpu", "peak", "memory", "error"]
    assert lines[1].split() == ["alpha", "failed", "DeviceError:", "no", "CUDA"]
    assert lines[2].split() == ["alpha", "complete", "3.5", "8", "streamed", "cpu", "1.0", "GiB"]
    assert len(lines) == 1 + 4 + 1
    assert lines[5] == "(peak memory on a CPU: of the weights alone)"


def test_a_narrow_terminal_keeps_entry_state_and_the_whole_error(out: Path) -> None:
    error = "mode resident needs 812.55 GiB for weights alone; 79.10 GiB are free on NVIDIA H100 80GB HBM3; set mode: streamed"
    name = "qwen2.5-72b_to_qwen2.5-72b-instruct"
    write_attempt(out, "3", entry=name, state="interrupted", started="2025-01-01T00:00:03.000", seconds=3.5, n_tokens=8,
                  mode="streamed", gpu="NVIDIA H100 80GB HBM3", peak_memory_bytes=2**35, error_class="DeviceMemoryError",
                  error=error)  # fmt: skip
    lines = list(table_lines(status_rows(RunDir(str(out))), 80))
    assert max(map(len, lines)) <= 80
    at = next(i for i, line in enumerate(lines) if line.startswith(name))
    assert lines[at].split()[:2] == [name, "interrupted"]
    below = lines[at + 1 : at + 3]
    assert all(line.startswith("    ") for line in below)
    assert " ".join(" ".join(below).split()) == f"DeviceMemoryError: {error}"
    assert "(gpu, mode: with --json, or on a wider terminal)" in lines
    wide = list(table_lines(status_rows(RunDir(str(out))), 200))
    assert "gpu" in wide[0]
    assert not any("wider terminal" in line for line in wide)


def test_a_failed_entry_gives_exit_code_1_and_its_name(out: Path, call: Callable[..., Any]) -> None:
    write_attempt(out, "3", entry="delta", state="failed", started="2025-01-01T00:00:03.000", error="gone")
    answer = call("status", out)
    assert answer.code == 1
    assert answer.err.strip() == "failed: delta"


def test_a_complete_capture_that_is_gone_is_missing(out: Path, call: Callable[..., Any]) -> None:
    shutil.rmtree(out / "captures" / "pair=alpha")
    row = call("status", out, "--json").rows[0]
    assert (row["state"], ALPHA in row["error"]) == ("missing", True)


def test_a_running_entry_is_shown_once(tmp_path: Path, call: Callable[..., Any]) -> None:
    write_capture(tmp_path, gamma(), marker=False)
    write_attempt(tmp_path, "1", entry="gamma", state="running", started="2025-01-01T00:00:01.000")
    assert states(call("status", tmp_path, "--json").rows) == [("gamma", "running")]


def test_nothing_there_is_an_error_that_exits_with_2(tmp_path: Path, call: Callable[..., Any]) -> None:
    assert call("status", tmp_path / "none").code == 2
    assert call("status", tmp_path).code == 2
    (tmp_path / "captures").mkdir()
    answer = call("status", tmp_path)
    assert (answer.code, "no attempt and no capture yet" in answer.err) == (2, True)


def test_a_capture_that_lost_bytes_is_damaged(out: Path, call: Callable[..., Any]) -> None:
    file = next(out.glob("captures/pair=alpha/*/pairwise*.parquet"))
    file.write_bytes(file.read_bytes()[:-1])
    rows = call("status", out, "--json").rows
    assert states(rows)[0] == ("alpha", "damaged")
    assert "sweep again" in rows[0]["error"]


def test_a_capture_of_another_schema_version_is_a_row_with_its_reason(out: Path, call: Callable[..., Any]) -> None:
    for marker in out.glob("captures/*/*/_COMPLETE"):
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"schema_version": 99}))
    answer = call("status", out, "--json")
    assert answer.code == 0
    assert states(answer.rows) == [("alpha", "unreadable"), ("gamma", "partial"), ("beta", "unreadable")]
    assert all("schema version 99" in r["error"] for r in answer.rows if r["state"] == "unreadable")


def test_memory_shows_the_plan_and_the_peak_of_every_stage(tmp_path: Path, call: Callable[..., Any]) -> None:
    write_capture(tmp_path, alpha())
    peaks = {"peak_open_bytes": 2**20, "peak_layers_bytes": 3 * 2**20, "peak_lens_bytes": 2**30, "peak_write_bytes": 0}
    write_attempt(tmp_path, "1", entry="alpha", capture=ALPHA, state="complete", started="2025-01-01T00:00:02.000",
                  mode="streamed", gpu="NVIDIA H100", peak_memory_bytes=2**30, planned_memory_bytes=2**31, **peaks)  # fmt: skip
    header, line = call("status", tmp_path, "--memory").out.splitlines()
    assert header.split() == ["entry", "state", "mode", "gpu", "planned", "peak", "open", "layers", "lens", "write"]
    assert " ".join(line.split()).endswith("NVIDIA H100 2.0 GiB 1.0 GiB 1.0 MiB 3.0 MiB 1.0 GiB 0 bytes")
