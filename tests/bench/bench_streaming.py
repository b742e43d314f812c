"""A pair 20 times larger than the memory given to it, streamed, against the same pair resident, in one run.

    python tests/bench/bench_streaming.py [--repeats 3] [--threads N] [--layers 82]

Both models are random llamas of many equal layers; `device_memory_gib` is a twentieth of both checkpoints, so that `auto` must
stream. Each repetition is one resident and one streamed capture, in turns, after one of each that only warms the page cache.
Compared is the walk with the writing of the tables; opening is shown too. Exits 1 where the median ratio is above the bar.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "bench"
BAR, TIMES = 1.3, 20
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
    from capture.config import Batching, Entry, Lens
    from capture.run import capture_pair

    entry = Entry(
        name="bench",
        base_model=str(paths.base),
        sft_model=str(paths.sft),
        tokenizer=str(paths.tokenizer),
        prompts=tuple(str(n) * 23 for n in range(4)),
        device="cpu",
        mode=mode,  # type: ignore[arg-type]
        lens=Lens(layers=20),
        batching=Batching(),
        noise_floor=False,
        device_memory_gib=None if cap_bytes is None else cap_bytes / 2**30,
    )
    result = capture_pair(entry, str(out), force=True)
    found: dict[str, Any] = json.loads((Path(result.path) / "capture.json").read_text())
    return found


def measure(paths: Any, repeats: int) -> dict[str, Any]:
    """Seconds of both, in turns; the mode that the cap led to, and what was planned and held."""
    stored = sum(f.stat().st_size for p in (paths.base, paths.sft) for f in p.glob("*.safetensors"))
    cap = stored / TIMES
    seconds: dict[str, list[float]] = {"resident": [], "streamed": []}
    with tempfile.TemporaryDirectory(prefix="bench-") as out:
        for repeat in range(repeats + 1):
            for name, mode, limit in (("resident", "resident", None), ("streamed", "auto", cap)):
                found = run(paths, Path(out), mode, limit)
                if repeat:
                    seconds[name].append(found["seconds"]["walk"] + found["seconds"]["write"])
                if name == "streamed":
                    streamed = found
    ratios = [s / r for s, r in zip(seconds["streamed"], seconds["resident"], strict=True)]
    return {
        "checkpoints_bytes": stored,
        "cap_bytes": round(cap),
        "mode": streamed["mode"],
        "planned_bytes": streamed["planned_memory_bytes"],
        "weights_peak_bytes": streamed["bytes"]["weights_peak"],
        "seconds": seconds,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "bar": BAR,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="captures of each that count (default 3)")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (default: as torch chooses)")
    parser.add_argument(
        "--layers", type=int, default=SHAPE["num_hidden_layers"], help="layers of each model (default 82)"
    )
    parser.add_argument("--json", type=Path, default=CACHE / "bench_streaming.json", help="where the figures go")
    args = parser.parse_args()

    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [str(ROOT / "tests" / "capture"), str(ROOT / "tests" / "bench")]
    import torch
    from bench_capture import make_pair

    if args.threads:
        torch.set_num_threads(args.threads)
    shape = SHAPE | {"num_hidden_layers": args.layers}
    paths = make_pair(CACHE / f"deep-{zlib.crc32(json.dumps(shape).encode()):08x}", shape)
    found = measure(paths, args.repeats) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    mib = {key: found[f"{key}_bytes"] / 2**20 for key in ("checkpoints", "cap", "planned", "weights_peak")}
    print(
        f"checkpoints {mib['checkpoints']:.0f} MiB, cap {mib['cap']:.1f} MiB: mode {found['mode']}, planned {mib['planned']:.1f} MiB, "
        f"weights at most {mib['weights_peak']:.1f} MiB"
    )
    for name, values in found["seconds"].items():
        print(f"{name}: {', '.join(f'{s:.2f}' for s in values)} s")
    kept = found["ratio"]["median"] <= BAR
    print(
        f"median ratio {found['ratio']['median']:.2f}, bar {BAR:g}: {'kept' if kept else 'MISSED'}; figures in {args.json}"
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
