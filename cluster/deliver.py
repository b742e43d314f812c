"""The head's disk, as far as workers on other nodes may see it: one run directory, behind an actor on the driver's node.

A worker on another node opens `head://<actor>/<path>` as its output. What it writes travels through Ray's object store in
chunks, a few at a time, and appears on the head's disk under its name only when it is whole. So a capture leaves its node
file by file as it is written, its marker last, and spans that a walk commits outlive the machine that made them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from capture.layout import OPENERS, RunDir, link_below
from cluster.prepare_gate import gate_at_head

if TYPE_CHECKING:
    from cluster.connect import Cluster

log = logging.getLogger(__name__)

SCHEME = "head"
CHUNK = 4 << 20  # bytes; with two under way a writer holds at most 12 MiB of its file in memory
FORGOTTEN_S = 3600.0  # an upload of which nothing was heard for so long has lost its writer
SUFFIX = ".upload"


@dataclass
class Upload:
    """One file on its way: written beside its place until it is whole."""

    path: Path
    stream: BinaryIO
    temporary: Path
    digest: Any = field(default_factory=hashlib.sha256)
    size: int = 0
    heard: float = field(default_factory=time.monotonic)


class Desk:
    """The actor. `root` is the one directory that it reads and writes; a path outside it is refused.

    Every call may be repeated by a caller that did not hear the answer: the second time it changes nothing.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.uploads: dict[str, Upload] = {}
        self.finished: dict[str, None] = {}
        _remove_uploads_of_the_dead(self.root)

    def node(self) -> str:
        """Ray's id of the node that this runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def info(self, paths: list[str]) -> list[tuple[str, str, int, int]]:
        """(path, kind, bytes, time of last change in ns) of each; kind is file, directory or none."""
        return [_info(path, self._inside(path)) for path in paths]

    def listing(self, path: str, recursive: bool) -> list[tuple[str, str, int, int]] | None:
        """What is in a directory, without uploads under way; None where there is no such directory."""
        top = self._inside(path)
        if not top.is_dir():
            return None
        found = top.rglob("*") if recursive else top.iterdir()
        return [_info(str(p), p) for p in sorted(found) if not p.name.endswith(SUFFIX)]

    def read(self, path: str, offset: int, count: int) -> bytes:
        with open(self._inside(path), "rb") as stream:
            stream.seek(offset)
            return stream.read(count)

    def begin(self, path: str) -> str:
        """Start a file; its token. Nothing is to be seen of it before `finish`."""
        target = self._to_change(path)
        self._drop_forgotten()
        target.parent.mkdir(parents=True, exist_ok=True)
        token = uuid.uuid4().hex
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{token[:8]}{SUFFIX}")
        self.uploads[token] = Upload(target, open(temporary, "wb"), temporary)  # noqa: SIM115  closed by finish or abandon
        return token

    def append(self, token: str, offset: int, data: bytes) -> None:
        upload = self._upload(token)
        if offset + len(data) <= upload.size:
            return  # sent again by a writer that did not hear of it
        if offset != upload.size:
            raise OSError(f"'{upload.path}': a chunk for byte {offset} came at byte {upload.size}")
        upload.stream.write(data)
        upload.digest.update(data)
        upload.size += len(data)
        upload.heard = time.monotonic()

    def finish(self, token: str, size: int, sha256: str) -> None:
        """Put a file in its place if it is what was sent."""
        if token in self.finished:
            return  # asked again by a writer that did not hear of it
        upload = self._upload(token)
        if (upload.size, upload.digest.hexdigest()) != (size, sha256):
            self.abandon(token)
            raise OSError(f"'{upload.path}' arrived with {upload.size} of {size} bytes, or others than were sent")
        upload.stream.flush()
        os.fsync(upload.stream.fileno())
        upload.stream.close()
        os.replace(upload.temporary, upload.path)
        del self.uploads[token]
        self.finished = dict.fromkeys([*list(self.finished)[-99:], token])

    def abandon(self, token: str) -> None:
        upload = self.uploads.pop(token, None)
        if upload is not None:
            with contextlib.suppress(OSError):  # a full disk takes the last bytes no better now
                upload.stream.close()
            upload.temporary.unlink(missing_ok=True)

    def create_dir(self, path: str) -> None:
        self._to_change(path).mkdir(parents=True, exist_ok=True)

    def delete_dir(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._to_change(path))

    def delete_file(self, path: str) -> None:
        self._to_change(path).unlink(missing_ok=True)

    def close(self) -> None:
        """Drop what is under way; the last call."""
        for token in list(self.uploads):
            self.abandon(token)

    def _upload(self, token: str) -> Upload:
        if token not in self.uploads:
            raise OSError("this upload was given up; its writer was silent for too long")
        return self.uploads[token]

    def _drop_forgotten(self) -> None:
        for token, upload in list(self.uploads.items()):
            if time.monotonic() - upload.heard > FORGOTTEN_S:
                self.abandon(token)

    def _inside(self, path: str) -> Path:
        below = os.path.normpath(
            path.removeprefix(f"{self.root}/")
        )  # the root's own `..` are the user's, and lead through links
        if path == str(self.root):
            return self.root
        if not path.startswith(f"{self.root}/") or Path(below).is_absolute() or Path(below).parts[:1] == ("..",):
            raise PermissionError(f"'{path}' is not in the run directory '{self.root}'")
        return self.root / below

    def _to_change(self, path: str) -> Path:
        """The same for what is put there or removed: not through a link, as capture/layout.py has it for writers on this node."""
        found = self._inside(path)
        if link := link_below(f"{self.root}/captures", str(found.parent)):
            raise PermissionError(f"'{link}' is a symbolic link, and nothing is written or deleted through one")
        return found


def _info(path: str, place: Path) -> tuple[str, str, int, int]:
    try:
        status = place.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path, "none", 0, 0
    kind = "directory" if place.is_dir() else "file"
    return path, kind, status.st_size if kind == "file" else 0, status.st_mtime_ns


def _remove_uploads_of_the_dead(root: Path) -> None:
    """Remove what earlier desks on this machine left when they were killed."""
    for path in root.rglob(f".*{SUFFIX}"):
        pid = path.name.removesuffix(SUFFIX).split(".")[-2]
        if not pid.isdigit() or not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def at_head(run: RunDir, cluster: Cluster, *, hub: bool = True) -> Iterator[str]:
    """What a sweep's workers share on the driver's node, for the length of the block: the gate to the hub and the desk.

    hub: whether something of the sweep is on the hub; a Ray of our own has a gate only then.

    Yields what actors are given as their output: the run directory itself where every node sees it, else the desk's address.
    Every node sees an object store, and a cluster of one node that does not grow sees its own disk.
    """
    out = run.root if run.is_local else run.out
    with contextlib.ExitStack() as stack:
        if hub or not cluster.local:
            sweep = run.root if run.is_local else run.out
            stack.enter_context(gate_at_head(hashlib.sha256(sweep.encode()).hexdigest()[:16]))
        if not cluster.local and run.is_local and (cluster.growing or len(cluster.nodes) > 1):
            out = stack.enter_context(desk_at_head(run.root))
        yield out


@contextlib.contextmanager
def desk_at_head(root: str) -> Iterator[str]:
    """A desk for `root` on the driver's node; its address."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name = f"desk-{uuid.uuid4().hex[:8]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk = ray.remote(Desk).options(name=name, num_cpus=0, scheduling_strategy=here).remote(root)
    ray.get(desk.node.remote())
    try:
        yield f"{SCHEME}://{name}{root}"
    finally:
        with contextlib.suppress(Exception):  # its node may be what ended
            ray.get(desk.close.remote(), timeout=10)
            ray.kill(desk)


def open_head(uri: str) -> tuple[Any, str]:
    """(file system, path) of a `head://<actor>/<path>`: the disk itself on the desk's own node, else through the desk."""
    import ray
    from pyarrow import fs

    name, _, path = uri.removeprefix(f"{SCHEME}://").partition("/")
    desk = ray.get_actor(name)
    if ray.get(desk.node.remote()) == ray.get_runtime_context().get_node_id():
        return fs.LocalFileSystem(), f"/{path}"
    from cluster.deliver_fs import DeskFiles

    log.info("the output is on another node's disk; it goes there through Ray")
    return fs.PyFileSystem(DeskFiles(desk)), f"/{path}"


OPENERS[SCHEME] = open_head
