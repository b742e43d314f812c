"""How long `pairscope plan` takes for the 18 pairs of the hardware table, without a network.

    python tests/bench/bench_plan.py [--rounds 5]

A process of its own each time, as a user starts it. Exits 1 where the median is above the bar.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from measured import ROOT, Bench, at_least, in_turns

BAR_S = 5.0
CONFIG = "configs/hardware_table.yaml"


def plan() -> float:
    """Seconds of one plan."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pairscope", "plan", CONFIG],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the plan failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=5, help="plans that count (default 5)")
    parser.add_argument("--json", type=Path, help="where the figures go (default .cache/bench/plan.json)")
    args = parser.parse_args()
    bench = Bench("plan", "make bench")
    seconds = in_turns({"plan": plan}, args.rounds)["plan"]
    bench.add("plan", "a plan for 18 pairs, without network", seconds, unit="s", bar=BAR_S)
    return bench.write(args.json)


if __name__ == "__main__":
    sys.exit(main())
