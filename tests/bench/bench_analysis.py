"""How long questions take on a large run directory, and against a plain loop over equal JSON.

    python tests/bench/bench_analysis.py [--rows 100000000] [--keep DIR]

A run directory of four pairs with prompts of 64 tokens through 32 blocks is made up: 6 comparisons x 34 layers x 64 tokens,
13,056 rows of `pairwise` a prompt, in row groups of whole prompts as captures write them. DuckDB gets 2 threads and 4 GB.
Each question is asked cold once and then five times; the median counts. Processor time is shown next to it: on a machine with
other work it is what the question itself took. Questions that look at all rows are also set against their floor, in turns: every row of
their columns decoded once by pyarrow, and nothing made of it.

The JSON is a smaller run directory's pairwise cells as the files of residual comparisons have them, top-10 lists included; the
loop loads it and adds up, and the same is asked of the run directory, which is opened each time. Both sides' processor time counts.
Opening takes some 70 ms however little there is, and the loop a time that grows with the file: over 234 MB (--json-rows 1000000) it
was 70 to 87 times ours, by a question.

Bars: a grid 100 ms, the 20 hotspots of everything 5 s, layer means 5 s; 100 times faster than the loop. Exits 1 below one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measured import Bench, at_least, in_turns, ratios

PASSES = ("BB", "BS", "SB", "SS")
COMPARISONS = tuple((a, b) for i, a in enumerate(PASSES) for b in PASSES[i + 1 :])
N_LAYERS, N_TOKENS, N_PAIRS = 32, 64, 4
LAYERS = np.arange(-1, N_LAYERS + 1)
ROWS = len(COMPARISONS) * len(LAYERS) * N_TOKENS  # of one prompt
SCANS = {"hotspots": ("norm_diff",), "layer means": ("base_run", "sft_run", "layer", "kl_divergence")}  # over all rows
SECONDS = {"grid": 0.1, "hotspots": 5.0, "layer means": 5.0}
TIMES_FASTER = 100.0


def make_run(out: Path, rows: int) -> int:
    """Write a run directory of about so many rows of `pairwise`; returns how many."""
    from capture.layout import RunDir

    prompts = max(1, round(rows / ROWS / N_PAIRS))
    for number in range(N_PAIRS):
        _make_capture(RunDir(str(out)), f"pair{number}", f"{number:016x}", prompts, np.random.default_rng(number))
    return prompts * N_PAIRS * ROWS


def _make_capture(run: Any, pair: str, capture: str, prompts: int, rng: Any) -> None:
    import pyarrow as pa

    from capture.store import ROW_GROUP, CaptureWriter, category

    per_group = max(1, ROW_GROUP // ROWS)
    grid = np.meshgrid(np.arange(len(COMPARISONS)), LAYERS, np.arange(N_TOKENS), indexing="ij")
    which, layer, position = (np.tile(g.reshape(-1), per_group) for g in grid)
    depth = np.exp(0.08 * layer)  # states and their differences grow with depth
    pools = [  # reused from group to group: what costs time is reading and adding, not whether numbers repeat
        {
            "cosine_distance": rng.gamma(2.0, 1e-4, len(which)).astype(np.float32),
            "norm_diff": (depth * rng.gamma(2.0, size=len(which))).astype(np.float32),
            "kl_divergence": rng.gamma(0.5, size=len(which)).astype(np.float32),
            "kl_reverse": rng.gamma(0.5, size=len(which)).astype(np.float32),
            "top1_agree": rng.random(len(which)) < 0.5,
        }
        for _ in range(4)
    ]

    def groups() -> Iterator[dict[str, Any]]:
        for start in range(0, prompts, per_group):
            n = min(per_group, prompts - start) * ROWS
            zeros = np.zeros(n)
            yield {
                "pair": category(zeros, [pair]), "capture": category(zeros, [capture]),
                "prompt_idx": (start + np.arange(n) // ROWS).astype(np.int32), "variant": category(zeros, ["identity"]),
                "base_run": category([PASSES.index(COMPARISONS[c][0]) for c in range(6)], PASSES).take(pa.array(which[:n])),
                "sft_run": category([PASSES.index(COMPARISONS[c][1]) for c in range(6)], PASSES).take(pa.array(which[:n])),
                "layer": layer[:n].astype(np.int16), "position": position[:n].astype(np.int32),
                **{k: v[:n] for k, v in pools[start // per_group % len(pools)].items()},
            }  # fmt: skip

    writer = CaptureWriter(run, pair, capture)
    zeros = np.zeros(prompts)
    keys = {"pair": category(zeros, [pair]), "capture": category(zeros, [capture]),
            "prompt_idx": np.arange(prompts, dtype=np.int32), "variant": category(zeros, ["identity"])}  # fmt: skip
    count = np.full(prompts, N_TOKENS, np.int32)
    texts = np.array(["text"] * prompts, object)
    writer.table("prompts", [keys | {"text": texts, "n_tokens": count, "n_tokens_before_trimming": count}])
    many = np.zeros(prompts * N_TOKENS)
    writer.table("tokens", [{
        "pair": category(many, [pair]), "capture": category(many, [capture]), "variant": category(many, ["identity"]),
        "prompt_idx": np.repeat(np.arange(prompts, dtype=np.int32), N_TOKENS),
        "position": np.tile(np.arange(N_TOKENS, dtype=np.int32), prompts),
        "token_id": np.zeros(len(many), np.int32), "token": np.array([" token"] * len(many), object),
        "is_special": np.zeros(len(many), bool),
    }])  # fmt: skip
    writer.table("pairwise", groups())
    writer.finish({"n_layers": N_LAYERS, "dtype": "float32"})


def write_json(con: Any, file: Path) -> int:
    """The pairwise cells of all prompts of the first pair as such a file; returns how many."""
    rows = con.execute(
        "SELECT prompt_idx, comparison, layer, position, cosine_distance, norm_diff, kl_divergence FROM pairwise "
        "WHERE pair = 'pair0' ORDER BY prompt_idx, comparison, layer, position"
    ).fetchall()
    records: dict[int, dict[str, Any]] = {}
    lists = {"indices": list(range(20_000, 20_010)), "values": [round(3.141592 / k, 6) for k in range(1, 11)]}
    for prompt, comparison, layer, position, cosine, norm, kl in rows:
        record = records.setdefault(prompt, {"format_version": 2, "metadata": {"prompt_idx": prompt}, "pairwise": {}})
        part = record["pairwise"].setdefault(comparison, {"name": comparison, "layers": {}})
        cell = {"token": " token", "entropy_base": kl, "entropy_sft": kl, "kl_div": kl, "cosine_sim": 1 - cosine,
                "norm_base": norm, "norm_sft": norm, "norm_diff": norm, "base_cosine_prev": cosine, "base_norm_delta": norm,
                "sft_cosine_prev": cosine, "sft_norm_delta": norm, "top_k_increased": lists, "top_k_decreased": lists,
                "tracked_token_logits": {"42": {"base": kl, "sft": norm}}}  # fmt: skip
        part["layers"].setdefault(str(layer), {})[str(position)] = cell
    for record in records.values():
        record["pairwise"] = list(record["pairwise"].values())
    file.write_text(json.dumps(list(records.values())))
    return len(rows)


def loops(file: Path) -> dict[str, Callable[[], Any]]:
    """The questions as plain Python loops over the file."""

    def cells() -> Iterator[tuple[int, str, str, str, dict[str, float]]]:
        for record in json.loads(file.read_text()):
            prompt = record["metadata"]["prompt_idx"]
            for part in record["pairwise"]:
                for layer, positions in part["layers"].items():
                    for position, cell in positions.items():
                        yield prompt, part["name"], layer, position, cell

    def grid() -> Any:
        return {(k, i): c["kl_div"] for p, name, k, i, c in cells() if p == 0 and name == "BB-SS"}

    def hotspots() -> Any:
        return sorted((abs(c["norm_diff"]), p, name, k, i) for p, name, k, i, c in cells())[-20:]

    def means() -> Any:
        sums: dict[tuple[str, str], list[float]] = {}
        for _, name, k, _, c in cells():
            found = sums.setdefault((name, k), [0.0, 0])
            found[0] += c["kl_div"]
            found[1] += 1
        return {key: total / n for key, (total, n) in sums.items()}

    return {"grid": grid, "hotspots": hotspots, "layer means": means}


def questions(con: Any, pair: str = "pair2", prompt: int = 1) -> dict[str, Callable[[], Any]]:
    """The same questions to a run directory; the grid is the one that Python users get, labels and provenance included."""
    from analysis import build_residual_grid

    means = "SELECT label, layer, mean FROM layer_profile('kl_divergence')"
    return {
        "grid": lambda: build_residual_grid(con, "kl_divergence", pair=pair, prompt=prompt, comparison="BB-SS").values,
        "hotspots": lambda: con.execute("FROM hotspots('norm_diff', 20)").fetchall(),
        "layer means": lambda: con.execute(means).fetchall(),
    }


def timed(ask: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Seconds: the first time, the median of the others, and the median of their processor time."""
    wall, cpu = [], []
    for _ in range(repeats + 1):
        began, worked = time.perf_counter(), time.process_time()
        ask()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - worked)
    return {"first": wall[0], "all": wall[1:], "median": statistics.median(wall[1:]), "least": min(wall[1:]),
            "cpu": statistics.median(cpu[1:])}  # fmt: skip


