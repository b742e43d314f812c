"""A worker that stands still is given up in the end, and its process ended; a driver that slept gives up nobody for it."""

from __future__ import annotations

import time
from pathlib import Path

import fake_work
import pytest
from fake_work import make_entry, quiet

import cluster.loop
from capture.layout import RunDir
from cluster.lost import SILENT_S, STEP_S, Pulse
from cluster.sweep import run_sweep


def test_only_time_in_which_the_driver_was_awake_and_waited_for_an_answer_counts() -> None:
    pulse = Pulse()
    assert [pulse.look(now, asked=True) for now in (100.0, 101.0, 103.0)] == [0.0, 1.0, 3.0]
    assert pulse.look(9000.0, asked=True) == 3.0 + STEP_S < SILENT_S
    pulse.heard()
    assert pulse.look(9001.0, asked=True) == 1.0
    assert pulse.look(9002.0, asked=False) == 0.0


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_is_stopped_for_good_is_ended_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.loop, "SILENT_S", 3.0)
    show, said = quiet()
    entries = [("stopped_once", make_entry("stopped_once"))]
    summary = run_sweep(entries, str(tmp_path), work="fake_work:by_name", resolve="fake_work:resolve", show=show)
    assert [i.state for i in summary.items] == ["complete"]
    first, second = fake_work.calls(tmp_path)
    assert first["pid"] != second["pid"]
    lost, _ = RunDir(str(tmp_path)).manifest_rows()
    assert (lost["state"], lost["error_class"]) == ("failed", "WorkerDiedError")
    assert f"pid {first['pid']}, for 3 s: its process is stopped or hangs" in lost["error"]
    assert "trying again: again, after its worker died" in said.getvalue()
    end = time.monotonic() + 60
    while Path(f"/proc/{first['pid']}/cmdline").exists() and Path(f"/proc/{first['pid']}/cmdline").read_bytes():
        assert time.monotonic() < end, "a process that stands still is left behind"
        time.sleep(0.1)
