"""What streaming promises: few weights alive, each checkpoint byte read once, the same numbers as resident."""

import gc
import threading

import pytest
import tiny
import torch
from walked import CPU, open_pair, walk

from capture.batches import make_batches
from capture.checkpoint import EMBEDDING, HEAD, REST
from capture.config import FOUR_PASSES, Batching
from capture.memory import weight_needs


def live_weight_bytes(pair):
    """Bytes of both models' weights that are not on meta, counted from the models themselves and not from the ledger."""
    models = {id(m): m for m in pair.models.values()}.values()
    tensors = {id(t): t for m in models for t in m.model.state_dict(keep_vars=True).values() if not t.is_meta}
    return sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("n_prompts", [1, 64])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_streamed_weights_stay_within_two_layers_and_one_ahead_of_each_model(arch, n_prompts, pairs):
    pair = open_pair(pairs(arch))
    base, sft = pair.models["base"], pair.models["sft"]
    ends = sum(m.group_bytes(g) for m in (base, sft) for g in (EMBEDDING, HEAD, REST))
    bound = ends + 3 * sum(max(m.layer_bytes()) for m in (base, sft))
    pair.begin(make_batches(tiny.random_ids(n_prompts, 9).tolist(), Batching(), CPU, probe=False))
    seen = [live_weight_bytes(pair) for _ in pair.walk(streamed=True)]
    whole = ends + sum(sum(m.layer_bytes()) for m in (base, sft))
    assert max(seen) <= bound < whole
    assert base.ledger.peak <= bound
    assert base.ledger.peak <= weight_needs(base, sft)["streamed"]


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


def test_planned_weight_bytes_are_the_peak(pairs):
    for streamed, mode in ((True, "streamed"), (False, "resident")):
        pair = open_pair(pairs("llama"))
        needs = weight_needs(pair.models["base"], pair.models["sft"])
        walk(pair, tiny.random_ids(2, 9).tolist(), streamed=streamed)
        assert 0.85 * needs[mode] <= pair.models["base"].ledger.peak <= needs[mode]


def test_a_walk_that_is_stopped_ends_and_leaves_its_thread_behind_it(pairs):
    pair = open_pair(pairs("llama"))
    pair.begin(make_batches(tiny.random_ids(2, 9).tolist(), Batching(), CPU, probe=False))
    walking = pair.walk(streamed=True, stop=lambda: True)
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


def test_frozen_first_layers_are_computed_once(tmp_path):
    paths = tiny.make_pair("llama", tmp_path, frozen_layers=(0, 1))
    pair = open_pair(paths)
    pair.begin(make_batches(tiny.random_ids(2, 9).tolist(), Batching(), CPU, probe=False))
    slots = {s.layer: len(s.slots) for s in pair.walk(streamed=True)}
    assert pair.shared_layers == 2
    assert slots == {-1: 2, 0: 2, 1: 2, 2: 4, 3: 4, 4: 4}


def test_a_checkpoint_against_itself_is_opened_once_and_has_one_state(pairs):
    paths = pairs("llama")
    pair = open_pair(tiny.PairPaths(paths.base, paths.base, paths.tokenizer), FOUR_PASSES)
    pair.begin(make_batches(tiny.random_ids(2, 9).tolist(), Batching(), CPU, probe=False))
    assert {len(s.slots) for s in pair.walk(streamed=True)} == {1}
