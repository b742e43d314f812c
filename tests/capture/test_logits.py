"""Logits and the shifts between slots against float64: every shift between slots that are related keeps its own digits."""

import itertools

import pytest
import tiny
import torch
from torch import nn
from walked import open_pair

from capture import unembed
from capture.checkpoint import EMBEDDING, HEAD
from capture.logits import Logits, can_shift, leads_of, led_logits, tile_logits
from capture.unembed import Space

MODELS = ["base", "sft", "base", "sft"]
HEADS = {"two": ["base", "sft", "base", "sft"], "one": ["base"] * 4}
FACTOR = {"llama": 1.0, "cohere": 0.3, "granite": 1 / 2.5, "mamba": 1.0}


def opened(arch, directory, dtype, bias):
    """A pair whose unembeddings are there, with biases that its architecture may not know."""
    pair = open_pair(tiny.make_pair(arch, directory, perturb=1e-3), dtype=dtype)
    for model in pair.unique():
        model.load(EMBEDDING)
        model.load(HEAD)
        if bias:
            model.head.bias = nn.Parameter(torch.randn(tiny.VOCAB).to(model.model.dtype), requires_grad=False)
    return pair


def states(dtype):
    """Rows of four slots: from embedding to embedding they move by 1e-4, from blocks to blocks by 1e-2."""
    first, blocks, embeddings = torch.randn(3, 6, tiny.HIDDEN, dtype=torch.float64).unbind()
    moved = [a * 1e-2 * blocks + b * 1e-4 * embeddings for b in (0, 1) for a in (0, 1)]
    return [(first + m).to(dtype) for m in moved]


def wanted(pair, rows, heads, factor):
    found = []
    for x, owner in zip(rows, heads, strict=True):
        _, weight, bias = pair.models[owner].head_shard()
        logits = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        found.append(logits * factor)
    return found


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("arch", FACTOR)
def test_shifts_between_related_slots_keep_their_digits(arch, dtype, bias, heads, shifted, tmp_path):
    torch.manual_seed(0)
    of = HEADS[heads]
    pair = opened(arch, tmp_path, dtype, bias)
    rows = states(getattr(torch, dtype))
    assert can_shift(pair, of)
    found = led_logits(pair, rows, of, leads_of(of, MODELS), Space(), shifted=shifted)
    want = wanted(pair, rows, of, FACTOR[arch])
    separate = tile_logits(pair, rows, of)
    for s in range(4):
        assert (found.slot(s) - want[s]).abs().max() < 3e-6 * want[s].abs().max()
        assert (separate.slot(s) - want[s]).abs().max() < 3e-6 * want[s].abs().max()
    for a, b in itertools.combinations(range(4), 2):
        shift = want[b] - want[a]
        related = shifted or of[a] == of[b]
        assert found.related(a, b) == related
        error = (found.shift(a, b) - shift).abs().max() / shift.abs().max()
        assert error < 3e-6 or not related, (a, b)


@pytest.mark.parametrize("bias", [False, True])
def test_a_vocabulary_of_several_chunks_has_the_logits_of_one(bias, tmp_path, monkeypatch):
    torch.manual_seed(0)
    of = HEADS["two"]
    pair = opened("llama", tmp_path, "float32", bias)
    rows = states(torch.float32)
    want = wanted(pair, rows, of, 1.0)
    monkeypatch.setattr(unembed, "HEAD_CHUNK", 100)
    monkeypatch.setattr(unembed, "CHANGE_CHUNK", 60)
    assert tiny.VOCAB > 2 * unembed.HEAD_CHUNK
    for found in (tile_logits(pair, rows, of), *(led_logits(pair, rows, of, leads_of(of, MODELS), shifted=s) for s in (False, True))):  # fmt: skip
        for s in range(4):
            assert (found.slot(s) - want[s]).abs().max() < 3e-6 * want[s].abs().max()


def test_a_slot_is_led_by_one_of_its_blocks_where_that_has_its_unembedding():
    assert leads_of(HEADS["two"], MODELS) == (None, None, 0, 1)
    assert leads_of(HEADS["one"], MODELS) == (None, 0, 0, 1)
    assert leads_of(["base", "base", "sft"], ["base", "sft", "sft"]) == (None, 0, None)


@pytest.mark.parametrize("heads", [["base"] * 8, ["base", "sft"] * 4, ["base"] * 4 + ["sft"] * 4])
def test_logits_are_sums_of_three_tensors_at_most(heads):
    for models in itertools.product(("base", "sft"), repeat=8):
        leads, terms = leads_of(heads, models), []
        for i, lead in enumerate(leads):
            before = (0 if i else None) if lead is None else lead
            terms.append(1 if before is None else terms[before] + 1)
        assert max(terms) <= 3, (models, leads)


def test_a_sum_is_added_up_in_the_order_of_its_terms():
    x = [torch.tensor([[value]]) for value in (1.0, 2.0, 4.0, 8.0)]
    found = Logits(x, [(1,), (1, 2), (1, 3), (1, 2, 4)])
    assert [found.slot(s).item() for s in range(4)] == [1, 3, 5, 11]
    assert found.shift(1, 2).item() == 2
    assert found.shift(2, 3).item() == 6
    assert found.shift(3, 0).item() == -10
    assert found.shift(2, 2).item() == 0
    assert not found.are_separate
