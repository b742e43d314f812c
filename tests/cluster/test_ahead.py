"""The next entry's files come while the present one computes: real workers and actors, a hub on loopback, nothing computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def scenarios(folder: Path, nodes: int, *names: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "ahead_driver.py"), str(folder), str(nodes), *names],
        capture_output=True, text=True, timeout=600, cwd=HERE.parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {found["scenario"]: found for found in map(json.loads, done.stdout.splitlines())}


def all_complete(found: dict[str, Any]) -> bool:
    return set(found["states"].values()) == {"complete"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the sweep of the tests below did, on one node."""
    return scenarios(tmp_path_factory.mktemp("ahead"), 1, "bounded")


def test_the_next_entrys_weights_are_there_before_the_present_one_ends(seen: dict[str, Any]) -> None:
    found = seen["bounded"]
    assert all_complete(found), found["said"]
    for present, following in ("gh", "hi", "ij"):
        pair = {f"org/{following}-base", f"org/{following}-sft"}
        assert pair <= set(found["notes"][present]["whole_at_the_end"])
        assert pair <= set(found["notes"][following]["whole"])


def test_nothing_is_fetched_twice(seen: dict[str, Any]) -> None:
    found = seen["bounded"]
    assert len(found["bytes"]) == 8
    assert set(found["bytes"].values()) == {found["file"]}, "each of them once"


def test_it_is_told_on_the_screen_and_in_the_attempts_log(seen: dict[str, Any]) -> None:
    found = seen["bounded"]
    assert "h: fetching ahead on " in found["said"]
    assert "h: fetched ahead on " in found["said"]
    assert "fetched ahead of its turn: 0.01 GiB in " in found["logs"]["h"]
    assert "fetched ahead" not in found["logs"]["g"]


def test_the_cache_stays_within_its_bound_over_four_pairs(seen: dict[str, Any]) -> None:
    found = seen["bounded"]
    assert 2 * found["pair"] < found["most"] <= found["bound"] < 3 * found["pair"]
    whole = found["notes"]["j"]["whole"]
    assert {"org/j-base", "org/j-sft"} <= set(whole)
    assert not {"org/g-base", "org/h-base"} & set(whole), "what was done first has made room"


@pytest.mark.slow
def test_what_cannot_be_fetched_ahead_harms_nothing_and_its_own_turn_tells_why(tmp_path: Path) -> None:
    found = scenarios(tmp_path, 1, "failing")["failing"]
    assert found["states"] == {"d": "complete", "x": "failed", "f": "complete", "e": "complete"}
    assert "x: not fetched ahead: CheckpointError: no model 'org/x-base'" in found["said"]
    assert found["errors"]["x"].startswith("no model 'org/x-base' on the hub")
    assert "e: not fetched ahead: CheckpointError: 'org/e-sft'" in found["said"]
    assert found["bytes"]["org/e-sft"] == 2 * found["file"], "its own turn fetched what was damaged"
    assert found["bytes"]["org/e-base"] == found["file"], "and only that"


@pytest.mark.slow
def test_a_stopped_sweep_leaves_no_process_that_fetches_and_goes_on_with_what_came(tmp_path: Path) -> None:
    found = scenarios(tmp_path, 1, "stopped")["stopped"]
    assert found["first"]["states"] == {"m": "interrupted", "n": "not started"}
    assert found["left"] == []
    assert found["again"]["states"] == {"m": "complete", "n": "complete"}
    assert list(found["again"]["bytes"]) == ["org/n-sft"], "the one that had come whole is not asked for again"


@pytest.mark.slow
def test_without_it_nothing_comes_before_its_turn(tmp_path: Path) -> None:
    found = scenarios(tmp_path, 1, "alone")["alone"]
    assert all_complete(found), found["said"]
    assert "ahead" not in found["said"]
    assert list(found["bytes"].values()) == [found["file"]] * 4


@pytest.mark.slow
def test_two_nodes_fetch_ahead_for_different_entries_and_each_runs_where_its_files_are(tmp_path: Path) -> None:
    found = scenarios(tmp_path, 2, "apart")["apart"]
    assert all_complete(found), found["said"]
    assert {found["notes"][name]["cache"] for name in "qr"} == {"node0", "node1"}
    for name in "qr":
        assert {f"org/{name}-base", f"org/{name}-sft"} <= set(found["notes"][name]["whole"])
        assert [found["bytes"][f"org/{name}-{kind}"] for kind in ("base", "sft")] == [found["file"]] * 2
