"""Opening on meta and loading by group: what is borrowed from transformers does what this project needs of it."""

import json
import shutil

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from capture import borrowed, stored
from capture.checkpoint import EMBEDDING, HEAD, REST, StreamedModel, layers_equal
from capture.errors import CheckpointError, UnsupportedModelError
from capture.ledger import Ledger
from capture.replay import record

CPU = torch.device("cpu")


def opened(path, *, dtype="auto", ledger=None, **model_kwargs):
    return StreamedModel(
        str(path), label="base", dtype=dtype, device=CPU, model_kwargs=model_kwargs, ledger=ledger or Ledger()
    )


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_every_weight_and_buffer_is_what_from_pretrained_loads(arch, pairs):
    want = AutoModelForCausalLM.from_pretrained(pairs(arch).sft, dtype="auto")
    model = opened(pairs(arch).sft)
    assert all(p.is_meta for p in model.model.parameters())
    for group in model.groups():
        model.load(group)
    assert want.state_dict().keys() == model.model.state_dict().keys()
    for name, tensor in want.state_dict().items():
        assert torch.equal(tensor, model.model.state_dict()[name]), name
    for (name, buffer), (_, ours) in zip(want.named_buffers(), model.model.named_buffers(), strict=True):
        assert torch.equal(buffer, ours), name


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "mixtral"])
def test_freeing_a_group_puts_it_back_on_meta_and_off_the_ledger(arch, pairs):
    ledger = Ledger()
    model = opened(pairs(arch).base, ledger=ledger)
    for group in model.groups():
        model.load(group)
    loaded = {id(p): p for p in model.model.state_dict(keep_vars=True).values()}
    assert ledger.live == sum(p.nbytes for p in loaded.values())
    assert ledger.live == sum(model.group_bytes(g) for g in model.groups())
    for group in model.groups():
        model.free(group)
    assert ledger.live == 0
    assert all(p.is_meta for p in model.model.parameters())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "deepseek_v3"])
def test_every_checkpoint_byte_is_read_once(arch, pairs):
    ledger = Ledger()
    model = opened(pairs(arch).base, ledger=ledger)
    for group in model.groups():
        model.load(group)
    stored = load_file(pairs(arch).base / "model.safetensors")
    assert ledger.reads == {f"base:{key}": tensor.nbytes for key, tensor in stored.items()}


def test_tied_weights_are_one_parameter_and_come_and_go_together(pairs):
    model = opened(pairs("gemma2").base)
    model.load(EMBEDDING)
    model.load(HEAD)
    assert model.tied
    assert model.head.weight is model.embedding.weight
    model.free(EMBEDDING)
    assert model.head.weight.is_meta


def test_a_head_stored_beside_a_tied_embedding_is_tied_only_where_both_are_equal(tmp_path):
    paths = tiny.make_pair("llama", tmp_path, tie=True)
    file = paths.base / "model.safetensors"
    tensors = load_file(file)
    other = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors | {"lm_head.weight": other}, file, metadata={"format": "pt"})
    model = opened(paths.base)
    assert not model.tied
    model.load(EMBEDDING)
    model.load(HEAD)
    assert torch.equal(model.head_weight, other)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, metadata={"format": "pt"}
    )
    model = opened(paths.base)
    model.load(EMBEDDING)
    assert model.head.weight is model.embedding.weight


def test_dtype_is_the_checkpoints_own_or_the_one_asked_for(tmp_path):
    paths = tiny.make_pair("llama", tmp_path, dtype=torch.bfloat16)
    for asked, got in (("auto", torch.bfloat16), ("float32", torch.float32)):
        model = opened(paths.base, dtype=asked)
        model.load(("layer", 0))
        assert model.layers[0].self_attn.q_proj.weight.dtype == got


def test_a_sharded_checkpoint_loads_like_a_whole_one(tmp_path, pairs):
    sharded = tiny.make_pair("mixtral", tmp_path, sharded=True)
    assert len(list(sharded.base.glob("*.safetensors"))) > 2
    a, b = opened(sharded.base), opened(pairs("mixtral").base)
    for group in a.groups():
        a.load(group)
        b.load(group)
    assert layers_equal(a, b, a.groups())


@pytest.mark.parametrize("gone", [False, True])
def test_files_that_are_replaced_or_removed_while_they_are_in_use_are_read_as_they_were(gone, tmp_path):
    paths = tiny.make_pair("llama", tmp_path, sharded=True)
    want = {key: tensor for file in paths.base.glob("*.safetensors") for key, tensor in load_file(file).items()}
    model = opened(paths.base)
    model.load(REST)
    for file in paths.base.glob("*.safetensors"):
        file.unlink()
        if not gone:
            shutil.copy(paths.sft / file.name, file)
    for group in model.groups():
        model.load(group)
    state = model.model.state_dict()
    assert [key for key, tensor in want.items() if not torch.equal(state[key], tensor)] == []


