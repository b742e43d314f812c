import pytest
import torch

from capture.batches import make_batches
from capture.config import Batching

CPU = torch.device("cpu")
IDS = [[1, 2, 3], [4, 5], [6, 7, 8], [9, 10], [11]]


def shapes(batches):
    return [(b.items, tuple(b.ids_BT.shape)) for b in batches]


def test_only_prompts_of_equal_length_share_a_batch():
    batches = make_batches(IDS, Batching(), CPU, probe=False)
    assert shapes(batches) == [((0, 2), (2, 3)), ((1, 3), (2, 2)), ((4,), (1, 1))]
    assert all(b.mask_BT is None for b in batches)


def test_a_batch_holds_no_more_tokens_than_allowed_but_always_one_prompt():
    assert shapes(make_batches(IDS, Batching(max_tokens=4), CPU, probe=False)) == [
        ((0,), (1, 3)), ((2,), (1, 3)), ((1, 3), (2, 2)), ((4,), (1, 1)),
    ]  # fmt: skip
    assert len(make_batches(IDS, Batching(max_tokens=1), CPU, probe=False)) == 5


def test_padding_keeps_every_token_and_counts_positions_from_the_first():
    left, right = (make_batches(IDS, Batching(padding=p), CPU, probe=False)[0] for p in ("left", "right"))
    assert left.ids_BT[-1].tolist() == [0, 0, 11]
    assert right.ids_BT[-1].tolist() == [11, 0, 0]
    assert left.positions_BT[-1].tolist() == [0, 0, 0]
    assert left.positions_BT[2].tolist() == [0, 0, 1]
    assert right.positions_BT[0].tolist() == [0, 1, 2]
    for batch in (left, right):
        rows = batch.rows(batch.ids_BT[..., None].float())[:, 0]
        assert rows.tolist() == [token for item in batch.items for token in IDS[item]]


def test_the_probe_is_a_prompt_of_the_fullest_batch_alone():
    assert shapes(make_batches(IDS, Batching(), CPU, probe=True))[-1] == ((0,), (1, 3))
    assert make_batches(IDS, Batching(), CPU, probe=True)[-1].probe
    assert not any(b.probe for b in make_batches(IDS[-1:], Batching(), CPU, probe=True))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_of_a_padded_batch_the_probe_is_the_prompt_that_is_padded_most(padding):
    *_, batch, probe = make_batches(IDS, Batching(padding=padding), CPU, probe=True)
    assert (probe.items, len(batch.items)) == ((4,), 5)
    assert probe.ids_BT.tolist() == [list(IDS[4])]
    assert probe.mask_BT is None


def test_the_same_prompts_always_make_the_same_batches():
    again = [make_batches(IDS, Batching(), CPU, probe=True) for _ in range(2)]
    assert shapes(again[0]) == shapes(again[1])
