"""Room on a node's disk for the weights of the next pair."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from capture.errors import CheckpointError
from cluster.mesh.peers import mesh_folder

log = logging.getLogger(__name__)

GIB = 1 << 30
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)  # of a cache that somebody else keeps, and we may only read
SPARE_BYTES = 2 * GIB  # for logs, staged tables and what else a node writes
# What weights that the sweep is done with leave to its results: the head's disk gets those of all nodes.
RESULTS_BYTES = 16 * GIB


def hub_cache() -> Path:
    """The hub's cache, made if need be."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def model_folder(repo: str) -> Path:
    """Where a model lies in the hub's cache, if it is there."""
    return hub_cache() / f"models--{repo.replace('/', '--')}"


def in_use(repo: str) -> TextIO:
    """Marks a model as used by this process for as long as the returned file is open."""
    try:
        stream = open(_note(repo), "a")  # noqa: SIM115  the caller keeps it
    except OSError as error:
        if error.errno not in NOT_OURS:
            raise
        return open(os.devnull)  # nothing is removed there either
    with contextlib.suppress(OSError):  # a file system without locks: what nobody can be asked about is not removed
        fcntl.flock(stream, fcntl.LOCK_SH)
    return stream


@dataclass(frozen=True)
class Keeping:
    """What a sweep keeps in a node's cache. sweep: its name, the same when it is run again. needed: models that entries which
    are not done read. most: bytes that models may take in the cache, None where only the disk sets a bound."""

    sweep: str = ""
    needed: frozenset[str] = frozenset()
    most: int | None = None


EVERYTHING = Keeping()


def make_room(need: int, wanted: Sequence[str], keeping: Keeping = EVERYTHING, *, ahead: bool = False) -> None:
    """See that `need` bytes fit the disk of the cache, and the bound, by removing models that nobody uses any more.

    Removed are those that the sweep does not need any more, then, unless `ahead`, those that only later entries need; of each
    kind those first that were not read for the longest time, and of the second none where all of them are not enough.
    On a machine that was not rented nothing is removed but what this sweep fetched, and that only for a bound. wanted: the models
    to come, which stay. Raises CheckpointError where there is too little room all the same.
    """
    cache = hub_cache()
    _leave_room_for_results(need, wanted, keeping)
    if _lacking(need, wanted, keeping):
        ours = [m for m in _removable(keeping) if m.repo not in wanted and not (ahead and m.repo in keeping.needed)]
        ours.sort(key=lambda m: (m.repo in keeping.needed, m.read))
        for n, model in enumerate(ours):
            if need and model.repo in keeping.needed:
                gain = sum(m.nbytes for m in ours[n:] if _is_free(m.repo))
                if _lacking(need - gain, wanted, keeping):
                    break  # later entries would fetch all of it once more, for nothing
            _remove(model)
            if not _lacking(need, wanted, keeping):
                return
    if not need:
        return  # all is there: nobody can be asked for less
    names = f"{' and '.join(repr(w) for w in wanted)} need {need / GIB:.1f} GiB more"
    if keeping.most is not None and _lacking(need, wanted, keeping, of_disk=False):
        held = _held(wanted, keeping)
        raise CheckpointError(
            f"{names} in the hub's cache, where {held / GIB:.1f} GiB are in use or still needed, and cache_gib is "
            f"{keeping.most / GIB:.3g}; raise it, or set weights: stream"
        )
    free_bytes = shutil.disk_usage(cache).free
    if _to_write(need, wanted) + SPARE_BYTES > free_bytes:
        raise CheckpointError(
            f"{names} on disk and {SPARE_BYTES / GIB:.0f} to spare, "
            f"{cache} has {free_bytes / GIB:.1f} GiB free; rent with a larger disk_gb, or set HF_HOME to a larger disk"
        )


def _leave_room_for_results(need: int, wanted: Sequence[str], keeping: Keeping) -> None:
    """On a rented node remove what the sweep is done with until RESULTS_BYTES stay free beside `need`, or nothing of it is left."""
    if not keeping.sweep or not is_rented():
        return
    done = [m for m in _models() if m.repo not in wanted and m.repo not in keeping.needed]
    for model in sorted(done, key=lambda m: m.read):
        if need + RESULTS_BYTES <= shutil.disk_usage(hub_cache()).free:
            return
        _remove(model)


