"""Files fetched whole before anybody reads them: stopped, damaged and gone on with."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_hub import Fault, LocalHub

from capture import keep, ranges, spool
from capture.errors import CheckpointError
from capture.hub import model_without_weights
from capture.keep import Keeper
from capture.ranges import Stopped
from capture.remote import Source
from capture.spool import Hasher, Spool, is_begun, part_of

SIZE = 3_000_000
PART = 256 << 10


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub whose org/model has two shards of random bytes."""
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(keep, "PART", PART)
    folder = tmp_path / "served" / "org" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    names = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {' + ", ".join(f'"{n}": "{n}"' for n in names) + "}}"
    )
    for name in names:
        (folder / name).write_bytes(os.urandom(SIZE))
    with LocalHub(tmp_path / "served") as made, made.used_here(monkeypatch, tmp_path / "cache"):
        yield made
    ended = time.monotonic() + 30
    while [t for t in threading.enumerate() if t.name.startswith(("fetch", "hash", "check"))]:
        assert time.monotonic() < ended, "threads are left"
        time.sleep(0.01)


def missing() -> list[tuple[Any, Path]]:
    folder, files = model_without_weights(
        "org/model", None, allow_pickle=False, token=None, check_config=lambda config: None
    )
    return [(file, folder) for file in files]


def same(hub: LocalHub, folder: Path) -> bool:
    served = hub.root / "org" / "model"
    return all((folder / p.name).read_bytes() == p.read_bytes() for p in served.glob("*.safetensors"))


def asked(hub: LocalHub) -> int:
    return sum(r.range[1] - r.range[0] + 1 for r in hub.seen("content") if r.range)


def test_files_come_whole_whatever_happens_on_the_way(hub: LocalHub) -> None:
    files = missing()
    hub.faults += [
        Fault("cut", after=1000, times=2), Fault("status", status=503), Fault("short"), Fault("stall", after=10, seconds=0.01)
    ]  # fmt: skip
    keeper = Keeper(connections=4)
    assert keeper.fetch(files) == 2
    assert keeper.fetched == 2 * SIZE
    assert same(hub, files[0][1])
    assert missing() == []
    assert not [p for p in files[0][1].parents[1].glob("blobs/*") if "pairscope" in p.name]


