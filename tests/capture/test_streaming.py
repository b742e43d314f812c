"""What streaming promises: few weights alive, each checkpoint byte read once, the same numbers as resident."""

import contextlib
import gc
import mmap
import os
import threading

import pytest
import tiny
import torch
from test_capture import entry_of
from walked import CPU, open_pair, walk

from capture import stored
from capture.batches import make_batches
from capture.checkpoint import EMBEDDING, HEAD, REST, StreamedModel
from capture.config import FOUR_PASSES, Batching
from capture.errors import PairscopeError
from capture.footprint import MODES, weight_bytes
from capture.measure import model_bytes
from capture.run import capture_pair


def live_weight_bytes(pair):
    """Bytes of both models' weights that are not on meta, counted from the models themselves and not from the ledger."""
    models = {id(m): m for m in pair.models.values()}.values()
    tensors = {id(t): t for m in models for t in m.model.state_dict(keep_vars=True).values() if not t.is_meta}
    return sum(t.nbytes for t in tensors.values())


def planned(pair):
    return weight_bytes([model_bytes(m) for m in pair.unique()])


@pytest.mark.parametrize("n_prompts", [1, 64])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_streamed_weights_stay_within_two_layers_and_one_ahead_of_each_model(arch, n_prompts, pairs):
    pair = open_pair(pairs(arch))
    base, sft = pair.models["base"], pair.models["sft"]
    ends = sum(m.group_bytes(g) for m in (base, sft) for g in (EMBEDDING, HEAD, REST))
    bound = ends + 3 * sum(max(m.layer_bytes()) for m in (base, sft))
    pair.begin(make_batches(tiny.random_ids(n_prompts, 9).tolist(), Batching(), CPU, probe=False), mode="streamed")
    seen = [live_weight_bytes(pair) for _ in pair.walk()]
    whole = ends + sum(sum(m.layer_bytes()) for m in (base, sft))
    assert max(seen) <= bound < whole
    assert base.ledger.peak <= bound
    assert base.ledger.peak <= planned(pair)["streamed"]


@pytest.mark.parametrize("n_prompts", [1, 64])
@pytest.mark.parametrize("streamed", [True, False])
def test_each_checkpoint_byte_is_read_once_however_many_prompts(streamed, n_prompts, pairs):
    pair = open_pair(pairs("llama"))
    walk(pair, tiny.random_ids(n_prompts, 9).tolist(), streamed=streamed, batching=Batching(max_tokens=90))
    ledger = pair.models["base"].ledger
    stored = sum(
        f.stat().st_size for owner in ("base", "sft") for f in getattr(pairs("llama"), owner).glob("*.safetensors")
    )
    assert len(ledger.reads) == sum(len(m.model.state_dict()) for m in pair.models.values())
    assert 0.95 * stored < ledger.read_bytes <= stored  # the rest is the files' headers
    assert max(n for n in ledger.reads.values()) == pair.models["base"].head_weight.nbytes  # no key twice


def test_nothing_but_the_ends_is_alive_after_a_streamed_walk(pairs):
    pair = open_pair(pairs("llama"))
    walk(pair, tiny.random_ids(2, 9).tolist(), streamed=True)
    gc.collect()
    assert live_weight_bytes(pair) == sum(m.group_bytes(g) for m in pair.models.values() for g in (HEAD, REST))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "mixtral", "deepseek_v3"])
def test_planned_weight_bytes_are_the_peak(arch, mode, pairs):
    pair = open_pair(pairs(arch))
    need = planned(pair)[mode]
    walk(pair, tiny.random_ids(2, 9).tolist(), mode=mode)
    peak = pair.models["base"].ledger.peak
    assert peak <= need
    if mode != "sub-layer":
        assert need <= 1.01 * peak


def test_the_modes_differ_in_what_they_hold(pairs):
    """Of models with more than a few layers, each mode holds less than the one before it."""
    pair = open_pair(pairs("llama", num_hidden_layers=12))
    need = planned(pair)
    assert need["resident"] > need["one-at-a-time"] > need["streamed"] > need["streamed-2"] > need["sub-layer"]


@pytest.mark.parametrize("mode", ["one-at-a-time", "streamed-2"])
def test_each_layer_is_read_once_in_the_modes_that_take_turns(mode, pairs):
    pair = open_pair(pairs("llama"))
    walk(pair, tiny.random_ids(8, 9).tolist(), mode=mode, batching=Batching(max_tokens=20))
    reads = pair.models["base"].ledger.reads
    head = pair.models["base"].head_weight.nbytes
    assert all(n == head * (2 if mode == "one-at-a-time" else 1) for key, n in reads.items() if "lm_head" in key)
    layers = {
        key.split(":")[0]: sum(n for k, n in reads.items() if k.startswith(key.split(":")[0]) and ".layers." in k)
        for key in reads
    }
    assert layers == {label: sum(m.layer_bytes()) for label, m in pair.models.items()}


