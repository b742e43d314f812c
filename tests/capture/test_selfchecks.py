"""Numbers that would not be right are not written: every self-check stops a capture, and the noise floor is what it says."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama import modeling_llama
from walked import open_pair, walk

import analysis
from capture import lens, lens_queue, logits
from capture.checkpoint import StreamedModel
from capture.collector import Collector
from capture.config import Batching, Entry, Lens
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
    finish = Collector.finish

    def finished(collector):
        finish(collector)
        collector.pairwise[metric][-1, -1, -1] = 1e-30

    monkeypatch.setattr(Collector, "finish", finished)
    base = pairs("llama").base
    with pytest.raises(SelfCheckError, match=f"base and sft are the same checkpoint, yet {metric} reaches 1e-30"):
        capture_pair(entry_of(tiny.PairPaths(base, base, base)), str(tmp_path))
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize("compiled", ["auto", False])
def test_a_lens_that_takes_a_curved_head_for_a_plain_one_stops_the_capture(compiled, pairs, tmp_path, monkeypatch):
    """The soft cap of gemma2: shifts of states are no shifts of logits there."""
    monkeypatch.setattr(logits, "heads_scale_alike", lambda models: True)
    with pytest.raises(SelfCheckError, match=r"the lens gives .* where the model's own logits have .*compile: false"):
        capture_pair(entry_of(pairs("gemma2"), lens=Lens(compile=compiled)), str(tmp_path))
    assert not list(tmp_path.rglob("*.parquet"))


def _off(by):
    def change(values):
        values[0] += by

    return change


def _other_ids(top):
    top.ids[0, 0] = top.ids[0, 1]


def _not_the_largest(top):
    top.ids[0], top.values[0] = top.ids[0].roll(-1), top.values[0].roll(-1)


@pytest.mark.parametrize("compiled", ["auto", False])
@pytest.mark.parametrize(
    ("statistic", "wrong"),
    [
        ("an entropy", lambda slots, pairs: _off(-0.01)(slots[1].entropy)),
        ("an entropy", lambda slots, pairs: _off(torch.nan)(slots[1].entropy)),
        ("a log-probability of the next token", lambda slots, pairs: _off(0.01)(slots[0].next_logprob)),
        ("a KL", lambda slots, pairs: _off(0.001)(pairs[0].kl_ba)),
        ("a reverse KL", lambda slots, pairs: _off(0.001)(pairs[-1].kl_ab)),
        ("a logit", lambda slots, pairs: _other_ids(slots[0].top)),
        ("a logit, the first of its list,", lambda slots, pairs: _not_the_largest(slots[-1].top)),
        ("a shift", lambda slots, pairs: _off(0.001)(pairs[0].increased.values)),
        ("a shift, the first of its list,", lambda slots, pairs: _not_the_largest(pairs[0].decreased)),
    ],
)
def test_a_lens_that_finds_another_number_stops_the_capture(statistic, wrong, compiled, pairs, tmp_path, monkeypatch):
    def tile(*args, **kwargs):
        slots, compared = lens.lens_tile(*args, **kwargs)
        wrong(slots, list(compared.values()))
        return slots, compared

    monkeypatch.setattr(lens_queue, "lens_tile", tile)
    with pytest.raises(
        SelfCheckError, match=f"the lens gives {statistic} of [-.0-9enan]+ where the model's own logits have"
    ):
        capture_pair(entry_of(pairs("llama"), lens=Lens(compile=compiled)), str(tmp_path))
    assert not list(tmp_path.rglob("*.parquet"))


def test_the_lens_is_checked_on_one_row_that_nothing_follows(pairs, tmp_path):
    """The log-probability of its next token is no number."""
    result = capture_pair(entry_of(pairs("llama"), prompts=("a",), add_special_tokens=False), str(tmp_path))
    errors = json.loads((Path(result.path) / "capture.json").read_text())["self_checks"]["lens_error"]
    assert errors.keys() == {"entropy", "kl", "logit"}
    assert all(0 <= error < 1e-4 for error in errors.values())
    assert errors["entropy"] > 0, "float32 terms, beside float64; two products of logits may be the same"


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
    ("arch", "changes", "probed", "least"),
    [
        # alone its longest prompt is short, so that its rotary frequencies are others; the shortest is padded most
        ("phi3_longrope", {"prompts": tiny.PROMPTS, "batching": Batching(padding="left")}, 1, 1e-4),
        # one token alone may take another matrix kernel than many: some processors then round otherwise
        ("llama", {"prompts": tuple("abcdefghi"), "add_special_tokens": False}, 0, 0.0),
    ],
)
def test_the_noise_floor_is_what_a_prompt_alone_differs_by_from_its_batch(
    arch, changes, probed, least, pairs, tmp_path
):
    entry = entry_of(pairs(arch), **changes)
    result = capture_pair(entry, str(tmp_path))
    floor = json.loads((Path(result.path) / "capture.json").read_text())["noise_floor"]
    ids = [tiny.make_tokenizer()(p, add_special_tokens=entry.add_special_tokens)["input_ids"] for p in entry.prompts]
    batched = walk(open_pair(pairs(arch)), ids, streamed=True, batching=entry.batching)
    alone = walk(open_pair(pairs(arch)), [ids[probed]], streamed=True)
    want = {
        name: noise([s[probed] for s in batched[name].values()], [s[0] for s in alone[name].values()]) for name in alone
    }
    assert floor["item"] == probed
    assert floor["by_run_and_layer"].keys() == want.keys()
    for name, metrics in want.items():
        for metric, values in metrics.items():
            assert floor["by_run_and_layer"][name][metric] == pytest.approx(values, rel=1e-6, abs=0), (name, metric)
    for metric, largest in floor["largest"].items():
        assert largest == max(max(metrics[metric]) for metrics in floor["by_run_and_layer"].values())
        assert largest >= least


def test_a_noise_floor_of_states_that_overflow_is_null_and_its_largest_value_is_not_told(tmp_path):
    paths = tiny.make_pair("llama", tmp_path / "pair")
    for side in (paths.base, paths.sft):
        weights = load_file(side / "model.safetensors")
        weights["model.layers.2.mlp.down_proj.weight"] *= 1e38
        weights["model.layers.2.mlp.up_proj.weight"] *= 1e4
        save_file(weights, side / "model.safetensors", {"format": "pt"})
    result = capture_pair(entry_of(paths, prompts=("two alike",) * 2), str(tmp_path / "out"))
    written = (Path(result.path) / "capture.json").read_text()
    floor = json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["noise_floor"]
    assert floor["by_run_and_layer"]["BB"]["norm_diff"][-3:] == [None] * 3
    assert None not in floor["by_run_and_layer"]["BB"]["norm_diff"][:3]
    assert floor["largest"] == {"norm_diff": None, "norm_diff_relative": None, "cosine_distance": None}
    grid = analysis.open(tmp_path / "out").grid("norm_diff", comparison="BB-SS", prompt=0)
    assert np.isnan(grid.floor).tolist() == [False] * 3 + [True] * 3


def noise(batched, alone):
    """The largest differences over the tokens, a value per layer, from states [T, D] in float64."""
    found = {"norm_diff": [], "norm_diff_relative": [], "cosine_distance": []}
    for a, b in zip(batched, alone, strict=True):
        a, b = a.double(), b.double()
        size, difference = a.norm(dim=1, keepdim=True), (b - a).norm(dim=1)
        found["norm_diff"].append(float(difference.max()))
        found["norm_diff_relative"].append(float((difference / size[:, 0]).max()))
        units = a / size - b / b.norm(dim=1, keepdim=True)
        found["cosine_distance"].append(float((units.square().sum(1) / 2).max()))
    return found