def stop_after(keeper: Keeper, nbytes: int) -> threading.Thread:
    def work() -> None:
        while keeper.fetched < nbytes:
            time.sleep(0.001)
        keeper.stop()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_what_came_before_a_stop_is_not_fetched_again(hub: LocalHub) -> None:
    files = missing()
    hub.bucket.rate = 10e6
    keeper = Keeper(connections=2)
    thread = stop_after(keeper, 2 * SIZE // 3)
    with pytest.raises(Stopped):
        keeper.fetch(files)
    thread.join()
    assert is_begun(part_of(*files[0]))
    first, came = asked(hub), keeper.fetched
    hub.bucket.rate = None
    again = Keeper(connections=2)
    assert again.fetch(missing()) == 2
    assert again.fetched == 2 * SIZE - came
    assert asked(hub) - first == again.fetched
    assert same(hub, files[0][1])


def test_a_capture_that_streams_goes_on_from_there(hub: LocalHub) -> None:
    files = missing()
    hub.bucket.rate = 10e6
    keeper = Keeper(connections=2)
    thread = stop_after(keeper, SIZE // 2)
    with pytest.raises(Stopped):
        keeper.fetch(files[:1])
    thread.join()
    hub.bucket.rate = None
    from capture.fetch import Fetcher
    from capture.spool import Spool

    file, folder = files[0]
    source = Source(keep=True)
    fetcher = Fetcher(source.ranges, connections=1)
    spool = Spool.open(file, folder)
    assert spool is not None
    fetcher.spools[file] = spool
    try:
        for at in range(0, SIZE, PART):
            fetcher.take((file, at, min(at + PART, SIZE)))
        assert fetcher.fetched == SIZE - keeper.fetched
        assert spool.finish()
    finally:
        fetcher.close()


def test_a_process_that_is_killed_loses_only_what_was_not_noted(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "SAVE_EVERY_S", 0.05)
    files = missing()[:1]
    hub.faults.append(Fault("stall", part="model-1", after=100, seconds=30.0, times=1))
    keeper = Keeper(connections=2)
    heard: list[BaseException] = []

    def work() -> None:
        try:
            keeper.fetch(files)
        except Stopped as error:
            heard.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        part = part_of(*files[0])
        end = time.monotonic() + 60
        while sum(b - a for a, b in noted(part)) < SIZE - PART:  # all but what a silent server was asked for
            assert time.monotonic() < end
            time.sleep(0.01)
        assert keeper.fetched < SIZE, "and it is still at work"
    finally:
        keeper.stop()
        thread.join()
    assert len(heard) == 1


def test_a_capture_that_is_killed_while_it_streams_loses_no_more(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "SAVE_EVERY_S", 0.05)
    with (hub.root / "org" / "model" / "model-1-of-2.safetensors").open("r+b") as stream:
        stream.write((2).to_bytes(8, "little") + b"{}")  # a header that names no tensor
    file, folder = missing()[0]
    source = Source(keep=True)
    try:
        path = source.stand_in(folder, [file])
        assert path is not None
        source.fetcher.take((file, PART, 2 * PART))
        end = time.monotonic() + 60
        while not any(a <= PART and b >= 2 * PART for a, b in noted(part_of(file, folder))):
            assert time.monotonic() < end, "no note tells of it"
            time.sleep(0.01)
        for at in range(0, SIZE, PART):
            source.fetcher.take((file, at, min(at + PART, SIZE)))
        source.finish()
        assert source.kept == 1
    finally:
        source.close()
    assert not list(part_of(file, folder).parent.glob("*.pairscope*")), "it is whole, and has no note any more"


def noted(part: Path) -> list[list[int]]:
    """The ranges that the note beside a file names."""
    if not is_begun(part):
        return []
    found: list[list[int]] = json.loads(part.with_name(part.name + ".json").read_text())["have"]
    return found


def test_other_bytes_than_the_hubs_are_refused_and_thrown_away(hub: LocalHub) -> None:
    files = missing()
    hub.faults.append(Fault("wrong", part="model-2"))
    with pytest.raises(CheckpointError, match="not those of the hub"):
        Keeper(connections=2).fetch(files)
    assert [f.name for f, _ in missing()] == ["model-2-of-2.safetensors"], "the first one is there, the other is not"
    assert not is_begun(part_of(*files[1]))


def test_a_full_disk_ends_it_and_leaves_nothing_of_the_file(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    files = missing()
    write, written = os.pwrite, []

    def pwrite(fd: int, data: Any, at: int) -> int:
        written.append(at)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(CheckpointError, match="cannot be kept: the disk refuses it"):
        Keeper(connections=2).fetch(files)
    assert not part_of(*files[0]).exists()


def test_much_that_came_is_written_to_the_disk_before_the_file_is_whole(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file, folder), *_ = missing()
    monkeypatch.setattr(spool, "SETTLE", PART)
    spooled = Spool.open(file, folder)
    assert spooled is not None
    sync, synced = os.fsync, []

    def fsync(fd: int) -> None:
        sync(fd)
        synced.append(os.fstat(fd).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    spooled.write(0, memoryview(bytes(PART - 1)))
    spooled.settle()
    assert synced == [], "little is left to the system"
    spooled.write(PART - 1, memoryview(bytes(1)))
    hasher = Hasher([spooled])
    try:
        ended = time.monotonic() + 30
        while not synced:
            assert time.monotonic() < ended, "nothing was written"
            time.sleep(0.01)
    finally:
        hasher.close()
    assert synced == [part_of(file, folder).stat().st_ino], "once for all that came"
    spooled.discard()


def test_what_a_note_tells_of_is_on_the_disk(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut the note may be there and the bytes zeros, and a capture that needs no more of the file sees no hash."""
    (file, folder), *_ = missing()
    spooled = Spool.open(file, folder)
    assert spooled is not None
    sync = os.fsync

    def later(fd: int) -> None:
        assert noted(part_of(file, folder)) == []
        spooled.write(PART, memoryview(bytes(PART)))
        sync(fd)

    spooled.write(0, memoryview(bytes(PART)))
    monkeypatch.setattr(os, "fsync", later)
    spooled.save()
    assert noted(part_of(file, folder)) == [[0, PART]], "what came meanwhile is for the next note"
    spooled.discard()


def test_a_disk_that_fails_meanwhile_keeps_nothing_of_the_file(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux tells it once: the fsync at the end would say that all is well."""
    (file, folder), *_ = missing()
    monkeypatch.setattr(spool, "SETTLE", PART)
    spooled = Spool.open(file, folder)
    assert spooled is not None

    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    spooled.write(0, memoryview(bytes(PART)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        spooled.settle()
    assert spooled.given_up
    assert not spooled.finish()
    assert not part_of(file, folder).exists()


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_disk_that_does_not_give_back_what_came_keeps_nothing_of_the_file(
    is_cut: bool, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a cache on NFS whose file was removed or cut on another machine: what was computed meanwhile is right all the same."""
    (file, folder), *_ = missing()
    spooled = Spool.open(file, folder)
    assert spooled is not None
    spooled.write(0, memoryview((hub.root / "org" / "model" / file.name).read_bytes()))

    def fails(*_: Any) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")

    if is_cut:
        os.truncate(part_of(file, folder), PART)
    else:
        monkeypatch.setattr(os, "preadv", fails)
    assert not spooled.read(SIZE - PART, memoryview(bytearray(PART)))
    assert not spooled.finish()
    assert spooled.given_up
    assert not part_of(file, folder).exists()


def test_a_hub_that_refuses_is_told(hub: LocalHub) -> None:
    files = missing()
    hub.faults.append(
        Fault("status", where="hub", part="model-1", status=404, headers={"X-Error-Code": "EntryNotFound"})
    )
    with pytest.raises(CheckpointError, match="lacks a file"):
        Keeper(connections=2).fetch(files)


def test_a_file_that_another_process_writes_is_left_to_it(hub: LocalHub) -> None:
    from capture.spool import Spool

    files = missing()
    other = Spool.open(*files[0])
    assert other is not None
    assert Keeper(connections=2).fetch(files) == 1
    other.discard()
