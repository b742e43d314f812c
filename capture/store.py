"""Write a capture: Parquet tables that are there whole or not at all, and the marker last.

Row order is by the keys of schema.py within each file. A part file of top-k lists may hold a range of layers only: lists
are nine tenths of the bytes, and are written as soon as they pass a budget instead of being kept to the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capture.errors import StoreError, cannot_write
from capture.layout import MARKER, RunDir
from capture.manifest import now
from capture.process import folder, remove_leftovers, stage
from capture.schema import BY_NAME, SCHEMA_VERSION, arrow_schema

ROW_GROUP = 100_000
ONCE = {"vocabulary": {"token_id": "DELTA_BINARY_PACKED", "token": "DELTA_LENGTH_BYTE_ARRAY"}}
WAIT_S = 60.0  # for another writer of the same capture that puts its files in place


class CaptureWriter:
    """Writes the files of one capture into a staging directory; `finish` moves them in place and puts the marker.

    So a capture that was complete stays complete until its successor is, and two writers of the same capture do not mix.
    """

    def __init__(self, run: RunDir, pair: str, capture: str, *, compression_level: int = 3) -> None:
        self.run, self.pair, self.capture, self.level = run, pair, capture, compression_level
        self.path = run.capture_path(pair, capture)
        run.refuse_links(self.path)
        self._written: list[tuple[dict[str, Any], Future[tuple[str, int]]]] = []
        # Writing a file out and reading it once more overlap the making of the next.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sync")
        with storing(self.path):
            if run.is_local:
                run.fs.create_dir(self.path, recursive=True)
                remove_leftovers(Path(self.path))
                self.stage = Path(tempfile.mkdtemp(prefix=stage(), dir=self.path))
            else:
                self.stage = folder()

    def table(self, name: str, chunks: Iterable[dict[str, Any]], part: int | None = None) -> None:
        """Write one file of a table from chunks of columns (column name -> Arrow or numpy array), a row group each."""
        schema = arrow_schema(name)
        file = f"{name}.parquet" if part is None else f"{name}-{part:05d}.parquet"
        target = self.stage / file
        rows = 0
        with storing(f"{self.path}/{file}"), pq.ParquetWriter(target, schema, **self._options(name)) as writer:
            for columns in chunks:
                arrays = [_array(columns[f.name], f) for f in schema]
                rows += len(arrays[0])
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=2 * ROW_GROUP)
        entry = {"name": file, "table": name, "rows": rows}
        self._written.append((entry, self._thread.submit(_sync_and_hash, target)))

    @property
    def files(self) -> list[dict[str, Any]]:
        """All files as the marker lists them, once they are on the disk. Raises StoreError for one that could not be put there."""
        found = []
        for entry, synced in self._written:
            with storing(f"{self.path}/{entry['name']}"):
                digest, size = synced.result()
            found.append(entry | {"bytes": size, "sha256": digest})
        return found

    def _options(self, name: str) -> dict[str, Any]:
        """Numbers of no order, floats and the ids of lists, with their bytes apart; rising ids and their texts, each there once, by
        differences and lengths; all else by dictionary: the smallest of what tests/bench/bench_storage.py tries."""
        leaf = {c: f"{c.name}.list.element" if c.type.startswith("list") else c.name for c in BY_NAME[name].all_columns}
        apart = {path for c, path in leaf.items() if "float32" in c.type or c.type.startswith("list")}
        encoding = dict.fromkeys(sorted(apart), "BYTE_STREAM_SPLIT") | ONCE.get(name, {})
        return {
            "compression": "zstd",
            "compression_level": self.level,
            "use_dictionary": [path for path in leaf.values() if path not in encoding],
            "column_encoding": encoding,
        }

    def finish(self, document: dict[str, Any], *, keep: bool = False) -> None:
        """Move the tables in place, write capture.json, then the marker: from here on the capture exists.

        keep: where another writer has finished the same capture meanwhile, cut into other files, its files stay and these go.

        capture.json holds times and so differs between two runs of the same work: it is not under the marker's checksums.
        """
        files = self.files
        names = [f["name"] for f in files]
        with storing(self.path), self._alone():
            before = self.run.marker(self.path)
            if before is not None and before["files"] != files:
                if keep and self.run.damage(self.pair, self.capture) is None:
                    self.discard()
                    return
                self.run.fs.delete_file(f"{self.path}/{MARKER}")  # it must never vouch for the files of another
            for info in self.run.list_dir(self.path):  # parts of an earlier capture with the same id, cut elsewhere
                if info.base_name.endswith(".parquet") and info.base_name not in names:
                    self.run.fs.delete_file(info.path)
            for name in names:
                self._move(name)
            self._json("capture.json", document)
            if self.run.is_local:
                _sync_directory(self.path)
            self._json(MARKER, {"schema_version": SCHEMA_VERSION, "pair": self.pair, "capture": self.capture,
                                "finished": now(), "files": files})  # fmt: skip
            if self.run.is_local:
                _sync_directory(self.path)
            self._look_again()
        self.discard()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """For the length of the block no other process of this machine puts files in place here: cut into other spans, they have
        the same names and other bytes. One that holds this for longer than WAIT_S stands still; where a file system has no
        locks, and in a store, `_look_again` tells."""
        if not self.run.is_local:
            yield
            return
        fd = os.open(self.path, os.O_RDONLY)
        try:
            until = time.monotonic() + WAIT_S
            while time.monotonic() < until:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.05)
                    continue
                except OSError:
                    pass
                break
            yield
        finally:
            os.close(fd)

    def _look_again(self) -> None:
        """Raise StoreError where another writer's files took the place of these and its marker has not taken that of ours."""
        try:
            whole = self.run.is_complete(self.pair, self.capture)
        except StoreError:  # a store that does not say
            return
        if not whole:
            raise StoreError(
                f"'{self.path}': another run of the same capture, cut into other spans, put its files in place at the same moment; run again"
            )

    def _move(self, name: str) -> None:
        if self.run.is_local:
            os.replace(self.stage / name, f"{self.path}/{name}")
            return
        with open(self.stage / name, "rb") as source, self.run.fs.open_output_stream(f"{self.path}/{name}") as target:
            shutil.copyfileobj(source, target, 1 << 22)

    def _json(self, name: str, content: dict[str, Any]) -> None:
        self.run.write_bytes(f"{self.path}/{name}", (json.dumps(content, indent=1) + "\n").encode())

    def discard(self) -> None:
        """Remove the staging directory, whatever is in it, and the capture's own where nothing was ever written."""
        try:
            self._thread.shutdown(cancel_futures=True)
        finally:  # a second Ctrl-C does not wait for a slow disk
            shutil.rmtree(self.stage, ignore_errors=True)
            if self.run.is_local:
                with suppress(OSError):  # not empty: it holds a capture
                    os.rmdir(self.path)
                    os.rmdir(Path(self.path).parent)


