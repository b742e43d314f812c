"""A hub file that is kept while its bytes pass, in whatever order: then it is checked and takes its place in the hub's cache.

Until it is whole it lies beside the cache's blobs as `<tag>.pairscope`, with a note of what is there of it, so that the next
capture goes on from it. One process at a time writes it. The cache only ever gets whole files whose hash is the hub's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capture.errors import CheckpointError
from capture.ranges import RemoteFile
from capture.weights import joined

log = logging.getLogger(__name__)

BLOCK = 8 << 20
SETTLE = 256 << 20  # bytes that may wait for the disk before it is told to write them
SAVE_EVERY_S = 5.0  # between two notes of what is there of a file: so much is lost where the process is killed


def part_of(file: RemoteFile, snapshot: Path) -> Path:
    """Where a file lies until it is whole. snapshot: the commit's folder in the cache, <cache>/models--.../snapshots/<commit>."""
    return snapshot.parents[1] / "blobs" / f"{file.etag}.pairscope"


def is_whole(file: RemoteFile, snapshot: Path) -> bool:
    """Whether the cache has a file's bytes, of this commit or another one. snapshot: as for part_of."""
    blob = part_of(file, snapshot).with_name(str(file.etag))
    return blob.is_file() and blob.stat().st_size == file.size


def bytes_there(part: Path) -> int:
    """Bytes of a file of the cache that are on the disk, 0 where it is gone: one that is not whole has holes."""
    try:
        found = part.stat()
    except OSError:
        return 0
    return min(found.st_size, found.st_blocks * 512)


def is_begun(part: Path) -> bool:
    """Whether something was kept of a file that is not whole, to go on from. part: as part_of gives it."""
    return _note_of(part).exists()


