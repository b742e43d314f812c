"""The tiny model that the replay is checked on is made of configs as they are published, and stays tiny."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from capture import selfcheck
from capture.opening import find_layers


def opened(model_type: str, **changes: Any) -> Any:
    """A model at its family's own sizes, without weights, as far as the check looks."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **changes))
    return SimpleNamespace(model=model, layers_name=find_layers(model)[0])


@pytest.mark.parametrize(
    "family", ["mamba2", "zamba2", "granitemoehybrid", "falcon_h1", "mpt", "gpt_neo", "gptj", "llama"]
)
def test_it_is_made_of_every_family_s_own_config(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "SHALLOW", ())  # narrow at the first attempt
    monkeypatch.setattr(selfcheck, "MOST_WEIGHTS", 1 << 20)
    assert selfcheck.replay_check(opened(family)) == "bitwise"


@pytest.mark.parametrize("name", ["Gemma3", "Gemma4", "Llava", "Qwen3VL"])
def test_a_text_model_in_a_wrapper_for_images_is_made_small_with_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "MOST_WEIGHTS", 1 << 23)
    config = getattr(transformers, f"{name}Config")()
    if name == "Gemma4":  # of the larger ones, whose layers hand each other the residual alone
        config.text_config.hidden_size_per_layer_input = config.text_config.num_kv_shared_layers = 0
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    streamed: Any = SimpleNamespace(model=model, layers_name="model.language_model.layers")
    assert selfcheck.replay_check(streamed) == "bitwise"


def test_where_a_class_cannot_be_so_narrow_its_own_widths_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selfcheck.TINY, "mamba_n_heads", 7)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "mamba_n_heads": 4, "mamba_d_head": 32, "num_attention_heads": 4,
             "num_key_value_heads": 2, "num_hidden_layers": 6, "layer_types": ["mamba", "attention"] * 3}  # fmt: skip
    assert selfcheck.replay_check(opened("granitemoehybrid", **sizes)) == "bitwise"


def test_a_model_that_stays_large_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "TINY", {key: selfcheck.TINY[key] for key in selfcheck.SHALLOW})
    said = selfcheck.replay_check(opened("llama"))
    assert said.startswith("not run: a tiny LlamaForCausalLM could not be made (ValueError: it would have 4")
