"""What an entry's own keys make of a plan: `tensor_parallel` fixes the GPUs, `model_kwargs.quantization_config` the bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from capture.degrees import degree_error
from capture.entries import Entry
from capture.errors import ConfigError, UnsupportedModelError
from capture.footprint import DTYPE_BYTES, MODES
from capture.quantize import KEY, Quantization, asked_for
from cluster.offers import COUNTS
from cluster.plan_sizes import ModelSizes

# Bytes of a quantized weight. A 4-bit one has a float32 scale for every 64 beside it; scales of 8-bit ones, one a row, are nothing.
FOUR_BIT, EIGHT_BIT = 0.5 + 4 / 64, 1.0


@dataclass(frozen=True)
class Asked:
    """pair: the models with their bytes as the entry's keys make them. degree: the GPUs that it must be split over, None where
    that is open. modes: those that are left. notes: what of it people should know."""

    pair: tuple[ModelSizes, ...]
    modes: tuple[str, ...] = tuple(MODES)
    degree: int | None = None
    notes: tuple[str, ...] = ()

    def mode(self, entry: Entry) -> str:
        """The entry's mode, or the only one that is left of `auto`."""
        return self.modes[0] if len(self.modes) == 1 else entry.mode


def as_asked(entry: Entry, pair: Sequence[ModelSizes]) -> Asked:
    """What an entry asks for. pair: base and sft, or one where both are the same.

    Raises UnsupportedModelError where the models cannot be split as `tensor_parallel` says, with the degrees that would do;
    ConfigError where a model that is stored quantized is to be quantized.
    """
    models = tuple(pair)
    if asked_for(entry.model_kwargs) is not None:
        return _quantized(models, entry.model_kwargs[KEY])
    whole = entry.replicate_attention and entry.tensor_parallel != 1
    if entry.tensor_parallel not in (1, "auto"):
        _check(models, int(entry.tensor_parallel), whole)
    if whole:
        models = tuple(_with_whole_attention(m) for m in models)
    if entry.tensor_parallel in (1, "auto"):
        return Asked(models)
    degree = int(entry.tensor_parallel)
    said = f"tensor_parallel: {degree}: planned over {degree} GPUs of one machine only"
    return Asked(models, tuple(m for m in MODES if m != "sub-layer"), degree, (said,))


def fits_heads(model: ModelSizes, degree: int, whole_attention: bool) -> bool:
    """Whether a model can be split over so many GPUs. whole_attention: each holds all of the attention."""
    return _why_not(model, degree, whole_attention) is None


def _why_not(model: ModelSizes, degree: int, whole: bool) -> str | None:
    return degree_error(model.model_type, model.heads, model.kv_heads, degree, ffn=[model.ffn], whole_attention=whole)


def _check(pair: Sequence[ModelSizes], degree: int, whole: bool) -> None:
    for model in pair:
        why = _why_not(model, degree, whole)
        if why is not None:
            valid = ", ".join(str(n) for n in COUNTS if all(fits_heads(m, n, whole) for m in pair))
            remedy = f"tensor_parallel may be {valid}"
            if not whole and all(fits_heads(m, degree, True) for m in pair):
                remedy += "; or set replicate_attention: true, and every GPU holds the whole attention"
            raise UnsupportedModelError(
                f"tensor_parallel: {degree}: '{model.model}' cannot be split over {degree} GPUs: {why}; {remedy}"
            )


def _with_whole_attention(model: ModelSizes) -> ModelSizes:
    """The model where every GPU holds all of q, k, v and o."""
    matrices = 2 * (model.heads + model.kv_heads) * model.head_dim * model.hidden * DTYPE_BYTES[model.dtype]
    whole = model.weights.replicated or (0,) * model.n_layers
    alike = tuple(min(size, same + matrices) for size, same in zip(model.weights.layers, whole, strict=True))
    return replace(model, weights=replace(model.weights, replicated=alike))


def _quantized(pair: tuple[ModelSizes, ...], wanted: Mapping[str, Any]) -> Asked:
    """The pair with the matrices of its layers quantized: loaded whole, on one GPU."""
    if stored := next((m for m in pair if m.stored == "float8"), None):
        raise ConfigError(f"'{stored.model}' is stored quantized ({stored.stored}); remove model_kwargs.{KEY}")
    label = Quantization(str(wanted["quant_method"]), wanted).label
    each = _bytes_each(wanted)
    if each is None:
        said = f"{label}: bytes of a weight are not known; planned with weights as stored, an upper bound"
    else:
        bits = f"{8 * each:g} bits" + (" with scales" if each == FOUR_BIT else "")
        said = f"{label}: matrices of the layers at {bits} in memory, embedding and unembedding as they are"
        if any(m.weights.fused for m in pair):
            said += "; experts are not quantized: planned with layers as stored, an upper bound"
        pair = tuple(_smaller(m, each, label) for m in pair)
    return Asked(pair, ("resident",), 1, (f"{said}; mode resident on one GPU only",))


def _bytes_each(wanted: Mapping[str, Any]) -> float | None:
    """Bytes of one quantized weight in memory; None where its settings do not tell."""
    if wanted["quant_method"] == "bitsandbytes":
        return FOUR_BIT if wanted.get("load_in_4bit") else EIGHT_BIT
    kind = str(wanted.get("quant_type"))
    if kind.startswith("Int4"):
        return FOUR_BIT
    # before Int4 in other names: activations of 8 bits, whose weights some versions of torchao keep in a byte each
    return EIGHT_BIT if kind.startswith(("Int8", "Float8")) else None


def _smaller(model: ModelSizes, each: float, label: str) -> ModelSizes:
    """Norms, routers and fused experts, which are no linear layers, stay. One matrix at a time is there unquantized as well."""
    weights = model.weights
    kept = weights.layers if weights.fused else weights.replicated or (0,) * model.n_layers
    share = min(1.0, each / DTYPE_BYTES[model.dtype])
    layers = tuple(same + math.ceil((size - same) * share) for size, same in zip(weights.layers, kept, strict=True))
    loading = (weights.matrix,) * model.n_layers
    return replace(model, quantized=label, weights=replace(weights, layers=layers, loading=loading))
