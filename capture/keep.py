"""Weight files fetched into the hub's cache, whole, before anybody reads them; stopped at any moment, and gone on with later.

The hub's own library begins a file anew after a stop. What came here of one lies beside the cache's files, as capture/spool.py
has it, so that a capture that reads the same file from the hub goes on from there, too. No torch: a process that only fetches
stays small.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from capture.errors import CheckpointError
from capture.ranges import CONNECTIONS, Ranges, RemoteFile, Stopped
from capture.spool import Hasher, Spool, is_written, part_of

PART = 4 << 20  # bytes of one request


class Keeper:
    """Fetches files one after the other, each by several connections. fetched: bytes that have come so far. elsewhere: files that
    another process was writing when their turn came."""

    def __init__(self, token: str | bool | None = None, connections: int = CONNECTIONS) -> None:
        self.ranges, self.connections, self.fetched = Ranges(token), connections, 0
        self.elsewhere: list[RemoteFile] = []
        self._lock = threading.Lock()

    def fetch(self, files: Iterable[tuple[RemoteFile, Path]]) -> int:
        """files: each with the folder of its commit in the cache. Returns how many of them were put into the cache; one that
        another process writes is left to that, and one of which the hub says no size or hash to the hub's own library.

        Raises CheckpointError (the hub refuses, other bytes than the hub's, a full disk) and Stopped, once `stop` was called.
        What has come of a file is left for whoever goes on with it.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="check") as checks:  # while the next file comes
            kept: list[Future[bool]] = []
            for file, snapshot in files:
                if not file.size or not file.has_hash:
                    continue
                spool = Spool.open(file, snapshot)
                if spool is not None:
                    self._whole(spool)
                    kept.append(checks.submit(spool.finish))
                elif is_written(part_of(file, snapshot)):
                    self.elsewhere.append(file)
            return sum(one.result() for one in kept)

    def stop(self) -> None:
        """End `fetch`, from any thread."""
        self.ranges.close()

    def _whole(self, spool: Spool) -> None:
        """Fetch what is missing of one file."""
        parts = ((at, min(at + PART, stop)) for start, stop in spool.missing for at in range(start, stop, PART))
        failed: list[BaseException] = []
        threads = [
            threading.Thread(target=self._work, args=(spool, parts, failed), name="fetch", daemon=True)
            for _ in range(self.connections)
        ]
        hasher = Hasher([spool])
        try:
            for thread in threads:
                thread.start()
            while (alive := [thread for thread in threads if thread.is_alive()]) and not failed:
                alive[0].join(0.1)
                if self.ranges.stop.is_set():  # whether or not a thread has heard of it
                    raise Stopped
            if failed:
                raise next((e for e in failed if not isinstance(e, Stopped)), failed[0])
        except BaseException:
            spool.pause()  # a thread that waits for a silent server finds it closed
            raise
        finally:
            hasher.close()

    def _work(self, spool: Spool, parts: Iterator[tuple[int, int]], failed: list[BaseException]) -> None:
        buffer = memoryview(bytearray(PART))
        try:
            while not failed:
                with self._lock:
                    part = next(parts, None)
                if part is None:
                    return
                view = buffer[: part[1] - part[0]]
                self.ranges.read(spool.file, part[0], view)
                spool.write(part[0], view)
                if spool.given_up:
                    raise CheckpointError(f"{spool.file} cannot be kept: the disk refuses it")
                with self._lock:
                    self.fetched += len(view)
        except BaseException as error:
            failed.append(error)
