"""A streamed capture from a cold disk, over the time that reading both checkpoints once takes from the same cold disk.

    python tests/bench/bench_cold.py [--rounds 6] [--layers 12]

The pair is that of bench_hub.py: wide layers, few tokens, no lens, so that reading dominates. Before each part the system is told
to forget the pages of these files (posix_fadvise DONTNEED), and asked whether it has. The floor reads both files in blocks of 8 MiB,
four at a time. The two come in turns, each first every other time, since a disk's own memory may favour the second.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pairs
from bench_hub import SHAPE
from measured import CACHE, Bench, ratios

BAR = 1.3
BLOCK = 8 << 20
READERS = 4
PROBES = 1000  # places of a file that are asked for


def forget(files: list[Path]) -> None:
    """Drop the pages of these files from the system's memory. Raises RuntimeError where they are still there."""
    gc.collect()
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # pages that are not written yet stay
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size = file.stat().st_size
            there = sum(_is_there(stream.fileno(), at) for at in range(0, size, size // PROBES))
        if there > PROBES // 100:
            raise RuntimeError(f"{there} of {PROBES} places of '{file}' are still in memory")


def _is_there(number: int, at: int) -> bool:
    try:
        return os.preadv(number, [bytearray(1)], at, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


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


def capture(paths: Any, files: list[Path]) -> float:
    """Seconds of a whole streamed capture, from a cold disk."""
    from capture.config import Lens

    entry = pairs.entry_of(paths, ("A few words.",), mode="streamed", lens=Lens(enabled=False), noise_floor=False)
    forget(files)
    with tempfile.TemporaryDirectory(prefix="bench-") as out:
        began = time.perf_counter()
        pairs.captured(entry, Path(out))
        return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="captures that count (default 6)")
    parser.add_argument(
        "--layers", type=int, default=SHAPE["num_hidden_layers"], help="layers of each model (default 12)"
    )
    parser.add_argument("--json", type=Path, help="where the figures go (default .cache/bench/cold.json)")
    args = parser.parse_args()
    import torch

    shape = SHAPE | {"num_hidden_layers": args.layers}
    paths = pairs.make_pair(CACHE / f"wide-{zlib.crc32(repr(sorted(shape.items())).encode()):08x}" / "org", shape)
    files = sorted(f for p in (paths.base, paths.sft) for f in p.glob("*.safetensors"))
    bench = Bench("cold", "make bench", threads=torch.get_num_threads())
    parts = {"reading": lambda: read_once(files), "capture": lambda: capture(paths, files)}
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(args.rounds):
        for name in sorted(parts, reverse=turn % 2 == 0):
            seconds[name].append(parts[name]())
    nbytes = sum(f.stat().st_size for f in files)
    note = f"{nbytes / 1e9:.2f} GB, read at {nbytes / 1e6 / min(seconds['reading']):.0f} MB/s at best"
    bench.add(
        "cold", "a whole streamed capture, page cache cold", ratios(seconds["capture"], seconds["reading"]),
        over="reading both checkpoints once, cold", bar=BAR, note=note,
    )  # fmt: skip
    return bench.write(args.json)


if __name__ == "__main__":
    sys.exit(main())
