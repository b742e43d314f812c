"""A capture against other programs, on the same pair and the same prompt, in turns; and what their weights take in memory.

    python tests/bench/bench_rivals.py [--rounds 3] [--threads 2] [--parts resident naive streamed memory json] [--layers 30 60 120]

The pair is that of bench_capture.py, the prompt has 64 tokens; against the resident mode 12 tokens, and 64 without the lens, are
measured as well. Rivals (rivals.py) find the hidden states of all four passes by
their own means and get our statistics behind them; they write nothing, while our side counts the walk and the writing of the
tables. Loading counts on neither side. What each finds is first compared with plain transformers.

resident: nnsight, TransformerLens and plain transformers against the resident mode. naive: the plain loop over positions, which
fetches every number by .item(). streamed: disk offload and AirLLM, which keep weights on the disk, against the streamed mode.
memory: bytes of weights alive at most, streamed, over both models whole. json: the naive program's record written and read as JSON
with an indent of 2, against the same content in our tables.

Rivals that are not installed are left out and named: `make bench-rivals` installs them, apart from everything else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pairs
from measured import Bench, at_least, in_turns, ratios

N_TOKENS = 64
RESIDENT = ("transformers, batched", "transformers, four forwards", "nnsight", "TransformerLens")
STREAMED = ("transformers, disk offload", "AirLLM")
BAR_NAIVE = 12.0
BAR_MEMORY = {30: 0.3, 60: 0.15, 120: 0.08}
SHORT = 12  # tokens
SAME = 2e-3  # most that states of one program may differ from another's, where they are about 10 in size
PARTS = ("resident", "naive", "streamed", "memory", "json")


class Stage:
    """The pair, the prompt's ids, and a scratch directory."""

    def __init__(self, paths: Any, scratch: Path, n_tokens: int = N_TOKENS) -> None:
        import torch
        from transformers import AutoTokenizer

        self.paths, self.scratch = paths, scratch
        self.prompts = pairs.prompts_of(n_tokens)
        self.tokenizer = AutoTokenizer.from_pretrained(paths.tokenizer)
        self.ids = torch.tensor(self.tokenizer(self.prompts[0])["input_ids"])
        self.tokens = self.tokenizer.convert_ids_to_tokens(self.ids.tolist())

    def ours(self, mode: str, *, lens: bool = True) -> Callable[[], float]:
        """A capture; its seconds of walk and writing."""
        from capture.config import Lens

        entry = pairs.entry_of(self.paths, self.prompts, mode=mode, lens=Lens(enabled=lens))
        return lambda: pairs.work(pairs.captured(entry, self.scratch / "ours"))

    def rivals(self, names: Sequence[str]) -> dict[str, Any]:
        """Those that can be made here and find the same states as plain transformers."""
        import rivals

        truth = rivals.plain(self.paths, self.ids, self.scratch).states()
        found = {}
        for name in names:
            folder = self.scratch / name.replace(", ", "-").replace(" ", "-")
            folder.mkdir(exist_ok=True)
            try:
                rival = rivals.MAKERS[name](self.paths, self.ids, folder)
            except ImportError as error:
                print(f"{name} is left out: {error}")
                continue
            states = rival.states()
            same = truth if rival.complete else [x[[0, 3]] for x in truth]
            worst = max(float((a - b).abs().max()) for a, b in zip(states, same, strict=True))
            print(f"{name}: {len(states)} states, at most {worst:.2g} from plain transformers'", flush=True)
            if worst > SAME:
                raise RuntimeError(f"{name} finds other states than plain transformers: they differ by {worst:.3g}")
            found[name] = rival
        return found


def against_resident(bench: Bench, stage: Stage, rounds: int) -> None:
    """The prompt of the stage with and without the lens, and a short one with it."""
    found = stage.rivals(RESIDENT)
    _resident(bench, stage, rounds, found, "")
    _resident(bench, stage, rounds, found, ", no lens", lens=False)
    short = Stage(stage.paths, stage.scratch, SHORT)
    _resident(bench, short, 2 * rounds + 1, short.rivals(RESIDENT), f", {SHORT} tokens")


def _resident(bench: Bench, stage: Stage, rounds: int, found: dict[str, Any], case: str, *, lens: bool = True) -> None:
    import rivals

    parts: dict[str, Callable[[], float | None]] = {"ours": stage.ours("resident", lens=lens)}
    for name, rival in found.items():
        parts[name] = lambda rival=rival: (
            rivals.our_statistics(rival, rival.states(), stage.ids, len(stage.tokenizer), lens=lens) and None
        )
    seconds = in_turns(parts, rounds)
    for name in found:
        bench.add(f"{name}{case}", f"{name}, with our statistics{case}", ratios(seconds[name], seconds["ours"]), over="ours", bar=1.0, want="least")  # fmt: skip


def against_naive(bench: Bench, stage: Stage, rounds: int) -> None:
    import rivals

    rival = rivals.four_forwards(stage.paths, stage.ids, stage.scratch)
    parts: dict[str, Callable[[], float | None]] = {
        "ours": stage.ours("resident"),
        "naive": lambda: rivals.naive_record(rival, rival.states(), stage.tokens) and None,
    }
    seconds = in_turns(parts, rounds)
    text = f"the plain loop over positions, {len(stage.ids)} tokens"
    bench.add("naive", text, ratios(seconds["naive"], seconds["ours"]), over="ours", bar=BAR_NAIVE, want="least")


