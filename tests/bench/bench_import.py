"""How much memory the import of a large JSON file takes, and how long.

    python tests/bench/bench_import.py [--mb 1000] [--bar-mb 1000]

A file of one record (format_version 2: four passes, six comparisons, top-10 lists) is written, then imported by
`pairscope import-json` in a process of its own, whose peak resident memory is taken from the system. Exits 1 where that is
above the bar.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from measured import ROOT, Bench, at_least

sys.path.insert(0, str(ROOT / "tests" / "analysis"))
BAR_MB = 1000
N_LAYERS = 24
_CHILD = """
import json, resource, sys
from analysis.json_import import import_json
found = import_json(sys.argv[1], sys.argv[2], pair="bench")
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"cells": found.cells, "peak_mb": used.ru_maxrss / 1024, "cpu": used.ru_utime + used.ru_stime}))
"""


def write_file(path: Path, megabytes: float) -> None:
    """A file of about so many MB: one prompt of as many tokens as that takes."""
    import seed_files

    rng = random.Random(0)
    one = seed_files.record(rng, 0, ["token"], 1)
    each = sum(len(json.dumps(part["layers"]["0"]["0"], indent=2)) * 1.35 for part in one["runs"] + one["pairwise"])
    n = max(1, round(megabytes * 1e6 / each / N_LAYERS))
    tokens = ["token"] * n
    runs = [seed_files.run_cell(rng, "token") for _ in range(50)]  # made once: writing is not what is timed
    pairs = [seed_files.pair_cell(rng, "token") for _ in range(50)]
    with path.open("w") as stream:
        head = {"format_version": 2, "prompt": "x", "tokens": tokens, "metadata": {"prompt_idx": 0}}
        stream.write("[" + json.dumps(head)[:-1])
        for key, made in (("runs", runs), ("pairwise", pairs)):
            stream.write(f', "{key}": [')
            for i, part in enumerate(one[key]):
                said = {k: v for k, v in part.items() if k not in ("layers", "tokens")}
                stream.write((", " if i else "") + json.dumps(said)[:-1] + ', "layers": {')
                _layers(stream, n, [json.dumps(cell, indent=2) for cell in made])
                stream.write("}}")
            stream.write("]")
        stream.write("}]\n")


def _layers(stream: TextIO, n: int, cells: list[str]) -> None:
    for layer in range(N_LAYERS):
        stream.write(f'{", " if layer else ""}"{layer}": {{')
        for position in range(n):
            stream.write(f'{", " if position else ""}"{position}": {cells[(layer * n + position) % len(cells)]}')
        stream.write("}")


def measure(megabytes: float, directory: Path) -> dict[str, Any]:
    """Write, import; seconds and MB."""
    path = directory / f"{megabytes:g}.json"
    write_file(path, megabytes)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(path), str(directory / "out")],
        cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    found["seconds"] = time.perf_counter() - began
    found["file_mb"] = path.stat().st_size / 1e6
    path.unlink()
    found["out_mb"] = sum(f.stat().st_size for f in (directory / "out").rglob("*") if f.is_file()) / 1e6
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=at_least(1, float), default=1000, help="size of the file (default 1000)")
    parser.add_argument("--bar-mb", type=float, default=BAR_MB, help=f"most resident memory (default {BAR_MB})")
    parser.add_argument("--json", type=Path, help="where the figures go (default .cache/bench/import.json)")
    args = parser.parse_args()
    bench = Bench("import", "make bench-analysis")
    directory = Path(tempfile.mkdtemp(prefix="bench-import-"))
    try:
        found = measure(args.mb, directory)
    finally:
        shutil.rmtree(directory)
    note = (
        f"{found['cells']} cells in {found['seconds']:.0f} s ({found['cpu']:.0f} s of processor time), tables of "
        f"{found['out_mb']:.0f} MB"
    )
    what = f"import of {found['file_mb']:.0f} MB of JSON, peak memory"
    bench.add("import", what, [found["peak_mb"]], unit="MB", bar=args.bar_mb, note=note)
    return bench.write(args.json)


if __name__ == "__main__":
    sys.exit(main())
