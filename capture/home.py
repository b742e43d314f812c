"""Where what waits is kept: states of batches that are not at work, on the device or in main memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

CPU = torch.device("cpu")


class Home:
    """Keeps tensors in main memory where `spill` asks for it and the device is not main memory itself; else leaves them."""

    def __init__(self, device: torch.device, *, spill: bool) -> None:
        self.device = device
        self.away = spill and device.type != "cpu"

    def put(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors where they wait."""
        return [t.to(CPU) for t in tensors] if self.away else list(tensors)

    def get(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors on the device."""
        return [t.to(self.device) for t in tensors] if self.away else list(tensors)

    def keep(self, tree: Any) -> Any:
        """As put, for all tensors inside tuples, lists and dicts: what a model gave its layers besides the state."""
        return tree_map_only(Tensor, lambda t: t.to(CPU), tree) if self.away else tree

    def take(self, tree: Any) -> Any:
        """As get, for all tensors inside tuples, lists and dicts."""
        return tree_map_only(Tensor, lambda t: t.to(self.device), tree) if self.away else tree
