"""A pair 20 times larger than the memory given to it, streamed, against the same pair resident, in one run.

    python tests/bench/bench_streaming.py [--rounds 5] [--threads N] [--layers 82]

Both models are random llamas of many equal layers; `device_memory_gib` is a twentieth of both checkpoints, so that `auto` must
stream. Each round is one resident and one streamed capture, in turns, after one of each that only warms the page cache.
Compared is the walk with the writing of the tables; opening is shown too. Exits 1 where the median ratio is above the bar.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import pairs
from measured import Bench, at_least, ratios

BAR, TIMES = 1.15, 20
SHAPE: dict[str, Any] = {
    "vocab": 4096,
    "tokenizer_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 82,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "attention_bias": False,
    "mlp_bias": False,
}


def run(paths: Any, out: Path, mode: str, cap_bytes: float | None) -> dict[str, Any]:
    """One capture; its capture.json, which says what it took."""
    from capture.config import Lens

    prompts = tuple(str(n) * 23 for n in range(4))
    cap = None if cap_bytes is None else cap_bytes / 2**30
    entry = pairs.entry_of(
        paths, prompts, mode=mode, lens=Lens(layers=20), noise_floor=False, device_memory_gib=cap, tracked_token_ids=()
    )
    return pairs.captured(entry, out)


def measure(bench: Bench, paths: Any, rounds: int) -> dict[str, Any]:
    """Both in turns; the figures, and the last streamed capture's record with the cap and the bytes stored."""
    stored = sum(f.stat().st_size for p in (paths.base, paths.sft) for f in p.glob("*.safetensors"))
    cap = stored / TIMES
    seconds: dict[str, list[float]] = {"resident": [], "streamed": []}
    with tempfile.TemporaryDirectory(prefix="bench-") as out:
        for turn in range(rounds + 1):
            for name, mode, limit in (("resident", "resident", None), ("streamed", "auto", cap)):
                found = run(paths, Path(out), mode, limit)
                if turn:
                    seconds[name].append(pairs.work(found))
                if name == "streamed":
                    streamed = found
    planned, alive = streamed["planned_memory_bytes"], streamed["bytes"]["weights_peak"]
    note = (
        f"{stored / 2**20:.0f} MiB of checkpoints, cap {cap / 2**20:.1f} MiB, mode {streamed['mode']}, page cache warm; layers 256 "
        "wide, four prompts of 24 tokens, the lens at every 20th layer, no noise floor"
    )
    bench.add(
        "streamed", f"a pair {TIMES} times larger than the memory it may use, streamed",
        ratios(seconds["streamed"], seconds["resident"]), over="the same pair resident", bar=BAR, note=note,
    )  # fmt: skip
    bench.add("planned", "memory that was planned for it", [planned / cap], over="the cap", bar=1.0)
    bench.add("alive", "weights alive at most", [alive / planned], over="memory that was planned", bar=1.0)
    return streamed | {"cap_bytes": cap, "stored_bytes": stored}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=3, help="captures of each that count (default 3)")
    parser.add_argument(
        "--threads", type=at_least(1), default=None, help="threads of torch (default: as torch chooses)"
    )
    parser.add_argument(
        "--layers", type=at_least(1), default=SHAPE["num_hidden_layers"], help="layers of each model (default 82)"
    )
    parser.add_argument("--json", type=Path, help="where the figures go (default .cache/bench/streaming.json)")
    args = parser.parse_args()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench("streaming", "make bench", threads=torch.get_num_threads())
    measure(bench, pairs.kept_pair(SHAPE | {"num_hidden_layers": args.layers}), args.rounds)
    return bench.write(args.json)


if __name__ == "__main__":
    sys.exit(main())
