"""What a pair further costs a sweep from a hub of a given bandwidth, and what fetching its files while one computes saves.

    python tests/bench/bench_ahead.py [--mb-per-s 50] [--rounds 2] [--parts further ahead] [--prompts N] [--ways stream cache download]

The hub is tests/e2e/local_hub.py in a process of its own, on loopback, throttled; every sweep begins with an empty cache. The pairs
are one random pair under three names, each about 0.4 GB. The sweeps run one entry at a time, through a Ray of their own.

further: one short prompt, so that the network is what takes time. (Sweep of three - sweep of one) / 2, over the bytes of a pair /
bandwidth: what is above 1 is what the network stands still between two pairs, and around them.

ahead: as many prompts as make computing take about as long as fetching, on this machine: where one of the two takes far longer
than the other, little can be gained. The sweep of three with fetch_ahead over the same without; Ray's start is in both. A pair
whose weights are streamed keeps no files, so nothing of it is fetched ahead.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from measured import CACHE, ROOT, Bench, at_least, in_turns, ratios
from pairs import captured, entry_of, make_pair, prompts_of, work

BAR = 1.15
TRIED = 24  # prompts whose time says how many take as long as fetching
NAMES = ("one", "two", "three")
WAYS = ("stream", "cache", "download")
PARTS = ("further", "ahead")
SHAPE: dict[str, Any] = {
    "vocab": 4096,
    "tokenizer_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "attention_bias": False,
    "mlp_bias": False,
}


def serve(folder: Path, paths: Any) -> None:
    """The pair as org/<name>-base and org/<name>-sft, for each name."""
    for name in NAMES:
        for kind, path in (("base", paths.base), ("sft", paths.sft)):
            link = folder / "org" / f"{name}-{kind}"
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(path)


def prompts_that_take(seconds: float, paths: Any) -> int:
    """How many prompts of 64 tokens a walk over this pair takes so long for, where its files are on the disk."""
    from capture.config import Lens

    entry = entry_of(paths, prompts_of(64, TRIED), mode="streamed", noise_floor=False, lens=Lens(enabled=False))
    out = Path(tempfile.mkdtemp(prefix="bench-ahead-", dir=CACHE))
    try:
        found = min(work(captured(entry, out)) for _ in range(2))
    finally:
        shutil.rmtree(out)
    return max(1, round(TRIED * seconds / found))


def sweep_seconds(
    weights: str, ahead: bool, prompts: tuple[str, ...], env: dict[str, str], names: tuple[str, ...] = NAMES
) -> float:
    """A whole `pairscope sweep` of these pairs into an empty cache, in a process of its own."""
    home = Path(tempfile.mkdtemp(prefix="bench-ahead-", dir=CACHE))
    sweep = [{"name": n, "base_model": f"org/{n}-base", "sft_model": f"org/{n}-sft", "tokenizer": f"org/{n}-base"}
             for n in names]  # fmt: skip
    block = {"model_sweep": sweep, "device": "cpu", "dtype": "float32", "mode": "streamed", "weights": weights,
             "prompts": list(prompts), "noise_floor": False, "lens": {"enabled": False}, "fetch_ahead": ahead}  # fmt: skip
    try:
        (home / "sweep.yaml").write_text(json.dumps({"residual_compare": block}))  # JSON is YAML
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "cluster", "sweep", str(home / "sweep.yaml"), "--out", str(home / "out"), "--jobs", "1"],
            cwd=ROOT, capture_output=True, text=True, env=os.environ | env | {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")},
        )  # fmt: skip
        seconds = time.perf_counter() - began
        print("\n".join(f"    {line}" for line in done.stderr.splitlines() if "ahead" in line or "complete in" in line))
        if done.returncode:
            raise RuntimeError(f"the sweep failed:\n{done.stderr[-3000:]}")
        return seconds
    finally:
        shutil.rmtree(home, ignore_errors=True)


def further(bench: Bench, rounds: int, ways: list[str], env: dict[str, str], nbytes: int, mb_per_s: float) -> None:
    least, prompts = nbytes / mb_per_s / 1e6, ("A few words.",)
    for way in ways:
        parts: dict[str, Callable[[], float]] = {
            "three": partial(sweep_seconds, way, True, prompts, env), "one": partial(sweep_seconds, way, True, prompts, env, NAMES[:1])
        }  # fmt: skip
        found = in_turns(parts, rounds, warm=0)
        beyond = [(three - one) / (len(NAMES) - 1) for three, one in zip(found["three"], found["one"], strict=True)]
        bench.add(
            f"further, {way}", f"each pair of a sweep beyond the first, weights: {way}", [s / least for s in beyond],
            over=f"{nbytes / 1e9:.2f} GB at {mb_per_s:g} MB/s", bar=BAR,
            note=f"{min(beyond):.1f} to {max(beyond):.1f} s; the first, with Ray's start, {min(found['one']):.1f} s; the cache is empty",
        )  # fmt: skip


def ahead(bench: Bench, rounds: int, ways: list[str], prompts: tuple[str, ...], env: dict[str, str], over: str) -> None:
    for way in ways:
        parts: dict[str, Callable[[], float]] = {
            "with": partial(sweep_seconds, way, True, prompts, env), "without": partial(sweep_seconds, way, False, prompts, env)
        }  # fmt: skip
        found = in_turns(parts, rounds, warm=0)
        said = ", ".join(f"{name} {min(s):.1f} to {max(s):.1f} s" for name, s in found.items())
        bench.add(
            way, f"a sweep of three pairs, weights: {way}, fetching ahead", ratios(found["with"], found["without"]),
            over=f"the same without, {over}", note=f"{said}; one entry at a time, the cache is empty",
        )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb-per-s", type=at_least(1, float), default=50.0, help="bandwidth of the hub (default 50)")
    parser.add_argument("--rounds", type=at_least(1), default=2, help="sweeps of each kind (default 2)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default both)")
    parser.add_argument(
        "--prompts", type=at_least(1), help="prompts of 64 tokens (default: as many as take as long as fetching)"
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=list(WAYS),
        help="values of weights to measure",
    )
    parser.add_argument("--json", type=Path, help="where the figures go (default .cache/bench/ahead.json)")
    args = parser.parse_args()

    folder = CACHE / f"three-{zlib.crc32(repr(sorted(SHAPE.items())).encode()):08x}"
    paths = make_pair(folder / "pair", SHAPE)
    serve(folder / "hub", paths)
    nbytes = sum(f.stat().st_size for p in (paths.base, paths.sft) for f in p.glob("*.safetensors"))
    command = [
        sys.executable,
        str(ROOT / "tests/e2e/local_hub.py"),
        str(folder / "hub"),
        "--mb-per-s",
        str(args.mb_per_s),
    ]
    hub = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert hub.stdout is not None
        env = {"HF_ENDPOINT": hub.stdout.readline().strip(), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "",
               "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
        bench = Bench("ahead", "make bench")
        if "further" in args.parts:
            further(bench, args.rounds, args.ways, env, nbytes, args.mb_per_s)
        if "ahead" in args.parts:
            n = args.prompts or prompts_that_take(nbytes / args.mb_per_s / 1e6, paths)
            over = f"{nbytes / 1e9:.2f} GB a pair at {args.mb_per_s:g} MB/s, {n} prompts of 64 tokens"
            ahead(bench, args.rounds, [w for w in args.ways if w != "stream"], prompts_of(64, n), env, over)
    finally:
        hub.kill()
        hub.wait()
    return bench.write(args.json)


if __name__ == "__main__":
    sys.exit(main())
