"""Numbers that would not be right are not written: every self-check stops a capture, and the noise floor is what it says."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers.models.llama import modeling_llama
from walked import open_pair, walk

from capture.checkpoint import StreamedModel
from capture.collector import Collector
from capture.config import Batching, Entry
from capture.errors import SelfCheckError, UnsupportedModelError
from capture.run import capture_pair


def entry_of(paths, **changes):
    settings = {"base_model": str(paths.base), "sft_model": str(paths.sft), "tokenizer": str(paths.tokenizer)}
    return Entry(**({"name": "tiny", "device": "cpu", "prompts": tiny.PROMPTS} | settings | changes))


@pytest.mark.parametrize("wrong", ["rows in another order", "one number off"])
def test_a_head_that_is_not_the_models_own_stops_the_capture(wrong, pairs, tmp_path, monkeypatch):
    own = StreamedModel.head_shard

    def other(model):
        first, weight, bias = own(model)
        if wrong == "rows in another order":
            return first, weight.roll(1, 0), bias
        weight = weight.clone()
        weight[100, 3] += 10
        return first, weight, bias

    monkeypatch.setattr(StreamedModel, "head_shard", other)
    with pytest.raises(SelfCheckError, match="base model: logits computed from the last state differ"):
        capture_pair(entry_of(pairs("llama")), str(tmp_path))
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize("metric", ["norm_diff", "cosine_distance", "kl_divergence", "kl_reverse"])
def test_a_model_that_differs_from_itself_stops_the_capture(metric, pairs, tmp_path, monkeypatch):
    take = Collector.take

    def taken(collector, state):
        take(collector, state)
        collector.pairwise[metric][-1, -1, -1] = 1e-30

    monkeypatch.setattr(Collector, "take", taken)
    base = pairs("llama").base
    with pytest.raises(SelfCheckError, match=f"base and sft are the same checkpoint, yet {metric} reaches 1e-30"):
        capture_pair(entry_of(tiny.PairPaths(base, base, base)), str(tmp_path))
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_model_that_does_more_than_its_modules_after_the_last_layer_is_refused(pairs, tmp_path, monkeypatch):
    forward = modeling_llama.LlamaModel.forward

    def more(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 1.0000002
        return output

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", more)
    with pytest.raises(
        UnsupportedModelError, match=r"what follows the last layer \(\['LlamaRMSNorm'\]\) is not a plain"
    ):
        capture_pair(entry_of(pairs("llama")), str(tmp_path))
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize(
    ("padding", "prompts", "probed"),
    [
        ("none", tuple(f"The river number {n} has two banks and one bed." for n in range(9)), 0),
        ("left", tiny.PROMPTS, 1),  # the shortest is padded most
    ],
)
def test_the_noise_floor_is_what_one_prompt_alone_differs_by_from_its_batch(padding, prompts, probed, pairs, tmp_path):
    paths = pairs("llama")
    result = capture_pair(entry_of(paths, prompts=prompts, batching=Batching(padding=padding)), str(tmp_path))
    floor = json.loads((Path(result.path) / "capture.json").read_text())["noise_floor"]
    ids = tiny.encode(prompts)
    batched = walk(open_pair(paths), ids, streamed=True, batching=Batching(padding=padding))
    alone = walk(open_pair(paths), [ids[probed]], streamed=True)
    want = defaultdict(lambda: defaultdict(list))
    for name, by_layer in alone.items():
        for layer in sorted(by_layer):
            a, b = batched[name][layer][probed].double(), by_layer[layer][0].double()
            difference = (b - a).norm(dim=1)
            want[name]["norm_diff"].append(difference.max())
            want[name]["norm_diff_relative"].append((difference / a.norm(dim=1)).max())
            units = [v / v.norm(dim=1, keepdim=True) for v in (a, b)]
            want[name]["cosine_distance"].append(((units[0] - units[1]).square().sum(1) / 2).max())
    assert floor["item"] == probed
    assert floor["by_run_and_layer"].keys() == want.keys()
    for name, metrics in want.items():
        for metric, values in metrics.items():
            assert floor["by_run_and_layer"][name][metric] == pytest.approx(torch.stack(values).tolist(), rel=1e-9)
    for metric, largest in floor["largest"].items():
        assert largest == pytest.approx(max(float(max(w[metric])) for w in want.values()), rel=1e-9)
        assert largest > 0, "these prompts were chosen because batching them changes bits"
    assert not np.any(floor["by_run_and_layer"]["BB"]["norm_diff"][0])  # what enters block 0 is looked up, not computed
