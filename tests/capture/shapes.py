"""The 18 models of configs/models.yaml as tiny configs: two layers, narrow, few experts, but each of its own shape family.

Kept true: the class, query heads for each key-value head, hidden size against heads x head_dim, feed-forward against hidden
size, tied or not, biases, norm epsilon, rotary base and scaling, sliding windows (none of the 18 uses one), router groups,
latent attention, and how the checkpoint is stored. What models.yaml does not say is general knowledge of these models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny import PairPaths, make_pair, store_in_fp8

FACTS = Path(__file__).parents[2] / "configs" / "models.yaml"
HEAD_DIM = 8

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip
_PLAIN_QWEN = {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 2}


def _rotary(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


# Beyond sizes, by type; then by model.
_BY_TYPE: dict[str, dict[str, Any]] = {
    "qwen2": _PLAIN_QWEN | _rotary(1e6) | {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    "llama": {"attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5, "rope_parameters": _LLAMA3,
              "max_position_embeddings": 131072},
    "mistral": _rotary(1e6) | {"sliding_window": None, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5, "max_position_embeddings": 4096,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "deepseek_v3": {
        "n_routed_experts": 16, "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "rope_interleave": True, "rms_norm_eps": 1e-6, "max_position_embeddings": 163840, "attention_bias": False,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0,
                            "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
    },
}  # fmt: skip
_BY_MODEL: dict[str, dict[str, Any]] = {
    "qwen-math-1.5b": _rotary(1e4) | {"max_position_embeddings": 4096},
    "qwen-math-7b": _rotary(1e4) | {"max_position_embeddings": 4096},
    "qwen-math-72b": _rotary(1e4) | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "minitron-8b": {"max_position_embeddings": 8192},
}
# What base and its instruct sibling say differently.
_BASE_ONLY = {"qwen-72b": {"rms_norm_eps": 1e-5}}


def facts() -> dict[str, dict[str, Any]]:
    """The records of models.yaml by name."""
    records = yaml.safe_load(FACTS.read_text(encoding="utf-8"))["models"]
    return {r["name"]: r for r in records}


def shape_of(record: dict[str, Any]) -> dict[str, Any]:
    """Config keys of the tiny sibling of one model."""
    heads, kv_heads = record["heads"], record["kv_heads"]
    per_group = heads // kv_heads
    kv = 4 if per_group == 1 else 2
    n_heads = per_group * kv
    latent = record["model_type"] == "deepseek_v3"
    width = n_heads * HEAD_DIM * (1 if latent else record["hidden"] / (heads * record["head_dim"]))
    hidden = max(16, round(width / 8) * 8)
    sizes = {
        "num_hidden_layers": 2, "hidden_size": hidden, "num_attention_heads": n_heads, "num_key_value_heads": kv,
        "intermediate_size": round(hidden * record["ffn"] / record["hidden"] / 8) * 8,
    }  # fmt: skip
    if not latent and record["model_type"] != "qwen2":
        sizes["head_dim"] = HEAD_DIM
    return sizes | _BY_TYPE[record["model_type"]] | _BY_MODEL.get(record["name"], {})


def make_shape(name: str, directory: Path) -> PairPaths:
    """The tiny sibling of one of the 18 pairs, stored as the real one is."""
    record = facts()[name]
    shape = shape_of(record)
    paths = make_pair(record["model_type"], directory, dtype=torch.bfloat16, tie=record["tied"], **shape)
    for key, value in _BASE_ONLY.get(name, {}).items():
        config = json.loads((paths.base / "config.json").read_text())
        (paths.base / "config.json").write_text(json.dumps(config | {key: value}))
    if record["stored"] == "float8":
        store_in_fp8(paths)
    return paths
