"""What a disk can do: be full, turn read-only, refuse a rename, be slow, hold other bytes than were written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inject
import invariants
import pytest
import runner
from inject import FOREVER, Fault

from capture.layout import RunDir
from capture.process import folder, me, stage, temporary


def last_row(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = RunDir(str(out)).manifest_rows()[-1]
    return found


def goes_on(entry: Any, out: Path, undisturbed: Path, said: Path, attempts: int) -> runner.Ended:
    """Run once more, undisturbed: now all is there and right."""
    again = runner.run(entry, out, said=said)
    assert again.code == 0, again.said
    assert invariants.wrong(out, as_undisturbed={"tiny": undisturbed}, attempts=attempts) == []
    return again


@pytest.mark.parametrize(
    ("key", "faults", "why"),
    [
        ("disk-full-again", [Fault("row group", "ENOSPC", times=FOREVER)], "the disk is full"),
        ("read-only", [Fault("replace", "EROFS", nth=6, times=FOREVER)], "read-only"),
        ("rename-fails", [Fault("rename", "EIO", nth=3)], "Input/output error"),
        ("fsync-fails", [Fault("fsync", "EIO", nth=14)], "Input/output error"),
    ],
)
def test_what_cannot_be_written_is_told_in_one_line_and_taken_up_again(
    key: str, faults: list[Fault], why: str, entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    ended = runner.run(entry, out, *faults, said=said)
    assert ended.code == 1, ended.said
    assert "Traceback" not in ended.said
    assert "(a bug)" not in ended.said
    line = next(line for line in ended.said.splitlines() if line.startswith("pairscope: tiny failed: "))
    assert "StoreError: cannot write" in line
    assert why in line
    assert invariants.complete(out) == {}
    again = goes_on(entry, out, undisturbed, said, attempts=2)
    told(key, sees=f"`StoreError: cannot write '<file>': {why}. Choose another --out, or make room and run again`",
         seconds=again.seconds, again="from the last span on")  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip("no right to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_full_loses_nothing_and_has_room_again_later(
    entry: Any, undisturbed: Path, told: Any, tmp_path: Path, small_disk: Path
) -> None:
    out, said = small_disk / "out", tmp_path / "said"
    out.mkdir()
    ended = runner.run(entry, out, said=said)
    assert ended.code == 1, ended.said
    assert "the disk is full" in ended.said
    assert "Traceback" not in ended.said
    assert invariants.complete(out) == {}
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    began = time.monotonic()
    again = runner.run(entry, out, said=said)
    assert again.code == 0, again.said
    assert invariants.wrong(out, as_undisturbed={"tiny": undisturbed}) == []
    told("disk-full", sees="`StoreError: cannot write '<file>': the disk is full. Choose another --out, or make room and run again`",
         seconds=time.monotonic() - began, again="from the last span on")  # fmt: skip


def test_a_slow_disk_is_waited_for(entry: Any, undisturbed: Path, told: Any, tmp_path: Path) -> None:
    slow = [Fault(at, "slow", times=FOREVER, seconds=0.2) for at in ("table", "rename")]
    ended = runner.run(entry, tmp_path / "out", *slow, said=tmp_path / "said")
    assert ended.code == 0, ended.said
    assert invariants.wrong(tmp_path / "out", as_undisturbed={"tiny": undisturbed}, attempts=1) == []
    told("slow-disk", sees="nothing", seconds=ended.seconds, again="nothing")


def test_two_at_work_on_one_capture_do_not_harm_each_other(
    entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    began = time.monotonic()
    slow = Fault("rename", "slow", times=FOREVER, seconds=0.1)  # so that they meet where it matters
    both = [runner.start(entry, out, slow, said=tmp_path / f"said{i}") for i in range(2)]
    for one in both:
        one.join(300)
    said = [(tmp_path / f"said{i}").read_text() for i in range(2)]
    assert [one.exitcode for one in both] == [0, 0], "\n".join(said)
    assert invariants.wrong(out, as_undisturbed={"tiny": undisturbed}, attempts=2) == []
    told("two-writers", sees="both are complete", seconds=time.monotonic() - began, again="what both did")


def test_one_that_begins_anew_with_force_ends_another_at_work_on_the_same_with_an_error_that_says_so(
    entry: Any, undisturbed: Path, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    first = runner.start(entry, out, Fault("table", "slow", seconds=6.0), said=said)
    while not list(out.glob("captures/*/*/spans/span-2-*")):
        assert first.exitcode is None, said.read_text()
        time.sleep(0.02)
    anew = runner.start(entry, out, Fault("layer", "slow", nth=2, seconds=10.0), force=True, said=tmp_path / "anew")
    first.join(60)
    assert first.exitcode == 1, said.read_text()
    assert "is gone: another run of the same capture began it anew (--force); run again" in said.read_text()
    assert "(a bug)" not in said.read_text()
    anew.join(60)
    assert anew.exitcode == 0, (tmp_path / "anew").read_text()
    assert invariants.wrong(out, as_undisturbed={"tiny": undisturbed}, attempts=2) == []


def test_a_clock_that_is_set_back_does_not_change_which_attempt_was_the_last(
    entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    from analysis.status import status_rows

    out, said = tmp_path / "out", tmp_path / "said"
    assert runner.run(entry, out, Fault("layer", "error", nth=8), said=said).code == 1
    again = runner.run(entry, out, Fault("clock", "clock", seconds=-86400.0), said=said)
    assert again.code == 0, again.said
    assert invariants.wrong(out, as_undisturbed={"tiny": undisturbed}, attempts=2) == []
    (row,) = status_rows(RunDir(str(out)))
    assert row["state"] == "complete"
    first, second = RunDir(str(out)).manifest_rows()
    assert first["started"] < second["started"] <= second["finished"]
    told(
        "clock-back",
        sees="nothing: `status` shows the last attempt",
        seconds=again.seconds,
        again="from the last span on",
    )


@pytest.mark.parametrize(
    ("table", "how"),
    [
        ("pairwise_topk-00000.parquet", "flipped"),
        ("pairwise_topk-00000.parquet", "truncated"),
        ("runs.parquet", "flipped"),
        ("runs.parquet", "truncated"),
    ],
)
def test_a_table_that_was_damaged_later_is_found_and_made_again(
    how: str, table: str, entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    assert runner.run(entry, out, said=said).code == 0
    (file,) = out.glob(f"captures/*/*/{table}")
    inject.damage(file, how)
    again = goes_on(entry, out, undisturbed, said, attempts=2)
    log = (out / last_row(out)["log"]).read_text()
    sees = (
        "a table is gone or has lost bytes" if how == "truncated" else f"{table}' holds other bytes than were written"
    )
    assert f"{sees}; capturing it anew" in log
    told(
        f"table-{how}",
        sees=f"`{sees}; it is captured anew`".replace(table, "<table>"),
        seconds=again.seconds,
        again="the capture",
    )


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("state-2", "truncated"),
        ("state-2", "flipped"),
        ("span-1-1", "truncated"),
        ("span-1-1", "flipped"),
    ],
)
def test_a_span_that_was_damaged_is_computed_again(
    how: str, name: str, entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    assert runner.run(entry, out, Fault("table", "kill", nth=2), said=said).code == -9
    (file,) = out.glob(f"captures/*/*/spans/{name}.safetensors")
    inject.damage(file, how, 0.9)
    again = goes_on(entry, out, undisturbed, said, attempts=2)
    log = (out / last_row(out)["log"]).read_text()
    assert f"{name}.safetensors'" in log
    assert "its layers are computed again" in log
    told(
        f"span-{how}",
        sees="the log says `its layers are computed again`",
        seconds=again.seconds,
        again="its layers and those behind it",
    )


def test_a_forced_capture_that_is_killed_never_leaves_a_marker_over_other_files(
    entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    uncut = entry.model_copy(
        update={"spans": entry.spans.model_copy(update={"layers": None})}
    )  # one part a table, not four
    assert runner.run(uncut, out, said=said).code == 0
    assert runner.run(entry, out, Fault("rename", "kill", nth=4), force=True, said=said).code == -9
    assert invariants.wrong(out, settled=False) == []
    again = goes_on(entry, out, undisturbed, said, attempts=3)
    told(
        "forced-over",
        sees="`status` says `missing`, until it is run again",
        seconds=again.seconds,
        again="from the last span on",
    )


def test_what_dead_writers_left_is_removed_and_what_live_ones_write_is_not(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    capture = tmp_path / "captures/pair=a/capture=b"
    capture.mkdir(parents=True)
    host, pid, born = me().split("/")
    dead, later = capture / f"x.999999--0123abcd@{host}.tmp", capture / f"x.{pid}-{int(born) - 1}-0123abcd@{host}.tmp"
    live, untold = (
        Path(temporary(f"{capture}/x")),
        capture / f"x.{pid}--0123abcd@{host}.tmp",
    )  # where a system does not say when
    elsewhere, long_ago = capture / "x.999999-7-0123abcd@other.tmp", capture / "y.999999-7-0123abcd@other.tmp"
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    unasked = capture / f"x.{zombie.pid}--0123abcd@{host}.tmp"
    probing = capture / f"{dead.name}.999999-7-4567cdef@{host}.tmp"  # was to be renamed to a temporary name
    for file in (dead, later, live, untold, elsewhere, long_ago, unasked, probing):
        file.touch()
    left, kept = capture / f".tmp-{host}-999999-7-abcd", capture / f"{stage()}abcd"
    left.mkdir()
    kept.mkdir()
    os.utime(long_ago, (0, 0))
    run.remove_leftovers()
    assert sorted(p.name for p in capture.iterdir()) == sorted(p.name for p in (live, untold, elsewhere, kept))
    zombie.wait()


KILLED = """
import os, signal, sys
from pathlib import Path
from pyarrow import fs
from capture.attemptlog import attempt_log
from capture.layout import RunDir
from capture.process import folder
from capture.store import CaptureWriter
run = RunDir(sys.argv[1])
run.fs, run.root = fs.SubTreeFileSystem(sys.argv[1], fs.LocalFileSystem()), "bucket"
with attempt_log(run, run.log_path("a", "1"), "first line", own_process=False):
    CaptureWriter(run, "a", "b").stage.joinpath("runs.parquet").write_bytes(b"x")
    folder()  # as for models that are read from the hub
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_into_a_store_left_among_temporary_files_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, other = tmp_path / "tmp", tmp_path / "tmp" / "pairscope-of-somebody"
    other.mkdir(parents=True)
    environment = os.environ | {"TMPDIR": str(place), "PYTHONPATH": str(Path(__file__).parents[2])}
    dead = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert dead.returncode == -9, dead.stderr
    assert len(list(place.iterdir())) == 1 + 3
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    mine = folder()
    assert sorted(place.iterdir()) == sorted([mine, other])
    assert mine.stat().st_mode & 0o777 == 0o700
