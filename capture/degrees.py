"""Over how many GPUs of one machine a model can be split by transformers' tensor-parallel plans.

Checked against the plans of the installed transformers by tests/capture/test_degrees.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from capture.errors import UnsupportedModelError

# Types whose plan divides attention and feed-forward.
PLANNED = frozenset(
    {"cohere", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "nemotron", "olmo2", "phi3", "qwen2",
     "qwen3", "qwen3_moe"}
)  # fmt: skip
# Types whose plan divides the feed-forward (and experts) only; every GPU holds the whole attention.
REPLICATED_ATTENTION = frozenset({"deepseek_v3"})


def degree_error(model_type: str, heads: int, kv_heads: int, degree: int) -> str | None:
    """Why a model cannot be split over `degree` GPUs; None where it can.

    Query heads and key-value heads must both divide: a degree that does not ends in a reshape error at the first forward.
    """
    if degree == 1:
        return None
    if degree < 1:
        return f"{degree} GPUs"
    if model_type in REPLICATED_ATTENTION:
        return None if degree & (degree - 1) == 0 else f"its experts do not divide by {degree}"
    if model_type not in PLANNED:
        return f"no tensor-parallel plan is known for the model type '{model_type}'"
    for what, count in (("query heads", heads), ("key-value heads", kv_heads)):
        if count % degree:
            return f"its {count} {what} do not divide by {degree}"
    return None


def valid_degrees(model_type: str, heads: int, kv_heads: int, counts: Sequence[int] = (1, 2, 4, 8)) -> tuple[int, ...]:
    """Those of `counts` that the model can be split over; 1 always is one of them."""
    return tuple(n for n in counts if degree_error(model_type, heads, kv_heads, n) is None)


def check_degree(directory: str, degree: int, label: str) -> None:
    """Raise UnsupportedModelError where the checkpoint in `directory` cannot be split over `degree` GPUs; reads config.json."""
    if degree == 1:
        return
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    model_type = config.get("model_type", "")
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    kv_heads = config.get("num_key_value_heads") or heads
    if why := degree_error(model_type, heads, kv_heads, degree):
        valid = ", ".join(str(n) for n in valid_degrees(model_type, heads, kv_heads))
        raise UnsupportedModelError(
            f"{label} model '{directory}' cannot be shared among {degree} GPUs: {why}; tensor_parallel may be {valid}"
        )
