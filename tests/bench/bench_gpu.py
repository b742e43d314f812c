"""The table of a capture on an NVIDIA GPU: statistics against the floor, streaming, memory against the plan. One file of results.

    python tests/bench/bench_gpu.py [--shapes 7b 14b] [--rounds 3] [--folder DIR]
    python tests/bench/bench_gpu.py --device cpu        a rehearsal on tiny shapes: it says that this runs, and nothing about speed

Needs torch, transformers, pyarrow and pydantic, and neither Ray nor DuckDB, so that it runs on a rented machine from a bare copy of
the repository. The pairs are random, in bfloat16, of the shapes of Qwen2.5-7B and -14B; they are made on the device and written to
--folder. Where the disk does not hold a pair, the models get fewer layers (a layer is as wide), and the figures say so.

Floor: one forward of each model with a batch of two passes, and for every state that a lens reads one product per model with
float32 results. Files floor: reading both checkpoints once, from the page cache, and copying them to the device. Each capture runs
between two floors. Idle: the share of a streamed walk in which no kernel runs, by torch's profiler, in a capture of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pairs
from measured import CACHE, Bench, at_least, ratios

SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
    "14b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064},
    "rehearsal": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400},
}  # fmt: skip
CASES = {"12": (12, 1), "64": (64, 1), "250": (250, 1), "8x64": (64, 8)}
BUFFER = 64 << 20  # bytes read at a time by the floor of reading files
BAR_STATISTICS, BAR_WITHOUT, BAR_IDLE, BAR_MEMORY, BAR_STREAMED = 1.3, 1.15, 0.1, 0.1, 1.15
SHARD_BYTES = 4 << 30
PERTURB = 0.05  # size of sft minus base, relative to each tensor
ROOM = 1.05  # of a pair's bytes, on the disk


def configured(shape: dict[str, int]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model("qwen2", **shape, max_position_embeddings=32768, tie_word_embeddings=False,
                                bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip


def on_meta(shape: dict[str, int]) -> Any:
    """The model without data."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(configured(shape), dtype=torch.bfloat16)


