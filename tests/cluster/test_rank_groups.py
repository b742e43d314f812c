"""Tensor-parallel entries through real Ray actors: the group is placed, works, is rebuilt when a rank dies, and removed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from capture.config import Entry
from capture.layout import RunDir
from capture.run import capture_pair
from cluster.resources import Sizing, refusal, request
from cluster.sweep import run_sweep

ROOT = Path(__file__).resolve().parents[2]
PYDOC = ROOT / "configs/pairs/pydoc"


def entry(**changes: object) -> Entry:
    settings = {
        "name": "shared",
        "base_model": str(PYDOC / "base"),
        "sft_model": str(PYDOC / "sft"),
        "tokenizer": str(PYDOC / "tokenizer"),
        "device": "cpu",
        "dtype": "float32",
        "prompts": ("Return a new list of the lines.",),
        "tensor_parallel": 2,
        "spans": {"layers": 1},
    }
    return Entry(**(settings | changes))


def placement_groups() -> list[str]:
    from ray.util import placement_group_table

    return [g["state"] for g in placement_group_table().values() if g["state"] != "REMOVED"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(capture_pair(entry(tensor_parallel=1), str(tmp_path_factory.mktemp("alone"))).path)


def same_numbers(a: Path, b: Path) -> bool:
    x, y = (pq.read_table(d / "pairwise.parquet", partitioning=None) for d in (a, b))
    close = all(
        abs(p - q) <= 1e-3 * max(abs(q), 1e-6) + 1e-5
        for c in ("norm_diff", "kl_divergence")
        for p, q in zip(x[c].to_pylist(), y[c].to_pylist(), strict=True)
    )
    return close and x.num_rows == y.num_rows


def test_a_group_of_two_ranks_captures_the_pair_and_is_removed(local_ray: None, alone: Path, tmp_path: Path) -> None:
    summary = run_sweep([("shared", entry())], str(tmp_path), cpus=2)
    assert [i.state for i in summary.items] == ["complete"], summary.items[0].row
    (found,) = tmp_path.glob("captures/*/*")
    assert json.loads((found / "capture.json").read_text())["tensor_parallel"] == 2
    assert same_numbers(found, alone)
    assert placement_groups() == []
    assert list(tmp_path.glob("logs/shared/*.rank1.log"))


# Kills rank 1's process once, as soon as the first span is committed.
KILLER = """
import glob, os, re, signal, sys, time
out = sys.argv[1]
while True:
    time.sleep(0.005)
    if glob.glob(out + "/captures/*/*/spans/state-*"):
        for log in glob.glob(out + "/logs/shared/*.rank1.log"):
            if found := re.search(r", pid ([0-9]+)", open(log).read()):
                os.kill(int(found[1]), signal.SIGKILL)
                sys.exit(0)
"""


@pytest.mark.slow
def test_a_rank_that_dies_takes_its_group_down_and_the_next_group_goes_on_after_the_last_span(
    local_ray: None, tmp_path: Path
) -> None:
    text = "Return a new list of the lines of the file, without their ends, and close the file when it was read."
    long = entry(prompts=tuple(text[:n] for n in range(20, len(text))))  # a batch a length: slow enough to be killed
    undisturbed = capture_pair(long.model_copy(update={"tensor_parallel": 1}), str(tmp_path / "alone"))
    out = tmp_path / "killed"
    killer = subprocess.Popen([sys.executable, "-c", KILLER, str(out)])
    try:
        summary = run_sweep([("shared", long)], str(out), cpus=2)
        assert killer.wait(timeout=5) == 0
    finally:
        killer.kill()
    assert summary.items[0].state == "complete", summary.items[0].row
    states = [(row["state"], row["error_class"]) for row in RunDir(str(out)).manifest_rows()]
    assert states == [("failed", "WorkerDiedError"), ("complete", None)]
    (found,) = out.glob("captures/*/*")
    spans = json.loads((found / "capture.json").read_text())["spans"]
    assert [(s["first"], s["last"]) for s in spans] == [(-1, 0), (1, 1), (2, 2), (3, 3)]
    assert spans[0]["process"] != spans[-1]["process"]
    assert same_numbers(found, Path(undisturbed.path))
    assert placement_groups() == []


def test_a_degree_that_does_not_divide_is_told_before_anything_is_reserved(local_ray: None, tmp_path: Path) -> None:
    summary = run_sweep([("shared", entry(tensor_parallel=3))], str(tmp_path), cpus=2)
    (item,) = summary.items
    assert item.state == "failed"
    assert "4 query heads do not divide by 3; tensor_parallel may be 1, 2" in item.row["error"]
    assert summary.ray_used is False


def test_more_ranks_than_any_node_has_room_for_are_refused() -> None:
    wanted = request(entry(device="cuda", tensor_parallel=4), cluster_has_gpus=True, sized=Sizing(1, 1, 1))
    assert (wanted.ranks, wanted.gpus) == (4, 1)
    assert refusal(wanted, [{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 4}]) is None
    reason = refusal(wanted, [{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 2}])
    assert reason == "asks for 4 GPU on one node; the largest node of this Ray has 2"
