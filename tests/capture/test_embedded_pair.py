"""The pair that comes with the repository: whole, small, really trained, really fine-tuned, and as its card says."""

from __future__ import annotations

import importlib
import platform
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from capture.config import Settings

REPO = Path(__file__).resolve().parents[2]
PAIR = REPO / "configs/pairs/pydoc"
SIDES = ("base", "sft")
KINDS = ("topics", "docstrings")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(PAIR / "tokenizer")


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {side: AutoModelForCausalLM.from_pretrained(PAIR / side) for side in SIDES}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script that made the pair: it knows what was held out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "configs/pairs"))
        return importlib.import_module("train_pydoc")


@pytest.fixture(scope="module")
def card() -> str:
    return (PAIR / "README.md").read_text(encoding="utf-8")


def card_losses(card: str, model: str) -> dict[str, float]:
    """The row of one model in the card's table of held-out losses, by kind of text."""
    row = re.search(rf"^\| {model} \| (\d+\.\d+) \| (\d+\.\d+) \|$", card, flags=re.MULTILINE)
    assert row, f"the card has no losses of {model}"
    return dict(zip(KINDS, map(float, row.groups()), strict=True))


def test_the_pair_is_whole_and_holds_nothing_else() -> None:
    names = {path.relative_to(PAIR).as_posix() for path in PAIR.rglob("*") if path.is_file()}
    checkpoint = ("config.json", "generation_config.json", "model.safetensors")
    assert names == {
        "README.md",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        *(f"{side}/{name}" for side in SIDES for name in checkpoint),
    }


def test_the_pair_is_under_2_5_megabytes() -> None:
    assert sum(path.stat().st_size for path in PAIR.rglob("*") if path.is_file()) < 2_500_000


def test_the_card_says_what_the_pair_is(card: str) -> None:
    assert "a pair that we tuned ourselves" in card
    assert "too small to say anything sensible" in card
    assert "Apache-2.0" in card
    assert "PSF" in card


def test_the_tokenizer_is_a_bpe_of_512_that_adds_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 512
    assert tokenizer("")["input_ids"] == []
    assert tokenizer("return")["input_ids"] == tokenizer("return", add_special_tokens=False)["input_ids"]
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer("a<|endoftext|>b")["input_ids"][1] == tokenizer.eos_token_id


@given(text=st.text())
@example(text="Größe: 3 µm, 日本語, 🦜\u200d🦜, e\u0301")
@example(text="  two  spaces , and a comma  ;\t\ttabs\r\n\r\n\x00 ")
@example(text="don 't ; do n't <|endoftext|> .")
def test_any_text_comes_back_as_it_was(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert all(0 <= i < 512 for i in ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("side", SIDES)
def test_both_models_are_the_small_llama_in_float32(side: str, models: dict[str, PreTrainedModel], card: str) -> None:
    model = models[side]
    parameters = sum(p.numel() for p in model.parameters())
    assert model.config.model_type == "llama"
    assert model.config.num_hidden_layers == 5
    assert model.config.vocab_size == 512
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert 250_000 < parameters < 270_000
    assert f"{parameters:,} parameters" in card
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32, name
        assert p.isfinite().all(), name


def test_fine_tuning_moved_every_weight_of_every_layer(models: dict[str, PreTrainedModel]) -> None:
    base, sft = (dict(models[side].named_parameters()) for side in SIDES)
    assert base.keys() == sft.keys()
    for name in base:
        moved = (sft[name] - base[name]).norm() / base[name].norm()
        assert moved > 0.01, f"{name} moved by {moved:.2e} of its size"


def test_the_special_token_was_trained_too(models: dict[str, PreTrainedModel]) -> None:
    embedding = models["base"].get_input_embeddings().weight
    assert embedding[0].norm() > 0.1 * embedding.norm(dim=1).median()


@torch.no_grad()
def test_each_model_is_better_on_its_own_text_as_the_card_claims(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, script: ModuleType, card: str
) -> None:
    held_out = {kind: script.held_out_windows(tokenizer, getattr(script, kind)(held_out=True)) for kind in KINDS}
    claimed = {side: card_losses(card, side) for side in SIDES}
    measured = {side: {kind: script.loss_on(models[side], held_out[kind]) for kind in KINDS} for side in SIDES}
    for own, side, other in (("topics", "base", "sft"), ("docstrings", "sft", "base")):
        margin = claimed[other][own] - claimed[side][own]
        assert margin > 0.2, f"the card claims too little on {own}"
        # Half of it: the standard library's texts differ from one Python to the next.
        assert measured[other][own] - measured[side][own] > margin / 2
        assert claimed[side][own] < card_losses(card, "untrained")[own] - 2.0
    if f"Python {platform.python_version()}," in card:
        for side in SIDES:
            assert measured[side] == pytest.approx(claimed[side], abs=0.01)


@pytest.mark.parametrize("name", ["demo.yaml", "demo_smollm2.yaml"])
def test_the_demonstrations_are_valid_and_say_whose_pairs_they_are(name: str) -> None:
    text = (REPO / "configs" / name).read_text(encoding="utf-8")
    settings = Settings.model_validate(yaml.safe_load(text)["residual_compare"])
    assert "a pair that we tuned ourselves" in text
    assert len(settings.prompts) >= 4
    folders = [settings.tokenizer, *(f for e in settings.model_sweep for f in (e.base_model, e.sft_model))]
    for folder in folders:
        assert folder is not None
        assert folder.startswith(".cache/smollm2/") or (REPO / folder).is_dir(), folder