def fitting(shape: dict[str, int], folder: Path) -> dict[str, int]:
    """The shape with as many layers as the disk at `folder` holds for both models. Raises SystemExit where it holds none."""
    model = on_meta(shape)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    ends = sum(p.nbytes for p in model.parameters()) - layer * shape["num_hidden_layers"]
    free = shutil.disk_usage(folder).free / ROOM / 2
    layers = min(shape["num_hidden_layers"], int((free - ends) // layer))
    if layers < 2:
        raise SystemExit(f"{folder} has {free * 2 / 2**30:.0f} GiB; two layers of both models need {2 * (ends + 2 * layer) / 2**30:.0f}")  # fmt: skip
    return shape | {"num_hidden_layers": layers}


def make_pair(shape: dict[str, int], folder: Path, device: str) -> Any:
    """A random pair of this shape below `folder`, made on the device, tensor by tensor; once."""
    from tiny import PairPaths, make_tokenizer

    paths = PairPaths(folder / "base", folder / "sft", folder / "tokenizer")
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(paths.tokenizer)
        model = on_meta(shape)
        for path, sft in ((paths.base, False), (paths.sft, True)):
            configured(shape).save_pretrained(path)
            (path / "config.json").write_text(
                json.dumps(json.loads((path / "config.json").read_text()) | {"architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16"})
            )  # fmt: skip
            tokenizer.save_pretrained(path)
            _write(model, path, device, sft)
        (folder / "whole").touch()
    return paths


def _write(model: Any, path: Path, device: str, sft: bool) -> None:
    """Shards of random tensors and their index."""
    from safetensors.torch import save_file

    index: dict[str, str] = {}
    shard: dict[str, Any] = {}
    total = number = 0
    names = list(model.state_dict().items())
    for i, (name, meta) in enumerate(names):
        shard[name] = _random(name, meta, device, sft).cpu().contiguous()
        total += shard[name].nbytes
        if i == len(names) - 1 or sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            file = f"model-{number:05}.safetensors"
            save_file(shard, path / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard, number = {}, number + 1
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(document))


def _random(name: str, meta: Any, device: str, sft: bool) -> Any:
    """Normal numbers of a size that keeps states of some units through all layers; norms around 1. sft: base's, changed a little."""
    import torch

    def noise(seed: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return torch.randn(meta.shape, generator=generator, device=device, dtype=torch.float32)

    if meta.dim() == 1:
        x = 0.1 * noise(0) + (1.0 if "norm" in name else 0.0)
    else:
        x = noise(0).mul_((2.8 if "embed" in name or "lm_head" in name else 0.5) / meta.shape[-1] ** 0.5)
    if sft:
        x.add_(noise(1), alpha=PERTURB * float(x.square().mean().sqrt()))
    return x.to(torch.bfloat16)


def synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(work: Callable[[], None], device: str) -> float:
    """Seconds until the device is done with it."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


class Floor:
    """Both models on the device, and the arithmetic that a capture cannot do without."""

    def __init__(self, paths: Any, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.device = device
        self.models = [
            AutoModelForCausalLM.from_pretrained(p, dtype=torch.bfloat16).to(device).eval() for p in (paths.base, paths.sft)
        ]  # fmt: skip

    def forwards(self, tokens: int, prompts: int) -> None:
        import torch

        width = self.models[0].config.hidden_size
        embeds = torch.zeros(2 * prompts, tokens, width, device=self.device, dtype=torch.bfloat16).normal_()
        with torch.no_grad():
            for model in self.models:
                model.model(inputs_embeds=embeds, use_cache=False)

    def products(self, tokens: int, prompts: int) -> None:
        """[2 x rows, D] by [D, V] for each state and model, float32 results of bfloat16 numbers; a batch's rows at a time, as many
        as 1 GiB holds logits of."""
        import torch

        config = self.models[0].config
        states = torch.zeros(
            2 * prompts * tokens, config.hidden_size, device=self.device, dtype=torch.bfloat16
        ).normal_()
        rows = max(1, (1 << 30) // (4 * config.vocab_size))
        for model in self.models:
            weight = model.lm_head.weight.detach().T
            for _ in range(config.num_hidden_layers + 1):
                for some in states.split(rows):
                    if self.device.startswith("cuda"):
                        torch.mm(some, weight, out_dtype=torch.float32)
                    else:
                        torch.mm(some, weight).float()

    def release(self) -> None:
        import gc

        import torch

        self.models = []
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


def read_files(paths: Any, device: str) -> None:
    """Both checkpoints' files once, to the device: read into one pinned buffer while the other is copied."""
    import torch

    cuda = device.startswith("cuda")
    here = [torch.empty(BUFFER, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
    there = [torch.empty(BUFFER, dtype=torch.uint8, device=device) for _ in range(2)]
    copied: list[Any] = [torch.cuda.Event() if cuda else None for _ in range(2)]
    turn = 0
    for path in (paths.base, paths.sft):
        for file in sorted(path.glob("*.safetensors")):
            with file.open("rb", buffering=0) as stream:
                while True:
                    if cuda:
                        copied[turn].synchronize()
                    n = stream.readinto(here[turn].numpy())  # type: ignore[attr-defined]
                    if not n:
                        break
                    there[turn][:n].copy_(here[turn][:n], non_blocking=True)
                    if cuda:
                        copied[turn].record()
                    turn = 1 - turn
    if cuda:
        torch.cuda.synchronize()


def entry_of(paths: Any, prompts: tuple[str, ...], device: str, **fields: Any) -> Any:
    return pairs.entry_of(paths, prompts, device=device, dtype="bfloat16", **fields)


def against_floor(
    bench: Bench, paths: Any, out: Path, device: str, name: str, cases: Sequence[str], rounds: int
) -> None:
    """All cases, both models resident beside the floor's own copies where they fit, else the floor is let go meanwhile."""
    from bench_capture import ways

    from capture.config import Lens

    every = ways(_ways_of(device)) | {"without the lens": {"lens": Lens(enabled=False)}}
    for case in cases:
        tokens, n = CASES[case]
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in every}
        floors: dict[str, list[float]] = {way: [] for way in every}
        entries = {
            way: entry_of(paths, pairs.prompts_of(tokens, n), device, mode="resident", **fields)
            for way, fields in every.items()
        }

        def floor(tokens: int = tokens, n: int = n) -> tuple[float, float]:
            one = Floor(paths, device)
            for _ in range(2):  # the first warms up
                forwards = timed(lambda: one.forwards(tokens, n), device)
                products = timed(lambda: one.products(tokens, n), device)
            one.release()
            return forwards, forwards + products

        for entry in entries.values():
            pairs.captured(entry, out)
        for _ in range(rounds):
            before = floor()
            for way, entry in entries.items():
                found[way].append(pairs.captured(entry, out))
            after = floor()
            for way in entries:
                index = 0 if way == "without the lens" else 1
                floors[way].append((before[index] + after[index]) / 2)
        text = f"{name}, {n} prompts of {tokens} tokens" if n > 1 else f"{name}, one prompt of {tokens} tokens"
        for way in entries:
            without = way == "without the lens"
            bench.add(
                f"{name} {case} {way}", f"{'statistics without the lens' if without else f'all statistics, {way}'}, {text}",
                ratios([pairs.work(f) for f in found[way]], floors[way]),
                over="the two forwards" if without else "bare forwards and bare lens products",
                bar=BAR_WITHOUT if without else BAR_STATISTICS,
                note=f"floor {statistics.median(floors[way]):.3g} s",
            )  # fmt: skip
            memory(bench, f"{name} {case} {way}", text, found[way][-1])


def _ways_of(device: str) -> list[str]:
    """Of the lens, on this device; says why the compiled one is left out."""
    import torch

    from capture.lens_kernel import load_fused

    found = load_fused(torch.device(device)) if device.startswith("cuda") else None
    if isinstance(found, str):
        print(f"the compiled lens is left out: {found}", flush=True)
        return ["eager"]
    return ["eager", "compiled"]


def memory(bench: Bench, name: str, text: str, found: dict[str, Any]) -> None:
    """How far the most memory on the device was from the plan; on a CPU only weights are counted, so that says nothing there."""
    planned, peak = found["planned_memory_bytes"], found["peak_memory_bytes"]
    bar = BAR_MEMORY if found["device"].startswith("cuda") else None
    note = f"peak {peak / 2**30:.3g} of {planned / 2**30:.3g} GiB, mode {found['mode']}"
    bench.add(f"{name}, memory", f"memory, {text}: plan less peak", [abs(planned - peak) / planned], over="the plan", bar=bar, note=note)  # fmt: skip


def streaming(bench: Bench, paths: Any, out: Path, device: str, name: str, rounds: int) -> None:
    """Streamed and resident in turns, with the reading of the files beside them."""
    prompts = pairs.prompts_of(64, 8)
    modes = {mode: entry_of(paths, prompts, device, mode=mode) for mode in ("resident", "streamed")}
    seconds: dict[str, list[float]] = {"resident": [], "streamed": [], "files": []}
    for turn in range(rounds + 1):
        for mode, entry in modes.items():
            found = pairs.captured(entry, out)
            if turn:
                seconds[mode].append(pairs.work(found))
        took = timed(lambda: read_files(paths, device), device)
        if turn:
            seconds["files"].append(took)
    text = f"{name}, 8 prompts of 64 tokens, page cache warm"
    floor = [max(a, b) for a, b in zip(seconds["files"], seconds["resident"], strict=True)]
    bench.add(f"{name} streamed", f"streamed, {text}", ratios(seconds["streamed"], floor), over="the longer of the same resident and of reading the files to the device", bar=BAR_STREAMED,
              note=f"resident {statistics.median(seconds['resident']):.3g} s, files {statistics.median(seconds['files']):.3g} s")  # fmt: skip
    memory(bench, f"{name} streamed", f"streamed, {text}", found)
    if device.startswith("cuda"):
        busy = idle(modes["streamed"], out)
        bench.add(
            f"{name} idle",
            f"share of a streamed walk without a kernel, {text}",
            [busy[0]],
            over="the walk",
            bar=BAR_IDLE,
        )
        bench.add(f"{name} idle, copies", f"share of it without a kernel or a copy, {text}", [busy[1]], over="the walk")


def idle(entry: Any, out: Path) -> tuple[float, float]:
    """Of one capture's walk, the share in which no kernel runs, and in which neither a kernel nor a copy does."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    with (
        walk_within(lambda: record_function("pairscope walk")),
        profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof,
    ):
        pairs.captured(entry, out)
    events = prof.events()
    walk = next(
        e.time_range for e in events if e.name == "pairscope walk" and e.device_type == torch.autograd.DeviceType.CPU
    )
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and e.name != "pairscope walk"]
    spans = [
        (max(e.time_range.start, walk.start), min(e.time_range.end, walk.end), e.name.startswith("Mem"))
        for e in on_device
    ]
    length = walk.end - walk.start
    kernels = covered([(a, b) for a, b, copy in spans if not copy])
    return 1 - kernels / length, 1 - covered([(a, b) for a, b, _ in spans]) / length


@contextmanager
def walk_within(around: Callable[[], Any]) -> Iterator[None]:
    """Let the walk of captures run inside a context."""
    from capture.work import Work

    plain = Work._walk

    def walk(self: Work) -> None:
        with around():
            plain(self)

    Work._walk = walk  # type: ignore[method-assign]
    try:
        yield
    finally:
        Work._walk = plain  # type: ignore[method-assign]


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal on tiny shapes (default cuda)")
    parser.add_argument(
        "--shapes", nargs="+", choices=["7b", "14b"], default=["7b", "14b"], help="pairs (default both)"
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=at_least(1), default=3, help="captures of each that count (default 3)")
    parser.add_argument("--folder", type=Path, default=CACHE, help="where the pairs are made (default .cache/bench)")
    parser.add_argument("--json", type=Path, help="where the figures go (default .cache/bench/gpu.json)")
    args = parser.parse_args()
    import torch

    rehearsal = args.device == "cpu"
    if not rehearsal and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu rehearses the bench without one")
    gpu = None if rehearsal else torch.cuda.get_device_name(args.device)
    bench = Bench("gpu", "make bench-gpu", threads=torch.get_num_threads(), gpu=gpu)
    run(bench, ["rehearsal"] if rehearsal else args.shapes, args.cases, args.rounds, args.device, args.folder)
    if rehearsal:
        print("a rehearsal: nothing was run on a GPU, and these figures say nothing; not written")
        return 0
    return bench.write(args.json)


def run(bench: Bench, shapes: Sequence[str], cases: Sequence[str], rounds: int, device: str, folder: Path) -> None:
    """All figures of all shapes; a pair that was cut to fit the disk has its number of layers in its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in shapes:
        asked = SHAPES[name]
        marks = [p for p in folder.glob(f"gpu-{name}-*") if (p / "whole").exists()]
        shape = asked | {"num_hidden_layers": int(marks[0].name.rsplit("-", 1)[1])} if marks else fitting(asked, folder)
        layers = shape["num_hidden_layers"]
        label = f"{name} shape" if layers == asked["num_hidden_layers"] else f"{name} shape cut to {layers} layers"
        print(f"{label}: {layers} layers", flush=True)
        paths = make_pair(shape, folder / f"gpu-{name}-{layers}", device)
        out = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
        try:
            against_floor(bench, paths, out, device, label, cases, rounds)
            streaming(bench, paths, out, device, label, rounds)
        finally:
            shutil.rmtree(out)


if __name__ == "__main__":
    sys.exit(main())
