"""Sizes from a checkpoint's keys and shapes: which layer, which group, how many bytes in memory."""

from __future__ import annotations

import pytest

from capture.errors import CheckpointError, UnsupportedModelError
from capture.footprint import FP8_STRIP
from cluster.plan_sizes import sizes_of

CONFIG = {"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 10}


def found(tensors, dtype="auto", **config):
    return sizes_of("m", tensors, CONFIG | config, dtype, source="hub", download_bytes=None)


def layers(prefix="model.layers", n=2, kind="BF16"):
    return {f"{prefix}.{i}.mlp.up_proj.weight": (kind, (8, 4)) for i in range(n)}


ENDS = {
    "model.embed_tokens.weight": ("BF16", (10, 4)),
    "lm_head.weight": ("BF16", (10, 4)),
    "model.norm.weight": ("BF16", (4,)),
}


def test_groups_are_counted_in_the_dtype_of_memory():
    sizes = found(ENDS | layers(), dtype="float32")
    assert (sizes.stored, sizes.dtype) == ("bfloat16", "float32")
    assert sizes.weights.layers == (128, 128)
    assert (sizes.weights.embedding, sizes.weights.head, sizes.weights.rest) == (160, 160, 16)
    assert sizes.read_bytes == sizes.download_bytes == 2 * (40 + 40 + 4 + 64)


def test_layers_beyond_the_config_are_never_loaded_but_downloaded():
    sizes = found(ENDS | layers(n=3))
    assert len(sizes.weights.layers) == 2
    assert sizes.download_bytes - sizes.read_bytes == 2 * 32


def test_scales_of_float8_weights_are_read_and_not_kept():
    tensors = ENDS | layers(kind="F8_E4M3") | {"model.layers.0.mlp.up_proj.weight_scale_inv": ("F32", (1, 1))}
    sizes = found({k: v if "layers" in k else ("BF16", v[1]) for k, v in tensors.items()}, num_hidden_layers=2)
    assert sizes.weights.layers == (64, 64)
    assert sizes.read_bytes == 2 * 84 + 64 + 4
    only = found({k: ("F8_E4M3", shape) for k, (_, shape) in tensors.items()})
    assert (only.stored, only.dtype) == ("float8", "bfloat16")
    assert only.weights.loading == ((1 + 4) * FP8_STRIP,) * 2, "a strip as stored and in float32"


def test_the_stored_dtype_is_that_of_most_elements_and_not_of_most_tensors():
    small = {f"model.layers.0.{name}_norm.weight": ("F32", (4,)) for name in "abcd"}
    sizes = found(ENDS | layers() | small)
    assert (sizes.stored, sizes.weights.loading, sizes.weights.fused) == ("bfloat16", (), False)


def test_experts_count_in_full_in_memory_and_in_part_in_work():
    tensors = ENDS | {
        f"model.layers.{i}.mlp.experts.{e}.up_proj.weight": ("BF16", (8, 4)) for i in range(2) for e in range(4)
    }
    sizes = found(tensors, num_local_experts=4, num_experts_per_tok=1)
    assert sizes.weights.layers == (256, 256)
    assert sizes.active == (32, 32)
    assert sizes.weights.fused
    assert sizes.weights.matrix == 64


def test_norms_and_the_gates_of_experts_stand_whole_on_every_gpu():
    tensors = ENDS | layers() | {
        "model.layers.0.input_layernorm.weight": ("BF16", (4,)),
        "model.layers.1.mlp.gate.weight": ("BF16", (3, 4)),
        "model.layers.1.mlp.gate_proj.weight": ("BF16", (8, 4)),
        "model.layers.1.self_attn.q_proj.weight": ("BF16", (4, 4)),
    }  # fmt: skip
    assert found(tensors).weights.replicated == (8, 24)
    attention_too = found(tensors, model_type="deepseek_v3").weights
    assert attention_too.replicated == (8, 24 + 32)
    assert attention_too.layers == (64 + 8, 64 + 24 + 64 + 32)


def test_without_a_head_the_embedding_is_the_head():
    sizes = found({k: v for k, v in ENDS.items() if "lm_head" not in k} | layers())
    assert sizes.weights.tied
    assert (sizes.weights.embedding, sizes.weights.head) == (80, 0)


def test_a_tied_head_that_is_stored_too_counts_once():
    sizes = found(ENDS | layers(), tie_word_embeddings=True)
    assert sizes.weights.tied
    assert (sizes.weights.embedding, sizes.weights.head) == (80, 0)
    assert sizes.parameters == 40 + 4 + 64
    assert sizes.weights.total == 2 * sizes.parameters
    assert found(ENDS | layers()).parameters == 40 + 40 + 4 + 64


def test_what_old_checkpoints_hold_and_transformers_makes_anew_is_downloaded_and_not_read():
    anew = {"model.layers.0.attn.bias": ("U8", (9, 9)), "model.layers.1.rotary_emb.inv_freq": ("F32", (4,))}
    plain, sizes = found(ENDS | layers()), found(ENDS | layers() | anew)
    assert sizes.download_bytes == plain.download_bytes + 81 + 16
    assert (sizes.read_bytes, sizes.parameters, sizes.weights) == (plain.read_bytes, plain.parameters, plain.weights)


def test_a_routers_correction_stays_float32_and_is_no_parameter():
    sizes = found(ENDS | layers() | {"model.layers.0.mlp.gate.e_score_correction_bias": ("F32", (5,))})
    assert sizes.weights.layers == (64 + 20, 64)
    assert sizes.parameters == found(ENDS | layers()).parameters


def test_heads_are_as_wide_as_the_config_says_and_else_share_the_hidden_size():
    assert (found(ENDS | layers()).head_dim, found(ENDS | layers()).kv_heads) == (2, 2)
    assert found(ENDS | layers(), head_dim=8, num_key_value_heads=1).head_dim == 8
    assert found(ENDS | layers(), num_key_value_heads=1).kv_heads == 1
    assert found(ENDS | layers(), qk_nope_head_dim=5, qk_rope_head_dim=2).head_dim == 7


def test_numbers_inside_a_layer_are_not_taken_for_layers():
    tensors = ENDS | {f"model.layers.{i}.blocks.{j}.w": ("BF16", (2, 2)) for i in range(2) for j in range(2)}
    assert found(tensors).weights.layers == (16, 16)


@pytest.mark.parametrize("prefix", ["h", "transformer.h", "model.decoder.layers"])
def test_layers_are_found_wherever_they_stand(prefix):
    assert found(ENDS | layers(prefix)).weights.layers == (64, 64)


def test_a_checkpoint_without_the_layers_of_its_config_is_refused():
    with pytest.raises(UnsupportedModelError, match="no list of 2 decoder layers"):
        found(ENDS | layers(n=1))


def test_a_config_without_a_size_is_refused_by_the_sizes_name():
    with pytest.raises(CheckpointError, match="no hidden_size"):
        sizes_of("m", ENDS, {"model_type": "x"}, "auto", source="hub", download_bytes=None)


def test_a_dtype_that_nothing_can_read_is_named():
    with pytest.raises(CheckpointError, match="F4"):
        found(ENDS | layers(kind="F4"))
