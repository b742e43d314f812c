"""One capture walked by several workers in turn, each a range of layers: what one of them is given and what it hands on.

Light, for schedulers. Arrays travel as parcels: their bytes one after the other, cut into parts of equal size, so that whoever
carries them (an object store) never holds a large object and a worker never holds more than its own arrays and one part.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from capture.errors import UnsupportedModelError

PART_BYTES = 16 << 20


@dataclass(frozen=True)
class Header:
    """What a parcel holds: (name, dtype, shape) of each array in the order of their bytes; the bytes of all."""

    arrays: tuple[tuple[str, str, tuple[int, ...]], ...]
    nbytes: int

    @property
    def n_parts(self) -> int:
        return -(-self.nbytes // PART_BYTES)


@dataclass(frozen=True)
class Done:
    """Layers first..last, computed. meta: JSON values. columns: of what the collector found in these layers."""

    first: int
    last: int
    meta: dict[str, Any]
    columns: Header


@dataclass(frozen=True)
class Handover:
    """What a worker hands on, parcel by parcel: columns of each of `done`, in order, then the states that leave its last layer.

    worker: who did it, where, and what it cost; for capture.json.
    """

    done: tuple[Done, ...]
    states: Header
    meta: dict[str, Any]
    worker: dict[str, Any]

    @property
    def parcels(self) -> tuple[Header, ...]:
        return (*(d.columns for d in self.done), self.states)


@dataclass(frozen=True)
class Sent:
    """A handover and, for each of its parcels, its parts: whatever the receiver's `fetch` turns into bytes."""

    handover: Handover
    parts: tuple[tuple[Any, ...], ...]


class LostError(Exception):
    """What a worker before this one handed over is gone. spans: whose."""

    def __init__(self, span: int) -> None:
        super().__init__(f"what span {span} handed over is lost")
        self.span = span


@dataclass
class Relay:
    """A worker's place: the `index`-th of `count`, from 0. fetch: the bytes of a part, a uint8 array; raises LostError.

    `give` is called from another thread than `receive`, once, with what all workers before this one handed over.
    """

    index: int
    count: int
    fetch: Callable[[int, Any], Any] = lambda span, part: part
    outbox: Any = None  # parcels.Outbox, once this worker is through
    _given: tuple[Sent, ...] = ()
    _there: threading.Event = field(default_factory=threading.Event)

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def give(self, sent: tuple[Sent, ...]) -> None:
        self._given = sent
        self._there.set()

    def receive(self, stop: Callable[[], bool] | None = None) -> tuple[Sent, ...]:
        """Wait for the workers before this one. Raises KeyboardInterrupt where `stop` says so."""
        while self.index > 0 and not self._there.wait(0.2):
            if stop is not None and stop():
                raise KeyboardInterrupt
        return self._given


def cut(layer_bytes: Sequence[int], count: int, at_once: int = 1) -> list[tuple[int, int]]:
    """`count` consecutive ranges (first, last) of layers of about equal bytes; the first begins with -1, what enters layer 0.

    Each range ends where the bytes so far come nearest to its share of all; where it can, with the last of `at_once` layers
    that belong together, counted from -1. Raises UnsupportedModelError where there are fewer layers than ranges.
    """
    n = len(layer_bytes)
    if count > n:
        raise UnsupportedModelError(f"spans.workers is {count} and the models have {n} layers; set it to {n} or less")
    so_far = list(itertools.accumulate(layer_bytes))
    ends: list[int] = []
    for k in range(1, count):
        share = so_far[-1] * k / count
        possible = range(ends[-1] + 1 if ends else 0, n - (count - k))  # a layer at least for each range behind it
        whole = [layer for layer in possible if (layer + 2) % at_once == 0]
        ends.append(min(whole or possible, key=lambda layer: abs(so_far[layer] - share)))
    return list(zip([-1, *(e + 1 for e in ends)], [*ends, n - 1], strict=True))
