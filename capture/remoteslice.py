"""A stored tensor whose bytes are fetched when they are asked for: the same protocol as a slice of safetensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from capture.errors import CheckpointError
from capture.fetch import Fetcher
from capture.ranges import RemoteFile

# as safetensors names them
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


class RemoteSlice:
    """span: first byte of the tensor in its file, and the one behind the last. local: a slice that knows shape and dtype.

    A tensor that was announced is taken whole; of another one only the rows that are asked for are fetched. What was taken
    is kept until its last row has been read, for readers that go through it in strips.
    """

    def __init__(self, fetcher: Fetcher, file: RemoteFile, span: tuple[int, int], local: Any) -> None:
        self._fetcher, self._file, self._span = fetcher, file, span
        self._shape, self._name = list(local.get_shape()), str(local.get_dtype())
        self._whole: Tensor | None = None

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return self._name

    def __getitem__(self, index: Any) -> Tensor:
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
        rows = None
        if isinstance(first, slice) and first.step in (None, 1) and self._shape:
            start, stop, _ = first.indices(self._shape[0])
            rows = (start, max(start, stop))
        span = (self._file, *self._span)
        if rows and rows[1] - rows[0] < self._shape[0] and self._whole is None and not self._fetcher.announced(span):
            found = self._read(*rows)
            return (found[(slice(None), *rest)] if rest else found).contiguous()
        whole = self._whole if self._whole is not None else self._read(0, self._shape[0] if self._shape else 1)
        ends_here = rows is None or rows[1] >= self._shape[0]
        self._whole = None if ends_here else whole
        return whole if index is Ellipsis else whole[index].contiguous()

    def _read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first axis."""
        dtype = DTYPES.get(self._name)
        if dtype is None:
            raise CheckpointError(f"{self._file}: its dtype {self._name} is not known here; set weights: download")
        shape = [stop - start, *self._shape[1:]] if self._shape else []
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        row = dtype.itemsize * math.prod(self._shape[1:])
        at = self._span[0] + start * row
        raw = self._fetcher.take((self._file, at, at + (stop - start) * row))
        if raw.storage_offset() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(shape)
