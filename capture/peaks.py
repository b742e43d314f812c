"""The most device memory of every stage of a capture, as it was."""

from __future__ import annotations

import torch

from capture.ledger import Ledger
from capture.schema import STAGES


class Peaks:
    """Told which stage begins, keeps the peak of each. On CUDA: bytes of the allocator, which count everything. On the CPU: of
    live weights, by the ledger; states and work are not seen there.
    """

    def __init__(self, device: torch.device, ledger: Ledger) -> None:
        self.device, self.ledger = device, ledger
        self.bytes = dict.fromkeys(STAGES, 0)
        self.stage = STAGES[0]
        self._reset()

    @property
    def measured(self) -> str:
        """What the figures are of."""
        return "everything on the device" if self.device.type == "cuda" else "weights"

    def begin(self, stage: str) -> None:
        """The stage before ends here."""
        self.bytes[self.stage] = max(self.bytes[self.stage], self._now())
        self.stage = stage
        self._reset()

    def all(self) -> int:
        """The peak so far, in bytes."""
        return max(*self.bytes.values(), self._now())

    def _now(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return self.ledger.stage_peak

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.ledger.begin_stage()
