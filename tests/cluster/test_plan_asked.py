"""What an entry asks for is what is planned: its degree, its quantization, and nothing that cannot be run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_plan_options import OFFERS, entry, planned

from cluster.offers import prices, this_machine
from cluster.plan import plan_entry
from cluster.plan_asked import as_asked
from cluster.plan_facts import sizes_from_facts
from cluster.plan_models import Models

FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True}
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}
BIG = {"base_model": "Qwen/Qwen2.5-72B", "sft_model": "Qwen/Qwen2.5-72B-Instruct"}


def few_bits(wanted, **keys):
    return entry(model_kwargs={"quantization_config": wanted}, **keys)


def sizes(model="Qwen/Qwen2.5-72B"):
    found = sizes_from_facts(model, "auto")
    assert found is not None
    return found


def test_an_explicit_degree_is_the_only_one_that_is_planned():
    assert {o.degree for o in planned(entry()).options} >= {1, 2, 4}
    plan = planned(entry(tensor_parallel=2))
    assert {o.degree for o in plan.options} == {2}
    assert {o.offer.gpus for o in plan.options} == {2, 4, 8}  # of a larger machine, a part
    assert "sub-layer" not in {o.mode for o in plan.options} | set(plan.needs)
    assert plan.needs["resident"] < planned(entry()).needs["resident"]
    assert "tensor_parallel: 2: planned over 2 GPUs of one machine only" in plan.notes


def test_a_degree_that_the_heads_do_not_divide_by_is_an_error_that_names_those_that_do():
    plan = planned(entry(tensor_parallel=3))
    assert plan.choice is None
    assert plan.error == (
        "UnsupportedModelError: tensor_parallel: 3: 'Qwen/Qwen2.5-7B' cannot be split over 3 GPUs: its 28 query heads do "
        "not divide by 3; tensor_parallel may be 1, 2, 4"
    )


def test_whole_attention_is_the_way_out_and_takes_more_memory():
    assert "or set replicate_attention: true" in planned(entry(tensor_parallel=8)).error
    whole = planned(entry(tensor_parallel=8, replicate_attention=True))
    assert {o.degree for o in whole.options} == {8}
    four = [planned(entry(tensor_parallel=4, replicate_attention=r)).needs["resident"] for r in (False, True)]
    assert four[0] < four[1]


def test_no_machine_with_so_many_gpus_is_said():
    single = [o for o in OFFERS if o.gpus == 1]
    assert "no machine with 4 GPUs is offered" in planned(entry(tensor_parallel=4), single).error


def test_processes_on_this_machine_share_its_memory():
    here = this_machine(prices(), 1.0, 8, 200 << 30)
    one, two = (
        plan_entry(entry(device="cpu", tensor_parallel=n), [], Models(offline=True), here=here, prompts=4, tokens=100)
        for n in (1, 2)
    )
    assert two.choice.degree == 2
    assert two.choice.offer.memory_mib == one.choice.offer.memory_mib / 2
    assert two.choice.stages.compute == pytest.approx(one.choice.stages.compute)


@pytest.mark.parametrize(("wanted", "each"), [
    (FOUR, 0.5625), (EIGHT, 1.0),
    ({"quant_method": "torchao", "quant_type": "Int4WeightOnlyConfig"}, 0.5625),
    ({"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}, 1.0),
])  # fmt: skip
def test_quantized_layers_are_planned_at_their_bits_and_the_ends_as_stored(wanted, each):
    plain = sizes()
    asked = as_asked(few_bits(wanted), (plain,))
    (few,) = asked.pair
    norms = sum(plain.weights.replicated)
    expected = norms + (sum(plain.weights.layers) - norms) * each / 2
    assert sum(few.weights.layers) == pytest.approx(expected, rel=1e-6)
    assert (few.weights.embedding, few.weights.head) == (plain.weights.embedding, plain.weights.head)
    assert few.download_bytes == plain.download_bytes


def test_a_quantized_pair_is_planned_resident_on_one_gpu_and_says_so():
    plan = planned(few_bits(FOUR, **BIG))
    assert {(o.mode, o.degree) for o in plan.options} == {("resident", 1)}
    assert list(plan.needs) == ["resident"]
    # 2 x (70.2e9 elements at 0.5625 bytes + 5 GB of both ends) and the work
    assert 85e9 < plan.choice.need_bytes < 110e9
    assert plan.choice.offer.gpu == "H200"
    (note,) = (n for n in plan.notes if "4-bit" in n)
    assert note.endswith("embedding and unembedding as they are; mode resident on one GPU only")


def test_a_quantized_pair_that_fits_nowhere_is_an_error_and_not_streamed():
    small = [o for o in OFFERS if o.memory_mib < 50000]
    assert "mode resident needs" in planned(few_bits(FOUR, **BIG), small).error


def test_weights_of_unknown_bits_and_fused_experts_are_planned_as_stored():
    plain = sizes()
    odd = as_asked(few_bits({"quant_method": "torchao", "quant_type": "IntxWeightOnlyConfig"}), (plain,))
    assert odd.pair == (plain,)
    assert "an upper bound" in odd.notes[0]
    experts = replace(plain, weights=replace(plain.weights, fused=True))
    fused = as_asked(few_bits(FOUR), (experts,))
    assert fused.pair[0].weights.layers == plain.weights.layers
    assert "experts are not quantized" in fused.notes[0]


def test_what_is_stored_quantized_is_not_quantized_again():
    stored = next(m for m in ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-V3-Base") if sizes_from_facts(m, "auto"))
    assert "stored quantized (float8); remove" in planned(few_bits(FOUR, base_model=stored, sft_model=stored)).error
