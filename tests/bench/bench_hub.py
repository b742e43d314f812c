"""A capture whose weights come from a hub of a given bandwidth, against the time that their bytes take at that bandwidth.

    python tests/bench/bench_hub.py [--mb-per-s 200] [--rounds 3] [--layers 12]

The hub is tests/e2e/local_hub.py in a process of its own, on loopback, throttled; every round begins with an empty cache, in memory
where there is room (/dev/shm), as a disk may be slower than the network. The
pair is made of random wide layers and the prompts are few, so that reading dominates; the lens is off. Compared is a whole
capture, from the config to the tables, for each value of `weights`. The bare line beside it is the same bytes fetched by the
same code with nothing computed: what this machine serves and receives at all. All have the same bar, `download` too,
which fetches all of a pair by the hub's own library before it computes. Exits 1 where a median is above it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from measured import CACHE, ROOT, Bench, at_least, in_turns
from pairs import make_pair

BAR = 1.15
WAYS = ("stream", "cache", "download")
SHAPE: dict[str, Any] = {
    "vocab": 4096,
    "tokenizer_size": 4096,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "attention_bias": False,
    "mlp_bias": False,
}


def capture(weights: str, home: Path) -> dict[str, Any]:
    """Seconds of one capture into an empty cache, and what it says of itself."""
    from huggingface_hub import constants

    from capture.config import Entry, Lens
    from capture.run import capture_pair

    constants.HF_HUB_CACHE = str(home / "hub")
    entry = Entry(
        name="bench", base_model="org/base", sft_model="org/sft", tokenizer="org/base", prompts=("A few words.",), device="cpu",
        mode="streamed", weights=weights, lens=Lens(enabled=False), noise_floor=False,  # type: ignore[arg-type]
    )  # fmt: skip
    began = time.perf_counter()
    result = capture_pair(entry, str(home / "out"), force=True)
    seconds = time.perf_counter() - began
    document = json.loads((Path(result.path) / "capture.json").read_text())
    return {"seconds": seconds, "stages": document["seconds"], "from_the_hub": document["from_the_hub"]}


def bare() -> float:
    """Seconds that the weights take with nothing computed."""
    from huggingface_hub import HfApi

    from capture.fetch import Fetcher
    from capture.ranges import Ranges, RemoteFile

    spans = []
    for repo in ("org/base", "org/sft"):
        info = HfApi().model_info(repo, files_metadata=True)
        for one in info.siblings or []:
            if one.rfilename.endswith(".safetensors") and one.size and info.sha and one.lfs:
                file = RemoteFile(repo, info.sha, one.rfilename, one.size, one.lfs.sha256, one.lfs.sha256)
                spans += [(file, at, min(at + (64 << 20), file.size)) for at in range(0, file.size, 64 << 20)]
    fetcher = Fetcher(Ranges())
    began = time.perf_counter()
    fetcher.announce(spans)
    for span in spans:
        fetcher.take(span)
    seconds = time.perf_counter() - began
    fetcher.close()
    return seconds


def cache_folder(nbytes: int) -> Path:
    """Where the empty caches lie: in memory where there is room, so that the network is measured and not this disk."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > 2 * nbytes else CACHE


def measure(bench: Bench, rounds: int, nbytes: int, mb_per_s: float, ways: Sequence[str]) -> None:
    """Each way and the bare fetching, in turns, over bytes / bandwidth."""
    least = nbytes / (mb_per_s * 1e6)
    stages: dict[str, dict[str, float]] = {}

    def one(way: str) -> float:
        home = Path(tempfile.mkdtemp(prefix="bench-hub-", dir=cache_folder(nbytes)))
        try:
            found = capture(way, home)
        finally:
            shutil.rmtree(home, ignore_errors=True)
        stages[way] = found["stages"]
        return float(found["seconds"])

    parts: dict[str, Callable[[], float]] = {"bare": bare} | {way: partial(one, way) for way in ways}
    seconds = in_turns(parts, rounds, warm=0)
    over = f"{nbytes / 1e9:.2f} GB at {mb_per_s:g} MB/s"
    where = "in memory" if cache_folder(nbytes) != CACHE else "on disk"
    bench.add("bare", "the same bytes fetched, nothing computed", [s / least for s in seconds["bare"]], over=over)
    for way in ways:
        said = ", ".join(f"{stage} {value:.1f} s" for stage, value in stages[way].items())
        bench.add(
            way, f"a whole capture, weights: {way}", [s / least for s in seconds[way]], over=over,
            bar=BAR, note=f"the cache is empty and {where}; {said}",
        )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb-per-s", type=at_least(1, float), default=200.0, help="bandwidth of the hub (default 200)")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="captures of each kind (default 3)")
    parser.add_argument(
        "--layers", type=at_least(1), default=SHAPE["num_hidden_layers"], help="layers of each model (default 12)"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="values of weights to measure")
    parser.add_argument(
        "--threads", type=at_least(1), default=None, help="threads of torch (default: as torch chooses)"
    )
    parser.add_argument("--json", type=Path, help="where the figures go (default .cache/bench/hub.json)")
    args = parser.parse_args()

    shape = SHAPE | {"num_hidden_layers": args.layers}
    folder = CACHE / f"wide-{zlib.crc32(repr(sorted(shape.items())).encode()):08x}"  # a hub of one owner, `org`
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(ROOT / "tests" / "e2e" / "local_hub.py"),
        str(folder),
        "--mb-per-s",
        str(args.mb_per_s),
    ]
    hub = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert hub.stdout is not None
        os.environ |= {"HF_ENDPOINT": hub.stdout.readline().strip(), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                       "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": ""}  # fmt: skip
        import torch
        import transformers.models.llama.modeling_llama  # noqa: F401  its import is no part of a capture

        if args.threads:
            torch.set_num_threads(args.threads)
        paths = make_pair(folder / "org", shape)
        nbytes = sum(f.stat().st_size for p in (paths.base, paths.sft) for f in p.glob("*.safetensors"))
        bench = Bench("hub", "make bench", threads=torch.get_num_threads())
        measure(bench, args.rounds, nbytes, args.mb_per_s, args.ways)
    finally:
        hub.kill()
        hub.wait()
    return bench.write(args.json)


if __name__ == "__main__":
    sys.exit(main())
