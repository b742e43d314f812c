"""Sweeps through Ray whose workers, driver, raylet or head are killed: in processes of their own, found again by a tag."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import invariants
import pytest
from inject import FOREVER, Fault
from sweeping import Sweep, start, sweeping

from capture.layout import RunDir

pytestmark = pytest.mark.slow
KILLED_AFTER_S = 3.0  # by Ray's job agent, after its SIGTERM
TWO = ("tiny", "other")
SLOW = Fault("table", "slow", times=FOREVER, seconds=1.0)  # so that there is time to strike


def entries(entry: Any) -> list[Any]:
    return [entry.model_copy(update={"name": name}) for name in TWO]


def until(what: Callable[[], Any], sweep: Sweep, seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, sweep.said.read_text()
        assert sweep.process.poll() is None, sweep.said.read_text()
        time.sleep(0.05)
    return found


def a_span_is_there(out: Path) -> Callable[[], Any]:
    return lambda: list(out.glob("captures/*/*/spans/state-[1-9]*"))


def goes_on(entry: Any, out: Path, undisturbed: Path, said: Path) -> float:
    """Sweep once more, undisturbed: all is there and right, and nothing is left. Seconds that it took."""
    reported, began = invariants.complete(out), time.monotonic()
    with sweeping(entries(entry), out, said) as sweep:
        assert sweep.wait() == 0, said.read_text()
        took = time.monotonic() - began
        sweep.until_nothing_is_left()
    assert invariants.wrong(out, as_undisturbed=dict.fromkeys(TWO, undisturbed), reported=reported) == []
    return took


def states(out: Path) -> list[tuple[str, str | None]]:
    return sorted((r["state"], r["error_class"] or "") for r in RunDir(str(out)).manifest_rows())


@pytest.mark.parametrize(
    ("key", "fault", "error"),
    [
        ("sweep-worker-killed", Fault("layer", "kill", nth=25), "WorkerDiedError"),
        ("cuda-poison-sweep", Fault("layer", "cuda", nth=25), "DeviceError"),
    ],
)
def test_a_worker_that_is_lost_is_replaced_and_its_entry_goes_on(
    key: str, fault: Fault, error: str, entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    once = Fault(fault.at, fault.do, fault.nth, once=str(tmp_path / "once"))
    with sweeping(entries(entry), out, said, {"tiny": [once]}) as sweep:
        assert sweep.wait() == 0, said.read_text()
        sweep.until_nothing_is_left()
    assert states(out) == [("complete", ""), ("complete", ""), ("failed", error)]
    assert invariants.wrong(out, as_undisturbed=dict.fromkeys(TWO, undisturbed), attempts=3) == []
    first, second = (r for r in RunDir(str(out)).manifest_rows() if r["entry"] == "tiny")
    line = next(line for line in said.read_text().splitlines() if line.startswith(f"tiny: {error}"))
    assert line.endswith("trying again: again, after its worker died")
    told(key, sees=f"`{first['error'].split(':')[0]}: …; trying again, after its worker died`", again="from the last span on",
         seconds=_seconds_between(first["finished"], second["finished"]))  # fmt: skip


def _seconds_between(a: str, b: str) -> float:
    import datetime

    return (datetime.datetime.fromisoformat(b) - datetime.datetime.fromisoformat(a)).total_seconds()


def test_a_worker_that_stands_still_for_a_minute_goes_on(
    entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    stop = Fault("layer", "stop", nth=25, seconds=60.0, once=str(tmp_path / "once"))
    began = time.monotonic()
    with sweeping(entries(entry), out, said, {"tiny": [stop]}) as sweep:
        assert sweep.wait() == 0, said.read_text()
        sweep.until_nothing_is_left()
    assert time.monotonic() - began > 60
    assert states(out) == [("complete", ""), ("complete", "")]
    assert invariants.wrong(out, as_undisturbed=dict.fromkeys(TWO, undisturbed), attempts=2) == []
    told("stop-minute", sees="progress stands still for a minute", seconds=time.monotonic() - began, again="nothing")


@pytest.mark.parametrize("key", ["asleep-driver", "asleep-sweep"])
def test_a_laptop_that_sleeps_for_a_minute_in_a_sweep_costs_nobody_an_attempt(
    key: str, entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    with sweeping(entries(entry), out, said, {"tiny": [SLOW], "other": [SLOW]}) as sweep:
        until(a_span_is_there(out), sweep)
        asleep = [sweep.process.pid, *(invariants.tagged(sweep.tag) if key == "asleep-sweep" else [])]
        for signal_ in (signal.SIGSTOP, signal.SIGCONT):
            for pid in asleep:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal_)
            time.sleep(60.0 if signal_ == signal.SIGSTOP else 0.0)
        woken = time.monotonic()
        assert sweep.wait() == 0, said.read_text()
        took = time.monotonic() - woken
        sweep.until_nothing_is_left()
    assert states(out) == [("complete", ""), ("complete", "")]
    assert invariants.wrong(out, as_undisturbed=dict.fromkeys(TWO, undisturbed), attempts=2) == []
    told(key, sees="progress stands still for a minute", seconds=took, again="nothing")


def test_a_killed_driver_leaves_no_process_and_the_next_sweep_goes_on(
    entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    from analysis.status import status_rows

    out, said = tmp_path / "out", tmp_path / "said"
    with sweeping(entries(entry), out, said, {"tiny": [SLOW], "other": [SLOW]}) as sweep:
        until(a_span_is_there(out), sweep)
        sweep.process.kill()
        sweep.process.wait()
        rows = {r["entry"]: r for r in status_rows(RunDir(str(out)))}
        assert {r["state"] for r in rows.values()} == {"interrupted"}, rows
        assert "is gone without a word" in next(iter(rows.values()))["error"]
        sweep.until_nothing_is_left()
    took = goes_on(entry, out, undisturbed, said)
    assert {error for state, error in states(out) if state == "interrupted"} == {"DriverLostError"}
    told("driver-killed", sees="`status` says `interrupted`: `the process that ran this attempt is gone without a word`",
         seconds=took, again="from the last spans on")  # fmt: skip


@pytest.mark.parametrize(
    ("key", "process"), [("raylet-killed", "/raylet/raylet "), ("head-killed", "/gcs/gcs_server ")]
)
def test_a_ray_that_dies_ends_the_sweep_and_the_next_one_goes_on(
    key: str, process: str, entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    slow = Fault("table", "slow", times=FOREVER, seconds=3.0)
    with sweeping(
        entries(entry), out, said, {"tiny": [slow], "other": [slow]}, RAY_gcs_rpc_server_reconnect_timeout_s="10"
    ) as sweep:
        until(a_span_is_there(out), sweep)
        (pid,) = sweep.found(process)
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        code = sweep.wait(240)
        ended = time.monotonic() - began
        shown = said.read_text()
        assert code == 1, shown
        assert "Traceback" not in shown
        sweep.until_nothing_is_left()
    took = goes_on(entry, out, undisturbed, said)
    if key == "raylet-killed":
        assert "the Ray of this sweep has no node left" in shown
        sees = f"after {ended:.0f} s: `the Ray of this sweep has no node left …; run again`"
    else:
        assert "Failed to connect to GCS" in shown
        sees = "Ray's own `Failed to connect to GCS within … seconds` ends the sweep; `status` says `interrupted`"
    told(key, sees=sees, seconds=took, again="from the last spans on")


def test_a_job_that_is_stopped_says_interrupted_before_it_is_killed(
    entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    slow = Fault("table", "slow", times=FOREVER, seconds=30.0)  # hears nothing of the stop
    sweep = start(entries(entry), out, said, {"tiny": [slow], "other": [slow]})
    try:
        until(a_span_is_there(out), sweep)
        sweep.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            sweep.process.wait(KILLED_AFTER_S)
        sweep.process.kill()
        code = sweep.wait(120)
        sweep.until_nothing_is_left()
    finally:
        with contextlib.suppress(ProcessLookupError):
            sweep.process.kill()
    assert code in (143, -9)
    assert {state for state, _ in states(out)} == {"interrupted"}
    took = goes_on(entry, out, undisturbed, said)
    told(
        "job-stop",
        sees="`interrupted`, within the three seconds that Ray gives",
        seconds=took,
        again="from the last spans on",
    )
