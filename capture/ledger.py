"""What is alive and what was read: counted, so that memory is a promise that a test can check; and how memory is let go."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Ledger:
    """Counts, over both models of a pair, the bytes of weights that are alive and the checkpoint bytes read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.live = 0
        self.peak = 0
        self.stage_peak = 0  # since begin_stage
        self.read_bytes = 0
        self.reads: dict[str, int] = {}

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.live += nbytes
            self.peak = max(self.peak, self.live)
            self.stage_peak = max(self.stage_peak, self.live)

    def begin_stage(self) -> None:
        """Count `stage_peak` from here on."""
        with self._lock:
            self.stage_peak = self.live

    def read(self, *found: tuple[str, int]) -> None:
        """found: key, bytes."""
        with self._lock:
            for key, nbytes in found:
                self.read_bytes += nbytes
                self.reads[key] = self.reads.get(key, 0) + nbytes


class CountedSlice:
    """A safetensors slice that tells the ledger what is read through it. Same protocol: shape, dtype, indexing."""

    def __init__(self, inner: Any, key: str, ledger: Ledger) -> None:
        self._inner, self._key, self._ledger = inner, key, ledger

    def get_shape(self) -> list[int]:
        return list(self._inner.get_shape())

    def get_dtype(self) -> str:
        return str(self._inner.get_dtype())

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._inner.get_shape())

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._inner[index]
        self._ledger.read((self._key, tensor.nbytes))
        return tensor


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch raises when an allocation fails: its own class on CUDA, a plain RuntimeError on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_memory() -> None:
    """Collect garbage and give cached device memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_ended_by_error = False


@contextmanager
def own_garbage() -> Iterator[None]:
    """Free memory at the end of the block, of what the block made and nobody holds any more: the libraries' objects, some hundred
    thousand, are set aside meanwhile, since a look at all of them takes a fifth of a second.

    What a block made that an error ended is held by the error; the next block looks at everything before it begins. Within another
    block, or where the caller has set objects aside by gc.freeze(), everything else is looked at, and nothing is undone of theirs.
    """
    global _ended_by_error
    if gc.get_freeze_count():
        try:
            yield
        finally:
            free_memory()
        return
    if _ended_by_error:
        free_memory()
    _ended_by_error = True
    try:
        gc.freeze()
        yield
        _ended_by_error = False
    finally:
        try:
            free_memory()
        finally:
            gc.unfreeze()