def scanned(out: Path, columns: tuple[str, ...]) -> None:
    """The floor of a question: every row of its columns decoded once, by pyarrow in two threads, and nothing made of them."""
    import pyarrow as pa
    import pyarrow.dataset as ds

    pa.set_cpu_count(2)
    files = [str(file) for file in out.rglob("pairwise*.parquet")]
    for batch in ds.dataset(files, format="parquet").scanner(columns=list(columns)).to_batches():
        del batch


def _asked(ask: Callable[[], Any]) -> None:
    ask()


def _opened_and_asked(out: Path, name: str) -> Any:
    """A question with the opening of the run directory: the loop opens its file each time, too."""
    con = opened(out)
    try:
        return questions(con, "pair0", 0)[name]()
    finally:
        con.close()


def opened(out: Path) -> Any:
    from analysis import open_run

    con = open_run(str(out))
    con.execute("SET memory_limit = '4GB'")
    con.execute("SET threads = 2")
    return con


def measure(out: Path, small: Path, rows: int, small_rows: int, repeats: int) -> dict[str, Any]:
    """Make what is missing, ask; all figures."""
    if not (out / "captures").exists():
        print(f"making {rows:,} rows in {out}", flush=True)
        make_run(out, rows)
    con = opened(out)
    found: dict[str, Any] = {
        "rows": con.execute("SELECT count(*) FROM pairwise").fetchall()[0][0],
        "bytes": sum(f.stat().st_size for f in out.rglob("*.parquet")),
        "seconds": {name: timed(ask, repeats) for name, ask in questions(con).items()},
        "scans": {name: in_turns({"ours": partial(_asked, questions(con)[name]), "scan": partial(scanned, out, columns)}, repeats)
                  for name, columns in SCANS.items()},
    }  # fmt: skip
    make_run(small, small_rows)
    few = opened(small)
    file = small / "cells.json"
    found["json_cells"] = write_json(few, file)
    found["json_bytes"] = file.stat().st_size
    small_out = small.with_name(small.name + "-one")
    shutil.rmtree(small_out, ignore_errors=True)
    shutil.copytree(small / "captures" / "pair=pair0", small_out / "captures" / "pair=pair0")
    mine, theirs = {name: partial(_opened_and_asked, small_out, name) for name in SECONDS}, loops(file)
    assert len(mine["layer means"]()) == len(theirs["layer means"]()) == len(COMPARISONS) * len(LAYERS)
    found["against"] = {name: {"ours": timed(mine[name], repeats), "loop": timed(theirs[name], 1)} for name in SECONDS}
    shutil.rmtree(small_out)
    return found


