"""Weights that are on the hub and not on this machine, behind the same handles as files that are here.

A model whose weight files are missing gets a *stand-in* folder: links to its small files, and for each missing file its header
followed by a hole, which takes no disk. So everything that looks at names, shapes and sizes works as ever; whoever reads a
tensor's bytes goes through `Source.opened`, which fetches them. A stand-in is never in the hub's cache and lives as long as the
capture.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from capture.errors import CheckpointError
from capture.process import folder
from capture.ranges import Ranges, RemoteFile
from capture.spool import bytes_there, part_of
from capture.weights import MAX_HEADER, Extent, places

log = logging.getLogger(__name__)

FIRST_READ = 128 << 10  # bytes: most headers at once
NEARLY = 0.9  # of a file's bytes; where so many have passed the rest is fetched, so that the file can be kept


class Source:
    """Where a pair's missing weights come from. keep: write them into the hub's cache as they pass. Closed by `close`."""

    def __init__(self, *, keep: bool, token: str | bool | None = None) -> None:
        self.keep = keep
        self.ranges = Ranges(token)
        self.files: dict[str, RemoteFile] = {}  # path of the stand-in -> what it stands for
        self._places: dict[RemoteFile, dict[str, Extent]] = {}
        self._snapshots: dict[RemoteFile, Path] = {}
        self._folders: list[Path] = []
        self._fetcher: Any = None
        self._hasher: Any = None
        self.kept = 0  # files put into the hub's cache

    def stand_in(self, snapshot: Path, missing: Sequence[RemoteFile]) -> Path | None:
        """A folder that looks like the snapshot with the missing files in it; None where they must be downloaded after all.

        Raises CheckpointError.
        """
        repo = missing[0].repo
        why = _only_whole(snapshot)
        if not all(file.size for file in missing):
            why = "the hub does not say how large its weights are"
        if why:
            if not self.keep:
                raise CheckpointError(f"'{repo}': {why}; set weights: download")
            log.info("%s: %s: its weights are downloaded first", repo, why)
            return None
        made = folder()
        self._folders.append(made)
        path = made / repo.replace("/", "--")
        path.mkdir()
        names = {file.name for file in missing}
        for one in snapshot.iterdir():
            if one.name not in names:
                (path / one.name).symlink_to(one.resolve())
        with ThreadPoolExecutor(8, thread_name_prefix="headers") as threads:
            headers = list(threads.map(self._header, missing))
        for file, header in zip(missing, headers, strict=True):
            with (path / file.name).open("wb") as stream:
                stream.write(header)
                stream.truncate(file.size)
            self.files[str(path / file.name)] = file
        size = sum(f.size for f in missing)
        keep = self.keep and self._room_for(missing, snapshot)
        if keep:
            self._snapshots |= dict.fromkeys(missing, snapshot)
        log.info("%s: %.2f GiB of weights are read from the hub%s", repo, size / 2**30,
                 ", and kept in its cache" if keep else "")  # fmt: skip
        return path

    def _room_for(self, files: Sequence[RemoteFile], snapshot: Path) -> bool:
        from capture.hub import free_bytes

        if not all(file.has_hash for file in files):
            log.warning(
                "%s is not kept: the hub gives no hash to check it by; weights: download keeps it", files[0].repo
            )
            return False

        def to_write(of: Mapping[RemoteFile, Path]) -> int:
            return sum(file.size - bytes_there(part_of(file, at)) for file, at in of.items())

        size, free = to_write(dict.fromkeys(files, snapshot)), free_bytes() - to_write(self._snapshots)
        if size > free:
            log.warning("%s is not kept, nor its hash checked: it has %.1f GiB, the disk of the hub's cache %.1f GiB free",
                        files[0].repo, size / 2**30, free / 2**30)  # fmt: skip
        return size <= free

    def _header(self, file: RemoteFile) -> bytes:
        """The 8 bytes of a safetensors header's length, and the header."""
        first = memoryview(bytearray(min(FIRST_READ, file.size)))
        self.ranges.read(file, 0, first)
        length = 8 + int.from_bytes(first[:8], "little")
        if not 10 <= length <= min(8 + MAX_HEADER, file.size):
            raise CheckpointError(f"{file} is not a safetensors file ({file.size} bytes)")
        if length <= len(first):
            return bytes(first[:length])
        rest = memoryview(bytearray(length - len(first)))
        self.ranges.read(file, len(first), rest)
        return bytes(first) + bytes(rest)

    # -- reading -------------------------------------------------------------------------------------------------------

    def open(self, most: int | None = None, *, pin: bool = False) -> int:
        """Begin. Returns the bytes that may wait in memory, fetched and not used yet: at most `most`. pin: in memory that a
        GPU can copy from by itself."""
        from capture.fetch import WINDOW

        self.fetcher.window, self.fetcher.pin = min(WINDOW, most or WINDOW), pin
        return int(self.fetcher.window)

    @property
    def fetcher(self) -> Any:
        """What fetches; made with torch, when the first tensor is asked for."""
        if self._fetcher is None:
            from capture.fetch import Fetcher
            from capture.spool import Hasher, Spool

            self._fetcher = Fetcher(self.ranges)
            for path, file in self.files.items():
                if file in self._snapshots and (spool := Spool.open(file, self._snapshots[file])) is not None:
                    self._fetcher.spools[file] = spool
                    with open(path, "rb") as stream:  # the header has passed already
                        length = stream.read(8)
                        spool.write(0, memoryview(length + stream.read(int.from_bytes(length, "little"))))
            if self._fetcher.spools:
                self._hasher = Hasher(list(self._fetcher.spools.values()))
        return self._fetcher

    def opened(self, path: str, key: str, local: Any) -> Any:
        """A slice of a tensor of a stand-in; local: the stand-in's own slice, which knows shape and dtype."""
        from capture.remoteslice import RemoteSlice

        return RemoteSlice(self.fetcher, self.files[path], self._span(path, key), local)

    def announce(self, keys: Iterable[tuple[str, str]]) -> None:
        """(path, key) of tensors that will be read soon, in order."""
        self.fetcher.announce((self.files[p], *self._span(p, k)) for p, k in keys if p in self.files)

    def cancel(self, keys: Iterable[tuple[str, str]]) -> None:
        self.fetcher.cancel((self.files[p], *self._span(p, k)) for p, k in keys if p in self.files)

    @property
    def idle(self) -> bool:
        """Nothing of what was announced is still to come."""
        return self._fetcher is None or bool(self._fetcher.idle)

    def _span(self, path: str, key: str) -> tuple[int, int]:
        file = self.files[path]
        if file not in self._places:
            self._places[file] = places(Path(path))
        return self._places[file][key].span

    # -- the end -------------------------------------------------------------------------------------------------------

    @property
    def record(self) -> dict[str, Any]:
        """For capture.json: bytes that came from the hub, the most that waited in memory, of how many files they were and how
        many of these have the hub's hash and are now in the cache, and how often the hub was asked for an address."""
        f = self.fetcher
        return {
            "bytes_fetched": f.fetched, "window_bytes": f.window, "window_peak_bytes": f.peak, "files": len(self.files),
            "files_kept": self.kept, "addresses": self.ranges.resolved,
        }  # fmt: skip

    def finish(self) -> None:
        """Check the files that have passed whole, and put them into the hub's cache.

        Of a file that has nearly passed (all but tensors that the model does not use) the rest is fetched first; where it
        does not come, the file is not kept. Raises CheckpointError where a hash is not the hub's, and for nothing else.
        """
        if self._fetcher is None:
            return
        for file, spool in self._fetcher.spools.items():
            missing = spool.missing
            if 0 < sum(b - a for a, b in missing) <= (1 - NEARLY) * file.size:
                try:
                    for start, stop in missing:
                        self._rest(file, start, stop)
                except CheckpointError as why:  # the capture has all that it needs
                    log.warning("%s is not kept: %s", file, why)
        with ThreadPoolExecutor(2, thread_name_prefix="hash") as threads:
            found = list(threads.map(_finished, self._fetcher.spools.values()))
        for error in found:
            if isinstance(error, CheckpointError):
                raise error
        self.kept = sum(one is True for one in found)

    def _rest(self, file: RemoteFile, start: int, stop: int) -> None:
        from capture.fetch import UNIT

        for at in range(start, stop, UNIT):
            self._fetcher.take((file, at, min(at + UNIT, stop)))

    def close(self) -> None:
        """End all reading, and remove the stand-ins. What was kept of unfinished files stays for the next capture."""
        self.ranges.close()
        if self._fetcher is not None:
            self._fetcher.close()
            if self._hasher is not None:
                self._hasher.close()
            for spool in self._fetcher.spools.values():
                spool.pause()
        for made in self._folders:
            shutil.rmtree(made, ignore_errors=True)
        self.files.clear()


def _finished(spool: Any) -> bool | CheckpointError:
    """Whether a file is in the cache now, or why it must not be: every file is looked at, whatever is wrong with the others."""
    try:
        return bool(spool.finish())
    except CheckpointError as error:
        return error


def _only_whole(snapshot: Path) -> str | None:
    """Why a checkpoint cannot be read tensor by tensor; None where it can."""
    from capture.quantize import FP8, stored_quantization

    method = stored_quantization(str(snapshot)).get("quant_method")
    return f"weights quantized by {method} are read whole" if method not in (None, FP8) else None
