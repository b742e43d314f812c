"""Log files on file systems that are not local."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from pyarrow import fs

from capture.attemptlog import append_log, attempt_log
from capture.layout import RunDir


@pytest.fixture
def remote(tmp_path: Path) -> RunDir:
    """A run directory on a file system that pyarrow does not call local, as a bucket's."""
    run = RunDir(str(tmp_path))
    run.fs, run.root = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "bucket"
    assert not run.is_local
    return run


def test_a_log_is_uploaded_when_the_attempt_ends(remote: RunDir, tmp_path: Path) -> None:
    path = remote.log_path("a", "1")
    with attempt_log(remote, path, "first line\n", own_process=False):
        logging.getLogger("capture.x").info("at work")
        assert not (tmp_path / path).exists()
    lines = (tmp_path / path).read_text().splitlines()
    assert lines[0] == "first line"
    assert lines[1].endswith("INFO capture.x: at work")


def test_a_log_is_uploaded_after_an_error_too(remote: RunDir, tmp_path: Path) -> None:
    path = remote.log_path("a", "1")
    with pytest.raises(KeyError), attempt_log(remote, path, "first line\n", own_process=False):
        raise KeyError
    assert (tmp_path / path).read_text() == "first line\n"


def test_a_driver_adds_to_a_log_or_begins_it(remote: RunDir, tmp_path: Path) -> None:
    path = remote.log_path("a", "1")
    append_log(remote, path, "one\n")
    append_log(remote, path, "two\n")
    assert (tmp_path / path).read_text() == "one\ntwo\n"


def test_records_after_the_attempt_are_not_in_its_log(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    path = run.log_path("a", "1")
    with attempt_log(run, path, "", own_process=False):
        pass
    logging.getLogger("capture.x").warning("later")
    assert Path(path).read_text() == ""
