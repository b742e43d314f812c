"""A remembered fingerprint: asked for again only when a file was touched in any way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from capture import remembered as module
from capture.remembered import remembered


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Asks for the fingerprint of one small file, and says whether it was hashed."""
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(module, "QUIET_S", 0.05)
    file = tmp_path / "weights"
    file.write_bytes(b"one")

    def ask_once() -> bool:
        time.sleep(0.1)
        hashed = []
        content = file.read_bytes().decode()
        assert remembered([file], lambda: hashed.append(1) or content) == content  # type: ignore[func-returns-value]
        return bool(hashed)

    return ask_once


def test_what_did_not_change_is_hashed_once(ask: Callable[[], bool]) -> None:
    assert [ask(), ask(), ask()] == [True, False, False]


def test_a_change_is_seen_though_size_and_time_are_set_back(ask: Callable[[], bool], tmp_path: Path) -> None:
    ask()
    file = tmp_path / "weights"
    before = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert ask()


def test_another_file_in_the_same_place_is_hashed(ask: Callable[[], bool], tmp_path: Path) -> None:
    ask()
    (tmp_path / "other").write_bytes(b"two")
    (tmp_path / "other").replace(tmp_path / "weights")
    assert ask()


def test_a_file_that_was_just_written_is_not_remembered(
    ask: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUIET_S", 100.0)
    assert [ask(), ask()] == [True, True]


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(ask: Callable[[], bool], tmp_path: Path) -> None:
    file = tmp_path / "weights"
    time.sleep(0.1)
    remembered([file], lambda: str(file.write_bytes(b"two")))
    assert ask()


def test_notes_that_cannot_be_used_are_no_matter(ask: Callable[[], bool], tmp_path: Path) -> None:
    ask()
    (note,) = (tmp_path / "home" / "fingerprints").glob("*.json")
    for content in ("", "[]", '{"files": 1}'):
        note.write_text(content)
        assert ask()
    note.unlink()
    note.parent.rmdir()
    note.parent.write_text("a file where the folder should be")
    assert [ask(), ask()] == [True, True]


def test_small_files_leave_no_note(ask: Callable[[], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 100)
    assert [ask(), ask()] == [True, True]
    assert not (tmp_path / "home").exists()