def _sync_and_hash(path: Path) -> tuple[str, int]:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest(), path.stat().st_size


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def storing(path: str) -> Iterator[None]:
    """Turn what a file system can say no with into one StoreError that names the path."""
    try:
        yield
    except OSError as error:
        raise cannot_write(f"'{path}'", error) from error


def _array(values: Any, field: pa.Field) -> pa.Array:
    """One column: lists come as [n, k] numpy arrays, null floats as NaN, null lists as rows of NaN, strings as codes."""
    if isinstance(values, pa.Array):
        return values
    if pa.types.is_list(field.type):
        values = np.ascontiguousarray(values)
        n, k = values.shape
        flat = pa.array(values.reshape(-1), field.type.value_type)
        offsets = pa.array(np.arange(n + 1, dtype=np.int32) * k)
        if field.nullable and k and values.dtype.kind == "f":
            return pa.ListArray.from_arrays(offsets, flat, mask=pa.array(np.isnan(values).all(axis=1)))
        return pa.ListArray.from_arrays(offsets, flat)
    if pa.types.is_boolean(field.type):
        values = np.asarray(values)
        if values.dtype.kind == "f":
            return pa.array(values == 1, mask=np.isnan(values))
        return pa.array(values)
    if field.nullable:
        return pa.array(np.asarray(values), field.type, from_pandas=True)  # NaN becomes null
    return pa.array(values, field.type)


def category(codes: Any, names: Sequence[str]) -> pa.Array:
    """A dictionary-encoded string column from integer codes into `names`."""
    indices = pa.array(np.asarray(codes, np.int32))
    return pa.DictionaryArray.from_arrays(indices, pa.array(list(names), pa.string()))
