"""Arrays on their way from one worker to the next: named tensors as one stream of bytes in parts, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capture.relay import PART_BYTES, Done, Handover, Header, Sent


class Parcel:
    """Named tensors to be sent. They are asked for anew when the first part is, so that what lies on a disk stays there."""

    def __init__(self, load: Callable[[], dict[str, Tensor]]) -> None:
        self._load = load
        tensors = load()
        arrays = tuple((n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items())
        self.header = Header(arrays, sum(t.nbytes for t in tensors.values()))
        self._open: list[Tensor] | None = None

    def part(self, index: int) -> Any:
        """Bytes index * PART_BYTES to (index + 1) * PART_BYTES of all arrays, uint8."""
        if self._open is None:
            tensors = self._load()  # files give their arrays in any order
            self._open = [tensors[name].contiguous() for name, *_ in self.header.arrays]
        start = index * PART_BYTES
        stop = min(start + PART_BYTES, self.header.nbytes)
        part, at = np.empty(stop - start, np.uint8), 0
        for tensor in self._open:
            low, high = max(start, at), min(stop, at + tensor.nbytes)
            if low < high:
                flat = tensor.reshape(-1).view(torch.uint8)
                part[low - start : high - start] = flat[low - at : high - at].cpu().numpy()
            at += tensor.nbytes
        if stop == self.header.nbytes:
            self._open = None
        return part


def unpack(header: Header, parts: Iterator[Any]) -> dict[str, Tensor]:
    """The tensors of a parcel from its parts in order; one part at a time is held beside them. On the host."""
    tensors = {n: torch.empty(shape, dtype=getattr(torch, dtype)) for n, dtype, shape in header.arrays}
    rest = torch.empty(0, dtype=torch.uint8)
    for tensor in tensors.values():
        if not tensor.nbytes:
            continue
        flat, filled = tensor.reshape(-1).view(torch.uint8), 0
        while filled < tensor.nbytes:
            if not len(rest):
                rest = torch.from_numpy(np.array(next(parts), copy=True))
            n = min(len(rest), tensor.nbytes - filled)
            flat[filled : filled + n] = rest[:n]
            filled, rest = filled + n, rest[n:]
    return tensors


@dataclass(frozen=True)
class Outbox:
    """What one worker hands over: what it says of it, and the parcels."""

    handover: Handover
    parcels: tuple[Parcel, ...]

    def part(self, parcel: int, index: int) -> Any:
        return self.parcels[parcel].part(index)


@dataclass(frozen=True)
class ReceivedSpan:
    """Layers that another worker computed; the same attributes as spans.Span. Columns are fetched when asked for."""

    done: Done
    fetch: Callable[[Any], Any]
    parts: tuple[Any, ...]

    @property
    def first(self) -> int:
        return self.done.first

    @property
    def last(self) -> int:
        return self.done.last

    @property
    def meta(self) -> dict[str, Any]:
        return self.done.meta

    def columns(self) -> dict[str, Any]:
        return {n: t.numpy() for n, t in unpack(self.done.columns, map(self.fetch, self.parts)).items()}


def pack_states(states: list[list[Tensor]]) -> dict[str, Tensor]:
    """[batch][slot] -> "batch.slot" -> [B, T, D]."""
    return {f"{b}.{s}": tensor for b, slots in enumerate(states) for s, tensor in enumerate(slots)}


def unpack_states(named: dict[str, Tensor], device: torch.device) -> list[list[Tensor]]:
    """The states of `pack_states`, on a device."""
    found: dict[int, dict[int, Tensor]] = {}
    for name, tensor in named.items():
        batch, slot = map(int, name.split("."))
        found.setdefault(batch, {})[slot] = tensor.to(device)
    return [[found[b][s] for s in sorted(found[b])] for b in sorted(found)]


def received(sent: tuple[Sent, ...], fetch: Callable[[int, Any], Any]) -> list[ReceivedSpan]:
    """All spans that earlier workers computed, in order of their layers."""
    return [
        ReceivedSpan(done, lambda part, worker=worker: fetch(worker, part), parts)  # type: ignore[misc]
        for worker, one in enumerate(sent)
        for done, parts in zip(one.handover.done, one.parts, strict=False)  # the last parcel holds the states
    ]
