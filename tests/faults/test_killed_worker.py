"""A worker killed at any stage of its work: what is run again goes on where it was, and gives the same tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import invariants
import pytest
import runner
from inject import Fault

# key -> the fault, the layer at which the next attempt goes on
STAGES = {
    "open": (Fault("open", "kill"), 0),
    "load": (Fault("load", "kill", nth=9), None),  # wherever the thread that reads ahead was
    "layer": (Fault("layer", "kill", nth=20), 2),
    "lens": (Fault("lens", "kill", nth=14), 2),
    "commit": (Fault("span file", "kill", nth=3, after=True), 1),  # columns of layer 1 are there, its states are not
    "write": (Fault("table", "kill", nth=4), 3),
    "rename": (Fault("rename", "kill", nth=3), 3),
    "before-marker": (Fault("marker", "kill", nth=2), 3),
    "after-marker": (Fault("marker", "kill", nth=2, after=True), None),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_worker_killed_at_any_stage_costs_nothing_but_time(
    stage: str, entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    fault, layer = STAGES[stage]
    out, said = tmp_path / "out", tmp_path / "said"
    dead = runner.run(entry, out, fault, said=said)
    assert dead.code == -9, dead.said
    reported = invariants.complete(out)
    assert len(reported) == (stage == "after-marker")
    again = runner.run(entry, out, said=said)
    assert again.code == 0, again.said
    assert invariants.wrong(out, as_undisturbed={"tiny": undisturbed}, reported=reported, attempts=2) == []
    (document,) = out.glob("captures/*/*/capture.json")
    (worker,) = json.loads(document.read_text())["workers"]
    if layer is not None:
        assert worker["began_at"] == layer
    redone = "nothing" if reported else f"layers {worker['began_at']} to 3 of 4"
    told(f"kill-{stage}", sees="the process is gone; `status` says `interrupted`", seconds=again.seconds, again=redone)
