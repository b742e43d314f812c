"""What decisions need to know of the device. Each question waits for all that a GPU has been given to do, and leaves it idle until more
is given: so they are few, of many things at once, and what follows is decided in main memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Mask = np.ndarray[Any, np.dtype[np.bool_]]


def asked(*masks: Tensor) -> list[Mask]:
    """Boolean tensors of any shapes, of one device, in main memory."""
    if masks[0].device.type == "cpu":
        return [mask.numpy() for mask in masks]
    return divided(torch.cat([mask.flatten() for mask in masks]).cpu(), masks)


def divided(all_of: Tensor, masks: Sequence[Tensor]) -> list[Mask]:
    """What stands behind one another in main memory, in the shapes of the masks that it is of."""
    parts = all_of.split([mask.numel() for mask in masks])
    return [part.view(mask.shape).numpy() for part, mask in zip(parts, masks, strict=True)]


def places(mask_R: Mask, device: torch.device) -> Tensor:
    """Where a mask is true, as indices on a device, which does not wait for them."""
    return torch.from_numpy(np.flatnonzero(mask_R)).to(device, non_blocking=True)


@cache
def indices(which: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers as an index on a device, made once: a list as an index is copied there each time, and waited for."""
    return torch.tensor(which, dtype=torch.long, device=device)
