"""Rows of the manifest whose driver is gone: told from those that somebody still works on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from analysis.status import status_rows
from capture.layout import RunDir
from capture.manifest import LOST, Attempt, as_it_is, settle_lost
from capture.process import me, runs


def begun(run: RunDir, entry: str, driver: str) -> str:
    attempt = Attempt(run, entry)
    attempt.start(driver=driver)
    return attempt.id


def a_dead_process() -> str:
    """How a process called itself that is gone."""
    code = "from capture.process import me; print(me())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def states(run: RunDir) -> list[str]:
    return [row["state"] for row in run.manifest_rows()]


def test_a_row_of_a_dead_driver_was_interrupted_and_one_of_a_live_driver_runs(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    begun(run, "dead", a_dead_process())
    begun(run, "live", me())
    assert {row["entry"]: row["state"] for row in status_rows(run)} == {"dead": "interrupted", "live": "running"}
    assert states(run) == ["running", "running"]  # who asks changes nothing
    (settled,) = settle_lost(run)
    assert {k: settled[k] for k in LOST} == LOST
    assert settled["finished"] >= settled["started"]
    assert states(run) == ["interrupted", "running"]


def test_a_later_process_of_the_same_number_is_not_the_driver() -> None:
    host, pid, born = me().rsplit("/", 2)
    assert runs(me())
    assert runs(f"{host}/{pid}/")  # a system that does not say when
    assert not runs(f"{host}/{pid}/{int(born) - 1}")


def test_a_driver_on_another_machine_counts_as_gone_once_its_entry_was_begun_again(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    begun(run, "a", "elsewhere/1/2")
    assert settle_lost(run) == []
    begun(run, "a", me())
    assert len(settle_lost(run)) == 1
    assert states(run) == ["interrupted", "running"]


def test_a_row_from_before_drivers_were_kept_is_left_as_it_is() -> None:
    row = {"state": "running", "entry": "a"}
    assert as_it_is(row) is row


def test_an_attempt_never_starts_before_the_one_before_it(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    ahead = Attempt(run, "a")
    ahead.start(started="2999-01-01T00:00:00.000")
    again = Attempt(RunDir(str(tmp_path)), "a")
    assert again.row["started"] < "2999"  # nothing was read yet
    settle_lost(run)
    assert Attempt(run, "a").row["started"] == "2999-01-01T00:00:00.001"


def test_a_probe_that_was_killed_is_removed_by_the_next(tmp_path: Path) -> None:
    from capture.attempt import check_output

    (tmp_path / "manifest").mkdir()
    left = tmp_path / f"manifest/.writable.999999-7-0123abcd@{os.uname().nodename}.tmp"
    left.touch()
    check_output(RunDir(str(tmp_path)))
    assert list((tmp_path / "manifest").iterdir()) == []
