"""Spans: ranges of layers whose results are committed, so that a lost worker costs one span and not the whole walk.

    captures/pair=<entry>/capture=<id>/spans/
        span-<first>-<last>.safetensors   columns of layers first..last, and what the walk had found out by then
        state-<last>.safetensors          the states that leave layer `last`: where the next span goes in

A span's files are written whole or not at all, columns first. An attempt at the same capture, here or on another node that
sees the same run directory, goes on after the last span committed; the numbers are those of an undisturbed run.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from capture.layout import RunDir
from capture.parcels import pack_states, unpack_states

SPANS = "spans"


@dataclass(frozen=True)
class Span:
    """Layers first..last, committed. meta: JSON values. columns: name -> array; read from the file when asked for."""

    store: SpanStore
    first: int
    last: int
    meta: dict[str, Any]

    def columns(self) -> dict[str, Any]:
        data = self.store.run.read_bytes(self.store.span_path(self.first, self.last))
        return {name: tensor.numpy() for name, tensor in load(data).items()}


class SpanStore:
    """The committed spans of one capture."""

    def __init__(self, run: RunDir, capture_path: str) -> None:
        self.run, self.path = run, f"{capture_path}/{SPANS}"

    def span_path(self, first: int, last: int) -> str:
        return f"{self.path}/span-{first}-{last}.safetensors"

    def state_path(self, last: int) -> str:
        return f"{self.path}/state-{last}.safetensors"

    def commit(
        self,
        first: int,
        last: int,
        columns: dict[str, Any],
        meta: dict[str, Any],
        states: list[list[Tensor]],
        *,
        since: int = -1,
    ) -> Span:
        """Write a span; then the states behind it; then forget the states behind the span before.

        columns: name -> numpy array. states: [batch][slot] -> [B, T, D]. since: the first layer of this walk; states that
        leave a layer before it are another worker's.
        """
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in columns.items()}
        self.run.write_bytes(self.span_path(first, last), save(tensors, {"meta": json.dumps(meta)}))
        named = {name: tensor.contiguous().cpu().clone() for name, tensor in pack_states(states).items()}
        self.run.write_bytes(self.state_path(last), save(named))
        for info in self.run.list_dir(self.path):
            found = re.fullmatch(r"state-(\d+)\.safetensors", info.base_name)
            if found and since <= int(found[1]) < last:
                self.run.fs.delete_file(info.path)
        return Span(self, first, last, meta)

    def committed(self, first: int = -1, last: int | None = None) -> list[Span]:
        """The spans from layer `first` on, without a gap, up to the last one whose states are there; else none.

        last: the last layer of this worker; what others committed behind it is theirs.
        """
        names = [i.base_name for i in self.run.list_dir(self.path)]
        starts = {}
        for name in names:
            if found := re.fullmatch(r"span-(-?\d+)-(\d+)\.safetensors", name):
                starts[int(found[1])] = int(found[2])
        chain: list[Span] = []
        at = first
        while at in starts and (last is None or starts[at] <= last):
            end = starts[at]
            chain.append(Span(self, at, end, self._meta(self.span_path(at, end))))
            at = end + 1
        while chain and f"state-{chain[-1].last}.safetensors" not in names:
            chain.pop()
        return chain

    def states(self, span: Span, device: torch.device) -> list[list[Tensor]]:
        """The states that leave a span, [batch][slot] -> [B, T, D]."""
        return unpack_states(load(self.run.read_bytes(self.state_path(span.last))), device)

    def _meta(self, path: str) -> dict[str, Any]:
        with self.run.fs.open_input_stream(path) as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        meta: dict[str, Any] = json.loads(header["__metadata__"]["meta"])
        return meta

    def clear(self) -> None:
        """Forget all spans: the capture is complete, or is to be made anew."""
        if self.run.list_dir(self.path):
            self.run.fs.delete_dir(self.path)
