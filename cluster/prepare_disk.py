"""Room on a node's disk for the weights of the next pair."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from capture.errors import CheckpointError
from cluster.mesh.peers import mesh_folder

log = logging.getLogger(__name__)

GIB = 1 << 30
SPARE_BYTES = 2 * GIB  # for logs, staged tables and what else a node writes


def hub_cache() -> Path:
    """The hub's cache, made if need be."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def in_use(repo: str) -> TextIO:
    """Marks a model as used by this process for as long as the returned file is open."""
    stream = open(_note(repo), "a")  # noqa: SIM115  the caller keeps it
    fcntl.flock(stream, fcntl.LOCK_SH)
    return stream


def make_room(need: int, wanted: Sequence[str]) -> None:
    """See that `need` bytes fit the disk of the cache, on a rented node by removing models that nobody uses any more.

    wanted: the models to come, which stay. Raises CheckpointError where there is too little all the same.
    """
    cache = hub_cache()
    if need + SPARE_BYTES > shutil.disk_usage(cache).free and _is_rented():
        _remove_unused(need + SPARE_BYTES, wanted)
    free = shutil.disk_usage(cache).free
    if need + SPARE_BYTES > free:
        raise CheckpointError(
            f"{' and '.join(repr(w) for w in wanted)} need {need / GIB:.1f} GiB more on disk and {SPARE_BYTES / GIB:.0f} to spare, "
            f"{cache} has {free / GIB:.1f} GiB free; rent with a larger disk_gb, or set HF_HOME to a larger disk"
        )


def _is_rented() -> bool:
    """True on a node that `ray up` made, whose cache is nobody's but ours."""
    return (mesh_folder() / "node.json").exists()


def _remove_unused(need: int, wanted: Sequence[str]) -> None:
    from huggingface_hub import scan_cache_dir

    cache = hub_cache()
    repos = sorted(scan_cache_dir(cache).repos, key=lambda r: r.last_accessed)
    for repo in repos:
        if shutil.disk_usage(cache).free >= need:
            return
        if repo.repo_id in wanted:
            continue
        with _nobody_uses(repo.repo_id) as free:
            if free:
                log.info("removing %s from the cache (%.1f GiB) to make room", repo.repo_id, repo.size_on_disk / GIB)
                shutil.rmtree(repo.repo_path, ignore_errors=True)


@contextlib.contextmanager
def _nobody_uses(repo: str) -> Iterator[bool]:
    with open(_note(repo), "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _note(repo: str) -> Path:
    return hub_cache() / f".used-{re.sub(r'[^A-Za-z0-9.-]', '_', repo)}"


@contextlib.contextmanager
def one_at_a_time() -> Iterator[bool]:
    """True where no other process of this node holds it; a place of a process that died is free again."""
    with open(hub_cache() / ".preparing", "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        os.utime(stream.name)
        yield True
