"""A streamed capture from a cold disk, over the time that reading both checkpoints once takes from the same cold disk.

    python tests/bench/bench_cold.py [--rounds 6] [--layers 12] [--large-layers 24]

The pair is that of bench_hub.py: wide layers, few tokens, no lens, so that reading dominates. Before each part the system is told
to forget the pages of these files (posix_fadvise DONTNEED), and asked whether it has (mincore). The floor reads both files in
blocks of 8 MiB, four at a time. The parts come in turns, each first every other time, since a disk's own memory may favour the second.

A local checkpoint is fingerprinted before its first capture, and what was found is remembered below PAIRSCOPE_HOME. Up to 4 GiB all of
it is hashed; of a larger one, which is where reading takes long, samples are. So there are three kinds, all with the bar: the first
capture of a small checkpoint, whose fingerprint nobody knows; later ones; and the first of a large one. Models of a hub have no
fingerprints.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import mmap
import os
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pairs
from bench_hub import SHAPE
from measured import CACHE, STEADY, Bench, at_least, ratios

BAR = 1.3
BLOCK = 8 << 20
READERS = 4
WHAT = {
    "later": "its fingerprint known",
    "first": "the first of this checkpoint, fingerprinted first",
    "large": "the first of this checkpoint, which is above 4 GiB",
}
STAY = 0.01  # of a file's pages that may stay in memory


def forget(files: list[Path]) -> None:
    """Drop the pages of these files from the system's memory. Raises RuntimeError where they are still there."""
    gc.collect()
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # pages that are not written yet stay
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            share = in_memory(stream.fileno(), file.stat().st_size)
        if share > STAY:
            raise RuntimeError(f"{share:.1%} of '{file}' is still in memory")


def in_memory(number: int, size: int) -> float:
    """The share of a file's pages that the system has in memory, by mincore (man 2 mincore), which reads nothing."""
    pages = -(-size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(
        number, size, flags=mmap.MAP_PRIVATE
    ) as mapped:  # private, so that it may be written to, as ctypes asks
        first = (ctypes.c_char * size).from_buffer(mapped)
        failed = libc.mincore(ctypes.byref(first), ctypes.c_size_t(size), found)
        del first
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in found) / pages


def read_once(files: list[Path]) -> float:
    """Seconds that reading all bytes takes, from a cold disk."""
    forget(files)
    blocks = [(file, at) for file in files for at in range(0, file.stat().st_size, BLOCK)]
    open_files = {file: os.open(file, os.O_RDONLY) for file in files}
    buffers = threading.local()

    def read(block: tuple[Path, int]) -> None:
        if not hasattr(buffers, "mine"):
            buffers.mine = bytearray(BLOCK)
        os.preadv(open_files[block[0]], [buffers.mine], block[1])

    try:
        with ThreadPoolExecutor(READERS) as readers:
            began = time.perf_counter()
            list(readers.map(read, blocks))
            return time.perf_counter() - began
    finally:
        for number in open_files.values():
            os.close(number)


def capture(paths: Any, files: list[Path], home: Path | None = None) -> float:
    """Seconds of a whole streamed capture, from a cold disk. home: where fingerprints are remembered; a new one by default."""
    from capture.config import Lens

    entry = pairs.entry_of(paths, ("A few words.",), mode="streamed", lens=Lens(enabled=False), noise_floor=False)
    forget(files)
    with tempfile.TemporaryDirectory(prefix="bench-") as out:
        os.environ["PAIRSCOPE_HOME"] = str(home or Path(out) / "home")
        began = time.perf_counter()
        pairs.captured(entry, Path(out) / "run")
        return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=6, help="captures of each kind that count (default 6)")
    parser.add_argument(
        "--layers", type=at_least(1), default=SHAPE["num_hidden_layers"], help="layers of each model (default 12)"
    )
    parser.add_argument(
        "--large-layers",
        type=at_least(0),
        default=24,
        help="layers of each model above 4 GiB (default 24; 0: leave it out)",
    )
    parser.add_argument("--json", type=Path, help="where the figures go (default .cache/bench/cold.json)")
    args = parser.parse_args()
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  its import is no part of a capture

    from capture.weights import FULL_HASH_BYTES

    bench = Bench("cold", "make bench", threads=torch.get_num_threads())
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        paths = pair_of(args.layers)
        parts = {
            "later": partial(capture, paths, files_of(paths), Path(home)),
            "first": partial(capture, paths, files_of(paths)),
        }
        parts["later"]()
        measure(bench, files_of(paths), args.rounds, parts)
    if args.large_layers:
        paths = pair_of(args.large_layers)
        if (
            size := min(sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (paths.base, paths.sft))
        ) <= FULL_HASH_BYTES:
            parser.error(f"--large-layers {args.large_layers} make {size / 2**30:.1f} GiB, which is hashed in full")
        measure(bench, files_of(paths), -(-args.rounds // 2), {"large": partial(capture, paths, files_of(paths))})
    return bench.write(args.json)


def pair_of(layers: int) -> Any:
    """The wide pair with so many layers, made once."""
    shape = SHAPE | {"num_hidden_layers": layers}
    return pairs.make_pair(CACHE / f"wide-{zlib.crc32(repr(sorted(shape.items())).encode()):08x}" / "org", shape)


def files_of(paths: Any) -> list[Path]:
    return sorted(f for p in (paths.base, paths.sft) for f in p.glob("*.safetensors"))


def measure(bench: Bench, files: list[Path], rounds: int, captures: dict[str, Callable[[], float]]) -> None:
    """Each of these captures and the reading of their files, in turns."""
    parts = {"reading": partial(read_once, files)} | captures
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds):
        for name in sorted(parts, reverse=turn % 2 == 0):
            seconds[name].append(parts[name]())
    nbytes = sum(f.stat().st_size for f in files)
    best, worst = min(seconds["reading"]), max(seconds["reading"])
    note = f"{nbytes / 1e9:.2f} GB, read at {nbytes / 1e6 / best:.0f} MB/s at best"
    if worst > STEADY * best:
        note += f"; reading itself varied by {worst / best:.1f}x: others used the disk, and this ratio says little"
    for name in captures:
        bench.add(
            f"cold, {name}", f"a whole streamed capture, page cache cold, {WHAT[name]}", ratios(seconds[name], seconds["reading"]),
            over="reading both checkpoints once, cold", bar=BAR, note=note,
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
