"""The run directory: where everything lies, on a local path or any URI that pyarrow.fs opens, and what counts as complete.

OUT/captures/pair=<entry>/capture=<id>/{capture.json, <table>-*.parquet, _COMPLETE}
OUT/manifest/<attempt>.json      one row per attempt
OUT/logs/<entry>/<attempt>.log
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capture.errors import ConfigError, StoreError, cannot_read, cannot_write
from capture.printable import without_logins
from capture.process import STAGE, remove_leftovers, temporary
from capture.schema import MANIFEST, SCHEMA_VERSION

MARKER = "_COMPLETE"
SPANS = "spans"  # a directory of a capture under way: capture/spans.py
AN_HOUR_S = 3600.0
LOOKS = 20  # at a directory that goes each time between the look whether it is there and its list: then there is none

# scheme -> what opens a URI that pyarrow does not know, as (file system, path); whoever has such a place adds it
OPENERS: dict[str, Callable[[str], tuple[Any, str]]] = {}


@dataclass(frozen=True)
class CaptureDir:
    """One complete capture: its directory (path on the run's file system) and its marker."""

    pair: str
    capture: str
    path: str
    marker: dict[str, Any]

    def files(self, table: str) -> list[str]:
        """Paths of one table's Parquet files, in order."""
        names = [f["name"] for f in self.marker["files"]]
        return [f"{self.path}/{n}" for n in names if n == f"{table}.parquet" or n.startswith(f"{table}-")]


class RunDir:
    """A run directory. `out` is a path or a URI (s3://, gs://, file://)."""

    def __init__(self, out: str) -> None:
        from pyarrow import fs

        self.out = str(out)
        if "://" in self.out and without_logins(self.out) != self.out:
            raise ConfigError(
                f"the output '{without_logins(self.out)}' names a login, which whoever sees commands, notes and logs would see too: leave "
                "it out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or write ~/.aws/credentials"
            )
        try:
            if self.out.partition("://")[0] in OPENERS:
                self.fs, self.root = OPENERS[self.out.partition("://")[0]](self.out)
            elif "://" in self.out:
                self.fs, self.root = fs.FileSystem.from_uri(self.out)
            else:
                self.fs, self.root = fs.LocalFileSystem(), str(Path(self.out).expanduser().absolute())
        except Exception as error:
            raise StoreError(f"cannot open the output '{out}': {error}") from error
        self.root = self.root.rstrip("/")
        self.last_started = ""  # of the attempts seen, the latest

    @property
    def is_local(self) -> bool:
        return self.fs.type_name == "local"

    def capture_path(self, pair: str, capture: str) -> str:
        return f"{self.root}/captures/pair={pair}/capture={capture}"

    def refuse_links(self, directory: str) -> None:
        """Raise StoreError where a directory in captures/ is reached by a symbolic link: whoever gave us the run directory would
        have us write and delete at another place. To be asked before a capture's directory is first written to."""
        if self.is_local and (link := link_below(f"{self.root}/captures", directory)):
            raise StoreError(
                f"'{link}' is a symbolic link, and nothing is written or deleted through one: remove it, or choose another --out"
            )

    def log_path(self, entry: str, attempt: str) -> str:
        return f"{self.root}/logs/{entry}/{attempt}.log"

    def exists(self, path: str) -> bool:
        from pyarrow import fs

        try:
            return bool(self.fs.get_file_info(path).type != fs.FileType.NotFound)
        except OSError as error:
            raise cannot_read(f"'{path}'", error) from error

    def list_dir(self, path: str) -> list[Any]:
        """What is in a directory, by name; nothing where there is none. What is no text in UTF-8 is no name of ours. Raises
        StoreError."""
        from pyarrow import fs

        infos: list[Any] = []
        try:
            for _ in range(LOOKS):
                with contextlib.suppress(FileNotFoundError):  # another writer removed it while it was looked at
                    infos = self.fs.get_file_info(fs.FileSelector(path, allow_not_found=True))
                    break
        except OSError as error:
            raise cannot_read(f"'{path}'", error) from error
        return sorted(filter(_is_named, infos), key=lambda i: i.path)

    def directories(self, path: str) -> list[Any]:
        """The directories in a directory: others may have put files of their own beside ours."""
        from pyarrow import fs

        return [info for info in self.list_dir(path) if info.type == fs.FileType.Directory]

    def read_bytes(self, path: str) -> bytes:
        with self.fs.open_input_stream(path) as stream:
            return bytes(stream.read())

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a small file so that it is there whole or not at all. Raises StoreError."""
        tmp = temporary(path)
        try:
            if not self.is_local:  # no directories to make there, and an object is published only when it is closed
                with self.fs.open_output_stream(path) as stream:
                    stream.write(data)
                return
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(tmp, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(tmp, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                if self.is_local:
                    os.unlink(tmp)
            raise cannot_write(f"'{path}'", error) from error

    def marker(self, path: str) -> dict[str, Any] | None:
        """The marker of a capture directory, or None where it is missing or broken.

        Raises StoreError where a store does not say: that is no `missing`, or the work would be done and paid again.
        """
        from pyarrow import fs

        try:
            if self.fs.get_file_info(f"{path}/{MARKER}").type != fs.FileType.File:
                return None
            marker = json.loads(self.read_bytes(f"{path}/{MARKER}"))
        except (ValueError, RecursionError, FileNotFoundError):
            return None
        except OSError as error:
            if self.is_local:
                return None
            raise cannot_read(f"'{path}/{MARKER}'", error) from error
        return marker if isinstance(marker, dict) and _lists_files(marker.get("files")) else None

    def is_complete(self, pair: str, capture: str) -> bool:
        """True if the capture has a valid marker and all its files at their recorded sizes. Raises StoreError, as `marker`."""
        from pyarrow import fs

        path = self.capture_path(pair, capture)
        marker = self.marker(path)
        if marker is None:
            return False
        try:
            infos = self.fs.get_file_info([f"{path}/{f['name']}" for f in marker["files"]])
        except OSError as error:
            raise cannot_read(f"'{path}'", error) from error
        return all(
            i.type == fs.FileType.File and i.size == f["bytes"] for i, f in zip(infos, marker["files"], strict=True)
        )

    def damage(self, pair: str, capture: str) -> str | None:
        """What is wrong with a capture that has a marker: a file gone, short or, on a local disk, with other bytes than were
        written (an object store keeps checksums of its own). None where it is whole or has no marker."""
        path = self.capture_path(pair, capture)
        marker = self.marker(path)
        if marker is None:
            return None
        if not self.is_complete(pair, capture):
            return f"'{path}': a table is gone or has lost bytes"
        for file in marker["files"] if self.is_local else ():
            try:
                with open(f"{path}/{file['name']}", "rb") as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() == file["sha256"]:
                        continue
            except OSError as error:
                return f"'{path}/{file['name']}' cannot be read: {error.strerror or error}"
            return f"'{path}/{file['name']}' holds other bytes than were written"
        return None

    def captures(
        self, include_partial: bool = False, refused: dict[tuple[str, str], str] | None = None
    ) -> Iterator[CaptureDir]:
        """The complete captures by pair and id. A marker of another schema version is an error that names it; where a dict
        is given for such errors, they go there by pair and id and the capture is left out.
        """
        for pair_info in self.directories(f"{self.root}/captures"):
            pair = pair_info.base_name.removeprefix("pair=")
            for info in self.directories(pair_info.path):
                marker = self.marker(info.path)
                if marker is None:
                    if not include_partial:
                        continue
                    marker = {"files": [{"name": f.base_name} for f in self.list_dir(info.path)
                                        if f.base_name.endswith(".parquet")], "partial": True}  # fmt: skip
                elif marker.get("schema_version") != SCHEMA_VERSION:
                    why = (
                        f"'{info.path}' was written with schema version {marker.get('schema_version')}, this pairscope "
                        f"reads version {SCHEMA_VERSION}; write to another --out, or read it with the version that wrote it"
                    )
                    if refused is None:
                        raise StoreError(why)
                    refused[pair, info.base_name.removeprefix("capture=")] = why
                    continue
                yield CaptureDir(pair, info.base_name.removeprefix("capture="), info.path, marker)

    def manifest_rows(self) -> list[dict[str, Any]]:
        """All attempts, oldest first. Raises StoreError."""
        from pyarrow import fs

        rows = []
        for info in self.list_dir(f"{self.root}/manifest"):
            if info.base_name.endswith(".json") and info.type == fs.FileType.File:
                try:
                    row = json.loads(self.read_bytes(info.path))
                except (ValueError, RecursionError):
                    continue  # being written on a file system without atomic rename
                except FileNotFoundError:  # gone since it was listed
                    continue
                except OSError as error:
                    raise cannot_read(f"'{info.path}'", error) from error
                if isinstance(row, dict) and isinstance(row.get("attempt"), str) and isinstance(row.get("entry"), str):
                    rows.append(row)
        self.last_started = max([self.last_started, *(r["started"] for r in rows if _is_time(r.get("started")))])
        return sorted(rows, key=lambda r: (str(r.get("started") or ""), r["attempt"]))

    def remove_leftovers(self) -> None:
        """Remove what killed writers left, wherever in the run directory: temporary files of dead processes of this machine,
        and spans of captures that are complete and that nobody is at work on."""
        if self.is_local:
            remove_leftovers(Path(f"{self.root}/manifest"))
        for pair in self.directories(f"{self.root}/captures"):
            for info in self.directories(pair.path):
                if self.is_local:
                    if link_below(f"{self.root}/captures", f"{info.path}/{SPANS}"):
                        continue  # it is read, and let be
                    remove_leftovers(Path(info.path))
                    remove_leftovers(Path(f"{info.path}/{SPANS}"))
                spans = self.list_dir(f"{info.path}/{SPANS}")
                there = os.path.isdir(f"{info.path}/{SPANS}") if self.is_local else bool(spans)
                if not there or self.marker(info.path) is None:
                    continue
                quiet = bool(spans) and all(time.time() - (i.mtime_ns or 0) / 1e9 > AN_HOUR_S for i in spans)
                if quiet or (self.is_local and not any(STAGE.search(n) for n in os.listdir(info.path))):
                    with contextlib.suppress(OSError):
                        self.fs.delete_dir(f"{info.path}/{SPANS}")

    def write_manifest_row(self, row: dict[str, Any]) -> None:
        """Write (or replace) the row of one attempt; keys as in schema.MANIFEST."""
        started = row.get("started")  # in a row that was read it may be anything
        self.last_started = max(self.last_started, started if isinstance(started, str) else "")
        self.write_bytes(f"{self.root}/manifest/{row['attempt']}.json", (json.dumps(row, indent=1) + "\n").encode())


def link_below(top: str, directory: str) -> str | None:
    """The first symbolic link on the way from `top`, which may be one itself, to a directory below it; None where there is none."""
    names = directory.removeprefix(f"{top}/").split("/") if directory.startswith(f"{top}/") else []
    ways = (f"{top}/{'/'.join(names[: n + 1])}" for n in range(len(names)))
    return next(filter(os.path.islink, ways), None)


def _is_named(info: Any) -> bool:
    try:
        return bool(info.path)
    except UnicodeDecodeError:
        return False


_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def _lists_files(files: Any) -> bool:
    """Whether a marker's list is one: names that stay in the directory, with counts. A run directory may be a stranger's."""
    return isinstance(files, list) and all(
        isinstance(f, dict)
        and isinstance(f.get("name"), str)
        and _FILE_NAME.fullmatch(f["name"]) is not None
        and type(f.get("bytes")) is int
        and 0 <= f["bytes"] < 1 << 63
        and isinstance(f.get("sha256", ""), str)
        for f in files
    )


def fitting(row: dict[str, Any]) -> dict[str, Any]:
    """An attempt's row with null for each field that is not of its type in schema.MANIFEST."""
    fits = {
        "VARCHAR": lambda v: isinstance(v, str),
        "TIMESTAMP": _is_time,
        "DOUBLE": lambda v: type(v) in (int, float) and abs(v) < 1e300,
        "BIGINT": lambda v: type(v) is int and abs(v) < 1 << 63,
    }
    return row | {f.name: None for f in MANIFEST if f.name in row and not fits[f.type](row[f.name])}


def _is_time(value: Any) -> bool:
    try:
        return datetime.datetime.fromisoformat(value) is not None
    except (TypeError, ValueError):
        return False