def against_streamed(bench: Bench, stage: Stage, rounds: int) -> None:
    import rivals

    found = stage.rivals(STREAMED)
    parts: dict[str, Callable[[], float | None]] = {"ours": stage.ours("streamed")}
    notes = {}
    for name, rival in found.items():
        if rival.complete:
            parts[name] = lambda rival=rival: (
                rivals.our_statistics(rival, rival.states(), stage.ids, len(stage.tokenizer)) and None
            )
            notes[name] = ""
        else:
            parts[name] = lambda rival=rival: rival.states() and None
            notes[name] = "BB and SS only and no statistics, against all of ours"
    seconds = in_turns(parts, rounds)
    for name in found:
        what = f"{name}, weights on the disk"
        bench.add(name, what, ratios(seconds[name], seconds["ours"]), over="ours, streamed", bar=1.0, want="least", note=notes[name])  # fmt: skip


def memory(bench: Bench, scratch: Path, depths: Sequence[int], shape: dict[str, Any] | None = None) -> None:
    """Peak bytes of weights, streamed, over what both models take whole (as nnsight, TransformerLens and transformers hold them)."""
    import rivals

    from capture.config import Lens

    for depth in depths:
        kept = (shape or pairs.SMOL) | {"num_hidden_layers": depth}
        paths = pairs.kept_pair(kept) if shape is None else pairs.make_pair(scratch / f"deep{depth}", kept)
        whole = rivals.weight_bytes([rivals._load(paths.base), rivals._load(paths.sft)])
        entry = pairs.entry_of(paths, pairs.prompts_of(12), mode="streamed", lens=Lens(layers=max(1, depth // 3)))
        peak = pairs.captured(entry, scratch / "memory")["bytes"]["weights_peak"]
        note = f"{peak / 2**20:.0f} of {whole / 2**20:.0f} MiB; 12 tokens, the lens at every third of the depth"
        bench.add(f"memory {depth}", f"weights alive at most, streamed, {depth} layers", [peak / whole], over="both models whole",
                  bar=BAR_MEMORY.get(depth), note=note)  # fmt: skip


def as_json(bench: Bench, stage: Stage, rounds: int) -> None:
    """The same content as JSON and as our tables: bytes, and seconds to write and to read one grid back."""
    import rivals

    from analysis import build_residual_grid, open_run

    rival = rivals.plain(stage.paths, stage.ids, stage.scratch)
    record = rivals.naive_record(rival, rival.states(), stage.tokens)
    file, out = stage.scratch / "record.json", stage.scratch / "tables"
    entry = pairs.entry_of(stage.paths, stage.prompts, mode="resident")
    written: list[float] = []

    def ours_written() -> float:
        written.append(pairs.captured(entry, out)["seconds"]["write"])
        return written[-1]

    def json_read() -> None:
        (one,) = json.loads(file.read_text())
        (pair,) = [p for p in one["pairwise"] if p["name"] == "BB-SS"]
        assert {k: [c["kl_div"] for c in cells.values()] for k, cells in pair["layers"].items()}

    def ours_read() -> None:
        con = open_run(str(out))
        assert build_residual_grid(con, "kl_divergence", pair="bench", prompt=0, comparison="BB-SS").values.size

    seconds = in_turns(
        {"json write": lambda: file.write_text(json.dumps([record], indent=2)) and None, "ours write": ours_written,
         "json read": json_read, "ours read": ours_read}, rounds,
    )  # fmt: skip
    tables = sum(f.stat().st_size for f in out.rglob("*.parquet"))
    size = file.stat().st_size
    note = f'{size / 1e6:.1f} MB against {tables / 1e6:.2f} MB; random weights, {len(stage.ids)} tokens; the SmolLM2 pair has the bar, under "Bytes of the tables"'
    bench.add(
        "json bytes",
        "bytes of the JSON",
        [size / tables],
        over="bytes of our tables",
        want="least",
        note=note,
    )
    bench.add(
        "json write",
        "writing the JSON",
        ratios(seconds["json write"], seconds["ours write"]),
        over="writing our tables",
    )
    bench.add("json read", "one grid out of the JSON", ratios(seconds["json read"], seconds["ours read"]), over="opening our tables and asking for it")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=3, help="runs of each that count (default 3)")
    parser.add_argument(
        "--threads", type=at_least(1), default=None, help="threads of torch (default: as torch chooses)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--layers", nargs="+", type=at_least(1), default=list(BAR_MEMORY), help="depths whose memory is measured"
    )
    parser.add_argument("--json", type=Path, help="where the figures go (default .cache/bench/rivals.json)")
    args = parser.parse_args()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench("rivals", "make bench-rivals", threads=torch.get_num_threads())
    paths = pairs.kept_pair(pairs.SMOL)
    run(bench, paths, args.parts, args.rounds, args.layers)
    return bench.write(args.json)


def run(
    bench: Bench, paths: Any, parts: Sequence[str], rounds: int, depths: Sequence[int], n_tokens: int = N_TOKENS,
    shape: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """The chosen parts, each in a scratch directory of its own."""
    timed = {"resident": against_resident, "naive": against_naive, "streamed": against_streamed, "json": as_json}
    for part in parts:
        scratch = Path(tempfile.mkdtemp(prefix="bench-rivals-"))
        began = time.perf_counter()
        try:
            if part == "memory":
                memory(bench, scratch, depths, shape)
            else:
                timed[part](bench, Stage(paths, scratch, n_tokens), rounds)
        finally:
            shutil.rmtree(scratch)
        print(f"  {part}: {time.perf_counter() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    sys.exit(main())
