"""What Ray adds to a sweep: its start, each further entry, a thousand entries, and several nodes.

    python tests/bench/bench_ray.py [--rounds 3] [--entries 12] [--parts start entry queue nodes]

start: a local Ray, and two of the actors that work on entries, each from its creation to its first answer.

entry: the embedded pair (two layers' worth of work, under two seconds) so many times, each under a name of its own: swept one at a
time through a Ray of its own, against the same captures one after the other in this process, without Ray. In turns. What an entry
beyond the first costs is (sweep of n - sweep of 1) / (n - 1); the captures' own time per entry is taken off. That difference
holds how much Ray's start varies, so the bar is asked of the same from within a single sweep as well: from one entry's start to the
next one's. Also shown: the seconds before the first entry starts.

queue: 1,000 entries whose work is nothing (tests/cluster/fake_work.py), on a Ray of two cores.

nodes: entries that sleep, on 1, 2 and 4 local Ray nodes of one core each (ray.cluster_utils.Cluster): sleeping needs no core, so
what is missing to N times as fast is Ray's and the sweep's own.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measured import ROOT, Bench, at_least, ratios

HERE = Path(__file__).parent
FAKES = ROOT / "tests" / "cluster"
PAIR = ROOT / "configs" / "pairs" / "pydoc"
BAR_ENTRY_S = 0.3
PARTS = ("start", "entry", "queue", "nodes")
NODES = (1, 2, 4)
SLEEP_S = 1.0
BEHIND_EACH_OTHER = 6  # sleeping entries for each node


def config(n: int, file: Path) -> Path:
    """The embedded pair as n entries; one prompt is enough."""
    sweep = [{"name": f"e{i:04}", "base_model": str(PAIR / "base"), "sft_model": str(PAIR / "sft")} for i in range(n)]
    block = {"model_sweep": sweep, "tokenizer": str(PAIR / "tokenizer"), "device": "cpu", "dtype": "float32",
             "prompts": ["If the optional argument key is given, it must be a function of one argument."]}  # fmt: skip
    file.write_text(json.dumps({"residual_compare": block}))  # JSON is YAML
    return file


def sweep_seconds(file: Path, out: Path) -> tuple[float, float, list[float]]:
    """A whole `pairscope sweep --jobs 1` in a process of its own: seconds in all; before the first entry starts; and from each
    entry's start to the next one's."""
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "sweep", str(file), "--out", str(out), "--jobs", "1"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    took = time.time() - began
    if done.returncode:
        raise RuntimeError(f"the sweep failed:\n{done.stderr[-3000:]}")
    from capture.layout import RunDir

    starts = sorted(_moment(row["started"]) for row in RunDir(str(out)).manifest_rows())
    return took, starts[0] - began, [b - a for a, b in itertools.pairwise(starts)]


def _moment(text: str) -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp()


_ALONE = """
import json, sys, time
from capture.config import load_config
from capture.attempt import run_entry
from capture.layout import RunDir
import torch
torch.set_num_threads(int(sys.argv[3]))
seconds = []
for entry in load_config(sys.argv[1]).entries():
    began = time.perf_counter()
    row, outcome = run_entry(entry, RunDir(sys.argv[2]))
    assert outcome.state == "complete", outcome
    seconds.append(time.perf_counter() - began)
print(json.dumps(seconds))
"""


def alone_seconds(file: Path, out: Path) -> list[float]:
    """The same entries one after the other in one process without Ray; seconds of each."""
    cores = str(os.cpu_count() or 1)
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, str(file), str(out), cores],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": cores},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the captures failed:\n{done.stderr[-3000:]}")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_entry(bench: Bench, rounds: int, n: int) -> None:
    """One sweep of 1, one of n, and n captures without Ray, in turns."""
    beyond, within, starts = [], [], []
    work = Path(tempfile.mkdtemp(prefix="bench-ray-"))
    try:
        one, many = config(1, work / "one.yaml"), config(n, work / "many.yaml")
        for turn in range(rounds):
            single, _, _ = sweep_seconds(one, work / f"one{turn}")
            whole, start, gaps = sweep_seconds(many, work / f"many{turn}")
            alone = alone_seconds(many, work / f"alone{turn}")
            own = statistics.mean(alone[1:])
            beyond.append((whole - single) / (n - 1) - own)
            within.append(statistics.median(gaps[1:]) - statistics.median(alone[1:]))
            starts.append(start)
            print(
                f"  sweep of 1 {single:.2f} s, of {n} {whole:.2f} s; alone {alone[0]:.2f} s, then {own:.2f} s each",
                flush=True,
            )
    finally:
        shutil.rmtree(work)
    what = f"each tiny entry beyond the first, of {n}"
    bench.add("entry", f"{what}: seconds that a sweep adds", beyond, unit="s", bar=BAR_ENTRY_S)
    bench.add(
        "entry, within", f"{what}: the same, from start to start within the sweep", within, unit="s", bar=BAR_ENTRY_S
    )
    bench.add("start", "from the command to the start of the first entry", starts, unit="s")


_START = """
import json, time
began = time.perf_counter()
import ray
from cluster.actor import CaptureActor
from cluster.connect import connected
seconds = [time.perf_counter() - began]
began = time.perf_counter()
with connected(2):
    seconds.append(time.perf_counter() - began)
    kind, actors = ray.remote(concurrency_groups={"control": 1})(CaptureActor), []
    for _ in range(2):
        began = time.perf_counter()
        actors.append(kind.options(num_cpus=1).remote({}))
        ray.get(actors[-1].prepare.remote())
        seconds.append(time.perf_counter() - began)
