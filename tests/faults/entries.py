"""Entries of tiny pairs: enough of them, and different enough, that faults find all ways through a capture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))  # tiny.py

from tiny import PROMPTS, make_pair

from capture.config import Entry

# architecture, options of the entry
RECIPES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {"mode": "streamed", "spans": {"layers": 1}}),
    ("llama", {"mode": "resident", "spans": {"layers": 2}, "prompts": PROMPTS[:2]}),
    # in another dtype than it is stored in: such weights are read by a thread
    ("llama", {"mode": "one-at-a-time", "prompts": PROMPTS[1:], "dtype": "bfloat16"}),
    ("gpt2", {"mode": "streamed-2", "spans": {"layers": 1}}),
    ("gpt2", {"mode": "streamed", "spans": {"seconds": 0.2}, "prompts": PROMPTS[2:], "dtype": "bfloat16"}),
    ("qwen2", {"mode": "sub-layer", "spans": {"layers": 1}, "prompts": PROMPTS[:3]}),
    ("qwen2", {"mode": "streamed", "spectrum": True, "spans": {"layers": 3}}),
    ("mixtral", {"mode": "streamed", "spans": {"layers": 1}, "prompts": PROMPTS[:2]}),
)


def make_entries(folder: Path, recipes: Any = RECIPES) -> list[Entry]:
    """One entry a recipe, with its pair on disk below `folder`."""
    pairs = {arch: make_pair(arch, folder / arch) for arch in dict.fromkeys(arch for arch, _ in recipes)}
    return [tiny_entry(pairs[arch], name=f"{arch}-{i}", **options) for i, (arch, options) in enumerate(recipes)]


def tiny_entry(pair: Any, **options: Any) -> Entry:
    settings = {
        "name": "tiny", "base_model": str(pair.base), "sft_model": str(pair.sft), "tokenizer": str(pair.tokenizer),
        "dtype": "auto", "device": "cpu", "prompts": PROMPTS, "top_k": 6, "mode": "streamed",
    }  # fmt: skip
    return Entry(**(settings | options))
