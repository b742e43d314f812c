"""The id of a capture: a hash of exactly what determines its numbers, so that the same work has the same id everywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capture.schema import SCHEMA_VERSION
from capture.variants import resolved_options

if TYPE_CHECKING:
    from capture.entries import Entry
    from capture.files import ModelFiles

# Raise it when the same settings give other numbers than before; captures made earlier then count as other captures.
NUMERICS_VERSION = 6

# Every field of Entry is in one of these two; a test says so. Names in the second: why the field is not in the id.
IN_ID = frozenset(
    {
        "tokenizer_kwargs", "model_kwargs", "dtype", "top_k", "prompts", "trim_prompts", "add_special_tokens",
        "prompt_variants", "prompt_variant_options", "tracked_token_ids", "tracked_token_strings", "interesting_token_map",
        "passes", "comparisons", "embedding_variants", "layers", "lens", "batching", "output", "noise_floor",
        "spectrum",
    }
)  # fmt: skip
NOT_IN_ID = {
    "name": "part of the path; the same pair under two names is the same capture twice",
    "base_model": "its resolved revision stands for it",
    "sft_model": "its resolved revision stands for it",
    "base_revision": "resolved to a commit or fingerprint",
    "sft_revision": "resolved to a commit or fingerprint",
    "tokenizer": "the hash of its files stands for it",
    "prompt_sources": "where a prompt stands, not what it says",
    "device": "where it runs",
    "mode": "all modes give the same numbers",
    "weights": "the way that bytes take changes none of them",
    "fetch_ahead": "when bytes come changes none of them",
    "cache_gib": "which files stay for later captures",
    "spans": "where a walk is cut changes no number",
    "local_run": "guards; what they override is in dtype and the kwargs",
    "tensor_parallel": "where it runs; capture.json records it",
    "replicate_attention": "where it runs; capture.json records it",
    "gpus": "scheduling",
    "accelerator_type": "scheduling",
    "device_memory_gib": "scheduling",
    "allow_pickle": "permission; the fingerprint stands for what was read",
    "notes": "for people",
}
# Keys of *_kwargs that say how to get at files, not what is in them; a new token must not mean a new capture.
_ACCESS = frozenset({"token", "use_auth_token", "cache_dir", "local_files_only", "force_download", "proxies"})
# Files of a tokenizer that can change ids.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
)


def capture_id(entry: Entry, base: ModelFiles, sft: ModelFiles, tokenizer_hash: str) -> str:
    """16 hexadecimal digits: SHA-256 over the canonical JSON of `identity`."""
    text = json.dumps(
        identity(entry, base, sft, tokenizer_hash), sort_keys=True, separators=(",", ":"), ensure_ascii=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def identity(entry: Entry, base: ModelFiles, sft: ModelFiles, tokenizer_hash: str) -> dict[str, Any]:
    """All that determines the numbers of a capture, as JSON values. It may hold secrets of *_kwargs: do not write it down."""
    data = entry.model_dump(mode="json", include=set(IN_ID))
    data |= {key: _without_access(data[key]) for key in ("tokenizer_kwargs", "model_kwargs")}
    # Only options of variants that are made, with defaults filled in: leaving a default out changes nothing.
    data["prompt_variant_options"] = {
        v: resolved_options(v, entry.prompt_variant_options) for v in entry.prompt_variants
    }
    data["interesting_token_map"] = list(entry.interesting_token_map.items())  # in order: it sets the slots
    data["passes"] = [[p.name, p.embeddings, p.model, p.unembedding] for p in entry.passes]
    data["comparisons"] = [[c.base_run, c.sft_run] for c in entry.comparisons]
    del data["lens"]["compile"]  # how it is computed; capture.json records it
    data["output"] = {"topk": entry.output.topk}  # how well files are compressed is not in the numbers
    if entry.output.topk_values != "float32":
        data["output"]["topk_values"] = entry.output.topk_values
    return data | {
        "base_revision": base.revision,
        "sft_revision": sft.revision,
        "tokenizer_hash": tokenizer_hash,
        "schema_version": SCHEMA_VERSION,
        "numerics_version": NUMERICS_VERSION,
    }


def _without_access(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k not in _ACCESS}


def tokenizer_hash(directory: str | Path, *, code: bool = False) -> str:
    """16 hexadecimal digits: SHA-256 over the names and contents of a tokenizer's files in a directory. code: of its Python files
    too, which run where the config trusts them.

    A chat template in a file of its own does not count: prompts are tokenised as they are.
    """
    sha = hashlib.sha256()
    path = Path(directory)
    names = [n for n in _TOKENIZER_FILES if (path / n).is_file()]
    suffixes = (".model", ".tiktoken", *([".py"] if code else []))
    names += sorted(p.name for p in path.glob("*") if p.suffix in suffixes and p.is_file())
    for name in names:
        content = (path / name).read_bytes()
        sha.update(f"{name} {len(content)}\n".encode() + content)
    return sha.hexdigest()[:16]
