"""A model's sizes from the headers of its checkpoint and its config.json: what a plan needs to know of it. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from capture.degrees import REPLICATED_ATTENTION
from capture.errors import CheckpointError, UnsupportedModelError
from capture.footprint import DTYPE_BYTES, FP8_STRIP, ModelBytes, ffn_width

# dtypes as safetensors headers spell them
STORED = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8",
    "F8_E5M2": "float8",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_STORED_BYTES = DTYPE_BYTES | {"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_HEADS = ("lm_head", "embed_out")
# What old checkpoints hold and transformers makes anew.
_IGNORED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
_KEPT_FLOAT32 = ("e_score_correction_bias",)


@dataclass(frozen=True)
class ModelSizes:
    """One checkpoint, as a plan sees it.

    source: models.yaml, hub, cache or directory. Bytes: `download_bytes` of its weight files from the hub (0 for a
    directory), `read_bytes` of what a capture reads of them, `weights` as they stand in memory
    in `dtype`. active: elements of each layer that one token uses (all of them but the experts it is not sent to). ffn: the
    width of the feed-forward of one token. gated: "none", or how access is given. quantized: how, where an entry asks for weights of
    few bits (cluster/plan_asked.py).
    """

    model: str
    source: str
    model_type: str
    parameters: int
    stored: str
    dtype: str
    download_bytes: int
    read_bytes: int
    weights: ModelBytes
    active: tuple[int, ...]
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: str = "none"
    note: str | None = None
    quantized: str = ""

    @property
    def n_layers(self) -> int:
        return len(self.active)


def fp8_loading(stored: str, n_layers: int) -> tuple[int, ...]:
    """What layers of FP8 weights take beside themselves while they are read: a strip as stored and in float32."""
    return (5 * FP8_STRIP,) * n_layers if stored == "float8" else ()


def memory_dtype(asked: str, stored: str, config_dtype: str | None = None) -> str:
    """The dtype of weights in memory: the one asked for, else the config's, else the stored one; float8 becomes bfloat16."""
    dtype = asked if asked != "auto" else (config_dtype or stored)
    dtype = dtype.removeprefix("torch.")
    return "bfloat16" if dtype.startswith("float8") else dtype


def sizes_of(
    model: str,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    config: Mapping[str, Any],
    dtype: str,
    *,
    source: str,
    download_bytes: int | None,
    gated: str = "none",
) -> ModelSizes:
    """Sizes from a checkpoint's tensors: key -> (dtype as safetensors spells it, shape).

    dtype: the entry's. download_bytes: of the weight files, None for the bytes of all tensors. Raises CheckpointError where
    config.json lacks a size, UnsupportedModelError where no list of decoder layers is found among the keys.
    """
    text = dict(config) | dict(config.get("text_config") or {})
    hidden, n_layers, heads = (_number(model, text, *names) for names in _NAMES)
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or (text.get("qk_nope_head_dim", 0) + text.get("qk_rope_head_dim", 0)) or 0)
    experts = int(text.get("n_routed_experts") or text.get("num_local_experts") or text.get("num_experts") or 0)
    share = int(text.get("num_experts_per_tok") or experts) / experts if experts else 1.0
    vocab = _number(model, text, "vocab_size")
    model_type = str(text.get("model_type") or config.get("model_type"))
    stored = _main_dtype(model, tensors)
    asked = memory_dtype(dtype, stored, config.get("dtype") or config.get("torch_dtype"))
    if asked not in DTYPE_BYTES:
        raise CheckpointError(f"'{model}': no size is known for dtype '{asked}'")
    element = DTYPE_BYTES[asked]

    prefix = _layers_prefix(model, list(tensors), n_layers)
    inside = re.compile(re.escape(prefix) + r"(\d+)\.")
    ends = {"embedding": 0, "head": 0, "rest": 0}
    layers, active, replicated = [0] * n_layers, [0.0] * n_layers, [0] * n_layers
    matrix, parameters, read, whole, fused = 0, 0, 0, 0, False
    for key, (kind, shape) in tensors.items():
        count = math.prod(shape)
        whole += count * _STORED_BYTES[STORED[kind]]
        found = inside.match(key)
        if key.endswith(_IGNORED) or (found and int(found.group(1)) >= n_layers):
            continue  # transformers makes it anew, or it predicts tokens further ahead and is never loaded
        read += count * _STORED_BYTES[STORED[kind]]
        if key.endswith(("_scale_inv", "_scale")):
            continue  # of float8 weights: multiplied in when they are loaded
        parameters += 0 if key.endswith(_KEPT_FLOAT32) else count
        size = count * (4 if key.endswith(_KEPT_FLOAT32) else element)
        if found:
            i = int(found.group(1))
            expert = ".experts." in key
            fused |= expert
            layers[i] += size
            active[i] += count * share if expert else count
            alike = "norm" in key or key.endswith(".gate.weight")
            alike |= model_type in REPLICATED_ATTENTION and ".self_attn." in key
            replicated[i] += size if alike else 0
            if len(shape) > 1:
                matrix = max(matrix, shape[-1] * shape[-2] * element)
        else:
            name = key.split(".")
            group = (
                "embedding"
                if any(p in _EMBEDDINGS for p in name)
                else "head"
                if any(p in _HEADS for p in name)
                else "rest"
            )
            ends[group] += size
    tied = bool(text.get("tie_word_embeddings")) or not (ends["head"] and ends["embedding"])
    if tied:
        parameters -= min(ends["embedding"], ends["head"]) // element
        ends |= {"embedding": max(ends["embedding"], ends["head"]), "head": 0}
    weights = ModelBytes(**ends, layers=tuple(layers), tied=tied, replicated=tuple(replicated), matrix=matrix,
                         row=hidden * element, fused=fused, loading=fp8_loading(stored, n_layers))  # fmt: skip
    return ModelSizes(
        model, source, model_type, parameters, stored, asked, whole if download_bytes is None else download_bytes, read,
        weights, tuple(int(a) for a in active), hidden, ffn_width(text, hidden), heads, kv_heads, head_dim or hidden // heads, vocab,
        gated,
    )  # fmt: skip


_NAMES = (
    ("hidden_size", "n_embd", "d_model"),
    ("num_hidden_layers", "n_layer", "num_layers"),
    ("num_attention_heads", "n_head"),
)


def _number(model: str, config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise CheckpointError(f"'{model}': config.json has no {names[0]}; it cannot be planned for")


def _main_dtype(model: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """The dtype that most elements have."""
    counts: dict[str, int] = {}
    for key, (kind, shape) in tensors.items():
        if kind not in STORED:
            raise CheckpointError(f"'{model}': the weight '{key}' has dtype {kind}, which capture cannot read")
        counts[kind] = counts.get(kind, 0) + math.prod(shape)
    if not counts:
        raise CheckpointError(f"'{model}': the checkpoint holds no weights")
    return STORED[max(counts, key=lambda kind: counts[kind])]


def _layers_prefix(model: str, keys: list[str], n_layers: int) -> str:
    """What goes before the number of a decoder layer: the shortest prefix that has the numbers 0 to n_layers - 1."""
    found: dict[str, set[int]] = {}
    for key in keys:
        for match in re.finditer(r"(?<=\.)(\d+)\.", "." + key):
            found.setdefault(("." + key)[1 : match.start()], set()).add(int(match.group(1)))
    fits = [prefix for prefix, numbers in found.items() if set(range(n_layers)) <= numbers]
    if not fits:
        raise UnsupportedModelError(f"'{model}': its checkpoint has no list of {n_layers} decoder layers")
    return min(fits, key=lambda prefix: (prefix.count("."), len(prefix)))