def test_weights_that_no_addresses_are_left_for_come_the_librarys_way(pairs, monkeypatch):
    def full(*_):
        raise RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)")

    monkeypatch.setattr(stored, "_mapped", lambda file: None)
    a = opened(pairs("llama").base)
    monkeypatch.undo()
    monkeypatch.setattr(torch.UntypedStorage, "from_file", full)
    assert stored._mapped(str(next(pairs("llama").base.glob("*.safetensors")))) is None
    monkeypatch.undo()
    b = opened(pairs("llama").base)
    for group in a.groups():
        a.load(group)
        b.load(group)
    assert layers_equal(a, b, a.groups())


def test_a_missing_weight_is_named(tmp_path):
    paths = tiny.make_pair("llama", tmp_path)
    file = paths.base / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the weight 'model\.layers\.2\.mlp\.up_proj\.weight'"):
        opened(paths.base).load(("layer", 2))


def test_a_misshapen_weight_is_named_with_both_shapes(tmp_path):
    paths = tiny.make_pair("llama", tmp_path)
    config = json.loads((paths.base / "config.json").read_text())
    (paths.base / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(CheckpointError, match=r"gate_proj.*\(80, 48\).*\(96, 48\)"):
        opened(paths.base).load(("layer", 0))


def test_a_directory_without_weights_is_refused(tmp_path, pairs):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(pairs("llama").base / name, tmp_path)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        opened(tmp_path)


def test_another_version_of_transformers_is_refused(monkeypatch, pairs):
    monkeypatch.setattr(borrowed.transformers, "__version__", "6.0.0")
    with pytest.raises(UnsupportedModelError, match=r"transformers 6\.0\.0 is installed; capture needs >= 5\.23"):
        opened(pairs("llama").base)


def test_from_pretrained_is_itself_again_after_an_error(tmp_path):
    before = transformers.PreTrainedModel.__dict__["_load_pretrained_model"]
    with pytest.raises(CheckpointError):
        opened(tmp_path)
    assert transformers.PreTrainedModel.__dict__["_load_pretrained_model"] is before


def test_groups_hold_every_tensor_once(pairs):
    model = opened(pairs("gpt2").base)
    assert "transformer.wpe.weight" in model.names(REST)
    assert "transformer.h.3.mlp.c_fc.weight" in model.names(("layer", 3))
    assert "lm_head.weight" in model.names(EMBEDDING)  # tied
    names = [n for g in model.groups() for n in model.names(g)]
    assert sorted(names) == sorted(model.model.state_dict())


def test_a_pickled_checkpoint_is_loaded_whole_and_never_freed(tmp_path, pairs):
    paths = tiny.make_pair("llama", tmp_path)
    torch.save(load_file(paths.base / "model.safetensors"), paths.base / "pytorch_model.bin")
    (paths.base / "model.safetensors").unlink()
    ledger = Ledger()
    model = StreamedModel(
        str(paths.base), label="base", dtype="auto", device=CPU, model_kwargs={}, ledger=ledger, whole=True
    )
    safe = opened(pairs("llama").base)
    for group in safe.groups():
        safe.load(group)
        model.load(group)
    assert layers_equal(model, safe, safe.groups())
    for group in model.groups():
        model.free(group)
    assert not any(p.is_meta for p in model.model.parameters())
    assert ledger.live == sum(model.group_bytes(g) for g in model.groups())


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_pickled_checkpoint_that_lacks_a_weight_is_named_and_the_weight_not_made_up(name, tmp_path):
    paths = tiny.make_pair("llama", tmp_path, tie=False)
    weights = load_file(paths.base / "model.safetensors")
    del weights[name]
    torch.save(weights, paths.base / "pytorch_model.bin")
    (paths.base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"base model '.*' lacks the weight '{name}'"):
        StreamedModel(
            str(paths.base), label="base", dtype="auto", device=CPU, model_kwargs={}, ledger=Ledger(), whole=True
        )


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("gemma3n_text", {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "laurel_rank": 4,
                          "num_kv_shared_layers": 0, "head_dim": 8}),
        ("deepseek_v4", {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}),
    ],
)  # fmt: skip
def test_several_residual_streams_are_refused(model_type, more, tmp_path):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 97,
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **more)).save_pretrained(tmp_path)
    model = opened(tmp_path)
    model.load(EMBEDDING)
    model.load(REST)
    with pytest.raises(
        UnsupportedModelError, match=r"residual of shape .* several residual streams cannot be compared"
    ):
        record(model, torch.randn(1, 3, 32))