def times_faster(found: dict[str, Any]) -> dict[str, float]:
    """The loop's processor time over ours, which counts both threads: other work on the machine slows neither."""
    return {name: both["loop"]["cpu"] / both["ours"]["cpu"] for name, both in found["against"].items()}


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{found['rows']:,} rows of pairwise, {found['bytes'] / 1e9:.2f} GB of Parquet",
             f"{'':14}{'first':>9}{'median':>9}{'least':>9}{'cpu':>9}{'bar':>9}"]  # fmt: skip
    for name, s in found["seconds"].items():
        figures = "".join(f"{s[k]:8.3f}s" for k in ("first", "median", "least", "cpu"))
        lines.append(f"{name:14}{figures}{SECONDS[name]:8.3f}s")
    lines.append(f"against a loop over {found['json_bytes'] / 1e6:.0f} MB of JSON, {found['json_cells']:,} cells")
    for name, times in times_faster(found).items():
        both = found["against"][name]
        lines.append(
            f"{name:14}{both['ours']['cpu']:8.4f}s {both['loop']['cpu']:8.2f}s  {times:6.0f} times (processor time)"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=at_least(1), default=100_000_000, help="rows of pairwise (default 100,000,000)")
    parser.add_argument(
        "--json-rows", type=at_least(1), default=2_000_000, help="rows of the smaller one; a pair's goes to JSON"
    )
    parser.add_argument("--repeats", type=at_least(1), default=5, help="times each question is asked (default 5)")
    parser.add_argument("--keep", type=Path, help="keep the large run directory here, and use it if it is there")
    parser.add_argument("--json", type=Path, help="where the figures go (default .cache/bench/analysis.json)")
    args = parser.parse_args()
    bench = Bench("analysis", "make bench-analysis", threads=2)
    work = Path(tempfile.mkdtemp(prefix="bench-analysis-"))
    try:
        found = measure(args.keep or work / "large", work / "small", args.rows, args.json_rows, args.repeats)
    finally:
        shutil.rmtree(work)
    print(table(found))
    report(bench, found)
    return bench.write(args.json)


def report(bench: Bench, found: dict[str, Any]) -> None:
    """The figures that have bars."""
    rows = f"{found['rows'] / 1e6:.0f} M rows of pairwise"
    for name, s in found["seconds"].items():
        note = f"{s['first']:.3g} s the first time; {s['cpu']:.3g} s of processor time; DuckDB has 2 threads and 4 GB"
        bench.add(name, f"{name} out of {rows}", s["all"], unit="s", bar=SECONDS[name], note=note)
    for name, seconds in found["scans"].items():
        what = ", ".join(SCANS[name])
        bench.add(
            f"{name}, scan",
            f"{name} out of {rows}",
            ratios(seconds["ours"], seconds["scan"]),
            over=f"a raw scan of {what}",
        )
    for name, times in times_faster(found).items():
        bench.add(
            f"{name}, loop", f"{name}: processor time of a plain loop over {found['json_bytes'] / 1e6:.0f} MB of JSON", [times],
            over="ours", bar=TIMES_FASTER, want="least",
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