def is_written(part: Path) -> bool:
    """Whether a process, this or another, is writing a file that is not whole now. part: as part_of gives it."""
    try:
        fd = os.open(part, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    finally:
        os.close(fd)
    return False


def drop(blob: Path) -> None:
    """Remove what was kept to go on with of a file that has come another way, unless a process is writing it. blob: the file."""
    part = blob.with_name(f"{blob.name}.pairscope")
    if part.exists() and not is_written(part):
        for path in (part, _note_of(part)):
            with contextlib.suppress(OSError):
                path.unlink()


def _note_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


class Spool:
    """One file. `open` gives None where another process writes it or has just put it into the cache, or that cannot be written."""

    def __init__(self, file: RemoteFile, part: Path, pointer: Path, fd: int, have: list[tuple[int, int]]) -> None:
        self.file, self.part, self.pointer = file, part, pointer
        self.note = _note_of(part)
        self._fd: int | None = fd
        self._have = have  # ranges [start, stop) that are there, rising, apart
        # SHA-256; of a file that the hub keeps in git, the SHA-1 that git gives it
        self._sha: Any = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size)
        self._hashed, self._hashing = 0, threading.Lock()
        self._unsettled = 0  # bytes written since the disk was last told to
        self._lock = threading.RLock()  # held while the file is used: a number of a closed file may be another's

    @classmethod
    def open(cls, file: RemoteFile, snapshot: Path) -> Spool | None:
        """snapshot: the commit's folder in the cache, <cache>/models--.../snapshots/<commit>."""
        part, pointer = part_of(file, snapshot), snapshot / file.name
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            log.warning("%s is read from the hub and not kept: %s", file, error)
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(fd), part.stat()):  # whoever held it has just put it into the cache
                raise OSError(errno.EWOULDBLOCK, "")
            if is_whole(file, snapshot):  # whoever listed it did so before
                part.unlink()
                _note_of(part).unlink(missing_ok=True)
                raise OSError(errno.EEXIST, "it is in the cache by now")
            have: list[tuple[int, int]] = []
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                note = json.loads(_note_of(part).read_text())
                if note["size"] == file.size == os.fstat(fd).st_size:
                    have = [(int(a), int(b)) for a, b in note["have"]]
            _note_of(part).unlink(missing_ok=True)  # good once: what is written from now on is not in it
            os.ftruncate(fd, file.size)
        except OSError as error:
            os.close(fd)
            log.info("%s is read from the hub and not kept: %s", file, _why(error))
            return None
        return cls(file, part, pointer, fd, have)

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Ranges that are not there."""
        with self._lock:
            ends = [0, *(b for _, b in self._have)]
            starts = [*(a for a, _ in self._have), self.file.size]
            return [(a, b) for a, b in zip(ends, starts, strict=True) if a < b]

    def read(self, start: int, view: memoryview) -> bool:
        """Fill `view` from the disk, where all of it is there."""
        stop = start + len(view)
        with self._lock:
            if self._fd is None or not any(a <= start and stop <= b for a, b in self._have):
                return False
            got = 0
            while got < len(view):
                n = self._pread(view[got:], start + got)
                if n == 0:
                    return False
                got += n
        return True

    def _pread(self, view: memoryview, start: int) -> int:
        """Bytes read; 0 where there is no more, or the disk does not give them: the file is then given up, and only that."""
        assert self._fd is not None
        try:
            return os.preadv(self._fd, [view], start)
        except OSError as error:
            log.warning("%s is not kept: %s", self.file, _why(error))
            self.discard()
            return 0

    def write(self, start: int, view: memoryview) -> None:
        """Keep bytes that have come. Where the disk refuses them the file is given up, and only that."""
        with self._lock:
            if self._fd is None:
                return
            try:
                done = 0
                while done < len(view):
                    done += os.pwrite(self._fd, view[done:], start + done)
            except OSError as error:
                log.warning("%s is not kept: %s", self.file, _why(error))
                self.discard()
                return
            self._have = list(joined([*self._have, (start, start + len(view))]))
            self._unsettled += len(view)

    def settle(self, least: int | None = None) -> None:
        """Have the disk write what has come, where that is much (SETTLE, or `least` bytes): else all of it is waited for at the end,
        with nothing beside it."""
        with self._lock:
            if self._fd is None or self._unsettled < (SETTLE if least is None else least):
                return
            fd, self._unsettled = os.dup(self._fd), 0
        try:
            os.fsync(fd)
        except OSError as error:  # told once: the end's own fsync would not hear of it
            log.warning("%s is not kept: %s", self.file, _why(error))
            self.discard()
        finally:
            os.close(fd)

    @property
    def given_up(self) -> bool:
        """It is not written any more: the disk refused it, or it has its end behind it."""
        with self._lock:
            return self._fd is None

    def finish(self) -> bool:
        """Check the whole file and put it into the cache; False where something is missing or it was given up.

        Raises CheckpointError where its hash is not the hub's; the file is then removed.
        """
        if self._fd is None or self.missing:
            return False
        self.hash()
        if self._hashed < self.file.size:  # it was not given back: nothing is known of the bytes that came
            self.discard()
            return False
        found = str(self._sha.hexdigest())
        if found != (self.file.sha256 or self.file.etag):
            self.discard()
            raise CheckpointError(
                f"{self.file}: the bytes that came are not those of the hub: their hash is {found}, not "
                f"{self.file.sha256 or self.file.etag}; nothing of this capture is kept. Run again, or set weights: download"
            )
        blob = self.part.with_name(str(self.file.etag))
        try:
            # it has its size already: who finds it in the cache would not see that bytes are missing
            os.fsync(self._fd)
            with self._lock:  # after which no note of it is made
                self.note.unlink(missing_ok=True)
                os.replace(self.part, blob)
                self._close()
            self.pointer.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.pointer.symlink_to(os.path.relpath(blob, self.pointer.parent))
        except OSError as error:
            log.warning("%s is not kept: %s", self.file, _why(error))
            return False
        finally:
            self._close()
        return True

    def pause(self) -> None:
        """Leave what there is for the next capture."""
        if self._fd is None:
            return
        try:
            if self._have:
                self.save()
                self._close()
            else:
                self.discard()
        except OSError:
            self.discard()

    def save(self) -> None:
        """Note what is there, so that it is not lost with this process. Raises OSError.

        It is on the disk before: of a file that never comes whole nobody would see that a power cut left zeros.
        """
        with self._lock:
            have = list(self._have)
        self.settle(1)
        self._note(have)

    def _note(self, have: list[tuple[int, int]]) -> None:
        with self._lock:
            if self.given_up or not have:
                return
            temporary = self.note.with_name(self.note.name + ".new")
            temporary.write_text(json.dumps({"size": self.file.size, "have": have}))
            os.replace(temporary, self.note)

    def discard(self) -> None:
        """Remove it."""
        with self._lock:
            for path in (self.part, self.note):
                with contextlib.suppress(OSError):
                    path.unlink()
            self._close()

    def hash(self) -> None:
        """Go on with the hash, as far as bytes are there in order: of a long file most is done once the last of them comes."""
        with self._hashing:
            buffer = memoryview(bytearray(BLOCK))
            while True:
                with self._lock:
                    end = self._have[0][1] if self._have and self._have[0][0] == 0 else 0
                    if self._fd is None or end <= self._hashed:
                        return
                    n = self._pread(buffer[: end - self._hashed], self._hashed)
                if n == 0:
                    return
                self._sha.update(buffer[:n])
                self._hashed += n

    def _close(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


class Hasher:
    """A thread that hashes what has come of the spools, notes it, and has the disk write it, while the rest is on its way."""

    def __init__(self, spools: Sequence[Spool]) -> None:
        self.spools, self.stop = spools, threading.Event()
        self.thread = threading.Thread(target=self._work, name="hash", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        next_save = 0.0
        while not self.stop.wait(0.1):
            save = time.monotonic() >= next_save
            for spool in self.spools:
                if save:
                    with contextlib.suppress(OSError):
                        spool.save()
                spool.hash()
                spool.settle()
            next_save = time.monotonic() + SAVE_EVERY_S if save else next_save

    def close(self) -> None:
        self.stop.set()
        self.thread.join()


def _why(error: OSError) -> str:
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
        return "another process is writing it" if error.errno == errno.EWOULDBLOCK else "the cache cannot be written"
    return "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror or error)
