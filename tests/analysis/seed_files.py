"""Made-up files of residual comparisons, in both formats, with numbers of every kind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

COMPARISONS = (("BB", "BS"), ("BB", "SB"), ("BB", "SS"), ("BS", "SB"), ("BS", "SS"), ("SB", "SS"))


def _topk(rng: random.Random, sign: int) -> dict[str, Any]:
    values = sorted((round(rng.uniform(0, 30), 6) for _ in range(3)), reverse=True)
    return {"indices": rng.sample(range(50_000), 3), "values": [sign * v for v in values]}


def _cosine(rng: random.Random) -> float:
    return rng.choice([1.0, 1 - 1e-9, rng.uniform(-1, 1), 0.25])


def run_cell(rng: random.Random, token: str) -> dict[str, Any]:
    return {
        "token": token, "entropy": rng.uniform(0, 10), "norm": rng.uniform(1, 1000), "norm_delta": rng.uniform(-50, 50),
        "cosine_prev": _cosine(rng), "top_k_logits": _topk(rng, 1),
        "tracked_token_logits": {"42": rng.uniform(-5, 5), "7": 0.5},
    }  # fmt: skip


def pair_cell(rng: random.Random, token: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"token": token, "top_k_increased": _topk(rng, 1), "top_k_decreased": _topk(rng, -1)}
    cell |= {
        k: rng.uniform(0, 10) for k in ("entropy_base", "entropy_sft", "kl_div", "norm_base", "norm_sft", "norm_diff")
    }
    cell["tracked_token_logits"] = {"42": {"base": rng.uniform(-5, 5), "sft": 0.25}, "7": {"base": 1.5, "sft": -2.0}}
    cell["cosine_sim"] = _cosine(rng)
    cell |= {"base_cosine_prev": _cosine(rng), "base_norm_delta": 0.1, "sft_cosine_prev": None, "sft_norm_delta": None}
    return cell


def layers(rng: random.Random, tokens: list[str], n_layers: int, cell: Any) -> dict[str, Any]:
    return {str(k): {str(i): cell(rng, t) for i, t in enumerate(tokens)} for k in range(n_layers)}


def record(rng: random.Random, index: int, tokens: list[str], n_layers: int = 3) -> dict[str, Any]:
    """A record of format_version 2: four passes, six comparisons."""
    metadata = {"prompt_idx": index, "variant_name": "identity", "embedding_variant": None, "multi_pass": True}
    source = {"B": "base", "S": "sft"}
    options = {
        p: {"embedding_source": source[p[0]], "unembedding_source": source[p[1]]} for p in ("BB", "BS", "SB", "SS")
    }
    return {
        "format_version": 2, "prompt": "".join(tokens), "tokens": tokens, "metadata": metadata,
        "runs": [
            {"name": p, "model": source[p[1]], **options[p], "layers": layers(rng, tokens, n_layers, run_cell),
             "metadata": metadata | {"run_name": p}}
            for p in options
        ],
        "pairwise": [
            {"name": f"{a}-{b}", "base_run": a, "sft_run": b, "prompt": "".join(tokens), "tokens": tokens,
             "metadata": {"base_run": a, "sft_run": b}, "swap_options": {"base": options[a], "sft": options[b]},
             "layers": layers(rng, tokens, n_layers, pair_cell)}
            for a, b in COMPARISONS
        ],
    }  # fmt: skip


def single(rng: random.Random, index: int, tokens: list[str], variant: str, embeddings: str = "sft") -> dict[str, Any]:
    """A record of the older format: one comparison at its top."""
    return {
        "prompt": "".join(tokens), "tokens": tokens,
        "metadata": {"prompt_idx": index, "variant_name": variant, "embedding_variant": f"to-{embeddings}"},
        "swap_options": {"base": {"embedding_source": "base", "unembedding_source": "base"},
                         "sft": {"embedding_source": embeddings, "unembedding_source": "sft"}},
        "layers": layers(rng, tokens, 3, pair_cell),
    }  # fmt: skip


def write(path: Path, records: list[dict[str, Any]], **how: Any) -> Path:
    path.write_text(json.dumps(records, **({"indent": 2} | how)), encoding="utf-8")
    return path
