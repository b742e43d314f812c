"""Tiny random pairs: real checkpoints on disk, a few hundred kB each, for every architecture that the tests name.

The weights are random but not convenient: norm weights, biases, router corrections and multipliers are all away from
0 and 1, because a norm of ones or a bias of zeros hides a forgotten norm or bias. The vocabulary is a prime, and larger
than the tokenizer, as padded vocabularies are. Sliding windows are shorter than the prompts.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

VOCAB = 307
TOKENIZER_SIZE = 300
HIDDEN = 48
LAYERS = 4
WINDOW = 4

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
_ROTARY = {"rope_theta": 10000.0, "rope_type": "default"}

# arch -> (model_type of the config, what it has beyond _COMMON)
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_inner": 80}),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED}),
    "qwen3": (
        "qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED},
    ),
    "mistral": ("mistral", {"sliding_window": WINDOW, "head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW, "layer_types": _MIXED[::-1]},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "decoder_sparse_step": 1,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "q_lora_rank": 20,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 10,
            "v_head_dim": 12,
            "num_mtp_layers": 0,
        },
    ),
    "phi3": ("phi3", {}),
    # frequencies depend on the longest prompt of a batch: up to 10 tokens the short factors, beyond it the long ones
    "phi3_longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 10,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
            },
        },
    ),
    "nemotron": ("nemotron", {"rope_parameters": _ROTARY | {"partial_rotary_factor": 0.5}}),
    "olmo2": ("olmo2", {}),
    "cohere": ("cohere", {"logit_scale": 0.3}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 1.7,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.35,
            "logits_scaling": 2.5,
        },
    ),
    "mamba": ("mamba", {"state_size": 8, "num_attention_heads": None, "num_key_value_heads": None}),  # it has neither
    "opt": (
        "opt",
        {"num_key_value_heads": None, "intermediate_size": None, "ffn_dim": 80, "word_embed_proj_dim": HIDDEN},
    ),
    "bloom": ("bloom", {"num_key_value_heads": None, "intermediate_size": None}),
    "falcon": (
        "falcon",
        {"num_key_value_heads": None, "intermediate_size": None, "parallel_attn": False, "alibi": False},
    ),
    "gptj": ("gptj", {"num_key_value_heads": None, "intermediate_size": None, "n_inner": 80, "rotary_dim": 8}),
    "ctrl": ("ctrl", {"num_key_value_heads": None, "intermediate_size": None, "dff": 80}),
    "openai-gpt": ("openai-gpt", {"num_key_value_heads": None, "intermediate_size": None}),
    "modernbert": (
        "modernbert-decoder",
        {
            "num_key_value_heads": None,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 8,
            "decoder_bias": False,
        },
    ),
    "codegen": ("codegen", {"num_key_value_heads": None, "intermediate_size": None, "n_inner": 80, "rotary_dim": 8}),
    "gpt_neo": (
        "gpt_neo",
        {"num_key_value_heads": None, "attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    ),
    "mpt": (
        "mpt",
        {
            "num_key_value_heads": None,
            "intermediate_size": None,
            "max_position_embeddings": None,
            "hidden_size": None,
            "num_hidden_layers": None,
            "num_attention_heads": None,
            "d_model": HIDDEN,
            "n_heads": 4,
            "n_layers": LAYERS,
            "max_seq_len": 256,
            "expansion_ratio": 2,
        },
    ),
    "roberta": ("roberta", {"num_key_value_heads": None, "is_decoder": True}),
    "bart": (
        "bart",
        {
            "num_key_value_heads": None,
            "intermediate_size": None,
            "hidden_size": None,
            "num_hidden_layers": None,
            "num_attention_heads": None,
            "d_model": HIDDEN,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 80,
            "decoder_ffn_dim": 80,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            "head_dim": 12,
            "mamba_d_ssm": 48,
            "mamba_n_heads": 4,
            "mamba_d_head": 12,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
    ),
    "zamba2": (
        "zamba2",
        {
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "num_mem_blocks": 1,
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_headdim": 24,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "attention_hidden_size": 96,
            "attention_head_dim": 24,
            "adapter_rank": 4,
        },
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "q_lora_rank": 20,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 4,
        },
    ),
    "bamba": (
        "bamba",
        {
            "attn_layer_indices": [1, 3],
            "mamba_n_heads": 4,
            "mamba_d_head": 24,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
    ),
    "rwkv": (
        "rwkv",
        {
            "num_attention_heads": None,
            "num_key_value_heads": None,
            "max_position_embeddings": None,
            "attention_hidden_size": 48,
            "context_length": 256,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": _MIXED[::-1],
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
        },
    ),
    "gemma4_shared": (
        "gemma4_text",
        {
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _MIXED[::-1],
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 0,
        },
    ),
}

# Whose learned positions of a padded prompt are not those that the same prompt has alone: on either side, on the left.
OWN_POSITIONS = ("roberta", "bart")
# Whose heads or layers are called in ways of their own.
OTHERS = (
    "opt",
    "bloom",
    "falcon",
    "gptj",
    "ctrl",
    "openai-gpt",
    "modernbert",
    "codegen",
    "gpt_neo",
    "mpt",
    "falcon_h1",
    "gemma4",
)
# Some of whose layers share weights.
SHARED = ("zamba2",)
# Whose layers hand each other more than the residual.
UNWALKABLE = ("bamba", "rwkv", "glm_moe_dsa", "gemma4_shared")
# The fourteen that a capture must be exact on in every way; phi3_longrope and mamba, which has no attention, are beside them.
ARCHS = tuple(
    arch for arch in _SHAPES if arch not in ("phi3_longrope", "mamba", *OTHERS, *OWN_POSITIONS, *SHARED, *UNWALKABLE)
)

# Own words, of unequal length; all but the shortest are longer than the sliding window.
PROMPTS = (
    "A river has two banks and one bed.",
    "Why?",
    "for n in range(3): print(n)",
    "The old clock on the wall is seven minutes slow, and nobody minds.",
)

_MERGES = (
    "Ġ t|h e|i n|Ġ a|o n|Ġt he|e r|r e|Ġ s|a n|Ġ o|Ġ w|Ġ b|e n|i s|o r|a t|e s|Ġ c|i t|Ġ m|Ġ f|o u|in g|e d|Ġ p|"
    "an d|a l|Ġ h|a r|Ġ in|Ġo n|Ġ and|n d|l l|Ġ d|o w|Ġ r|o m|l e|i c"
)


@dataclass(frozen=True)
class PairPaths:
    """Where one pair lies: three directories that from_pretrained opens. base and sft hold the tokenizer as well."""

    base: Path
    sft: Path
    tokenizer: Path


def make_pair(
    arch: str,
    directory: Path,
    *,
    seed: int = 0,
    tie: bool | None = None,
    identical: bool = False,
    same_embeddings: bool = False,
    frozen_layers: Collection[int] = (),
    vocab: int = VOCAB,
    sft_vocab: int | None = None,
    tokenizer_size: int = TOKENIZER_SIZE,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    perturb: float = 0.05,
    **overrides: Any,
) -> PairPaths:
    """Write a random base and its perturbed sibling below `directory`, the same for the same arguments.

    tie: embeddings and head are one matrix; None leaves it to the architecture. identical: sft has base's weights.
    same_embeddings: the input embeddings (and a head tied to them) are equal. frozen_layers: blocks with equal weights.
    vocab, sft_vocab: rows of the embeddings; sft_vocab adds rows to sft, or cuts them off, after what both share.
    tokenizer_size: ids of the tokenizer. sharded: several files per checkpoint. dtype: of the files; the random numbers
    are drawn in float32 and rounded. perturb: size of sft minus base, relative to each tensor's root mean square.
    overrides: further config keys.
    """
    model_type, shape = _SHAPES[arch]
    settings = {k: v for k, v in (_COMMON | shape).items() if v is not None} | {"vocab_size": vocab} | overrides
    if tie is not None:
        settings["tie_word_embeddings"] = tie
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32).eval()
    transformers_logging.disable_progress_bar()
    paths = PairPaths(directory / "base", directory / "sft", directory / "tokenizer")
    make_tokenizer(tokenizer_size).save_pretrained(paths.tokenizer)
    same = _untouched(model, same_embeddings, frozen_layers)
    with torch.no_grad():
        for name, tensor in _tensors(model):
            tensor.copy_(_random(name, tensor, seed))
        _save(model, paths.base, paths.tokenizer, dtype, sharded)
        if sft_vocab is not None:
            model.resize_token_embeddings(sft_vocab, mean_resizing=False)
            for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                table[vocab:] = _random("lm_head of new rows", table[vocab:], seed)
        for name, tensor in _tensors(model):
            if not identical and not name.startswith(same):
                size = perturb * tensor.square().mean().sqrt()
                tensor.add_(size * _noise(name, tensor.shape, seed + 1))
        _save(model, paths.sft, paths.tokenizer, dtype, sharded)
    return paths


def make_tokenizer(size: int = TOKENIZER_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts `<s>` (id 1) first; any text round-trips. Ids from TOKENIZER_SIZE on are never used."""
    merges = [(left, right) for left, right in (m.split() for m in _MERGES.split("|"))]
    pieces = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
    if len(set(pieces)) != TOKENIZER_SIZE:
        raise AssertionError(f"the tiny tokenizer has {len(set(pieces))} ids")
    pieces += [f"<unused{i}>" for i in range(size - TOKENIZER_SIZE)]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def encode(texts: Collection[str]) -> list[list[int]]:
    """Ids of the texts with the tiny tokenizer, `<s>` first, no padding."""
    tokenizer = make_tokenizer()
    return [tokenizer(text)["input_ids"] for text in texts]


