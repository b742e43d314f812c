"""How long a capture takes against the bare floor, both timed in one run.

    python tests/bench/bench_capture.py [--repeats 5] [--threads 2] [--json FILE]

The pair has the shape of SmolLM2-135M (576 wide, 30 layers, 49152 tokens, tied, float32) and random weights; one prompt
of 64 tokens; all statistics on. The floor is what no capture of all layers can do without, and nothing else: one forward
of each model with a batch of two prompts, and for every state that a lens reads one product per model, [2 x 64, 576] by
[576, 49152]. States -1..30 need 31 of them: layer 30 is layer 29 after the final norm.

The floor is timed before and after every capture, and each ratio is to the mean of the two, so that a busy machine slows
both sides. The ratio that counts takes in the walk and the writing of the tables. Opening (files, configs, tokenizer,
self-checks) is shown apart. Exits 1 where the median ratio is above the bar.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Mode = Literal["auto", "resident", "streamed"]
ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "bench"
BAR = 3.0
STEADY = 1.3  # floors of one run that are further apart than this say that the machine was busy
N_TOKENS = 64
SHAPE: dict[str, Any] = {
    "vocab": 49152,
    "tokenizer_size": 49152,
    "tie": True,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}


@dataclass(frozen=True)
class Repetition:
    """Seconds of one capture by stage, and of the floor around it."""

    floor: float
    stages: dict[str, float]
    mode: str

    @property
    def work(self) -> float:
        return self.stages["walk"] + self.stages["write"]

    @property
    def ratio(self) -> float:
        return self.work / self.floor


def make_pair(directory: Path, shape: dict[str, Any]) -> Any:
    """The random pair (tiny.PairPaths), made once: about 1.1 GB at the full shape."""
    from tiny import PairPaths
    from tiny import make_pair as write

    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        half_made = Path(tempfile.mkdtemp(dir=directory.parent))
        try:
            write("llama", half_made, **shape)
            half_made.rename(directory)
        finally:
            shutil.rmtree(half_made, ignore_errors=True)
    return PairPaths(directory / "base", directory / "sft", directory / "tokenizer")


class Floor:
    """Both models whole, and the arithmetic that a capture cannot do without."""

    def __init__(self, paths: Any) -> None:
        import torch
        from reference import load_pair

        pair = load_pair(paths, dtype=torch.float32)
        self.models = [pair.base, pair.sft]
        width = pair.base.config.hidden_size
        self.embeds = torch.randn(2, N_TOKENS, width, generator=torch.Generator().manual_seed(0))
        self.rows = torch.randn(2 * N_TOKENS, width, generator=torch.Generator().manual_seed(1))
        self.logits = torch.empty(2 * N_TOKENS, pair.base.config.vocab_size)
        self.n_products = pair.n_layers + 1

    def seconds(self) -> float:
        """Run it once."""
        import torch

        began = time.perf_counter()
        with torch.no_grad():
            for model in self.models:
                model.model(inputs_embeds=self.embeds, use_cache=False)
                for _ in range(self.n_products):
                    torch.mm(self.rows, model.lm_head.weight.T, out=self.logits)
        return time.perf_counter() - began


def capture_once(entry: Any, out: Path) -> tuple[dict[str, float], str]:
    """One capture in this process: seconds by stage from its capture.json, and its mode."""
    from capture.run import capture_pair

    result = capture_pair(entry, str(out), force=True)
    found = json.loads((Path(result.path) / "capture.json").read_text())
    return {**found["seconds"], "all": result.seconds}, result.mode


def measure(paths: Any, out: Path, repeats: int, mode: Mode = "auto") -> list[Repetition]:
    """Floor, capture, floor, capture, ... floor; the first capture only warms up and is not counted."""
    from capture.config import Entry

    entry = Entry(
        name="bench",
        base_model=str(paths.base),
        sft_model=str(paths.sft),
        tokenizer=str(paths.tokenizer),
        prompts=(("0123456789" * N_TOKENS)[: N_TOKENS - 1],),  # a token a digit, after <s>
        tracked_token_ids=(5, 299),
        device="cpu",
        dtype="float32",
        mode=mode,
    )
    floor = Floor(paths)
    floor.seconds()
    capture_once(entry, out)
    done = []
    before = floor.seconds()
    for _ in range(repeats):
        stages, chosen = capture_once(entry, out)
        after = floor.seconds()
        done.append(Repetition((before + after) / 2, stages, chosen))
        before = after
    return done


def summary(done: list[Repetition]) -> dict[str, Any]:
    """Medians and spread; seconds, and ratios to the floor."""

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    stages = {stage: spread([r.stages[stage] for r in done]) for stage in done[0].stages}
    return {
        "ratio": spread([r.ratio for r in done]),
        "ratio_with_opening": spread([r.stages["all"] / r.floor for r in done]),
        "bar": BAR,
        "floor_seconds": spread([r.floor for r in done]),
        "walk_and_write_seconds": spread([r.work for r in done]),
        "stage_seconds": stages,
        "mode": done[0].mode,
        "repeats": len(done),
        "tokens": N_TOKENS,
    }


def table(found: dict[str, Any]) -> str:
    """The summary for people."""
    rows = [("floor, s", found["floor_seconds"]), ("walk + write, s", found["walk_and_write_seconds"])]
    rows += [(f"  {stage}, s", spread) for stage, spread in found["stage_seconds"].items()]
    rows += [("ratio, walk + write", found["ratio"]), ("ratio, everything", found["ratio_with_opening"])]
    lines = [f"{'':22}{'median':>8}{'min':>8}{'max':>8}"]
    lines += [f"{name:22}{s['median']:8.2f}{s['min']:8.2f}{s['max']:8.2f}" for name, s in rows]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="captures that count (default 5)")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (default: as torch chooses)")
    parser.add_argument("--mode", choices=["auto", "resident", "streamed"], default="auto", help="mode of the capture")
    parser.add_argument("--json", type=Path, default=CACHE / "bench_capture.json", help="where the figures go")
    args = parser.parse_args()

    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(ROOT / "tests" / "capture"))
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    paths = make_pair(CACHE / f"llama-{zlib.crc32(json.dumps(SHAPE).encode()):08x}", SHAPE)
    out = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        done = measure(paths, out, args.repeats, args.mode)
    finally:
        shutil.rmtree(out)
    found = summary(done) | {"threads": torch.get_num_threads(), "torch": torch.__version__, "cpu": platform.machine()}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"one prompt of {N_TOKENS} tokens, 135M-shaped float32 pair, {found['mode']}, {found['threads']} threads")
    print(table(found))
    kept = found["ratio"]["median"] <= BAR
    print(
        f"median ratio {found['ratio']['median']:.2f}, bar {BAR:g}: {'kept' if kept else 'MISSED'}; figures in {args.json}"
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
