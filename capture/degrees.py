"""Over how many GPUs of one machine a model can be split by transformers' tensor-parallel plans.

Checked against the plans of the installed transformers by tests/capture/test_degrees.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from capture.errors import ConfigError, UnsupportedModelError

# Types whose plan divides attention and feed-forward.
PLANNED = frozenset(
    {"cohere", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "nemotron", "olmo2", "phi3", "qwen2",
     "qwen3", "qwen3_moe"}
)  # fmt: skip
# Types whose plan divides the feed-forward (and experts) only; every GPU holds the whole attention.
REPLICATED_ATTENTION = frozenset({"deepseek_v3"})


def degree_error(
    model_type: str, heads: int, kv_heads: int, degree: int, *, ffn: Sequence[int] = (), whole_attention: bool = False
) -> str | None:
    """Why a model cannot be split over `degree` GPUs; None where it can.

    Query heads and key-value heads must both divide: a degree that does not ends in a reshape error at the first forward.
    whole_attention: every GPU holds the whole attention, so that only the widths of the feed-forward, `ffn`, must divide.
    """
    if degree == 1:
        return None
    if degree < 1:
        return f"{degree} GPUs"
    if model_type in REPLICATED_ATTENTION:
        return None if degree & (degree - 1) == 0 else f"its experts do not divide by {degree}"
    if model_type not in PLANNED:
        return f"no tensor-parallel plan is known for the model type '{model_type}'"
    if whole_attention:
        counts = [("feed-forward columns", width) for width in ffn]
    else:
        counts = [("query heads", heads), ("key-value heads", kv_heads)]
    for what, count in counts:
        if count % degree:
            return f"its {count} {what} do not divide by {degree}"
    return None


def valid_degrees(
    model_type: str,
    heads: int,
    kv_heads: int,
    counts: Sequence[int] = (1, 2, 4, 8),
    *,
    ffn: Sequence[int] = (),
    whole_attention: bool = False,
) -> tuple[int, ...]:
    """Those of `counts` that the model can be split over; 1 always is one of them."""
    return tuple(
        n
        for n in counts
        if degree_error(model_type, heads, kv_heads, n, ffn=ffn, whole_attention=whole_attention) is None
    )


def check_mode(mode: str, tensor_parallel: int | str, where: str) -> None:
    """Raise ConfigError where a mode cannot be shared among GPUs. where: the file and the entry."""
    if mode == "sub-layer" and isinstance(tensor_parallel, int) and tensor_parallel > 1:
        raise ConfigError(
            f"{where}: mode: sub-layer and tensor_parallel: {tensor_parallel} exclude each other, as matrices are read whole; set "
            "tensor_parallel: 1, or mode: streamed-2, which needs least of the modes that several GPUs share"
        )


def check_degree(directory: str, degree: int, label: str, *, whole_attention: bool = False) -> None:
    """Raise UnsupportedModelError where the checkpoint in `directory` cannot be split over `degree` GPUs; reads config.json.

    The error names the degrees that would do, and the way out where every GPU holds the whole attention.
    """
    if degree == 1:
        return
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    model_type = config.get("model_type", "")
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    kv_heads = config.get("num_key_value_heads") or heads
    ffn = [config[key] for key in ("intermediate_size", "moe_intermediate_size") if config.get(key)]
    why = degree_error(model_type, heads, kv_heads, degree, ffn=ffn, whole_attention=whole_attention)
    if why is None:
        return
    valid = ", ".join(
        str(n) for n in valid_degrees(model_type, heads, kv_heads, ffn=ffn, whole_attention=whole_attention)
    )
    remedy = f"tensor_parallel may be {valid}"
    if not whole_attention and degree_error(model_type, heads, kv_heads, degree, ffn=ffn, whole_attention=True) is None:
        remedy += "; or set replicate_attention: true, and every GPU holds the whole attention"
    raise UnsupportedModelError(f"{label} model '{directory}' cannot be shared among {degree} GPUs: {why}; {remedy}")


def check_spans(directory: str, workers: int) -> None:
    """Raise UnsupportedModelError where the checkpoint in `directory` has fewer layers than ranges are asked for."""
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    n_layers = config.get("num_hidden_layers") or config.get("n_layer") or config.get("num_layers")
    if n_layers and workers > n_layers:
        raise UnsupportedModelError(
            f"spans.workers is {workers} and the models have {n_layers} layers; set it to {n_layers} or less"
        )


def whole_attention_plan(directory: str) -> dict[str, str]:
    """Changes to a model's tensor-parallel plan that leave its attention undivided: module or weight -> "replicate".

    The names are those of the plan itself, so that nothing is written down here for any architecture.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.from_pretrained(directory)
    prefix = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].base_model_prefix
    plan = config.base_model_tp_plan or {}
    return {f"{prefix}.{name}": "replicate" for name in plan if any(part.endswith("attn") for part in name.split("."))}
