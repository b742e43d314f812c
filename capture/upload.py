"""Weights on their way to the device. To a GPU they go on a stream of their own, beside the layers that compute, out of pinned memory:
a copy from a mapped file on the layers' stream would begin when all layers that were asked for are done, and hold the thread that
asked for it until it is over.

Order, as all of it happens later than it is asked for:
- a layer that uses weights waits for their copies, and the device does that waiting (`wait`);
- memory of weights that are let go is used anew when all layers that were asked for until then are done (`leaving`), and weights that
  are promised room after that are not begun before (`room`, `on_stream`): so no more is there than was planned;
- pinned memory is written anew when what was copied from it has arrived.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

STAGE = 32 << 20  # bytes of one piece of pinned memory
STAGES = 3  # of them: one is filled, one is copied from, one waits between these
ONE_STREAM = (
    "PAIRSCOPE_ONE_STREAM"  # set in the environment: weights and results are copied by whoever needs them, in turn
)
ALIGN = 512  # bytes: where a copy begins in it

log = logging.getLogger(__name__)


class Upload:
    """To main memory: weights are filled where they stand, and nothing is ever late."""

    def fill(self, out: Tensor, source: Tensor) -> None:
        """Copy a tensor of main memory, in whatever dtype it is, into one on the device."""
        out.copy_(source)

    def put(self, source: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of main memory on the device; the very same where it is there already."""
        return source.to(device=device, dtype=dtype)

    def room(self) -> Any:
        """What `on_stream` takes: in whose place weights come that are promised room now."""

    def on_stream(self, room: Any = None) -> AbstractContextManager[Any]:
        """Around all that makes weights, on the stream of the copies. room: when they were promised it."""
        return nullcontext()

    def off_stream(self) -> AbstractContextManager[Any]:
        """Within it, around what others make in threads of their own, which know nothing of it."""
        return nullcontext()

    def arriving(self, key: Hashable) -> None:
        """What was made until now is `key`."""

    def wait(self, key: Hashable) -> None:
        """What this thread asks for from now on begins when `key` is there."""

    def leaving(self, key: Hashable, weights: Iterable[Tensor]) -> None:
        """These are about to be let go by the thread that used them."""

    def left(self) -> None:
        """They are gone."""

    def tidy(self) -> None:
        """Memory of weights that are gone may be used for other things: of a GPU, each stream has its own otherwise."""


class SideStream(Upload):
    """To a GPU. Used by several threads. cuda: torch.cuda."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        self.stream = cuda.Stream(device)
        self._lock = threading.Lock()
        self._stages: list[tuple[Tensor, Any]] = []  # with the event behind which it may be written
        self._at = self._used = 0
        self._most = STAGES
        self._arrived: dict[Hashable, Any] = {}
        self._left: Any = None  # event behind the last use of weights that are gone

    # -- copies --------------------------------------------------------------------------------------------------------

    def put(self, source: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        with self._current():
            out = torch.empty(source.shape, dtype=dtype, device=device)
        self.fill(out, source)
        return out

    def fill(self, out: Tensor, source: Tensor) -> None:
        with self._current():
            self._fill(out, source)

    def _fill(self, out: Tensor, source: Tensor) -> None:
        if source.dtype == out.dtype and out.is_contiguous() and source.is_pinned():
            self._send(out, source)  # its memory is kept by the allocator until it has arrived
            return
        if out.is_contiguous() and source.is_contiguous():
            out, source = out.view(-1), source.view(-1)
        row = out.dtype.itemsize * (out.numel() // max(1, out.shape[0] if out.dim() else 1))
        if not out.dim():
            out.copy_(source)
        elif row > STAGE:
            for o, s in zip(out, source, strict=True):
                self._fill(o, s)
        else:
            rows = max(1, STAGE // max(1, row))
            for first in range(0, out.shape[0], rows):
                some = slice(first, first + rows)
                with self._lock:
                    piece = self._room_for(out[some])
                    if piece is None:
                        out[some].copy_(source[some])
                    else:
                        piece.copy_(source[some])
                        self._send(out[some], piece)

    def _send(self, out: Tensor, piece: Tensor) -> None:
        out.copy_(piece, non_blocking=True)

    def _room_for(self, like: Tensor) -> Tensor | None:
        """Pinned memory for a tensor of this shape and dtype; None where the system has none."""
        nbytes = like.numel() * like.dtype.itemsize
        if not self._stages or self._used + nbytes > STAGE:
            self._next()
        if not self._stages:
            return None
        memory = self._stages[self._at][0][self._used : self._used + nbytes]
        self._used += -(-nbytes // ALIGN) * ALIGN
        return memory.view(like.dtype).view(like.shape)

    def _next(self) -> None:
        if self._stages:
            self._stages[self._at][1].record(self.stream)
        made = self._pinned(STAGE) if len(self._stages) < self._most else None
        if made is not None:
            self._stages.append((made, self.cuda.Event(blocking=True)))
            self._at = len(self._stages) - 1
        elif self._stages:
            self._at = (self._at + 1) % len(self._stages)
            self._stages[self._at][1].synchronize()
        if made is None:
            self._most = len(self._stages)  # not asked for again
        self._used = 0

    def _pinned(self, nbytes: int) -> Tensor | None:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:  # a limit on what may be locked in memory
            log.warning("no pinned memory for weights: %s", str(error).splitlines()[0])
            return None

    # -- order ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _current(self) -> Iterator[None]:
        with self.cuda.device(self.device), self.cuda.stream(self.stream):
            yield

    def room(self) -> Any:
        return self._left

    @contextmanager
    def on_stream(self, room: Any = None) -> Iterator[None]:
        if room is not None:
            room.synchronize()
        with self._current():
            yield

    @contextmanager
    def off_stream(self) -> Iterator[None]:
        plain, done = self.cuda.default_stream(self.device), self.cuda.Event()
        with self.cuda.stream(plain):
            yield
        done.record(plain)
        self.stream.wait_event(done)

    def arriving(self, key: Hashable) -> None:
        event = self.cuda.Event()
        event.record(self.stream)
        self._arrived[key] = event

    def wait(self, key: Hashable) -> None:
        event = self._arrived.pop(key, None)
        if event is not None:
            self.cuda.current_stream(self.device).wait_event(event)

    def leaving(self, key: Hashable, weights: Iterable[Tensor]) -> None:
        self._arrived.pop(key, None)
        now = self.cuda.current_stream(self.device)
        for weight in weights:
            self._used_by(weight, now)

    def _used_by(self, weight: Tensor, stream: Any) -> None:
        weight.record_stream(stream)

    def left(self) -> None:
        event = self.cuda.Event(blocking=True)  # behind those that the allocator has made of what is gone
        event.record(self.cuda.current_stream(self.device))
        self._left = event

    def tidy(self) -> None:
        self.cuda.empty_cache()


def upload_to(device: torch.device) -> Upload:
    """The way to a device."""
    return SideStream(device) if device.type == "cuda" and not os.environ.get(ONE_STREAM) else Upload()
