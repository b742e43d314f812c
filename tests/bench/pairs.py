"""The random pairs that benches run on, made once below .cache/bench, and what they ask of a capture."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

from measured import CACHE, ROOT

# tiny and reference, imported where they are needed; and ourselves, for an environment that this package is not installed in
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "capture")]
os.environ["HF_HUB_OFFLINE"] = "1"

SMOL: dict[str, Any] = {  # the shape of SmolLM2-135M
    "vocab": 49152,
    "tokenizer_size": 49152,
    "tie": True,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}


def make_pair(directory: Path, shape: dict[str, Any]) -> Any:
    """A random llama pair of this shape (tiny.PairPaths) in a directory, made where it is not there yet."""
    from tiny import PairPaths
    from tiny import make_pair as write

    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        half_made = Path(tempfile.mkdtemp(dir=directory.parent))
        try:
            write("llama", half_made, **shape)
            half_made.rename(directory)
        finally:
            shutil.rmtree(half_made, ignore_errors=True)
    return PairPaths(directory / "base", directory / "sft", directory / "tokenizer")


def kept_pair(shape: dict[str, Any]) -> Any:
    """The pair of this shape below .cache/bench: about 1.1 GB for SMOL."""
    return make_pair(CACHE / f"llama-{zlib.crc32(json.dumps(shape).encode()):08x}", shape)


def prompts_of(n_tokens: int, n_prompts: int = 1) -> tuple[str, ...]:
    """Prompts of exactly so many tokens of the tiny tokenizer: `<s>` and a token a digit; all different where there
    are less than 10,000 of at least five."""
    width = n_tokens - 1
    return tuple((f"{n:04}" + "0123456789" * (width // 10 + 1))[:width] for n in range(n_prompts))


def smollm2() -> Any:
    """SmolLM2-135M and its short fine-tune, as `make demo-smollm2` makes them; None where they are not there."""
    from tiny import PairPaths

    made = ROOT / ".cache" / "smollm2"
    return PairPaths(made / "base", made / "sft", made / "base") if (made / "sft").exists() else None


def real_prompt(paths: Any, n_tokens: int) -> tuple[str, ...]:
    """A prompt of so many tokens of this pair's tokenizer, from a page of ours."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(paths.tokenizer)
    words = (ROOT / "docs" / "playbook.md").read_text().split()
    for n in range(1, len(words)):
        text = " ".join(words[:n])
        ids = tokenizer(text)["input_ids"]
        if len(ids) >= n_tokens:
            return (tokenizer.decode(ids[:n_tokens]),)
    raise ValueError(f"the page has fewer than {n_tokens} tokens")


def entry_of(paths: Any, prompts: tuple[str, ...], **fields: Any) -> Any:
    """An Entry on the CPU in float32, all statistics on unless `fields` say otherwise."""
    from capture.config import Entry

    return Entry(
        **{
            "name": "bench", "base_model": str(paths.base), "sft_model": str(paths.sft), "tokenizer": str(paths.tokenizer),
            "prompts": prompts, "tracked_token_ids": (5, 299), "device": "cpu", "dtype": "float32",
        } | fields
    )  # fmt: skip


def captured(entry: Any, out: Path) -> dict[str, Any]:
    """One capture in this process; its capture.json, with the whole time as seconds.all, and its directory as path."""
    from capture.run import capture_pair

    result = capture_pair(entry, str(out), force=True)
    found: dict[str, Any] = json.loads((Path(result.path) / "capture.json").read_text())
    found["seconds"]["all"] = result.seconds
    return found | {"path": result.path}


def work(found: dict[str, Any]) -> float:
    """Seconds of the walk and the writing of the tables: what grows with the prompts."""
    return float(found["seconds"]["walk"] + found["seconds"]["write"])
