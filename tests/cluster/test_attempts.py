"""How attempts end and what is tried next: the same scenarios in this process and through Ray's actors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_work
import pytest
from fake_work import make_entry, quiet
from ray.exceptions import RayActorError

from capture.attempt import MOST_NODES, Outcome, Try, next_try, run_entry
from capture.config import Entry
from capture.layout import RunDir
from cluster.crew import Crew
from cluster.lost import lost
from cluster.sweep import run_sweep

Rows = list[dict[str, Any]]


def in_process(entry: Entry, out: Path, work: str) -> tuple[dict[str, Any], bool]:
    row, outcome = run_entry(entry, RunDir(str(out)), work=f"fake_work:{work}")
    return row, outcome.bug


def through_ray(entry: Entry, out: Path, work: str) -> tuple[dict[str, Any], bool]:
    summary = run_sweep(
        [(entry.name, entry)], str(out), show=quiet()[0], work=f"fake_work:{work}", resolve="fake_work:resolve"
    )
    (item,) = summary.items
    assert summary.exit_code == (0 if item.row["state"] == "complete" else 1)
    return item.row, item.bug


@pytest.fixture(params=["in_process", "through_ray"])
def execute(request: pytest.FixtureRequest) -> Callable[..., tuple[dict[str, Any], bool]]:
    if request.param == "through_ray":
        request.getfixturevalue("local_ray")
        return through_ray
    return in_process


def rows(out: Path) -> Rows:
    return RunDir(str(out)).manifest_rows()


class TestAttempts:
    def test_a_success_leaves_one_complete_row_with_what_the_work_found(self, execute: Any, tmp_path: Path) -> None:
        row, bug = execute(make_entry(), tmp_path, "complete")
        assert [r | {} for r in rows(tmp_path)] == [row]
        assert (row["state"], row["capture"], row["mode"], row["gpu"]) == ("complete", "id-complete", "resident", "cpu")
        assert (row["n_prompts"], row["n_tokens"], row["peak_memory_bytes"]) == (2, 34, 1000)
        assert row["error_class"] is None
        assert row["finished"] >= row["started"]
        assert not bug

    def test_the_log_holds_versions_settings_stages_and_warnings_and_no_secret(
        self, execute: Any, tmp_path: Path
    ) -> None:
        entry = make_entry(model_kwargs={"token": "hf_very_secret"}, tracked_token_ids=(7,))
        row, _ = execute(entry, tmp_path, "complete")
        log = (tmp_path / row["log"]).read_text()
        for part in ("torch 2.", "transformers 5.", "host ", '"top_k": 20', "an info line of ours", "a warning of transformers",
                     "a Python warning", "layers, layer 1/2, 340 tokens/s", "2 in all"):  # fmt: skip
            assert part in log
        assert "hf_very_secret" not in log
        assert "an info line of a library" not in log

    def test_out_of_memory_is_tried_again_with_smaller_tiles(self, execute: Any, tmp_path: Path) -> None:
        row, _ = execute(make_entry(), tmp_path, "out_of_memory_once")
        assert row["state"] == "complete"
        assert [r["state"] for r in rows(tmp_path)] == ["failed", "complete"]
        assert [(c["tile_divisor"], c["mode"]) for c in fake_work.calls(tmp_path)] == [(1, "auto"), (4, "auto")]

    def test_a_hub_out_of_reach_of_the_only_node_is_the_end(self, execute: Any, tmp_path: Path) -> None:
        row, bug = execute(make_entry(base_model="org/base"), tmp_path, "cut_off_everywhere")
        assert [r["error_class"] for r in rows(tmp_path)] == [row["error_class"]] == ["HubUnreachableError"]
        assert not bug

    def test_out_of_memory_with_smaller_tiles_is_tried_streamed(self, execute: Any, tmp_path: Path) -> None:
        row, _ = execute(make_entry(), tmp_path, "out_of_memory_unless_streamed")
        assert (row["state"], row["mode"]) == ("complete", "streamed")
        called = [(c["tile_divisor"], c["mode"]) for c in fake_work.calls(tmp_path)]
        assert called == [(1, "auto"), (4, "auto"), (4, "streamed")]
        assert [r["error_class"] for r in rows(tmp_path)] == ["DeviceMemoryError", "DeviceMemoryError", None]
        assert len({r["log"] for r in rows(tmp_path)}) == 3

    def test_out_of_memory_ends_when_nothing_smaller_is_left(self, execute: Any, tmp_path: Path) -> None:
        row, bug = execute(make_entry(mode="sub-layer"), tmp_path, "out_of_memory_always")
        assert (row["state"], row["error_class"], row["error"]) == ("failed", "MemoryError", "no more")
        assert len(rows(tmp_path)) == 2  # no mode takes less, so only the tiles were left
        assert not bug

    def test_what_the_arithmetic_says_cannot_fit_is_not_tried_again(self, execute: Any, tmp_path: Path) -> None:
        row, bug = execute(make_entry(), tmp_path, "too_large")
        assert (row["state"], row["error_class"]) == ("failed", "DoesNotFitError")
        assert len(rows(tmp_path)) == 1
        assert not bug

    def test_a_gated_model_fails_once_with_its_reason_in_one_line(self, execute: Any, tmp_path: Path) -> None:
        row, bug = execute(make_entry(), tmp_path, "gated")
        assert row["error_class"] == "CheckpointError"
        assert row["error"] == "'owner/model' is gated: accept its terms, then `hf auth login`"
        assert len(rows(tmp_path)) == 1
        assert not bug

    def test_a_bug_fails_once_and_its_traceback_is_in_the_log(self, execute: Any, tmp_path: Path) -> None:
        row, bug = execute(make_entry(), tmp_path, "bug")
        assert (row["error_class"], row["error"]) == ("Unpicklable", "one and two")
        assert bug
        assert 'raise Unpicklable("one", "two")' in (tmp_path / row["log"]).read_text()
        assert len(rows(tmp_path)) == 1

    def test_a_library_that_exits_is_a_failure_of_its_entry(self, execute: Any, tmp_path: Path) -> None:
        row, bug = execute(make_entry(), tmp_path, "exits")
        assert (row["state"], row["error_class"]) == ("failed", "SystemExit")
        assert bug

    def test_work_that_is_not_there_is_a_failure_of_its_entry(self, execute: Any, tmp_path: Path) -> None:
        row, bug = execute(make_entry(), tmp_path, "not_there")
        assert (row["state"], row["error_class"]) == ("failed", "AttributeError")
        assert bug


def test_a_stop_in_this_process_leaves_an_interrupted_row(tmp_path: Path) -> None:
    row, outcome = run_entry(make_entry(), RunDir(str(tmp_path)), work="fake_work:obliging", stop=lambda: True)
    assert outcome.state == row["state"] == "interrupted"
    assert rows(tmp_path) == [row]


def test_an_entry_is_not_to_blame_for_machines_that_are_taken_away_and_gets_several() -> None:
    """As an interruptible one is; a worker that dies by itself is tried once more."""
    text = "The actor died because its node has died. Node Id: ab the actor's node was terminated unexpectedly"
    crew = Crew.__new__(Crew)
    crew.place = None
    gone, died = (lost(RayActorError(error_msg=said), crew) for said in (text, "The actor exited by SIGKILL"))
    assert (gone.node_gone, died.node_gone, gone.died, died.died) == (True, False, True, True)
    tried, tries = Try(), 1
    while (following := next_try(tried, make_entry(), gone)) is not None:
        tried, tries = following, tries + 1
    assert tries == MOST_NODES
    assert tried.note == f"again, after {MOST_NODES - 1} nodes went"
    tried = next_try(Try(nodes=3), make_entry(), died) or Try()
    assert (tried.deaths, tried.nodes) == (1, 3)
    assert next_try(tried, make_entry(), died) is None
    assert next_try(tried, make_entry(), gone) == Try(deaths=1, nodes=4)
    lost_span = Outcome("failed", lost_span=0)
    assert next_try(Try(nodes=1, losses=1), make_entry(), lost_span) == Try(nodes=1, losses=2)
    assert next_try(Try(nodes=1, losses=2), make_entry(), lost_span) is None
