"""Captures that stream their weights against the same captures with them resident, in one run, from a warm page cache.

    python tests/bench/bench_streaming.py [--rounds 5] [--threads N] [--cases tight 12 64] [--layers 82]

tight: random llamas of many equal layers; `device_memory_gib` is a twentieth of both checkpoints, so that `auto` must stream.
12 and 64: the pair in SmolLM2-135M's shape that bench_capture.py measures, one prompt of so many tokens, with all statistics and
without the lens, with `mode: streamed` asked for. Each round is one resident and one streamed capture, in turns, after one of each
that only warms the page cache. Compared is the walk with the writing of the tables, and once more all of it. Exits 1 where a median ratio is above the bar.
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
CASES = ("tight", "12", "64")
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


Seconds = dict[str, list[float]]  # by name, round by round


def in_turns(entries: dict[str, Any], rounds: int) -> tuple[Seconds, Seconds, dict[str, Any]]:
    """Captures of these, one after the other, `rounds` times after one that does not count: seconds of walk and writing, those with
    the opening, and the last record of each."""
    seconds: Seconds = {name: [] for name in entries}
    whole: Seconds = {name: [] for name in entries}
    last: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as out:
        for turn in range(rounds + 1):
            for name, entry in entries.items():
                last[name] = pairs.captured(entry, Path(out))
                if turn:
                    seconds[name].append(pairs.work(last[name]))
                    whole[name].append(last[name]["seconds"]["all"])
    return seconds, whole, last


def add_whole(bench: Bench, name: str, what: str, whole: Seconds, over: str) -> None:
    """The same with the opening, which costs the same either way: for who waits for all of it."""
    bench.add(
        f"{name}, opening too", f"{what}, opening included", ratios(whole["streamed"], whole["resident"]), over=over
    )


def tight(bench: Bench, paths: Any, rounds: int) -> dict[str, Any]:
    """A pair that does not fit; the last streamed capture's record with the cap and the bytes stored."""
    from capture.config import Lens

    stored = sum(f.stat().st_size for p in (paths.base, paths.sft) for f in p.glob("*.safetensors"))
    cap = stored / TIMES
    asked = {"lens": Lens(layers=20), "noise_floor": False, "tracked_token_ids": ()}
    prompts = tuple(str(n) * 23 for n in range(4))
    entries = {
        "resident": pairs.entry_of(paths, prompts, mode="resident", **asked),
        "streamed": pairs.entry_of(paths, prompts, device_memory_gib=cap / 2**30, **asked),
    }
    seconds, whole, last = in_turns(entries, rounds)
    streamed = last["streamed"]
    planned, alive = streamed["planned_memory_bytes"], streamed["bytes"]["weights_peak"]
    note = (
        f"{stored / 2**20:.0f} MiB of checkpoints, cap {cap / 2**20:.1f} MiB, mode {streamed['mode']}, page cache warm; layers 256 "
        "wide, four prompts of 24 tokens, the lens at every 20th layer, no noise floor"
    )
    bench.add(
        "streamed", f"a pair {TIMES} times larger than the memory it may use, streamed",
        ratios(seconds["streamed"], seconds["resident"]), over="the same pair resident", bar=BAR, note=note,
    )  # fmt: skip
    add_whole(
        bench,
        "streamed",
        f"a pair {TIMES} times larger than the memory it may use, streamed",
        whole,
        "the same pair resident",
    )
    bench.add("planned", "memory that was planned for it", [planned / cap], over="the cap", bar=1.0)
    bench.add("alive", "weights alive at most", [alive / planned], over="memory that was planned", bar=1.0)
    return streamed | {"cap_bytes": cap, "stored_bytes": stored}


def plain(bench: Bench, paths: Any, tokens: int, rounds: int) -> None:
    """The 135M shape with so many tokens, with all statistics and without the lens."""
    from capture.config import Lens

    for what, lens in (("all statistics", Lens()), ("statistics without the lens", Lens(enabled=False))):
        entries = {
            mode: pairs.entry_of(paths, pairs.prompts_of(tokens), mode=mode, lens=lens) for mode in ("resident", "streamed")
        }  # fmt: skip
        seconds, whole, last = in_turns(entries, rounds)
        walk, peak = last["streamed"]["seconds"]["walk"], last["streamed"]["bytes"]["weights_peak"]
        text = f"{what}, 135M shape, one prompt of {tokens} tokens, streamed"
        bench.add(
            f"{tokens} {what}", text, ratios(seconds["streamed"], seconds["resident"]), over="the same resident", bar=BAR,
            note=f"its walk {walk:.2f} s, its weights alive at most {peak / 2**20:.0f} MiB",
        )  # fmt: skip
        add_whole(bench, f"{tokens} {what}", text, whole, "the same resident")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=3, help="captures of each that count (default 3)")
    parser.add_argument(
        "--threads", type=at_least(1), default=None, help="threads of torch (default: as torch chooses)"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what to capture (default all)")
    parser.add_argument(
        "--layers",
        type=at_least(1),
        default=SHAPE["num_hidden_layers"],
        help="layers of each model of `tight` (default 82)",
    )
    parser.add_argument("--json", type=Path, help="where the figures go (default .cache/bench/streaming.json)")
    args = parser.parse_args()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench("streaming", "make bench", threads=torch.get_num_threads())
    for case in args.cases:
        if case == "tight":
            tight(bench, pairs.kept_pair(SHAPE | {"num_hidden_layers": args.layers}), args.rounds)
        else:
            plain(bench, pairs.kept_pair(pairs.SMOL), int(case), args.rounds)
    return bench.write(args.json)


if __name__ == "__main__":
    sys.exit(main())
