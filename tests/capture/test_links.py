"""A run directory with symbolic links in it is read as ever; nothing is written or deleted through those below captures/."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_capture import entry_of

from capture.attempt import check_output
from capture.config import Entry
from capture.errors import StoreError
from capture.layout import RunDir
from capture.run import capture_pair
from capture.settings import Spans
from capture.spans import SpanStore
from capture.store import CaptureWriter


@pytest.fixture(scope="module")
def entry(pairs: Callable[..., Any]) -> Entry:
    return entry_of(pairs("llama"), spans=Spans(layers=1))


@pytest.fixture(scope="module")
def made(entry: Entry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete capture, for its name and to be copied."""
    out = tmp_path_factory.mktemp("made")
    return Path(capture_pair(entry, str(out)).path)


@pytest.fixture
def elsewhere(made: Path, tmp_path: Path) -> Path:
    """Somebody's directory, where all lies that a capture takes for its own, or for what a killed one left."""
    for place in (there := tmp_path / "elsewhere", there / made.name, there / made.name / "spans"):
        place.mkdir()
        for name in ("photos.parquet", f".tmp-{socket.gethostname()}-999999999--x", "state-0.safetensors"):
            (place / name).write_text("mine")
    return there


def everything(directory: Path) -> dict[str, Any]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


def linked(out: Path, made: Path, elsewhere: Path, what: str) -> Path:
    """A run directory in which a pair, a capture or its spans lead elsewhere; the link."""
    pair = out / "captures" / made.parent.name
    link, target = {
        "pair": (pair, elsewhere),
        "capture": (pair / made.name, elsewhere / made.name),
        "spans": (pair / made.name / "spans", elsewhere / made.name / "spans"),
    }[what]
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    return link


@pytest.mark.parametrize("what", ["pair", "capture", "spans"])
def test_nothing_is_written_or_deleted_through_a_link(
    what: str, entry: Entry, made: Path, elsewhere: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    link = linked(out, made, elsewhere, what)
    before = everything(elsewhere)
    why = f"'{link}' is a symbolic link, .*: remove it, or choose another --out$"
    check_output(RunDir(str(out)))
    for force in (False, True):
        with pytest.raises(StoreError, match=why):
            capture_pair(entry, str(out), force=force)
    with pytest.raises(StoreError, match=why):
        SpanStore(RunDir(str(out)), str(out / "captures" / made.parent.name / made.name))
    if what != "spans":
        with pytest.raises(StoreError, match=why):
            CaptureWriter(RunDir(str(out)), "tiny", made.name.removeprefix("capture="))
    assert everything(elsewhere) == before
    link.unlink()
    assert capture_pair(entry, str(out)).state == "complete"


@pytest.mark.parametrize("what", ["pair", "capture", "spans"])
def test_what_lies_behind_a_link_is_read_and_not_tidied_up(
    what: str, entry: Entry, made: Path, elsewhere: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    link = linked(out, made, elsewhere, what)
    shutil.copytree(made, link.parent if what == "spans" else elsewhere / made.name, dirs_exist_ok=True)
    for path in elsewhere.rglob("*"):
        os.utime(path, (0, 0))  # long ago
    before = everything(elsewhere)
    run = RunDir(str(out))
    check_output(run)
    assert [f"capture={c.capture}" for c in run.captures()] == [made.name]
    assert capture_pair(entry, str(out)).state == "skipped"
    assert everything(elsewhere) == before


@pytest.mark.parametrize("what", ["captures", "out", "above"])
def test_the_run_directory_may_lie_behind_links(what: str, entry: Entry, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    out = tmp_path / "work" / "out"
    link = {"captures": out / "captures", "out": out, "above": tmp_path / "work"}[what]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "disk")
    assert capture_pair(entry, str(out)).state == "complete"
    assert len(list(RunDir(str(out)).captures())) == 1
