"""The bench runs, on a pair small enough to say nothing about speed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))

import bench_capture


def test_the_bench_times_floor_and_capture_and_shows_every_stage(tmp_path):
    small = bench_capture.SHAPE | {"vocab": 400, "tokenizer_size": 400, "num_hidden_layers": 2, "hidden_size": 72}
    paths = bench_capture.make_pair(tmp_path / "pair", small)
    assert bench_capture.make_pair(tmp_path / "pair", {}) == paths  # made once
    found = bench_capture.summary(bench_capture.measure(paths, tmp_path / "out", repeats=2))
    assert found["repeats"] == 2
    assert found["ratio"]["min"] > 0
    assert {"open", "walk", "write"} <= found["stage_seconds"].keys()
    assert found["walk_and_write_seconds"]["median"] <= found["stage_seconds"]["all"]["median"]
    assert "ratio, walk + write" in bench_capture.table(found)