def test_a_walk_that_is_stopped_ends_and_leaves_its_thread_behind_it(pairs):
    pair = open_pair(pairs("llama"))
    pair.begin(make_batches(tiny.random_ids(2, 9).tolist(), Batching(), CPU, probe=False), mode="streamed")
    walking = pair.walk(stop=lambda: True)
    assert next(walking).layer == -1
    with pytest.raises(KeyboardInterrupt):
        next(walking)
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_equal_embeddings_halve_the_work_and_change_nothing(arch, tmp_path):
    paths = tiny.make_pair(arch, tmp_path, same_embeddings=True)
    pair = open_pair(paths)
    got = walk(pair, tiny.random_ids(2, 9).tolist(), streamed=True)
    assert pair.same_embeddings
    for layer in range(-1, pair.n_layers + 1):
        for prompt in range(2):
            assert torch.equal(got["BB"][layer][prompt], got["SB"][layer][prompt])
            assert torch.equal(got["BS"][layer][prompt], got["SS"][layer][prompt])
    assert not torch.equal(got["BB"][1][0], got["BS"][1][0])


@pytest.mark.parametrize("mode", MODES)
def test_frozen_first_layers_are_one_state_in_every_mode(mode, pairs):
    pair = open_pair(pairs("llama", frozen_layers=(0, 1)))
    pair.begin(make_batches(tiny.random_ids(2, 9).tolist(), Batching(), CPU, probe=False), mode=mode)
    slots = {s.layer: len(s.slots) for s in pair.walk()}
    assert pair.shared_layers == 2
    assert slots == {-1: 2, 0: 2, 1: 2, 2: 4, 3: 4, 4: 4}


def test_a_checkpoint_against_itself_is_opened_once_and_has_one_state(pairs):
    paths = pairs("llama")
    pair = open_pair(tiny.PairPaths(paths.base, paths.base, paths.tokenizer), FOUR_PASSES)
    pair.begin(make_batches(tiny.random_ids(2, 9).tolist(), Batching(), CPU, probe=False), mode="streamed")
    assert {len(s.slots) for s in pair.walk()} == {1}


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not say what is in memory")
@pytest.mark.parametrize("stay", [True, False])
def test_layers_that_lie_in_memory_are_mapped_ahead_and_those_that_stay_are_not_asked_for_again(
    stay, pairs, monkeypatch
):
    for file in pairs("llama").base.glob("*.safetensors"):
        file.read_bytes()
    pair = open_pair(pairs("llama"))
    base, asked = pair.models["base"], []
    monkeypatch.setattr(stored, "_madvise", lambda *call: asked.append(call) or 0)
    thread = base.map_ahead(stay=stay)
    if thread is None:
        pytest.skip("this file system does not say what is in memory")
    thread.join()
    sizes = sum(base.layer_bytes())
    assert sum(size for _, size, _ in asked) >= sizes
    assert all(start % mmap.PAGESIZE == 0 and advice == stored.POPULATE_READ for start, _, advice in asked)
    monkeypatch.setattr(base.stored, "cached", lambda keys: pytest.fail("asked again") if stay else False)
    assert all(base.is_at_hand(("layer", i)) is stay for i in range(pair.n_layers))


@pytest.mark.parametrize(
    ("asked", "stay"),
    [
        ({}, True),
        ({"mode": "resident"}, True),
        ({"mode": "streamed"}, False),
        ({"mode": "streamed-2"}, False),
        ({"device_memory_gib": 0.001}, False),
        ({"mode": "sub-layer"}, None),
    ],
)
def test_which_layers_are_mapped_ahead(asked, stay, pairs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(StreamedModel, "map_ahead", lambda self, *, stay: seen.append(stay))
    entry = entry_of(pairs("llama"), prompts=("a bc",), **asked)
    with contextlib.suppress(PairscopeError):  # a megabyte is too little for anything
        capture_pair(entry, str(tmp_path))
    assert seen == ([] if stay is None else [stay] * 2)


def test_what_is_no_view_or_not_in_memory_is_not_mapped_ahead(pairs, monkeypatch):
    base = open_pair(pairs("mixtral")).models["base"]  # whose experts are put together from many tensors
    assert base.map_ahead(stay=True) is None
    assert not base.is_at_hand(("layer", 0))
    other = open_pair(pairs("llama")).models["base"]
    monkeypatch.setattr(other.stored, "cached", lambda keys: False)
    assert other.map_ahead(stay=True) is None
    assert not other.is_at_hand(("layer", 0))


def test_where_the_system_cannot_map_ahead_layers_are_read_as_ever(pairs, monkeypatch):
    monkeypatch.setattr(stored, "_madvise", None)
    pair = open_pair(pairs("llama"))
    assert pair.models["base"].map_ahead(stay=True) is None
    walked = walk(pair, tiny.random_ids(1, 9).tolist(), streamed=False)
    assert all(len(states) == pair.n_layers + 2 for states in walked.values())
