"""Sub-layer mode: a matrix in use, the next being read, the ends by rows. The numbers are those of every other mode."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_capture import entry_of
from walked import CPU, open_pair, walk

from capture import unembed
from capture.batches import make_batches
from capture.checkpoint import EMBEDDING, HEAD, REST
from capture.config import Batching
from capture.errors import UnsupportedModelError
from capture.group import Group
from capture.run import capture_pair
from capture.sublayer import SubLayer, leaf_groups, sublayer_bytes

IDS = tiny.random_ids(3, 12).tolist()


def assert_same(got, want):
    for name, by_layer in want.items():
        for layer, states in by_layer.items():
            assert torch.equal(torch.stack(got[name][layer]), torch.stack(states)), (name, layer)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "mixtral", "deepseek_v3", "gpt2", "falcon_h1"])
def test_states_equal_those_of_resident_mode_bitwise(arch, tie, pairs):
    paths = pairs(arch, tie=tie)
    want = walk(open_pair(paths), IDS, mode="resident")
    pair = open_pair(paths)
    assert_same(walk(pair, IDS, mode="sub-layer"), want)
    live = [t for m in pair.models.values() for g in m.groups() if g not in (REST, HEAD, EMBEDDING) for t in m.names(g)]
    assert all(pair.models["base"].weights.get(n).is_meta for n in live)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_checkpoint_is_walked_beside_itself(arch, pairs):
    paths = replace(pairs(arch), sft=pairs(arch).base)
    assert_same(walk(open_pair(paths), IDS, mode="sub-layer"), walk(open_pair(paths), IDS, mode="resident"))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "deepseek_v3", "nemotron"])
def test_the_peak_is_the_rest_two_leaves_and_a_chunk_of_each_unembedding(arch, pairs, monkeypatch):
    monkeypatch.setattr(unembed, "HEAD_CHUNK", 100)
    monkeypatch.setattr(unembed, "CHANGE_CHUNK", 100)
    pair = open_pair(pairs(arch, intermediate_size=160))
    models = list(pair.models.values())
    rest = sum(m.group_bytes(REST) for m in models)
    leaves = max(sublayer_bytes(m) for m in models)
    chunks = sum(100 * m.config.hidden_size * m.head.weight.element_size() for m in models)
    whole = sum(m.group_bytes(g) for m in models for g in m.groups())
    walk(pair, IDS, mode="sub-layer")
    peak = models[0].ledger.peak
    assert 0.85 * (rest + leaves + chunks) <= peak <= rest + leaves + chunks
    assert peak < 0.5 * whole


def test_the_two_leaves_are_those_that_follow_each_other_at_most(pairs):
    model = open_pair(pairs("llama")).models["base"]
    sizes = {g: sum(model.meta(n).nbytes for n in names) for g, names in leaf_groups(model).items() if g[1] == 0}
    vectors = model.group_bytes(("layer", 0)) - sum(sizes.values())
    assert sublayer_bytes(model) == sum(sorted(sizes.values())[-2:]) + 2 * vectors
    assert [g[2] for g in sizes][:4] == [f"self_attn.{x}_proj" for x in "qkvo"]


def test_matrices_are_read_once_a_batch_and_the_order_is_learned_in_one_layer(pairs):
    """deepseek registers its experts before its router, and calls them after it: one wrong guess, in the first layer."""
    pair = open_pair(pairs("deepseek_v3"))
    walk(pair, IDS, mode="sub-layer", batching=Batching(max_tokens=12))
    reads = pair.models["base"].ledger.reads
    stored = load_file(pairs("deepseek_v3").base / "model.safetensors")
    times = {k: reads[f"base:{k}"] / t.nbytes for k, t in stored.items() if ".layers." in k and t.ndim > 1}
    batches = len(make_batches(IDS, Batching(max_tokens=12), CPU, probe=False))
    assert batches == 3
    last = {k: n for k, n in times.items() if ".layers.3." in k}
    assert set(last.values()) == {batches}
    assert max(times.values()) <= batches + 1


def test_only_the_rows_of_the_tokens_in_use_are_read_of_the_embedding(pairs):
    pair = open_pair(pairs("llama"))
    pair.begin(make_batches(IDS, Batching(), CPU, probe=False), mode="sub-layer")
    used = len({i for ids in IDS for i in ids})
    row = pair.models["base"].meta("model.embed_tokens.weight")[0].nbytes
    assert pair.models["base"].ledger.reads["base:model.embed_tokens.weight"] == used * row


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_all_tables_are_those_of_resident_mode(arch, pairs, tmp_path, monkeypatch):
    """The lens as well: all modes multiply with the same chunks of the unembedding."""
    monkeypatch.setattr(unembed, "HEAD_CHUNK", 100)
    monkeypatch.setattr(unembed, "CHANGE_CHUNK", 100)
    found = {}
    for mode in ("resident", "sub-layer"):
        capture_pair(entry_of(pairs(arch), mode=mode), str(tmp_path / mode))
        (directory,) = (tmp_path / mode).glob("captures/pair=tiny/capture=*")
        assert json.loads((directory / "capture.json").read_text())["mode"] == mode
        found[mode] = {p.name: p.read_bytes() for p in directory.glob("*.parquet")}
    assert found["resident"] == found["sub-layer"]
    assert any(name.startswith("pairwise_topk") for name in found["resident"])


def test_a_head_stored_beside_a_tied_embedding_is_the_one_that_is_used(tmp_path):
    paths = tiny.make_pair("llama", tmp_path, tie=True)
    file = paths.base / "model.safetensors"
    tensors = load_file(file)
    other = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors | {"lm_head.weight": other}, file, metadata={"format": "pt"})
    model = open_pair(paths).models["base"]
    SubLayer(model)
    assert torch.equal(model.head_weight[5:9], other[5:9])


def test_a_model_that_is_divided_among_gpus_is_refused(pairs):
    model = open_pair(pairs("llama")).models["base"]
    model.group = Group(0, 2)
    with pytest.raises(UnsupportedModelError, match="mode sub-layer: the base model is divided among GPUs"):
        SubLayer(model)


def test_a_layer_that_takes_a_matrix_past_its_module_s_forward_is_refused(pairs, tmp_path):
    """Nothing would have read the matrix: the layer would compute with what memory happens to hold."""
    with pytest.raises(
        UnsupportedModelError, match=r"layer 0 of the base model does not call its mixer\.dt_proj; set another mode"
    ):
        capture_pair(entry_of(pairs("mamba"), mode="sub-layer"), str(tmp_path))
    assert not list(tmp_path.rglob("*.parquet"))