def _remove(model: _Model) -> None:
    """Remove a model from the cache unless somebody uses it."""
    with _nobody_uses(model.repo) as free:
        if free:
            log.info("removing %s from the cache (%.1f GiB) to make room", model.repo, model.nbytes / GIB)
            shutil.rmtree(model.folder, ignore_errors=True)
            _mark(model.repo).unlink(missing_ok=True)


def _lacking(need: int, wanted: Sequence[str], keeping: Keeping, *, of_disk: bool = True) -> bool:
    """Whether there is too little room, of the bound or, on a machine where that can be changed, of the disk."""
    if keeping.most is not None and _held(wanted, keeping) + need > keeping.most:
        return True
    return of_disk and need > 0 and _to_write(need, wanted) + SPARE_BYTES > shutil.disk_usage(hub_cache()).free


def _to_write(need: int, wanted: Sequence[str]) -> int:
    """Bytes that the disk has to take for the models to come: of files that are there in part only the rest."""
    return need - sum(m.partly for m in _models() if m.repo in wanted)


def is_rented() -> bool:
    """True on a node that `ray up` made, whose cache is nobody's but ours."""
    return (mesh_folder() / "node.json").exists()


@dataclass(frozen=True)
class _Model:
    """A model in the cache. nbytes: what it takes on disk; partly: what of that are files that are not whole. read: when it was
    last read."""

    repo: str
    folder: Path
    nbytes: int
    partly: int
    read: float


def _models() -> list[_Model]:
    found = []
    for folder in hub_cache().glob("models--*"):
        blobs: list[tuple[Path, os.stat_result]] = []
        for path in folder.glob("blobs/*"):
            with contextlib.suppress(OSError):  # it got its place, or was removed, just now
                blobs.append((path, path.stat()))
        sizes = {path: min(s.st_blocks * 512, s.st_size) for path, s in blobs}  # files that are not whole have holes
        partly = sum(size for path, size in sizes.items() if path.name.endswith(".pairscope"))
        read = max((s.st_atime for _, s in blobs), default=0.0)
        repo = folder.name.removeprefix("models--").replace("--", "/")
        found.append(_Model(repo, folder, sum(sizes.values()), partly, read))
    return found


def _ours(keeping: Keeping) -> list[_Model]:
    """The models that count for the bound: all of a rented node's, elsewhere those that this sweep fetched."""
    return [m for m in _models() if is_rented() or (keeping.sweep and _fetched_by(m.repo) == keeping.sweep)]


def _removable(keeping: Keeping) -> list[_Model]:
    return _ours(keeping) if is_rented() or keeping.most is not None else []


def _held(wanted: Sequence[str], keeping: Keeping) -> int:
    """Bytes that count for the bound; files of the models to come that are there in part are in what those need."""
    return sum(m.nbytes - (m.partly if m.repo in wanted else 0) for m in _ours(keeping))


def mark_fetched(repo: str, sweep: str) -> None:
    """Note that a model which is not in the cache yet is there because of this sweep."""
    if sweep and not model_folder(repo).exists():
        try:
            _mark(repo).write_text(sweep)
        except OSError as error:  # whoever fetches it there says what is in the way
            if error.errno not in NOT_OURS:
                raise


def _fetched_by(repo: str) -> str | None:
    with contextlib.suppress(OSError):
        return _mark(repo).read_text()
    return None


@contextlib.contextmanager
def _nobody_uses(repo: str) -> Iterator[bool]:
    with open(_note(repo), "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _is_free(repo: str) -> bool:
    with _nobody_uses(repo) as free:
        return free


def _note(repo: str) -> Path:
    return hub_cache() / f".used-{re.sub(r'[^A-Za-z0-9.-]', '_', repo)}"


def _mark(repo: str) -> Path:
    return hub_cache() / f".fetched-{re.sub(r'[^A-Za-z0-9.-]', '_', repo)}"


@contextlib.contextmanager
def one_at_a_time() -> Iterator[bool]:
    """True where no other process of this node holds it; a place of a process that died is free again. Also where it cannot be
    held, in a cache that may not be written to or whose file system has no locks: then all go at once."""
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(open(hub_cache() / ".preparing", "a"))
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.utime(stream.name)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True
