"""What the plan offers: only what fits, only what can be split so, and first of all what this version runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from capture.batches import make_batches
from capture.config import Batching, load_config
from capture.degrees import degree_error
from cluster.offers import assumed_offers, prices, this_machine
from cluster.plan import plan_entry, plan_sweeps
from cluster.plan_facts import CONFIGS, sizes_from_facts
from cluster.plan_guide import CELLS, offers_of
from cluster.plan_models import Models
from cluster.plan_options import Stages, degrees, options, stages
from cluster.plan_page import guide_cells
from cluster.plan_work import token_counts, work_of

OFFERS = assumed_offers(prices())


def entry(**keys):
    base, sft = "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"
    (found,) = load_config(CONFIGS / "hardware_table.yaml", {}).entries()[3:4]
    return found.model_copy(update={"base_model": base, "sft_model": sft} | keys)


def planned(one, offers=OFFERS, **keys):
    here = this_machine(prices(), 1.0, 2, 8 << 30)
    return plan_entry(one, offers, Models(offline=True), here=here, **({"prompts": 4, "tokens": 100} | keys))


@pytest.fixture(scope="module")
def table():
    return {e.name: planned(e) for e in load_config(CONFIGS / "hardware_table.yaml", {}).entries()}


def test_every_pair_of_the_table_has_a_choice(table):
    assert len(table) == 18
    assert all(p.choice is not None and p.error is None for p in table.values())


def test_nothing_is_offered_that_does_not_fit(table):
    for plan in table.values():
        assert all(o.need_bytes <= o.offer.room_bytes for o in plan.options)


def test_none_of_the_guides_impossible_cells_is_offered(table):
    impossible = [(name, c) for name, row in guide_cells().items() for c in row if c.impossible or c.too_tight]
    assert len(impossible) == 21
    for name, cell in impossible:
        machines = offers_of(cell, OFFERS)
        assert not [o for o in table[name].options if o.mode == "resident" and o.offer in machines]


def test_the_guides_cells_are_judged_as_its_weights_say():
    cells = [c for row in guide_cells().values() for c in row]
    assert len(cells) == 72 == 4 * len(CELLS)
    assert sum(c.impossible for c in cells) == 18
    assert sum(c.too_tight for c in cells) == 3
    # thirteen numbers that no tensor parallelism takes, and 16 GPUs for 8 key-value heads, which transformers does not
    assert sum(c.split is not None for c in cells) == 14


def test_only_valid_degrees_are_offered(table):
    for plan in table.values():
        for option in plan.options:
            assert option.degree <= option.offer.gpus
            assert all(degree_error(m.model_type, m.heads, m.kv_heads, option.degree) is None for m in plan.models)


def test_a_machine_with_more_gpus_than_can_be_used_is_used_in_part():
    small = sizes_from_facts("Qwen/Qwen2.5-0.5B", "auto")  # two key-value heads
    assert degrees([small], 8, alone=False) == [2]
    assert degrees([small], 8, alone=True) == [1, 2]


def test_what_runs_is_recommended_before_what_is_cheaper_but_only_planned(table, monkeypatch):
    monkeypatch.setattr("cluster.plan_options.RUNNABLE", frozenset({"resident", "streamed"}))
    plan = table["llama-3.1-405b"]
    assert plan.choice.runs
    assert not plan.cheapest.runs
    assert plan.cheapest.usd < plan.choice.usd
    assert (plan.choice.mode, plan.choice.offer.title) == ("streamed", "A100 SXM4 40G")


def test_nothing_is_cheaper_than_the_cheapest_or_faster_than_the_fastest(table):
    for plan in table.values():
        assert plan.cheapest.usd == min(o.usd for o in plan.options)
        assert plan.fastest.hours == min(o.hours for o in plan.options)


def test_every_recommended_choice_runs(table):
    assert all(plan.choice.runs for plan in table.values())


def test_where_nothing_runs_the_choice_says_so(table, monkeypatch):
    monkeypatch.setattr("cluster.plan_options.RUNNABLE", frozenset())
    assert not table["deepseek-v3"].choice.runs


def test_a_matrix_at_a_time_reads_once_for_every_batch():
    times = Stages(10, 3, 2, 4)
    assert times.seconds("sub-layer", 3) == 10 + 15
    assert times.seconds("streamed", 3) == 10 + 5


def test_fourteen_pairs_stream_on_one_card_of_24_gb(table):
    fits = {
        name for name, plan in table.items()
        if any(o.mode == "streamed" and o.degree == 1 and o.offer.gpu == "RTX 4090" for o in plan.options)
    }  # fmt: skip
    assert len(fits) == 14
    assert set(table) - fits == {"llama-3.1-405b", "deepseek-v3", "deepseek-v3.1", "nemotron-340b"}


def test_a_card_without_bfloat16_is_not_offered_for_it():
    tesla = [o for o in OFFERS if o.gpu == "Tesla T4"]
    assert not planned(entry(base_model="Qwen/Qwen2.5-0.5B", sft_model="Qwen/Qwen2.5-0.5B"), tesla).options
    half = planned(
        entry(base_model="Qwen/Qwen2.5-0.5B", sft_model="Qwen/Qwen2.5-0.5B-Instruct", dtype="float16"), tesla
    )
    assert half.choice is not None


def test_the_entrys_mode_and_memory_cap_are_kept():
    assert {o.mode for o in planned(entry(mode="resident")).options} == {"resident"}
    assert all(o.need_bytes <= 16 * 2**30 for o in planned(entry(device_memory_gib=16.0)).options)
    refused = planned(entry(mode="resident", device_memory_gib=4.0))
    assert "mode resident needs 28." in refused.error
    assert "device_memory_gib allows 4.3 GB" in refused.error


def test_a_disk_that_is_too_small_is_no_choice():
    tiny = [dataclasses.replace(o, disk_gb=40.0) for o in OFFERS]
    assert "the largest disk 40 GB" in planned(entry(), tiny).error


def test_stages_and_dollars_by_hand():
    one = entry()
    pair = [sizes_from_facts(m, "auto") for m in (one.base_model, one.sft_model)]
    work = work_of(one, pair, token_counts(one, 4, 100))
    offer = next(o for o in OFFERS if o.title == "RTX 4090 24G")
    gb = 2 * 15.231233024
    times = stages(offer, pair, work, 1)
    assert times.download == pytest.approx(gb * 8 / 1)
    assert times.disk == pytest.approx(gb / 3)
    assert times.pcie == pytest.approx(gb / 20)
    # 2 operations an element, attention, and the lens at layers -1 to L-1
    layers = 4 * (2 * 400 * 28 * 233057792 + 4 * 4 * 100**2 * 28 * 128 * 28)
    assert work.layer_flop == pytest.approx(layers)
    assert work.lens_flop == pytest.approx(4 * 2 * 3584 * 152064 * 400 * 29)
    assert times.compute == pytest.approx(work.layer_flop / 100e12 + work.lens_flop / 50e12)
    assert times.bottleneck == "download"
    found = next(o for o in options([offer], pair, work) if o.mode == "streamed")
    hours = (times.download + max(times.disk + times.pcie, times.compute)) / 3600
    assert found.hours == pytest.approx(hours)
    assert found.usd == pytest.approx(hours * (0.78 + (gb + 30) * 0.15 / 730) + gb * 0.005)


def test_one_model_at_a_time_does_not_read_while_it_computes():
    times = Stages(10, 3, 2, 4)
    assert times.seconds("streamed") == 10 + 5
    assert times.seconds("one-at-a-time") == 10 + 5 + 4


def test_a_faster_network_is_faster_and_the_same_card():
    slow, fast = planned(entry()), planned(entry(), assumed_offers(prices(), 10.0))
    assert fast.choice.hours < slow.choice.hours / 5
    assert fast.choice.offer.gpu == slow.choice.offer.gpu


def test_tokens_are_the_callers_or_estimated_from_the_text():
    one = entry(prompts=("abcdef", "abcdefghi"), trim_prompts=False)
    assert token_counts(one) == [2, 3]
    assert token_counts(entry(prompts=("abcdef", "abcdefghi"), trim_prompts=True)) == [2, 2]
    assert token_counts(one, prompts=3, tokens=7) == [7, 7, 7]


def test_an_entry_for_the_cpu_is_planned_for_this_machine():
    plan = planned(entry(device="cpu", base_model="Qwen/Qwen2.5-0.5B", sft_model="Qwen/Qwen2.5-0.5B-Instruct"))
    assert {o.offer.title for o in plan.options} == {"this machine"}
    assert plan.choice.usd == 0


@pytest.mark.parametrize("padding", ["none", "right"])
def test_prompts_share_batches_as_a_capture_puts_them_together(padding):
    batching = Batching(max_tokens=40, padding=padding)
    one = entry(batching=batching)
    pair = [sizes_from_facts(one.base_model, "auto")]
    for counts in ([10] * 9, [10] * 9 + [20] * 3, [20, 10, 10], [50, 7]):
        work = work_of(one, pair, counts)
        made = make_batches([[1] * n for n in counts], batching, torch.device("cpu"), probe=False)
        largest = max(batch.ids_BT.numel() for batch in made)
        if padding == "none":
            assert (work.batches, work.walk.batch_tokens) == (len(made), largest)
        else:  # as if all were as long as the longest: rather more than there are
            assert work.batches == -(-len(counts) // max(1, 40 // max(counts))) >= len(made)
            assert work.walk.batch_tokens == largest


def test_a_lens_that_is_off_or_thinned_costs_less():
    one = entry()
    pair = [sizes_from_facts(one.base_model, "auto")]
    full, thin, off = (
        work_of(one.model_copy(update={"lens": one.lens.model_copy(update=keys)}), pair, [100])
        for keys in ({}, {"layers": 4}, {"enabled": False})
    )
    assert full.lens_flop > thin.lens_flop > off.lens_flop == 0
    assert not off.walk.lens


def test_sublayer_mode_fetches_all_of_a_streamed_pair_once_for_every_batch():
    """Its traffic is billed each time; where what was fetched is kept it is read again from the disk."""
    few = Batching(max_tokens=100)
    kept, streamed = (
        planned(entry(mode="sub-layer", batching=few, weights=way)).options[0] for way in ("cache", "stream")
    )
    assert (kept.offer, kept.traffic_gb) == (streamed.offer, pytest.approx(30.5, abs=0.1))
    assert streamed.traffic_gb == 4 * kept.traffic_gb
    assert streamed.stages.download == 4 * kept.stages.download
    more = 3 * kept.traffic_gb * kept.offer.usd_per_gb
    assert streamed.usd - kept.usd > more > 0
    (sweep,) = plan_sweeps([planned(entry(mode="sub-layer", batching=few, weights="stream"))], 1, 0.0)
    assert sweep.usd == pytest.approx(streamed.usd)
    other = [planned(entry(mode="streamed", batching=few, weights=way)).options[0] for way in ("cache", "stream")]
    assert other[0].usd == other[1].usd
