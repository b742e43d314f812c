"""Every state of every pass is what plain transformers gives: bit for bit at the same batch shape."""

import pytest
import reference
import tiny
import torch
from walked import open_pair, walk

from capture import footprint
from capture.config import Batching

IDS = tiny.random_ids(3, 12)
UNEQUAL = [IDS[0, :12].tolist(), IDS[1, :7].tolist(), IDS[2, :3].tolist(), IDS[1, :12].tolist()]


@pytest.mark.parametrize("mode", footprint.MODES)
@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_states_equal_plain_transformers_bitwise_at_the_same_batch_shape(arch, mode, pairs, loaded):
    want = reference.residuals(loaded(arch), IDS)
    got = walk(open_pair(pairs(arch)), IDS.tolist(), mode=mode)
    for name, by_layer in want.items():
        assert got[name].keys() == by_layer.keys()
        for layer, state in by_layer.items():
            assert torch.equal(torch.stack(got[name][layer]), state), (name, layer)


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_states_equal_one_prompt_and_one_pass_at_a_time(arch, pairs):
    paths = pairs(arch)
    want = reference.residuals_one_by_one(reference.load_pair(paths), IDS.tolist())
    got = walk(open_pair(paths), IDS.tolist(), streamed=True)
    worst = max(
        reference.relative_error(got[name][layer][p], state)
        for p, one in enumerate(want)
        for name, by_layer in one.items()
        for layer, state in by_layer.items()
    )
    assert worst < 1e-6


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_swapped_passes_equal_a_model_whose_embedding_module_was_replaced(arch, pairs):
    paths = pairs(arch)
    loaded = reference.load_pair(paths)
    got = walk(open_pair(paths), IDS.tolist(), streamed=True)
    for name in ("BS", "SB"):
        want = reference.residuals_replaced(loaded, IDS, reference.FOUR[name])
        for layer, state in want.items():
            assert reference.relative_error(torch.stack(got[name][layer]), state) < 1e-6, (name, layer)


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])
def test_padded_batches_of_unequal_prompts_give_the_rows_of_each_prompt_alone(arch, padding, pairs):
    paths = pairs(arch)
    want = reference.residuals_one_by_one(reference.load_pair(paths), UNEQUAL)
    got = walk(open_pair(paths), UNEQUAL, streamed=True, batching=Batching(padding=padding))
    for p, one in enumerate(want):
        for name, by_layer in one.items():
            for layer, state in by_layer.items():
                assert reference.relative_error(got[name][layer][p], state) < 1e-5, (p, name, layer)
