"""A disk without room is told as that, at once where it can be, and never as a bug."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from capture.attempt import check_output, run_entry
from capture.config import Entry
from capture.errors import StoreError
from capture.layout import RunDir

FULL = os.strerror(errno.ENOSPC)


def entry() -> Entry:
    return Entry(name="a", base_model="b", sft_model="s", tokenizer="t", prompts=("one",), device="cpu")


def work_without_room(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, FULL)


def work_without_room_for_a_file(*_: Any, **__: Any) -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/some/file")


def missing_file(*_: Any, **__: Any) -> None:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/some/file")


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (work_without_room, "cannot write to '{out}' or a directory for temporary files: the disk is full. Choose"),
        (work_without_room_for_a_file, "cannot write '/some/file': the disk quota is used up. Choose another --out"),
    ],
)
def test_work_that_finds_no_room_fails_with_an_error_for_the_user(work: Any, says: str, tmp_path: Path) -> None:
    row, outcome = run_entry(entry(), RunDir(str(tmp_path)), work=f"test_full_disk:{work.__name__}")
    assert (row["state"], row["error_class"], outcome.bug) == ("failed", "StoreError", False)
    assert says.format(out=tmp_path) in row["error"]


def test_another_error_of_the_system_is_still_a_bug(tmp_path: Path) -> None:
    row, outcome = run_entry(entry(), RunDir(str(tmp_path)), work="test_full_disk:missing_file")
    assert (row["error_class"], outcome.bug) == ("FileNotFoundError", True)


def test_a_manifest_without_room_does_not_hide_how_the_attempt_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(str(tmp_path))
    write = run.write_manifest_row

    def written(row: dict[str, Any]) -> None:
        if row["state"] != "running":
            raise StoreError("no room")
        write(row)

    monkeypatch.setattr(run, "write_manifest_row", written)
    said: list[str] = []
    row, outcome = run_entry(entry(), run, work="test_full_disk:missing_file", say=lambda _, text: said.append(text))
    assert (outcome.state, row["error_class"]) == ("failed", "FileNotFoundError")
    assert said == ["the manifest cannot be written: no room"]


def test_an_output_with_room_for_names_only_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(str(tmp_path))
    sync = os.fsync

    def full(fd: int) -> None:
        if os.fstat(fd).st_size:
            raise OSError(errno.ENOSPC, FULL)
        sync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=rf"cannot write to the output '{tmp_path}': the disk is full; choose another"):
        check_output(run)
    assert not list(tmp_path.rglob("*writable*"))


def test_an_output_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    check_output(RunDir(str(tmp_path)))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
