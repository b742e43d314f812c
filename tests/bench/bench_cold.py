"""A streamed capture from a cold disk, over the time that reading both checkpoints once takes from the same cold disk.

    python tests/bench/bench_cold.py [--rounds 2] [--layers 12]

The pair is that of bench_hub.py: wide layers, few tokens, no lens, so that reading dominates. Before each part the system is told
to forget the pages of these files (posix_fadvise DONTNEED). The floor reads both files in blocks of 8 MiB, one after the other.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import pairs
from bench_hub import SHAPE
from measured import CACHE, Bench, in_turns, ratios

BAR = 1.3
BLOCK = 8 << 20


def forget(files: list[Path]) -> None:
    """Drop the pages of these files from the system's memory."""
    gc.collect()
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(files: list[Path]) -> float:
    """Seconds that reading all bytes takes, from a cold disk."""
    forget(files)
    buffer = bytearray(BLOCK)
    began = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - began


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
    parser.add_argument("--rounds", type=int, default=2, help="captures that count (default 2)")
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
    seconds = in_turns(
        {"reading": lambda: read_once(files), "capture": lambda: capture(paths, files)}, args.rounds, warm=0
    )
    nbytes = sum(f.stat().st_size for f in files)
    note = f"{nbytes / 1e9:.2f} GB, read at {nbytes / 1e6 / min(seconds['reading']):.0f} MB/s at best"
    bench.add(
        "cold", "a whole streamed capture, page cache cold", ratios(seconds["capture"], seconds["reading"]),
        over="reading both checkpoints once, cold", bar=BAR, note=note,
    )  # fmt: skip
    return bench.write(args.json)


if __name__ == "__main__":
    sys.exit(main())