def random_ids(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length] that the tiny tokenizer knows."""
    return torch.randint(3, TOKENIZER_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """All that a checkpoint holds, tied tensors once: parameters, and buffers that are saved."""
    saved = model.state_dict().keys()
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            yield name, buffer


def _noise(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Normal numbers that depend on the tensor's name and the seed alone, not on the other tensors."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())))


def _random(name: str, tensor: torch.Tensor, seed: int) -> torch.Tensor:
    noise = _noise(name, tensor.shape, seed)
    if tensor.ndim == 1:  # norms, biases and corrections, around what the library starts them with; post-norms smaller,
        # or olmo2's blocks outweigh its embeddings and blow rounding up
        return tensor * (0.4 if "post_" in name else 1.0) + 0.2 * noise
    if any(
        part in name for part in ("embed_tokens", "wte", "wpe", "lm_head")
    ):  # embeddings and heads: spread lenses, but not one-token ones
        return 2.8 * noise / math.sqrt(tensor.shape[-1])
    return 0.5 * noise / math.sqrt(tensor.shape[-1])


def _untouched(model: PreTrainedModel, same_embeddings: bool, frozen_layers: Collection[int]) -> tuple[str, ...]:
    """Prefixes of the names of tensors that base and sft share."""
    names = {module: name for name, module in model.named_modules()}
    prefixes = [f"{names[model.get_input_embeddings()]}."] if same_embeddings else []
    if not frozen_layers:
        return tuple(prefixes)
    layers = model.transformer.h if hasattr(model, "transformer") else model.base_model.layers
    return tuple(prefixes + [f"{names[layers[i]]}." for i in frozen_layers])


def _save(model: PreTrainedModel, path: Path, tokenizer: Path, dtype: torch.dtype, sharded: bool) -> None:
    rounded = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    rounded.save_pretrained(path, **({"max_shard_size": "100KB"} if sharded else {}))
    shutil.copytree(tokenizer, path, dirs_exist_ok=True)


def store_in_fp8(
    paths: PairPaths,
    *,
    block: tuple[int, int] | None = (128, 128),
    further_layers: int = 1,
    layers: str = "model.layers.",
) -> None:
    """Store a pair's matrices as DeepSeek-V3's checkpoints do: float8_e4m3fn, and a float32 scale for each block.

    The router, the vectors and both ends stay as they are. block: None is one scale for each matrix. further_layers: that
    many copies of the last layer are stored behind it, as multi-token prediction modules are; no model loads them.
    """
    for directory in dict.fromkeys((paths.base, paths.sft)):
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": None if block is None else list(block),
        }  # fmt: skip
        (directory / "config.json").write_text(json.dumps(config))
        for file in directory.glob("*.safetensors"):
            stored: dict[str, torch.Tensor] = {}
            for key, tensor in load_file(file).items():
                if key.startswith(layers) and tensor.ndim == 2 and not key.endswith("mlp.gate.weight"):
                    stored[key], stored[f"{key}_scale_inv"] = to_fp8(tensor, block)
                else:
                    stored[key] = tensor
            last = f"{layers}{config['num_hidden_layers'] - 1}."
            for n in range(further_layers):
                behind = f"{layers}{config['num_hidden_layers'] + n}."
                stored |= {behind + k.removeprefix(last): t.clone() for k, t in stored.items() if k.startswith(last)}
            save_file(stored, file, metadata={"format": "pt"})


def to_fp8(weight: torch.Tensor, block: tuple[int, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [R, C] as float8_e4m3fn and one float32 scale for each block; the last blocks are cut off by its edge."""
    m, n = block or tuple(weight.shape)
    rows, columns = -(-weight.shape[0] // m), -(-weight.shape[1] // n)
    scale = torch.empty(rows, columns)
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            part = (slice(i * m, (i + 1) * m), slice(j * n, (j + 1) * n))
            values = weight[part].float()
            scale[i, j] = values.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            stored[part] = (values / scale[i, j]).to(torch.float8_e4m3fn)
    return stored, scale if block else scale.reshape(())


def from_fp8(stored: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The numbers of an FP8 matrix in float32, written down from the format's definition."""
    spread = scale.repeat_interleave(block[0], 0)[: stored.shape[0]].repeat_interleave(block[1], 1)
    return stored.float() * spread[:, : stored.shape[1]]
