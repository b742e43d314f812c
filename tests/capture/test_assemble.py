"""Fused experts are put together in place: a layer takes itself and one expert while it is read, never more."""

import logging

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from walked import CPU, open_pair, walk

from capture import borrowed
from capture.assemble import Misshapen, Part, Place, Recipe, assemble
from capture.ledger import CountedSlice, Ledger
from capture.live import Live

MOE = ("mixtral", "qwen3_moe", "deepseek_v3")
MANY = {"mixtral": {"num_local_experts": 16}, "qwen3_moe": {"num_experts": 16}, "deepseek_v3": {"n_routed_experts": 16}}


def expert_bytes(model, layer):
    """Bytes of one expert: its slice of each fused weight."""
    return sum(p[0].nbytes for p in model.layers[layer].mlp.experts.parameters())


class CountsReads(CountedSlice):
    """A stored tensor whose reads are copies, so that what was read is seen as alive as long as somebody holds it."""

    def __getitem__(self, index):
        return super().__getitem__(index).clone()


@pytest.mark.parametrize("arch", MOE)
def test_loading_takes_the_layer_and_one_expert(arch, pairs, monkeypatch):
    model = open_pair(pairs(arch, dtype=torch.bfloat16, **MANY[arch])).models["base"]
    opened = type(model).opened
    monkeypatch.setattr(type(model), "opened", lambda m, f, k: CountsReads(opened(m, f, k), k, Ledger()))
    layer = model.n_layers - 1  # deepseek's first is dense
    with Live(CPU) as seen:
        model.load(("layer", layer))
    size = model.group_bytes(("layer", layer))
    assert size <= seen.peak <= size + expert_bytes(model, layer)
    assert model.ledger.peak == size


@pytest.mark.parametrize("arch", MOE)
def test_in_place_or_by_the_library_the_weights_are_the_same(arch, pairs, monkeypatch, caplog):
    paths = pairs(arch, **MANY[arch])
    want = AutoModelForCausalLM.from_pretrained(paths.sft, dtype="auto").state_dict()
    ours = open_pair(paths).models["sft"]
    monkeypatch.setattr(borrowed, "MergeModulelist", type("Unknown", (), {}))
    with caplog.at_level(logging.INFO, logger="capture.checkpoint"):
        theirs = open_pair(paths).models["sft"]
    assert "takes more memory: MergeModulelist" in caplog.text
    for model in (ours, theirs):
        for group in model.groups():
            model.load(group)
        for name, tensor in want.items():
            assert torch.equal(tensor, model.model.state_dict()[name]), name
    sizes = [ours.group_bytes(g) for g in ours.groups()]
    assert ours.ledger.peak == sum(sizes)
    assert theirs.ledger.peak > sum(sizes)  # what the library holds meanwhile is counted


def test_experts_of_many_digits_keep_their_order(pairs):
    """Key 10 comes after key 9, not after key 1."""
    paths = pairs("mixtral", num_local_experts=12)
    want = AutoModelForCausalLM.from_pretrained(paths.base, dtype="auto")
    model = open_pair(paths).models["base"]
    model.load(("layer", 0))
    assert torch.equal(model.layers[0].mlp.experts.gate_up_proj, want.model.layers[0].mlp.experts.gate_up_proj)


def test_a_missing_expert_is_told(pairs, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    from capture.errors import CheckpointError

    shutil.copytree(pairs("mixtral").base, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj' has shape \(3, 48, 80\).*\(4, 48, 80\)"
    ):
        open_pair(tiny.PairPaths(tmp_path, tmp_path, tmp_path))


class Stored:
    """A tensor behind the protocol of a safetensors slice."""

    def __init__(self, tensor):
        self.tensor = tensor

    def get_shape(self):
        return list(self.tensor.shape)

    def get_dtype(self):
        return "F32"

    def __getitem__(self, index):
        return self.tensor[index]


def place(shape):
    return Place(torch.Size(shape), torch.float32, torch.device("cpu"), lambda s, _: tuple(slice(0, n) for n in s))


def test_columns_are_laid_one_behind_the_other():
    a, b = torch.randn(3, 4), torch.randn(2, 4)
    tensors = {"a": Stored(a), "b": Stored(b)}
    recipe = Recipe((Part("f", "a", column=0), Part("f", "b", column=1)), axis=0)
    made = assemble(recipe, place((5, 4)), lambda _, key: tensors[key], Ledger())
    assert torch.equal(made, torch.cat([a, b]))


def test_columns_that_do_not_fill_the_weight_are_refused():
    tensors = {"a": Stored(torch.randn(3, 4)), "b": Stored(torch.randn(2, 4))}
    recipe = Recipe((Part("f", "a", column=0), Part("f", "b", column=1)), axis=0)
    for rows in (4, 6):
        with pytest.raises(Misshapen):
            assemble(recipe, place((rows, 4)), lambda _, key: tensors[key], Ledger())


def test_a_walk_reads_every_expert_once(pairs):
    pair = open_pair(pairs("qwen3_moe"))
    walk(pair, tiny.random_ids(2, 9).tolist(), mode="streamed")
    reads = pair.models["base"].ledger.reads
    assert {n for k, n in reads.items() if "experts" in k} == {24 * 48 * 4}
