"""What is asked of a device comes in one copy, in the shapes that it was asked in."""

import torch

from capture.asked import asked, divided, indices, places

MASKS = [
    torch.tensor([True, False, True]),
    torch.zeros(0, 3, dtype=torch.bool),
    torch.tensor([[False, True], [True, True]]),
]


def test_masks_that_come_in_one_copy_are_those_that_were_asked_for():
    one_copy = divided(torch.cat([mask.flatten() for mask in MASKS]), MASKS)
    for mask, here, together in zip(MASKS, asked(*MASKS), one_copy, strict=True):
        assert here.shape == together.shape == tuple(mask.shape)
        assert here.tolist() == together.tolist() == mask.tolist()


def test_places_are_where_a_mask_is_true():
    assert places(MASKS[0].numpy(), torch.device("cpu")).tolist() == [0, 2]


def test_an_index_is_made_once():
    cpu = torch.device("cpu")
    assert indices((2, 0), cpu).tolist() == [2, 0]
    assert indices((2, 0), cpu) is indices((2, 0), cpu)
