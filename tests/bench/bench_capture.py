"""How long a capture takes against the bare floor, in turns, in one run.

    python tests/bench/bench_capture.py [--rounds 5] [--threads 2] [--cases 12 64 250 8x64 64-close 64-real] [--eager] [--compile]

The pair has the shape of SmolLM2-135M (576 wide, 30 layers, 49152 tokens, tied, float32) and random weights; all statistics are
on. The floor is one forward of each model with two passes in its batch, and for every state that a lens reads one product per
model, [2 x tokens, 576] by [576, 49152]. States -1..30 need 31 of them: layer 30 is layer 29 after the final norm. A capture puts
short states of several layers into one product, which costs less than one for each: so it can be below 1. Without the lens the
floor is the two forwards. With 8 prompts a capture runs a ninth, one of them alone, for the noise floor; the floor has eight, so
without the lens it is measured with noise_floor: false as well. The bars were found with a floor of one product a state, [4 x tokens,
576] by [576, 49152], as if both models had one unembedding; for 12 tokens, where reading a second one is most of a product, the
ratio to that floor is shown besides. The models differ by 5 % of each weight's size; of "64-close" by 0.5 %:
small divergences may cost products that the floor does not have (docs/method.md, Numerics). "64-real" is SmolLM2-135M and a short
fine-tune of it on a text, where `make demo-smollm2` has made that pair.

Each capture runs between two floors, and each ratio is to the mean of the two. What counts is the walk and the writing of the
tables; opening (files, configs, tokenizer, self-checks) does not grow with the prompts and is shown apart. The first round only
warms up. --eager: the plain lens only; --compile: the compiled lens only; by default both, where this version has both. Exits 1
where a bar is missed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pairs
from measured import STEADY, Bench, at_least, ratios

CASES = {
    "12": (12, 1),
    "64": (64, 1),
    "250": (250, 1),
    "8x64": (64, 8),
    "64-close": (64, 1),
    "64-real": (64, 1),
}  # tokens, prompts
CLOSE = {"perturb": 0.005}  # of the pair of 64-close: a tenth of what the others' models differ by
BARS: dict[str, dict[str, float | None]] = {
    "compiled": {"12": 0.9, "64": 1.35, "250": 1.4, "8x64": 1.5, "64-close": 1.35, "64-real": 1.35},
    "eager": {"12": 1.1, "64": 1.7, "250": 1.9, "8x64": 1.9, "64-close": 1.7, "64-real": 1.7},
    "without the lens": {"12": 1.15, "64": 1.15, "250": 1.15, "8x64": 1.15},
    "without the lens and the noise floor": {"8x64": None},
}
ONE_HEAD = ("12",)  # cases that are measured against a floor with one unembedding, too
NINTH = "the capture runs a ninth prompt, for the noise floor; the floor has eight"


ONE = "the bar was found with this floor, which reads one unembedding and not both"


class Floor:
    """Both models whole, and the arithmetic that a capture cannot do without."""

    def __init__(self, paths: Any) -> None:
        import torch
        from reference import load_pair

        pair = load_pair(paths, dtype=torch.float32)
        self.models = [pair.base, pair.sft]
        self.n_products = pair.n_layers + 1

    def forwards(self, tokens: int, prompts: int) -> float:
        """Seconds of the two forwards."""
        import torch

        width = self.models[0].config.hidden_size
        embeds = torch.randn(2 * prompts, tokens, width, generator=torch.Generator().manual_seed(0))
        began = time.perf_counter()
        with torch.no_grad():
            for model in self.models:
                model.model(inputs_embeds=embeds, use_cache=False)
        return time.perf_counter() - began

    def products(self, tokens: int, prompts: int, *, heads: int = 2) -> float:
        """Seconds of the lens products. heads: unembeddings that the rows of all four passes are divided among."""
        import torch

        width, rows = self.models[0].config.hidden_size, 4 // heads * prompts * tokens
        states = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
        logits = torch.empty(rows, self.models[0].config.vocab_size)
        began = time.perf_counter()
        with torch.no_grad():
            for model in self.models[:heads]:
                for _ in range(self.n_products):
                    torch.mm(states, model.lm_head.weight.T, out=logits)
        return time.perf_counter() - began


def ways(chosen: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The ways of the lens that this version has, as fields of an Entry."""
    from capture.config import Lens

    if "compile" not in Lens.model_fields:
        every: dict[str, dict[str, Any]] = {"eager": {}}
    else:
        every = {"eager": {"lens": Lens(compile=False)}, "compiled": {"lens": Lens(compile=True)}}
    return {name: fields for name, fields in every.items() if not chosen or name in chosen}


