"""The shipped model facts: exact against models built without weights, and right about names."""

from __future__ import annotations

import pytest

from capture.config import load_config
from capture.errors import CheckpointError
from cluster.plan_facts import CONFIGS, facts, sizes_from_facts

# Published sizes, GB of 10^9 bytes: one checkpoint as stored, the largest layer as stored or (float8) in bfloat16.
PUBLISHED = {
    "qwen-0.5b": (0.988, 0.0298), "qwen-1.5b": (3.087, 0.0936), "qwen-3b": (6.172, 0.154), "qwen-7b": (15.23, 0.466),
    "qwen-14b": (29.54, 0.551), "qwen-32b": (65.53, 0.975), "qwen-72b": (145.41, 1.755), "qwen-math-1.5b": (3.087, 0.0936),
    "qwen-math-7b": (15.23, 0.466), "qwen-math-72b": (145.41, 1.755), "llama-3.1-8b": (16.06, 0.436),
    "llama-3.1-70b": (141.1, 1.711), "llama-3.1-405b": (811.7, 6.375), "deepseek-v3": (688.6, 23.01),
    "deepseek-v3.1": (688.6, 23.01), "mistral-nemo-12b": (24.50, 0.545), "minitron-8b": (16.83, 0.367),
    "nemotron-340b": (682.1, 6.908),
}  # fmt: skip
# config keys of one model of each class, beside those that the facts give
MORE = {
    "qwen-0.5b": {},
    "llama-3.1-8b": {"head_dim": 128},
    "minitron-8b": {"head_dim": 128},
    "nemotron-340b": {"head_dim": 192},
    "deepseek-v3": {
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "num_mtp_layers": 0,
    },
}  # fmt: skip


def record(name):
    return next(r for r in facts() if r["name"] == name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_within_one_per_cent_of_the_published(name):
    repos = record(name)["repos"]
    for owner in ("base", "sft"):
        sizes = sizes_from_facts(repos[owner], "bfloat16")
        checkpoint, layer = PUBLISHED[name]
        assert sizes.download_bytes == pytest.approx(checkpoint * 1e9, rel=0.01)
        assert max(sizes.weights.layers) == pytest.approx(layer * 1e9, rel=0.01)
        assert sizes.weights.total == 2 * sizes.parameters
        assert sizes.n_layers == record(name)["layers"]


@pytest.mark.parametrize("name", MORE)
def test_layers_and_ends_are_those_of_the_model_that_transformers_builds(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    r = record(name)
    runs = r["layer_runs"]
    few = sum(count for count, *_ in runs[:-1]) + 1
    config = AutoConfig.for_model(
        r["model_type"], hidden_size=r["hidden"], num_hidden_layers=few, num_attention_heads=r["heads"],
        num_key_value_heads=r["kv_heads"], intermediate_size=r["ffn"], vocab_size=r["vocab"], tie_word_embeddings=r["tied"],
        **MORE[name],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counts = {"embedding": 0, "head": 0, "rest": 0}
    layers = [0] * few
    for key, p in model.named_parameters():
        if ".layers." in key:
            layers[int(key.split(".layers.")[1].split(".")[0])] += p.numel()
        else:
            counts["embedding" if "embed_tokens" in key else "head" if "lm_head" in key else "rest"] += p.numel()
    assert counts == {group: r["elements"][group] for group in counts}
    assert layers == [size for count, size, *_ in runs[:-1] for _ in range(count)] + [runs[-1][1]]
    assert r["parameters"] == sum(counts.values()) + sum(count * size for count, size, *_ in runs)


def test_every_pair_of_the_hardware_table_is_known_by_its_facts():
    config = load_config(CONFIGS / "hardware_table.yaml", {})
    entries = config.entries()
    assert [e.name for e in entries] == list(PUBLISHED)
    for entry in entries:
        assert {"base": entry.base_model, "sft": entry.sft_model} == record(entry.name)["repos"]
        estimate = next(s.estimated_vram_gb for s in config.settings.model_sweep if s.name == entry.name)
        assert estimate == pytest.approx(4 * record(entry.name)["parameters"] / 1e9, rel=0.03)


@pytest.mark.parametrize("model", ["nvidia/Mistral-NeMo-12B-Base", "nvidia/Nemotron-4-340B-Instruct"])
def test_a_repository_in_another_format_is_refused_with_one_that_can_be_loaded(model):
    with pytest.raises(CheckpointError, match="cannot load; use "):
        sizes_from_facts(model, "auto")


def test_a_float8_checkpoint_is_bfloat16_in_memory_and_smaller_on_the_wire():
    sizes = sizes_from_facts("deepseek-ai/DeepSeek-V3", "auto")
    assert (sizes.stored, sizes.dtype) == ("float8", "bfloat16")
    assert sizes.weights.total == 1_342_052_808_704
    assert sizes.read_bytes == 673_150_611_808 < sizes.download_bytes < sizes.weights.total


def test_an_unknown_model_is_not_guessed():
    assert sizes_from_facts("nobody/nothing", "auto") is None
