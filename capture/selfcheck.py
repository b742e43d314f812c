"""A self-check that runs with every capture: on a tiny model of the same class, walking layer by layer through recorded
arguments must give, bit for bit, what the model's own forward gives.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from capture.checkpoint import StreamedModel
from capture.errors import SelfCheckError, UnsupportedModelError
from capture.replay import record, run_layer, run_tail

log = logging.getLogger(__name__)

# What a config is cut to. Keys that a config lacks are skipped; ratios that architectures rely on stay whole numbers.
TINY: dict[str, Any] = {
    "num_hidden_layers": 2, "n_layer": 2, "hidden_size": 64, "n_embd": 64, "intermediate_size": 96, "ffn_dim": 96,
    "n_inner": 96, "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97,
    "moe_intermediate_size": 32, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "word_embed_proj_dim": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "sliding_window": 4, "layer_types": 2, "query_pre_attn_scalar": 16, "rotary_dim": 8,
    "d_model": 64, "n_layers": 2, "num_layers": 2, "n_heads": 4, "layers_block_type": 2, "attention_hidden_size": 128,
    "attention_head_dim": 32,
    # Mamba-2's: heads x their width = expand x hidden size
    "num_heads": 8, "mamba_n_heads": 8, "n_mamba_heads": 8, "mamba_d_head": 16, "mamba_headdim": 16, "mamba_d_ssm": 128,
    "expand": 2, "mamba_expand": 2,
}  # fmt: skip
KINDS = ("layer_types", "layers_block_type")  # of which each is kept once
# What is cut where a class does not take the above.
SHALLOW = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "vocab_size",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    *KINDS,
)
MOST_WEIGHTS = 1 << 26  # of a model that is made to be checked


def tiny_config(config: Any, keys: Collection[str] = tuple(TINY)) -> Any:
    """A copy of a config, cut to two narrow layers; everything that is not a size stays. keys: what is cut, of TINY."""
    small = copy.deepcopy(config)
    for key in keys:
        value = TINY[key]
        current = getattr(small, key, None)
        if current is None or key in getattr(small, "attribute_map", {}):
            continue
        if key in KINDS:
            kinds = list(dict.fromkeys(current))
            value = (kinds * 2)[:2]
        if key == "num_key_value_heads" and getattr(config, "num_attention_heads", None) == current:
            value = 4
        with contextlib.suppress(AttributeError):  # derived from others, as Mamba's layer_types
            setattr(small, key, value)
    if getattr(small, "hybrid_layer_ids", None) is not None:
        small.hybrid_layer_ids = [i for i, kind in enumerate(small.layers_block_type) if kind == "hybrid"]
    if (
        "head_dim" in keys and getattr(small, "qk_rope_head_dim", None) is not None
    ):  # latent attention rotates only this part of a head
        small.head_dim, small.qk_head_dim = small.qk_rope_head_dim, small.qk_nope_head_dim + small.qk_rope_head_dim
    return small


class _Whole:
    """A fully loaded model behind the few attributes of StreamedModel that the replay needs."""

    def __init__(self, model: Any, layers_name: str) -> None:
        self.model, self.base = model, model.base_model
        self.layers: nn.ModuleList = model.get_submodule(layers_name)
        self.n_layers = len(self.layers)


def replay_check(streamed: StreamedModel) -> str:
    """Build the tiny model, run it both ways, compare; where this class cannot be so narrow, a model of two layers as wide as the
    real one's. Returns "bitwise", or why it could not be run.

    Raises SelfCheckError where the two differ: the layers of this class are not what the replay takes them for.
    """
    reason = ""
    for keys in (tuple(TINY), SHALLOW):
        state = torch.random.get_rng_state()
        try:
            torch.manual_seed(0)
            plain, hidden = _both_ways(streamed, tiny_config(streamed.model.config, keys))
        except UnsupportedModelError:
            raise
        except Exception as error:  # a size that this class cannot be cut to says nothing about the real model
            reason = reason or f"{type(error).__name__}: {error}"
            continue
        finally:
            torch.random.set_rng_state(state)
        if not torch.equal(hidden, plain):
            raise SelfCheckError(
                f"{type(streamed.model).__name__}: layer by layer differs from the model's own forward by "
                f"{float((hidden - plain).abs().max()):.3g} on a tiny model of this class; this architecture is not supported"
            )
        return "bitwise"
    reason = f"not run: a tiny {type(streamed.model).__name__} could not be made ({reason})"
    log.warning("self-check of the replay %s", reason)
    return reason


def _both_ways(streamed: StreamedModel, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states [2, 6, D] of a model with this config and random weights: by its own forward, and layer by layer."""
    with torch.device("meta"):
        n_weights = sum(p.numel() for p in type(streamed.model)(config).parameters())
    if n_weights > MOST_WEIGHTS:
        raise ValueError(f"it would have {n_weights} weights")
    with torch.device("cpu"):
        model = type(streamed.model)(config).float().eval()
    whole = _Whole(model, streamed.layers_name)
    ids = torch.arange(3, 15).reshape(2, 6) % config.get_text_config().vocab_size
    with torch.no_grad():
        plain = model.base_model(input_ids=ids, use_cache=False)[0]
        recording = record(whole, model.get_input_embeddings()(ids))  # type: ignore[arg-type]
    hidden = recording.entry_BTD
    for layer, call in zip(whole.layers, recording.calls, strict=True):
        hidden = run_layer(layer, hidden, call)
    return plain, run_tail(recording.tail, hidden)
