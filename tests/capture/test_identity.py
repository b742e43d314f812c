"""The capture's id: the same for the same work, another for anything that changes a number."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capture import identity as module
from capture import run
from capture.config import Batching, Comparison, Entry, Lens, LocalRun, Output, Pass
from capture.files import ModelFiles
from capture.identity import IN_ID, NOT_IN_ID, capture_id, tokenizer_hash

FILES = ModelFiles("hub", "/cache/a", "c0ffee", ("model.safetensors",), 10, {}, "safetensors")
SFT = replace(FILES, revision="decaf")
ENTRY = Entry(
    name="e",
    base_model="b",
    sft_model="s",
    tokenizer="t",
    prompts=("one", "two"),
    prompt_variants=("identity", "dual_channel"),
)

CHANGES: dict[str, Any] = {
    "tokenizer_kwargs": {"use_fast": False},
    "model_kwargs": {"attn_implementation": "eager"},
    "dtype": "float32",
    "top_k": 21,
    "prompts": ("two", "one"),
    "trim_prompts": True,
    "add_special_tokens": False,
    "prompt_variants": ("dual_channel", "identity"),
    "prompt_variant_options": {"dual_channel": {"order": "sft_first"}},
    "tracked_token_ids": (1,),
    "tracked_token_strings": ("ĠYes",),
    "interesting_token_map": {"eos": "<|endoftext|>"},
    "passes": (Pass(name="BB", model="base"), Pass(name="SS", model="sft")),
    "comparisons": (Comparison(base_run="BB", sft_run="SS"),),
    "embedding_variants": {"default": "BB-SS"},
    "layers": 2,
    "lens": Lens(norm="none"),
    "batching": Batching(padding="left"),
    "output": Output(topk=False),
    "noise_floor": False,
    "spectrum": True,
}
OTHERS: dict[str, Any] = {
    "name": "f",
    "base_model": "/elsewhere",
    "sft_model": "/elsewhere",
    "base_revision": "main",
    "sft_revision": "main",
    "tokenizer": "/elsewhere",
    "prompt_sources": ("p.txt:1", "p.txt:2"),
    "device": "cuda:3",
    "mode": "streamed",
    "weights": "stream",
    "fetch_ahead": False,
    "cache_gib": 10.0,
    "local_run": LocalRun(enabled=True),
    "gpus": 2,
    "accelerator_type": "H100",
    "device_memory_gib": 8,
    "spans": {"layers": 1},
    "tensor_parallel": 2,
    "replicate_attention": True,
    "allow_pickle": True,
    "notes": "mine",
}


def the_id(**changes: Any) -> str:
    return capture_id(ENTRY.model_copy(update=changes), FILES, SFT, "t0k")


def test_every_field_of_an_entry_is_classed() -> None:
    assert not IN_ID & set(NOT_IN_ID)
    assert IN_ID | set(NOT_IN_ID) == set(Entry.model_fields)
    assert (set(CHANGES), set(OTHERS)) == (set(IN_ID), set(NOT_IN_ID))  # so that the tests below see every field


@pytest.mark.parametrize("field", sorted(CHANGES))
def test_what_changes_the_numbers_changes_the_id(field: str) -> None:
    assert the_id(**{field: CHANGES[field]}) != the_id()


@pytest.mark.parametrize("field", sorted(OTHERS))
def test_what_does_not_change_the_numbers_leaves_the_id(field: str) -> None:
    assert the_id(**{field: OTHERS[field]}) == the_id()


@pytest.mark.parametrize(
    "change",
    [
        {"lens": Lens(enabled=False)},
        {"lens": Lens(layers=2)},
        {"lens": Lens(layers=(0, -1))},
        {"lens": Lens(compile=False)},
        {"batching": Batching(max_tokens=64)},
        {"passes": (*ENTRY.passes[:3], Pass(name="SS", model="sft", embedding_source="sft", unembedding_source="sft"))},
        {"output": Output(compression_level=9)},
        {"output": Output(topk_values="float16")},
        {"prompt_variant_options": {"dual_channel": {"order": "base_first"}, "shuffle_sentences": {"seed": 9}}},
        {"model_kwargs": {"token": "hf_abc", "cache_dir": "/big"}},
    ],
    ids=[
        "enabled",
        "nth",
        "listed",
        "compiled",
        "tokens",
        "pass-spelled-out",
        "compression",
        "rounded",
        "defaults-and-unused-options",
        "access",
    ],
)
def test_settings_inside_a_block_count_where_they_change_the_numbers(
    change: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    changes_it = request.node.callspec.id in {"enabled", "nth", "listed", "tokens", "rounded"}
    assert (the_id(**change) != the_id()) == changes_it


def test_every_setting_of_the_nested_blocks_is_covered_here() -> None:
    assert set(Lens.model_fields) == {"enabled", "norm", "layers", "compile"}
    assert set(Batching.model_fields) == {"padding", "max_tokens"}
    assert set(Output.model_fields) == {"topk", "topk_values", "compression_level"}


def test_revisions_tokenizer_and_versions_are_part_of_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {
        the_id(),
        capture_id(ENTRY, SFT, FILES, "t0k"),  # the other way round is another capture
        capture_id(ENTRY, replace(FILES, revision="x"), SFT, "t0k"),
        capture_id(ENTRY, FILES, SFT, "other"),
    }
    for version in ("SCHEMA_VERSION", "NUMERICS_VERSION"):
        monkeypatch.setattr(module, version, 99)
        ids.add(the_id())
        monkeypatch.undo()
    assert len(ids) == 6


def test_where_files_lie_is_not() -> None:
    assert capture_id(ENTRY, replace(FILES, path="/other", source="local"), SFT, "t0k") == the_id()


def test_the_id_is_the_same_in_every_process() -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_identity; print(test_identity.the_id())
"""
    for seed in ("1", "2"):  # of the hashes that order sets and dicts of text
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True)
        assert done.stdout.strip() == the_id()
    assert len(the_id()) == 16


