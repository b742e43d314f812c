"""The desk of cluster/deliver.py as a file system of pyarrow's, so that a run directory on the head reads like any other."""

from __future__ import annotations

import hashlib
import io
import time
from typing import Any

import pyarrow as pa
import ray
from pyarrow import fs

from cluster.deliver import CHUNK

UNDER_WAY = 2  # chunks that a writer has sent and not heard of
CUT_S = 300.0  # how long a cut line to the head is waited for
AGAIN_S = 2.0


class DeskFiles(fs.FileSystemHandler):
    """Calls on a Desk actor. What goes wrong on the way, the loss of the head included, is an OSError."""

    def __init__(self, desk: Any) -> None:
        self.desk = desk

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeskFiles) and self.desk == other.desk

    __hash__ = None  # type: ignore[assignment]

    def get_type_name(self) -> str:
        return "head"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[Any]:
        return [_as_info(row) for row in call(self.desk.info, list(paths))]

    def get_file_info_selector(self, selector: Any) -> list[Any]:
        rows = call(self.desk.listing, selector.base_dir, selector.recursive)
        if rows is None:
            if selector.allow_not_found:
                return []
            raise FileNotFoundError(selector.base_dir)
        return [_as_info(row) for row in rows]

    def create_dir(self, path: str, recursive: bool) -> None:
        call(self.desk.create_dir, path)

    def delete_dir(self, path: str) -> None:
        call(self.desk.delete_dir, path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        raise NotImplementedError

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        call(self.desk.delete_file, path)

    def move(self, src: str, dest: str) -> None:
        raise NotImplementedError

    def copy_file(self, src: str, dest: str) -> None:
        raise NotImplementedError

    def open_input_stream(self, path: str) -> Any:
        return pa.PythonFile(io.BufferedReader(_Reader(self.desk, path), CHUNK), mode="r")

    open_input_file = open_input_stream

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pa.PythonFile(_Writer(self.desk, path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError


def call(method: Any, *args: Any) -> Any:
    """A call on the desk and its answer; an OSError of the desk's as it is, any failure of Ray's as another.

    While the way to the head is cut it is asked again: the desk takes the same twice for once.
    """
    until = time.monotonic() + CUT_S
    while True:
        try:
            return answer(method.remote(*args))
        except CutError:
            if time.monotonic() > until:
                raise
            time.sleep(AGAIN_S)


class CutError(OSError):
    """The head did not answer; nothing is known of what became of the call."""


def answer(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, OSError):
            raise cause from error
        raise
    except ray.exceptions.ActorUnavailableError as error:
        raise CutError("the head's disk cannot be reached") from error
    except ray.exceptions.RayError as error:
        raise OSError(f"the head's disk cannot be reached: {' '.join(str(error).split())[:300]}") from error


def _as_info(row: tuple[str, str, int, int]) -> Any:
    path, kind, size, changed = row
    types = {"file": fs.FileType.File, "directory": fs.FileType.Directory, "none": fs.FileType.NotFound}
    if kind == "none":
        return fs.FileInfo(path, types[kind])
    return fs.FileInfo(path, types[kind], size=size if kind == "file" else None, mtime_ns=changed)


class _Reader(io.RawIOBase):
    """A file of the head's, read in chunks."""

    def __init__(self, desk: Any, path: str) -> None:
        ((_, kind, self.size, _),) = call(desk.info, [path])
        if kind != "file":
            raise FileNotFoundError(path)
        self.desk, self.path, self.at = desk, path, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        self.at = start + offset
        return self.at

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), CHUNK, max(0, self.size - self.at))
        if not count:
            return 0
        data = call(self.desk.read, self.path, self.at, count)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


class _Writer(io.RawIOBase):
    """A file of the head's being written: it is there when this is closed, and never if this is lost."""

    def __init__(self, desk: Any, path: str) -> None:
        self.desk = desk
        self.token: str | None = call(desk.begin, path)
        self.digest, self.size = hashlib.sha256(), 0
        self.under_way: list[tuple[int, bytes, Any]] = []  # (offset, chunk, its call)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            chunk = bytes(view[start : start + CHUNK])
            while len(self.under_way) >= UNDER_WAY:
                self._hear_of_one()
            self.under_way.append((self.size, chunk, self.desk.append.remote(self.token, self.size, chunk)))
            self.digest.update(chunk)
            self.size += len(chunk)
        return len(view)

    def _hear_of_one(self) -> None:
        """Wait for the oldest chunk under way; after a cut send it again, and all behind it, in order."""
        offset, chunk, ref = self.under_way.pop(0)
        try:
            answer(ref)
        except CutError:
            behind, self.under_way = self.under_way, []
            for at, data in [(offset, chunk), *((at, data) for at, data, _ in behind)]:
                call(self.desk.append, self.token, at, data)

    def tell(self) -> int:
        return self.size

    def close(self) -> None:
        token = self.token
        if token is not None:
            try:
                while self.under_way:
                    self._hear_of_one()
                call(self.desk.finish, token, self.size, self.digest.hexdigest())
            except OSError:
                self.desk.abandon.remote(token)
                raise
            finally:
                self.token = None
        super().close()
