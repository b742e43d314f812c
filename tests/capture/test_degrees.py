"""The list of models that can be split is what the installed transformers says."""

from __future__ import annotations

import json

import pytest

from capture.degrees import (
    PLANNED,
    REPLICATED_ATTENTION,
    check_degree,
    check_spans,
    degree_error,
    valid_degrees,
    whole_attention_plan,
)
from capture.errors import UnsupportedModelError


def divided(model_type):
    """(attention is divided, feed-forward is divided) by the library's plan."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    plan = CONFIG_MAPPING[model_type]().base_model_tp_plan or {}
    return any("attn" in k for k in plan), any("mlp" in k for k in plan)


@pytest.mark.parametrize("model_type", sorted(PLANNED))
def test_a_planned_type_divides_attention_and_feed_forward(model_type):
    assert divided(model_type) == (True, True)


@pytest.mark.parametrize("model_type", sorted(REPLICATED_ATTENTION))
def test_a_replicated_type_divides_the_feed_forward_alone(model_type):
    assert divided(model_type) == (False, True)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bloom", "stablelm", "gpt_oss"])
def test_a_type_without_a_plan_is_not_split(model_type):
    assert valid_degrees(model_type, 16, 16) == (1,)
    assert "no tensor-parallel plan" in degree_error(model_type, 16, 16, 2)


def test_query_and_key_value_heads_must_both_divide():
    assert valid_degrees("qwen2", 14, 2) == (1, 2)
    assert valid_degrees("qwen2", 28, 4) == (1, 2, 4)
    assert valid_degrees("llama", 64, 8) == (1, 2, 4, 8)
    assert "64 query heads" in degree_error("llama", 64, 8, 6)
    assert "8 key-value heads" in degree_error("llama", 128, 8, 16)


def test_experts_divide_by_powers_of_two_whatever_the_heads():
    assert valid_degrees("deepseek_v3", 128, 128, (1, 2, 3, 4, 5, 8, 16)) == (1, 2, 4, 8, 16)


def test_with_whole_attention_only_the_feed_forward_must_divide():
    assert valid_degrees("qwen2", 14, 2, ffn=[4864], whole_attention=True) == (1, 2, 4, 8)
    assert degree_error("llama", 9, 3, 8, ffn=[1536], whole_attention=True) is None
    why = degree_error("llama", 9, 3, 8, ffn=[1540], whole_attention=True)
    assert why == "its 1540 feed-forward columns do not divide by 8"
    assert valid_degrees("gpt2", 16, 16, ffn=[64], whole_attention=True) == (1,)


def write_config(directory, **config):
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 3} | config))
    return str(directory)


def test_the_error_names_degrees_that_would_do_and_the_way_out(tmp_path):
    directory = write_config(tmp_path, num_attention_heads=8, num_key_value_heads=2, intermediate_size=64)
    check_degree(directory, 2, "base")
    with pytest.raises(UnsupportedModelError) as error:
        check_degree(directory, 4, "base")
    assert "its 2 key-value heads do not divide by 4; tensor_parallel may be 1, 2; or set replicate_attention" in str(
        error.value
    )
    check_degree(directory, 4, "base", whole_attention=True)
    with pytest.raises(
        UnsupportedModelError, match=r"feed-forward columns do not divide by 3; tensor_parallel may be 1, 2, 4, 8$"
    ):
        check_degree(directory, 3, "base", whole_attention=True)


def test_more_ranges_than_layers_are_refused(tmp_path):
    directory = write_config(tmp_path)
    check_spans(directory, 3)
    with pytest.raises(
        UnsupportedModelError, match=r"spans.workers is 4 and the models have 3 layers; set it to 3 or less"
    ):
        check_spans(directory, 4)


@pytest.mark.parametrize("model_type", sorted(PLANNED))
def test_the_plan_with_whole_attention_changes_the_attention_alone(model_type, tmp_path):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    plan = whole_attention_plan(str(tmp_path))
    own = CONFIG_MAPPING[model_type]().base_model_tp_plan
    assert set(plan.values()) == {"replicate"}
    assert {name.split(".", 1)[1] for name in plan} == {name for name in own if "attn" in name}