print(json.dumps(seconds))
"""


def measure_start(bench: Bench, rounds: int) -> None:
    """What passes before an entry can begin, each time in a process of its own; the first round only warms up."""
    found = []
    for _ in range(rounds + 1):
        done = subprocess.run([sys.executable, "-c", _START], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"Ray did not start:\n{done.stderr[-3000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    names = {
        "import": "import of Ray and of what creates actors",
        "init": "start of a local Ray",
        "actor": "an actor, from its creation to its first answer",
        "second actor": "a second actor",
    }
    for (name, what), seconds in zip(names.items(), zip(*found[1:], strict=True), strict=True):
        bench.add(name, what, seconds, unit="s")


@contextmanager
def fakes_at_hand() -> Iterator[Any]:
    """tests/cluster/fake_work.py, for this process and for the workers of any Ray started within."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FAKES), before]))
    sys.path.insert(0, str(FAKES))
    try:
        import fake_work

        yield fake_work
    finally:
        sys.path.remove(str(FAKES))
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def fake_sweep(fake_work: Any, kind: str, n: int, out: Path, cpus: int | None = None) -> float:
    """Seconds of a sweep of n entries of fake work."""
    from cluster.sweep import run_sweep

    entries = [fake_work.make_entry(f"{kind}-{i:04}") for i in range(n)]
    began = time.perf_counter()
    summary = run_sweep(
        [(e.name, e) for e in entries], str(out), show=fake_work.quiet()[0], work="fake_work:by_name",
        resolve="fake_work:resolve", cpus=cpus,
    )  # fmt: skip
    took = time.perf_counter() - began
    if summary.complete != n:
        raise RuntimeError(f"{summary.complete} of {n} entries are complete")
    return took


def measure_queue(bench: Bench, n: int = 1000, cpus: int = 2, rounds: int = 1) -> None:
    took = []
    for _ in range(rounds):
        with fakes_at_hand() as fake_work, tempfile.TemporaryDirectory(prefix="bench-ray-") as work:
            took.append(fake_sweep(fake_work, "nothing", n, Path(work) / "out", cpus))
    text = f"{n:,} entries whose work is nothing, on {cpus} cores: all complete"
    note = f"{1000 * statistics.median(took) / n:.0f} ms an entry, the start of Ray included"
    bench.add("queue", text, took, unit="s", note=note)


def measure_nodes(bench: Bench, nodes: Sequence[int] = NODES, sleep_s: float = SLEEP_S, rounds: int = 1) -> None:
    """Seconds of so many entries that sleep, on more and more nodes; Ray is there before, so that only the sweep counts."""
    n = BEHIND_EACH_OTHER * max(nodes)
    seconds: dict[int, list[float]] = {count: [] for count in nodes}
    with fakes_at_hand() as fake_work:
        os.environ["FAKE_SLEEP_S"] = str(sleep_s)
        for _ in range(rounds):
            for count in nodes:
                seconds[count].append(_on_nodes(fake_work, count, n))
        del os.environ["FAKE_SLEEP_S"]
    for count, took in seconds.items():
        ideal = n * sleep_s / count
        note = f"{statistics.median(took):.1f} s; {ideal:.0f} s of sleep on each node"
        text = f"{n} entries that sleep {sleep_s:g} s, on {count} local node{'s' * (count > 1)}: share of the time that is sleep"
        bench.add(f"nodes {count}", text, [100 * ideal / one for one in took], unit="%", note=note)
    first, last = min(seconds), max(seconds)
    bench.add("scaling", f"{last} nodes: times as fast", ratios(seconds[first], seconds[last]), over=f"{first} node")


def _on_nodes(fake_work: Any, count: int, n: int) -> float:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(count - 1):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        with tempfile.TemporaryDirectory(prefix="bench-ray-") as work:
            fake_sweep(fake_work, "dozing", count, Path(work) / "warm")
            return fake_sweep(fake_work, "dozing", n, Path(work) / "out")
    finally:
        ray.shutdown()
        cluster.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=3, help="sweeps of each that count (default 3)")
    parser.add_argument("--entries", type=at_least(3), default=12, help="entries of the longer sweep (default 12)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, help="where the figures go (default .cache/bench/ray.json)")
    args = parser.parse_args()
    bench = Bench("ray", "make bench", threads=os.cpu_count() or 1)
    if "start" in args.parts:
        measure_start(bench, args.rounds)
    if "entry" in args.parts:
        measure_entry(bench, args.rounds, args.entries)
    if "queue" in args.parts:
        measure_queue(bench, rounds=args.rounds)
    if "nodes" in args.parts:
        measure_nodes(bench, rounds=args.rounds)
    return bench.write(args.json)


if __name__ == "__main__":
    sys.exit(main())
