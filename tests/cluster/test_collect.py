"""Captures that come home: whole, once, in place with the marker last, whatever happens to the line."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from far import Far

from capture.errors import ConfigError, StoreError
from capture.layout import RunDir
from capture.show import Show
from cluster.collect import Collector, sole_collector
from cluster.collect_check import unfit_marker, wrong_files
from cluster.collect_errors import UnreachableError
from cluster.collect_source import Found, HeadSource, StoreSource

pytestmark = pytest.mark.skipif(not shutil.which("rsync"), reason="rsync is not installed")


@pytest.fixture
def home(tmp_path: Path) -> RunDir:
    return RunDir(str(tmp_path / "home"))


def collector(far: Far, home: RunDir, **more: Any) -> Collector:
    return Collector(HeadSource(far.reach, far.run.root), home, Show(stream=io.StringIO(), live=False), **more)


def said(made: Collector) -> str:
    return made.show.stream.getvalue()  # type: ignore[attr-defined]


def check(home: RunDir, pairs: list[str]) -> None:
    found = list(home.captures())
    assert sorted(c.pair for c in found) == sorted(pairs)
    for c in found:
        assert wrong_files(Path(c.path), c.marker) == {}
        assert not [p for p in Path(c.path).iterdir() if p.name.endswith(".tmp")]


def test_what_is_complete_comes_home_with_its_row_and_log_and_only_once(far: Far, home: RunDir) -> None:
    far.capture("one")
    made = collector(far, home)
    assert made.round().fetched == 1
    far.capture("two", seed=1)
    again = made.round()
    assert (again.fetched, again.left) == (1, {})
    check(home, ["one", "two"])
    rows = home.manifest_rows()
    assert [(r["entry"], r["state"], r["dollars"]) for r in rows] == [
        ("one", "complete", 0.25),
        ("two", "complete", 0.25),
    ]
    assert all((Path(home.root) / r["log"]).read_text() == f"the log of {r['attempt']}\n" for r in rows)
    assert (Path(home.capture_path("one", "0123456789abcdef")) / "capture.json").is_file()
    transfers = far.calls("rsync")
    assert made.round().fetched == 0
    assert collector(far, home).round().fetched == 0  # another process: what is at home is checked, not fetched
    assert far.calls("rsync") == transfers
    assert "one: at home: 1 file" in said(made)


@pytest.mark.usefixtures("near")
def test_a_capture_under_way_stays_there_and_its_attempt_runs_on(far: Far, home: RunDir) -> None:
    path = far.capture("one")
    (path / "_COMPLETE").unlink()
    made = collector(far, home)
    assert made.round().fetched == 0
    assert home.manifest_rows() == []  # it says complete over there, and nothing of it is here


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize("change", ["byte", "short", "rows", "gone", "no parquet"])
def test_what_is_not_as_its_marker_says_is_not_taken_and_the_others_are(far: Far, home: RunDir, change: str) -> None:
    path = far.capture("bad")
    far.capture("good", seed=1)
    file = path / "prompts.parquet"
    data, marker = bytearray(file.read_bytes()), json.loads((path / "_COMPLETE").read_text())
    if change == "byte":
        data[len(data) // 2] ^= 1
    elif change == "short":
        del data[-1:]
    elif change == "rows":
        marker["files"][0]["rows"] += 1
    elif change == "no parquet":
        import hashlib

        data = bytearray(os.urandom(len(data)))
        marker["files"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    file.write_bytes(data)
    if change == "gone":
        file.unlink()
    (path / "_COMPLETE").write_text(json.dumps(marker))
    made = collector(far, home)
    found = made.round()
    assert list(found.left) == ["bad (0123456789abcdef)"]
    assert "prompts.parquet" in found.left["bad (0123456789abcdef)"]
    check(home, ["good"])
    assert [r["entry"] for r in home.manifest_rows()] == ["good"]
    transfers = far.calls("rsync")
    assert made.round().left == found.left
    assert far.calls("rsync") == transfers, "it is not fetched again before it changes"
    shutil.rmtree(path)
    far.capture("bad", seed=2)
    assert made.round().left == {}
    check(home, ["bad", "good"])


def test_a_transfer_that_breaks_off_goes_on_where_it_was(far: Far, home: RunDir) -> None:
    far.capture("one", rows=4000)
    total = sum(f["bytes"] for c in far.run.captures() for f in c.marker["files"])
    assert total > 2_000_000
    made = collector(far, home)
    far.cut_after(total * 3 // 4)
    with pytest.raises(UnreachableError, match="broke off"):
        made.round()
    assert list(home.captures()) == []
    (part,) = Path(home.root).glob(".incoming/*/*/prompts.parquet")
    assert part.stat().st_size > total // 2
    assert collector(far, home).round().fetched == 1  # as after a restart
    (_, fetch, *_) = map(int, (far.folder / "bytes").read_text().split()[-3:])
    assert fetch < total * 0.6, "what was there was not sent again"
    check(home, ["one"])
    assert not (Path(home.root) / ".incoming" / "pair=one").exists()


def test_a_head_that_is_down_is_said_to_be_and_is_asked_again(far: Far, home: RunDir) -> None:
    far.capture("one")
    made = collector(far, home)
    far.down()
    with pytest.raises(UnreachableError, match="No route to host"):
        made.round()
    far.down(False)
    assert made.round().fetched == 1


def test_a_stop_ends_a_transfer_and_leaves_it_to_be_gone_on_with(far: Far, home: RunDir) -> None:
    far.capture("one", rows=2000)
    stopped: list[bool] = []
    made = collector(far, home, stop=lambda: bool(stopped))
    made._check_room = lambda *args: stopped.append(True)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        made.round()
    assert list(home.captures()) == []
    assert collector(far, home).round().fetched == 1


def _made(home: RunDir) -> Path:
    path = Path(home.root) / ".incoming" / "pair=one" / "capture=0123456789abcdef"
    path.mkdir(parents=True)
    return path


@pytest.mark.usefixtures("near")
def test_what_was_damaged_at_home_is_fetched_again(far: Far, home: RunDir) -> None:
    far.capture("one")
    collector(far, home).round()
    file = Path(home.capture_path("one", "0123456789abcdef")) / "prompts.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    made = collector(far, home)
    (found,) = made.source.look().captures
    assert made.verify(found) == ["prompts.parquet has another checksum than its marker says"]
    assert made.round().fetched == 1
    assert made.verify(found) == []
    check(home, ["one"])


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize("harm", [None, '{"pair": "o', "[]"])
def test_what_was_asked_and_found_is_a_part_of_a_capture_at_home(far: Far, home: RunDir, harm: str | None) -> None:
    there = far.capture("one") / "capture.json"
    here = Path(home.capture_path("one", "0123456789abcdef")) / "capture.json"
    for _ in range(2):
        made = collector(far, home)
        assert (made.round().left, made.verify(made.source.look().captures[0])) == ({}, [])
        assert here.read_bytes() == there.read_bytes()
        here.unlink() if harm is None else here.write_text(harm)
        assert "capture.json" in made.verify(made.source.look().captures[0])[0]
    there.unlink() if harm is None else there.write_text(harm)
    assert "capture.json" in collector(far, home).round().left["one (0123456789abcdef)"]


@pytest.mark.usefixtures("near")
def test_nothing_is_left_of_what_an_earlier_try_fetched_of_another_capture_of_the_id(far: Far, home: RunDir) -> None:
    path = far.capture("one")
    left = _made(home)
    for name in ("prompts.parquet", "capture.json"):
        (left / name).write_text('{"pair": "older"}')
    assert collector(far, home).round().fetched == 1
    here = Path(home.capture_path("one", "0123456789abcdef")) / "capture.json"
    assert here.read_bytes() == (path / "capture.json").read_bytes()


@pytest.mark.usefixtures("near")
def test_a_capture_made_anew_over_there_replaces_the_one_at_home(far: Far, home: RunDir) -> None:
    far.capture("one", rows=10)
    made = collector(far, home)
    made.round()
    far.capture("one", rows=20, seed=5)
    assert made.round().fetched == 1
    (found,) = home.captures()
    assert found.marker["files"][0]["rows"] == 20
    check(home, ["one"])


@pytest.mark.usefixtures("near")
def test_nothing_is_brought_or_deleted_through_a_link_at_home(far: Far, home: RunDir, tmp_path: Path) -> None:
    far.capture("one")
    there, link = tmp_path / "elsewhere", Path(home.capture_path("one", "0123456789abcdef"))
    there.mkdir()
    (there / "photos.parquet").write_text("mine")
    link.parent.mkdir(parents=True)
    link.symlink_to(there)
    with pytest.raises(StoreError, match=f"'{link}' is a symbolic link, .*: remove it"):
        collector(far, home).round()
    assert [p.name for p in there.iterdir()] == ["photos.parquet"]


HOSTILE = [
    ("../../evil", "0123", [{"name": "prompts.parquet"}]),
    ("one", "..", [{"name": "prompts.parquet"}]),
    ("one", "0123", [{"name": "../../../evil.parquet"}]),
    ("one", "0123", [{"name": "/etc/evil.parquet"}]),
    ("one", "0123", [{"name": "_COMPLETE"}]),
    ("one", "0123", [{"name": "a\nb.parquet"}]),
    ("one", "0123", []),
    ("one", "0123", "files"),
    (None, {}, None),
]


@pytest.mark.parametrize(("pair", "capture", "files"), HOSTILE)
def test_names_that_a_stranger_made_up_are_refused(pair: Any, capture: Any, files: Any, home: RunDir) -> None:
    if isinstance(files, list):
        files = [{"rows": 1, "bytes": 1, "sha256": "0" * 64} | f for f in files]
    marker = {"schema_version": 1, "files": files}
    assert unfit_marker(pair, capture, marker)

    class Lying:
        def look(self) -> Any:
            from cluster.collect_source import Look

            return Look(
                "/out", captures=[Found(pair, capture, marker)], rows=[{"attempt": "../evil", "state": "failed"}]
            )

        def fetch(self, *args: Any) -> None:
            raise AssertionError("asked for")

    made = Collector(Lying(), home, Show(stream=io.StringIO(), live=False))
    assert len(made.round().left) == 1
    assert home.manifest_rows() == []


def test_a_link_in_place_of_a_file_is_not_followed(far: Far, home: RunDir, tmp_path: Path) -> None:
    path = far.capture("one")
    os.replace(path / "prompts.parquet", tmp_path / "elsewhere")
    (path / "prompts.parquet").symlink_to(tmp_path / "elsewhere")
    assert "is not there" in str(collector(far, home).round().left)


@pytest.mark.usefixtures("near")
def test_a_home_without_room_is_said_before_anything_is_fetched(
    far: Far, home: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    far.capture("one")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("cluster.collect.shutil.disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(StoreError, match=r"has 10 B free, and the next capture needs .*; make room"):
        collector(far, home).round()
    assert far.calls("rsync") == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
@pytest.mark.parametrize("size", [100, (1 << 20) + 77])
def test_a_home_that_fills_while_a_stores_file_is_written_is_no_failure_of_the_store(size: int, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_bytes(os.urandom(size))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "x").symlink_to("/dev/full")
    with pytest.raises(StoreError, match=r"cannot write .*the disk is full"):
        StoreSource(str(tmp_path / "out"), None).fetch(".", ["x"], tmp_path / "home", lambda: None)
    (tmp_path / "home" / "x").unlink()
    StoreSource(str(tmp_path / "out"), None).fetch(".", ["x"], tmp_path / "home", lambda: None)
    assert (tmp_path / "home" / "x").read_bytes() == (tmp_path / "out" / "x").read_bytes()


def test_two_collectors_into_one_directory_are_refused(home: RunDir) -> None:
    with (
        sole_collector(home),
        pytest.raises(ConfigError, match="another `pairscope collect` is at work"),
        sole_collector(home),
    ):
        pass
    with sole_collector(home):
        pass
    assert not (Path(home.root) / ".incoming").exists()


def test_a_home_without_locks_is_no_other_collector(home: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("cluster.collect.fcntl.flock", none)
    with sole_collector(home):
        assert Path(home.root).exists()


def test_a_store_needs_no_head_and_a_part_that_came_is_kept(far: Far, home: RunDir) -> None:
    far.capture("one", rows=4000)
    part = _made(home) / "prompts.parquet"
    whole = (Path(far.run.capture_path("one", "0123456789abcdef")) / "prompts.parquet").read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    made = Collector(StoreSource(f"file://{far.run.root}", None), home, Show(stream=io.StringIO(), live=False))
    read: list[int] = []
    made._tick = lambda *args: read.append(1)  # type: ignore[method-assign]
    assert made.round().fetched == 1
    assert len(read) <= len(whole) // 2 / (1 << 20) + 2, "a megabyte a tick, of the second half alone"
    check(home, ["one"])
    assert [r["state"] for r in home.manifest_rows()] == ["complete"]
    assert far.calls("look") == 0
