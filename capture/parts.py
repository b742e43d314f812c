"""Batches that go through the layers in parts, because whole they did not fit; and what a layer is called with for each part."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from capture.batches import halves
from capture.config import Owner
from capture.entering import Entering
from capture.ledger import free_memory, is_out_of_memory
from capture.replay import Recording

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """From this layer on, batch `batch` goes through the layers in `parts` parts: whole it did not fit."""

    layer: int
    batch: int
    parts: int


class Parts:
    """Which batches are split from which layer on, in order: `splits`. recorded: each model's recording of each whole batch."""

    def __init__(self, entering: Entering, recorded: list[dict[Owner, Recording]]) -> None:
        self.entering, self.batches, self.home = entering, entering.batches, entering.home
        self.splits: list[Split] = []
        # [batch][number of parts][part]
        self._recorded: list[dict[int, list[dict[Owner, Recording]]]] = [{1: [whole]} for whole in recorded]

    def of(self, b: int, layer: int) -> int:
        """In how many parts batch b goes through a layer."""
        if not self.splits:
            return 1
        return max((s.parts for s in self.splits if s.batch == b and s.layer <= layer), default=1)

    def call(self, owner: Owner, layer: int, b: int) -> Any:
        """The arguments of one of the model's layers for batch b, whole."""
        return self.home.take(self._recorded[b][1][0][owner].calls[layer])

    def calls(self, owner: Owner, layer: int, b: int) -> Iterator[tuple[slice, Any]]:
        """Each part of batch b, and the arguments of one of the model's layers for it."""
        n = self.of(b, layer)
        for part, recorded in zip(halves(self.batches[b], n), self._recorded[b][n], strict=True):
            yield part, self.home.take(recorded[owner].calls[layer])

    def split(self, split: Split) -> None:
        """Let a batch go through this layer and all after it in parts, with arguments recorded anew for each part."""
        self.splits.append(split)
        batch, recorded = self.batches[split.batch], self._recorded[split.batch]
        if split.parts not in recorded:
            parts = halves(batch, split.parts)
            recorded[split.parts] = [self.entering.enter_part(batch.part(part)) for part in parts]

    def attempt(self, b: int, layer: int, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Run; where memory runs out, split the batch in twice as many parts from this layer on, and run again.

        Not of a model whose layers are called with states; nor can ranks of a group do this: while one runs out of memory the others
        wait for it inside the layer.
        """
        while True:
            try:
                return run()
            except RuntimeError as error:
                n, most = self.of(b, layer), len(self.batches[b].items)
                if not is_out_of_memory(error) or n == most or self.entering.models["base"].group.size > 1:
                    raise
                if not self.entering.divisible:
                    raise
                why = str(error).splitlines()[0]
            free_memory()  # outside of the handler: the traceback holds what the failed attempt had made
            n = min(2 * n, most)
            log.warning("layer %d, batch %d: %s; going on in %d parts", layer, b, why, n)
            self.split(Split(layer, b, n))
