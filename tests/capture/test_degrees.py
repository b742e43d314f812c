"""The list of models that can be split is what the installed transformers says."""

from __future__ import annotations

import pytest

from capture.degrees import PLANNED, REPLICATED_ATTENTION, degree_error, valid_degrees


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
