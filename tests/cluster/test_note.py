"""The notes that the head keeps of its sweeps: which are forgotten, and which never."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from capture.process import born
from cluster import note
from cluster.note import noted, read_notes


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path))
    moments = (f"2026-01-01T{n // 60:02d}:{n % 60:02d}:00.000" for n in range(1440))
    monkeypatch.setattr(note, "now", lambda: next(moments))


def outs() -> list[str]:
    return [found["out"] for found in read_notes()[0]]


def test_of_many_sweeps_into_one_directory_the_oldest_notes_are_forgotten() -> None:
    for _ in range(note.KEPT + 5):
        with noted("/root/out", ["one"]):
            pass
    assert outs() == ["/root/out"] * note.KEPT


def test_the_last_note_of_each_directory_stays_since_what_lies_there_may_not_be_at_home() -> None:
    for n in range(note.KEPT + 5):
        for _ in range(2):
            with noted(f"/root/out{n}", ["one"]):
                pass
    assert set(outs()) == {f"/root/out{n}" for n in range(note.KEPT + 5)}


def test_a_sweep_that_runs_is_not_forgotten_however_many_come_after_it() -> None:
    with noted("/root/out", ["one"]):
        for _ in range(note.KEPT + 5):
            with noted("/root/out", ["two"]):
                pass
        assert [found["entries"] for found in read_notes()[0] if found["alive"]] == [["one"]]


def test_the_last_sweep_is_the_last_also_where_the_clock_was_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of a rented machine may be put right while it works."""
    for moment, out in (("2026-01-01T12:00:00.000", "first"), ("2026-01-01T11:00:00.000", "second"),
                        ("2026-01-01T11:30:00.000", "third"), ("2026-01-01T13:00:00.000", "fourth")):  # fmt: skip
        monkeypatch.setattr(note, "now", lambda moment=moment: moment)
        with noted(out, ["one"]):
            pass
    assert outs() == ["first", "second", "third", "fourth"]


def test_a_sweep_that_was_killed_does_not_run_where_nobody_asks_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(
        os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT
    )  # a container's first process may reap none that it did not start
    assert born(killed.pid) is not None
    monkeypatch.setattr(note.os, "getpid", lambda: killed.pid)
    with noted("/root/out", ["one"]):
        assert [found["alive"] for found in read_notes()[0]] == [False]
    killed.wait()


def test_a_note_names_the_sweeps_that_run_when_its_own_begins() -> None:
    with noted("/root/out", ["one"]) as first:
        pass
    with noted("/root/out", ["two"]) as second, noted("/root/out", ["three"]) as third:
        pass
    assert (first["beside"], second["beside"]) == ([], [])
    assert third["beside"] == [[second["pid"], second["born"]]]


def full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, memory: Path) -> Path:
    """A home that nothing can be written to (root may write where permissions do not let it), and what stands for memory."""
    full = tmp_path / "full"
    full.touch()
    monkeypatch.setenv("PAIRSCOPE_HOME", str(full))
    monkeypatch.setattr(note, "MEMORY", memory)
    return full


def test_a_sweep_is_known_also_where_the_disk_is_full_as_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, tmp_path, tmp_path)
    said: list[str] = []
    with noted("/root/out", ["one"], said.append) as content:
        assert [found["alive"] for found in read_notes()[0]] == [True]
        content["exit_code"] = 1
    assert [(found["alive"], found["exit_code"]) for found in read_notes()[0]] == [(False, 1)]
    assert said == []


@pytest.mark.parametrize("full_at", ["the start", "the end"])
def test_of_two_notes_of_a_sweep_the_later_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    monkeypatch.setattr(note, "MEMORY", tmp_path)
    write = note._write
    full = [full_at == "the start"]

    def on_a_small_disk(path: Path, content: dict[str, object]) -> None:
        if full[0] and path.parent == note.folder():
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(note, "_write", on_a_small_disk)
    with noted("/root/out", ["one"]) as content:
        content["exit_code"] = 0
        full[0] = not full[0]
    assert [(found["alive"], found["exit_code"]) for found in read_notes()[0]] == [(False, 0)]
    assert [found["out"] for found in read_notes()[0]] == ["/root/out"]


def test_what_somebody_else_put_into_memory_is_no_note_and_that_none_can_be_left_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = full_disk(monkeypatch, tmp_path, tmp_path)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "2026-1.json").write_text('{"out": "/theirs", "ended": null, "pid": 1, "born": "1"}')
    note.in_memory().symlink_to(theirs)
    said: list[str] = []
    with noted("/root/out", ["one"], said.append):
        assert read_notes() == ([], {})
    assert len(list(theirs.iterdir())) == 1
    assert f"no note of this sweep can be left in '{full}/sweeps'" in said[0]
