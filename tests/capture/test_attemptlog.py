"""Log files on file systems that are not local."""

from __future__ import annotations

import errno
import io
import logging
from pathlib import Path

import pytest
from pyarrow import fs

from capture.attemptlog import append_log, attempt_log
from capture.errors import StoreError
from capture.layout import RunDir
from capture.printable import without_logins


@pytest.fixture
def remote(tmp_path: Path) -> RunDir:
    """A run directory on a file system that pyarrow does not call local, as a bucket's."""
    run = RunDir(str(tmp_path))
    run.fs, run.root = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "bucket"
    assert not run.is_local
    (tmp_path / "bucket" / "logs" / "a").mkdir(parents=True)  # a bucket needs none
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


class FullDisk(io.StringIO):
    """What a log file on a full disk does, from its `room`-th write on."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def write(self, text: str) -> int:
        self.room -= bool(text)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)

    def close(self) -> None:
        if self.room < 0:
            self.room = 0  # a second close, by the garbage collector, is well
            raise OSError(errno.ENOSPC, "No space left on device")


def full_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> FullDisk:
    stream = FullDisk(room)
    monkeypatch.setattr(Path, "open", lambda *_, **__: stream)
    return stream


def test_a_log_that_cannot_be_begun_is_an_error_that_names_the_file_and_the_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(str(tmp_path))
    full_disk(monkeypatch, 0)
    with (
        pytest.raises(StoreError, match=r"cannot write '.*logs/a/1\.log': the disk is full\. Choose another --out"),
        attempt_log(run, run.log_path("a", "1"), "first line\n", own_process=False),
    ):
        pytest.fail("the work was begun")


def test_a_disk_that_fills_up_in_the_middle_of_a_log_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(str(tmp_path))
    stream = full_disk(monkeypatch, 1)
    with attempt_log(run, run.log_path("a", "1"), "first line\n", own_process=False):
        logging.getLogger("capture.x").warning("at work")
    with pytest.raises(KeyError), attempt_log(run, run.log_path("a", "2"), "", own_process=False):
        raise KeyError
    assert stream.getvalue() == "first line\n"
    assert "Logging error" not in capsys.readouterr().err


def test_addresses_lose_their_login_in_the_log_and_on_other_handlers(tmp_path: Path) -> None:
    run, stream = RunDir(str(tmp_path)), io.StringIO()
    own = logging.StreamHandler(stream)  # as a library has that tells the terminal by itself
    library = logging.getLogger("a_library")
    library.addHandler(own)
    try:
        with attempt_log(run, run.log_path("a", "1"), "", own_process=False):
            logging.getLogger("a_library.http").warning("asked %s %d times", "http://me:planted@host:1/x?y=z", 2)
            logging.getLogger("a_library.http").warning("a://b and mail@c:d@e")
        logging.getLogger("a_library.http").warning("%s", "http://me:planted@host")
    finally:
        library.removeHandler(own)
    said = (tmp_path / "logs/a/1.log").read_text()
    assert "asked http://***@host:1/x?y=z 2 times" in said
    assert "a://b and mail@c:d@e" in said
    assert stream.getvalue().splitlines()[0] == "asked http://***@host:1/x?y=z 2 times"
    assert "planted" in stream.getvalue().splitlines()[2], "afterwards all is as it was"


@pytest.mark.parametrize("login", ["me:planted", "planted", ":planted", "me:pl@nted", "me:"])
def test_a_login_is_taken_out_whatever_its_kind(login: str) -> None:
    text = f"asked 'https://{login}@host/a@b' and s3://bucket/x@host"
    assert without_logins(text) == "asked 'https://***@host/a@b' and s3://bucket/x@host"
