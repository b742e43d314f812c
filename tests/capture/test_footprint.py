"""The arithmetic of memory agrees with the engine, exactly where it can be checked."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
from walked import CPU

from capture import assemble, footprint, lens_plan, unembed
from capture.checkpoint import EMBEDDING, HEAD, REST, StreamedModel
from capture.footprint import ModelBytes, Walk, activation_bytes, lens_bytes, rank_share, state_bytes, weight_bytes
from capture.ledger import Ledger
from capture.measure import model_bytes
from cluster.plan_models import directory_sizes

ARCHS = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2", "mixtral", "deepseek_v3", "phi3", "nemotron", "olmo2",
         "cohere", "granite")  # fmt: skip


def opened(paths, dtype):
    return [StreamedModel(str(p), label=label, dtype=dtype, device=CPU, model_kwargs={}, ledger=Ledger())
            for label, p in (("base", paths.base), ("sft", paths.sft))]  # fmt: skip


def planned(paths, dtype):
    return [directory_sizes(p, str(p), dtype, source="directory") for p in (paths.base, paths.sft)]


def agree(paths, dtype):
    base, sft = opened(paths, dtype)
    engine = [model_bytes(m) for m in (base, sft)]
    sizes = planned(paths, dtype)
    found = weight_bytes([s.weights for s in sizes])
    for mode, need in weight_bytes(engine).items():
        assert found[mode] == need or (mode == "sub-layer" and found[mode] >= 0.9 * need), mode
    for model, size in zip((base, sft), sizes, strict=True):
        for group, bytes_ in (
            (EMBEDDING, size.weights.embedding),
            (HEAD, size.weights.head),
            (REST, size.weights.rest),
        ):
            assert model.group_bytes(group) == bytes_, group
        assert tuple(model.layer_bytes()) == size.weights.layers
        own = {n: p for n, p in model.model.named_parameters() if n not in model.ties}
        assert size.parameters == sum(p.numel() for p in own.values())


@pytest.mark.parametrize("arch", ARCHS)
def test_weights_planned_from_headers_are_the_engines(arch, pairs):
    agree(pairs(arch), "auto")


def test_weights_cast_to_another_dtype_are_planned_so(pairs):
    agree(pairs("llama"), "bfloat16")


def test_what_the_library_keeps_in_float32_is_planned_so(pairs):
    base, _ = opened(pairs("deepseek_v3"), "bfloat16")
    size, _ = planned(pairs("deepseek_v3"), "bfloat16")
    for i, planned_bytes in enumerate(size.weights.layers):
        base.load(("layer", i))
        assert base.loaded[("layer", i)] == planned_bytes


def test_shards_and_a_tied_head_change_nothing(pairs):
    agree(pairs("llama", sharded=True), "auto")
    agree(pairs("llama", tie=True), "auto")


def test_a_checkpoint_against_itself_is_held_once(pairs):
    paths = pairs("llama")
    (size,) = planned(tiny.PairPaths(paths.base, paths.base, paths.tokenizer), "auto")[:1]
    (model,) = opened(paths, "auto")[:1]
    need = weight_bytes([model_bytes(model)])
    assert {m: n for m, n in weight_bytes([size.weights]).items() if m != "sub-layer"} == {
        m: n for m, n in need.items() if m != "sub-layer"
    }


def test_the_engines_constants_are_the_plans():
    assert lens_plan.TILE_BYTES["cuda"] == footprint.LENS_TILE_BYTES
    assert footprint.LENS_STATISTICS_CELLS == lens_plan.CELLS_ON_DEVICE
    assert footprint.LENS_HEAD_CHUNK == unembed.HEAD_CHUNK
    assert footprint.FP8_STRIP == assemble.STRIP


MODEL = ModelBytes(100, 100, 10, (30, 40, 50), matrix=20, row=1)


def test_each_mode_by_hand():
    base, sft = MODEL, dataclasses.replace(MODEL, layers=(30, 40, 60))
    assert weight_bytes([base, sft]) == {
        "resident": 2 * 110 + 120 + 130,
        "one-at-a-time": 2 * 110,  # both unembeddings at the end: more than 20 + 130
        "streamed": 2 * 110 + (40 + 40) + (50 + 60),
        "streamed-2": 2 * 110 + 50 + 60,
        "sub-layer": 2 * 10 + 2 * 20 + 2 * 100,  # both chunks are the whole of so small an unembedding
    }
    large = [dataclasses.replace(m, layers=tuple(10 * s for s in m.layers)) for m in (base, sft)]
    assert weight_bytes(large)["one-at-a-time"] == 2 * 10 + 1300


def test_only_embeddings_that_are_unembeddings_stay_while_the_next_is_read():
    small = ModelBytes(1000, 10, 1, (1,))
    assert footprint.weights([small, small], "streamed").open == 1000
    tied = ModelBytes(1000, 0, 1, (1,), tied=True)
    assert footprint.weights([tied, tied], "streamed").open == 2002


def test_a_tied_embedding_is_never_freed():
    tied = ModelBytes(100, 0, 10, (300, 400), tied=True)
    assert weight_bytes([tied])["resident"] == 110 + 700
    assert weight_bytes([dataclasses.replace(tied, head=100, tied=False)])["resident"] == 110 + 700


def test_one_layer_is_enough():
    assert weight_bytes([dataclasses.replace(MODEL, layers=(500,))])["streamed"] == 110 + 500


def test_a_rank_holds_its_share_and_what_is_not_divided():
    model = ModelBytes(100, 101, 10, (40, 41), replicated=(8, 9), matrix=20)
    share = rank_share(model, 4)
    assert (share.embedding, share.head, share.rest, share.layers) == (100, 26, 10, (16, 17))
    assert rank_share(model, 1) is model


def test_what_loading_takes_stands_beside_the_layers():
    act = footprint.Activations(*9 * [0])
    loads = dataclasses.replace(MODEL, loading=(0, 0, 7))
    assert footprint.needs([loads], "streamed", act).layers == footprint.needs([MODEL], "streamed", act).layers + 7


def test_states_that_wait_count_where_the_models_take_turns_and_not_where_they_are_spilled():
    act = footprint.Activations(
        states=1000, batch=100, calls=10, batch_calls=1, opening=0, forward=50, statistics=0, products=0, lens=0
    )
    layers = footprint.weights([MODEL], "streamed").layers

    def work(mode, **how):
        return footprint.needs([MODEL], mode, act, **how).layers - layers

    assert work("streamed") == 1010 + 100
    assert work("streamed-2") == 1010 + 900 + 100
    assert work("streamed", spill=True) == 101 + 100
    assert work("streamed-2", spill=True) == 101 + 100
    assert work("streamed", spill=True, on_host=True) == 1010 + 100


def test_the_last_stage_is_the_larger_of_products_and_of_heads_with_lens_tiles():
    held = footprint.weights([MODEL], "streamed")
    for products, lens in ((0, 7000), (7000, 0)):
        act = footprint.Activations(
            states=1000,
            batch=100,
            calls=10,
            batch_calls=1,
            opening=0,
            forward=0,
            statistics=0,
            products=products,
            lens=lens,
        )
        need = footprint.needs([MODEL], "streamed", act)
        assert need.lens == (held.lens if lens else held.products) + 7000 + 1010 + 100
        assert need.peak == need.lens


def test_statistics_take_float64_of_some_rows_and_of_no_more_than_there_are():
    copies = 8 * (4 + footprint.STATISTICS_TEMPORARIES)
    many = dataclasses.replace(WALK, tokens=40_000, batch_tokens=40_000)
    assert footprint.statistics_bytes(WALK) == 400 * 896 * copies
    assert footprint.statistics_bytes(many) == footprint.STATISTICS_CELLS * copies
    assert footprint.statistics_bytes(many, on_cpu=True) == footprint.STATISTICS_CELLS_ON_CPU * copies


WALK = Walk(tokens=400, batch_tokens=400, passes=4, passes_of_one=2, hidden=896, ffn=4864, heads=14, kv_heads=2, head_dim=64,
            vocab=151936, element=2)  # fmt: skip


def test_states_are_all_passes_between_two_layers():
    assert state_bytes(WALK) == 4 * 400 * 896 * 2


def test_the_lens_takes_tiles_however_many_tokens_there_are():
    many = dataclasses.replace(WALK, tokens=40_000, batch_tokens=40_000)
    assert lens_bytes(WALK) <= lens_bytes(many) < 4 * footprint.LENS_TILE_BYTES
    assert lens_bytes(dataclasses.replace(WALK, lens=False)) == 0
    assert activation_bytes(many) > activation_bytes(WALK) > lens_bytes(WALK)


def test_how_many_states_wait_for_their_statistics(monkeypatch):
    monkeypatch.setattr(footprint, "WAITING_CELLS", 100)
    assert footprint.waiting([60], 30) == (0, 60)  # of two of them there is no room
    assert footprint.waiting([30], 30) == (60, 90)
    assert footprint.waiting([30], 2) == (30, 90)  # one while the second layer runs; the third is the final norm's
    assert footprint.waiting([30, 60], 30) == (30, 90)
    assert footprint.waiting([10], 4) == (30, 50)
