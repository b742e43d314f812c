"""Results on their way from the device. On a GPU they are copied behind what makes them, and used when they are there: who asks for
the next layer has not waited for the numbers of this one. A tile of the lens, with rows of several layers where they are few, is
waited for all the same: which of its rows are worked on again is known from its numbers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from capture.upload import ONE_STREAM

Use = Callable[[list[Tensor]], None]
WAITING = 8  # results that may be on their way; the next waits for the first of them


class Download:
    """Results are used at once."""

    def put(self, tensors: Sequence[Tensor], use: Use) -> None:
        """Have tensors brought to main memory, and `use` called with them there, in the order of the calls."""
        use([x.cpu() for x in tensors])

    def settle(self) -> None:
        """Wait for all that is on its way, and use it."""


class Behind(Download):
    """From a GPU. cuda: torch.cuda."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        self.waiting: deque[tuple[Any, list[Tensor], Use]] = deque()

    def put(self, tensors: Sequence[Tensor], use: Use) -> None:
        flat: dict[torch.dtype, list[int]] = {}  # one copy for all of a dtype
        for i, x in enumerate(tensors):
            flat.setdefault(x.dtype, []).append(i)
        here: dict[int, Tensor] = {}
        for members in flat.values():
            try:
                whole = self._copied(torch.cat([tensors[i].reshape(-1) for i in members]))
            except torch.OutOfMemoryError:  # of what is made already nothing is lost: one by one
                here |= {i: tensors[i].cpu() for i in members}
                continue
            parts = whole.split([tensors[i].numel() for i in members])
            here |= {i: part.view(tensors[i].shape) for i, part in zip(members, parts, strict=True)}
        event = self.cuda.Event()
        event.record(self.cuda.current_stream(self.device))
        self.waiting.append((event, [here[i] for i in range(len(tensors))], use))
        while self.waiting and (len(self.waiting) > WAITING or self.waiting[0][0].query()):
            self._use_first()

    def _copied(self, x: Tensor) -> Tensor:
        return x.to("cpu", non_blocking=True)  # into pinned memory, which is not to be read before the event

    def _use_first(self) -> None:
        event, here, use = self.waiting.popleft()
        event.synchronize()
        use(here)

    def settle(self) -> None:
        while self.waiting:
            self._use_first()


def download_from(device: torch.device) -> Download:
    """The way from a device."""
    return Behind(device) if device.type == "cuda" and not os.environ.get(ONE_STREAM) else Download()