def measure(bench: Bench, paths: Any, out: Path, case: str, rounds: int, chosen: Sequence[str] = ()) -> None:
    """All ways of one case, in turns, each capture between two floors."""
    from capture.config import Lens

    tokens, n_prompts = CASES[case]
    floor = Floor(paths)
    bare: dict[str, dict[str, Any]] = {
        "without the lens": {"lens": Lens(enabled=False)},
        "without the lens and the noise floor": {"lens": Lens(enabled=False), "noise_floor": False},
    }
    todo = ways(chosen) | {name: fields for name, fields in bare.items() if case in BARS[name]}
    prompts = pairs.real_prompt(paths, tokens) if case.endswith("-real") else pairs.prompts_of(tokens, n_prompts)
    entries = {name: pairs.entry_of(paths, prompts, **fields) for name, fields in todo.items()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in todo}
    floors: dict[str, list[float]] = {name: [] for name in todo}
    one_head: dict[str, list[float]] = {name: [] for name in todo}

    def both() -> tuple[float, ...]:
        forwards = floor.forwards(tokens, n_prompts)
        heads = (2, 1) if case in ONE_HEAD else (2,)
        return forwards, *(forwards + floor.products(tokens, n_prompts, heads=n) for n in heads)

    both()
    for entry in entries.values():
        pairs.captured(entry, out)
    before = both()
    for _ in range(rounds):
        for name, entry in entries.items():
            found[name].append(pairs.captured(entry, out))
            after = both()
            index = 0 if name in bare else 1
            floors[name].append((before[index] + after[index]) / 2)
            one_head[name].append((before[-1] + after[-1]) / 2)
            before = after
    text = f"{n_prompts} prompts of {tokens} tokens" if n_prompts > 1 else f"one prompt of {tokens} tokens"
    text += {"close": ", models that hardly differ", "real": ", SmolLM2-135M and a fine-tune"}.get(
        case.partition("-")[2], ""
    )
    for name in todo:
        works = [pairs.work(f) for f in found[name]]
        over = "the two forwards" if name in bare else "bare forwards and bare lens products"
        spread = max(floors[name]) / min(floors[name])
        notes = [NINTH] if n_prompts > 1 and name != "without the lens and the noise floor" else []
        notes += [f"the floor itself varied by {spread:.1f}x: the machine was busy"] if spread > STEADY else []
        what = f"statistics {name}" if name in bare else f"all statistics, {name}"
        bench.add(f"{case} {name}", f"{what}, {text}", ratios(works, floors[name]), over=over, bar=BARS[name].get(case), note="; ".join(notes))  # fmt: skip
        whole = [f["seconds"]["all"] for f in found[name]]
        bench.add(f"{case} {name}, opening too", f"{what}, {text}, opening included", ratios(whole, floors[name]), over=over)  # fmt: skip
        if case in ONE_HEAD and name not in bare:
            bench.add(f"{case} {name}, one head", f"{what}, {text}", ratios(works, one_head[name]), over=f"{over} of one unembedding", note=ONE)  # fmt: skip
        stages = {s: statistics.median(f["seconds"][s] for f in found[name]) for s in found[name][0]["seconds"]}
        print(
            f"  floor {statistics.median(floors[name]):.2f} s;", ", ".join(f"{s} {t:.2f} s" for s, t in stages.items())
        )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=3, help="captures of each that count (default 3)")
    parser.add_argument(
        "--threads", type=at_least(1), default=None, help="threads of torch (default: as torch chooses)"
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="what to capture")
    parser.add_argument("--eager", action="store_const", const="eager", help="the plain lens only")
    parser.add_argument("--compile", action="store_const", const="compiled", help="the compiled lens only")
    parser.add_argument("--json", type=Path, help="where the figures go (default .cache/bench/capture.json)")
    args = parser.parse_args(words)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = [way for way in (args.eager, args.compile) if way]
    if missing := [way for way in chosen if way not in ways()]:
        parser.error(f"this version has no {missing[0]} lens")
    bench = Bench("capture", "make bench", threads=torch.get_num_threads())
    out = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        for case in args.cases:
            if case.endswith("-real"):
                paths = pairs.smollm2()
            else:
                paths = pairs.kept_pair(pairs.SMOL | (CLOSE if case.endswith("-close") else {}))
            if paths is None:
                print("the SmolLM2 pair is not there; `make demo-smollm2` makes it")
                continue
            measure(bench, paths, out, case, args.rounds, chosen)
    finally:
        shutil.rmtree(out)
    return bench.write(args.json)


if __name__ == "__main__":
    sys.exit(main())
