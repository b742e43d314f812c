"""The bench runs, on a pair small enough to say nothing about speed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))

import bench_capture
import pairs
import pytest
from measured import Bench, wrong_result


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    shape = pairs.SMOL | {"vocab": 400, "tokenizer_size": 400, "num_hidden_layers": 2, "hidden_size": 72}
    return pairs.make_pair(tmp_path_factory.mktemp("bench") / "pair", shape)


def test_the_bench_times_floor_and_capture_in_turns(small, tmp_path, monkeypatch):
    monkeypatch.setitem(bench_capture.CASES, "64", (8, 2))
    bench = Bench("capture", "make bench", threads=1)
    bench_capture.measure(bench, small, tmp_path / "out", "64", rounds=2, chosen=["eager"])
    result = bench.result()
    assert wrong_result(result) == []
    names = [f["name"] for f in result["figures"]]
    of = ("64 eager", "64 without the lens")
    assert {*of, *(f"{name}, opening too" for name in of)} == set(names)
    assert all(f["rounds"] == 2 and 0 < f["low"] <= f["median"] <= f["high"] for f in result["figures"])


def test_short_prompts_are_held_against_a_floor_of_one_unembedding_as_well(small, tmp_path, monkeypatch):
    monkeypatch.setitem(bench_capture.CASES, "12", (4, 1))
    bench = Bench("capture", "make bench", threads=1)
    bench_capture.measure(bench, small, tmp_path / "out", "12", rounds=1, chosen=["eager"])
    (one,) = [f for f in bench.result()["figures"] if f["name"] == "12 eager, one head"]
    assert one["over"] == "bare forwards and bare lens products of one unembedding"
    assert one["bar"] is None
    assert one["note"] == bench_capture.ONE


def test_a_pair_is_made_once(small):
    assert pairs.make_pair(small.base.parent, {}) == small


def test_prompts_have_the_tokens_that_they_are_made_for():
    from tiny import encode

    prompts = pairs.prompts_of(64, 61)
    assert {len(ids) for ids in encode(prompts)} == {64}
    assert len(set(prompts)) == 61