def test_the_order_of_the_tracked_map_counts_because_it_sets_the_slots() -> None:
    assert the_id(interesting_token_map={"a": "x", "b": "y"}) != the_id(interesting_token_map={"b": "y", "a": "x"})


def test_a_tokenizer_s_hash_is_of_the_files_that_make_ids(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    first = tokenizer_hash(tmp_path)
    (tmp_path / "model.safetensors").write_text("weights")
    (tmp_path / "chat_template.jinja").write_text("{{ x }}")
    assert tokenizer_hash(tmp_path) == first
    seen = {first}
    for name in (
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        "spiece.model",
        "tekken.json",
    ):
        (tmp_path / name).write_text("x")
        seen.add(tokenizer_hash(tmp_path))
    (tmp_path / "merges.txt").write_text("y")
    seen.add(tokenizer_hash(str(tmp_path)))
    assert len(seen) == 8


def test_code_of_a_tokenizer_counts_where_it_may_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    ordinary = tokenizer_hash(tmp_path)
    (tmp_path / "tokenization_own.py").write_text("# one")
    assert tokenizer_hash(tmp_path) == ordinary
    monkeypatch.setattr(run, "resolve_model", lambda *_, **__: FILES)
    monkeypatch.setattr(run, "resolve_tokenizer", lambda *_, **__: str(tmp_path))

    def ids() -> list[str]:
        asked = ({}, {"trust_remote_code": False}, {"trust_remote_code": True})
        entries = [ENTRY.model_copy(update={"tokenizer_kwargs": kwargs}) for kwargs in asked]
        return [run.resolve(entry, download=False).tokenizer_hash for entry in entries]

    before = ids()
    (tmp_path / "tokenization_own.py").write_text("# two")
    after = ids()
    assert before[:2] == after[:2] == [ordinary] * 2
    assert len({ordinary, before[2], after[2]}) == 3


def test_of_one_repository_the_tokenizer_is_the_sft_revision_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def tokenizer(name: str, revision: str | None, **_: Any) -> str:
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr(run, "resolve_model", lambda *_, **__: FILES)
    monkeypatch.setattr(run, "resolve_tokenizer", tokenizer)
    one = {"base_model": "org/m", "sft_model": "org/m", "base_revision": "step1", "sft_revision": "step2"}
    for change in (
        {"tokenizer": "org/m"},
        {"tokenizer": "org/m", "tokenizer_kwargs": {"revision": "v3"}},
        {"tokenizer": "x/y"},
    ):
        run.resolve(ENTRY.model_copy(update=one | change), download=False)
    assert asked == [("org/m", "step2"), ("org/m", "v3"), ("x/y", None)]
