"""Weights that lie on a disk and not in memory: all of a group is read ahead, and what is not in memory is known not to be."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from capture.ledger import Ledger
from capture.stored import Stored

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what it reads")

SIZE = 24 << 20  # bytes: more than a system reads ahead at one call


def read_from_disk() -> int:
    """Bytes that this process has had read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def forget(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A file of one tensor `w` that no system has in memory."""
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.rand(SIZE // 4)}, file, metadata={"format": "pt"})
    forget(file)
    before = read_from_disk()
    file.read_bytes()
    if read_from_disk() - before < SIZE:
        pytest.skip("this file system is no disk, or forgets nothing")
    forget(file)
    return file


def opened(file: Path) -> Stored:
    stored = Stored([str(file)], "base", str(file.parent), Ledger())
    stored.opened(str(file), "w")
    return stored


def test_all_of_a_tensor_is_read_ahead_however_large_it_is(cold: Path) -> None:
    before = read_from_disk()
    opened(cold).read_ahead([(str(cold), "w")])
    assert read_from_disk() - before > 0.9 * SIZE


def test_a_tensor_of_which_a_fingerprint_has_read_the_first_bytes_is_not_in_memory(cold: Path) -> None:
    stored, keys = opened(cold), [(str(cold), "w")]
    with cold.open("rb") as stream:
        stream.read(64 << 10)
    assert not stored.cached(keys)
    cold.read_bytes()
    if not stored.cached(keys):
        pytest.skip("this file system does not say what is in memory")
