"""Numbers as the page carries them: float16 or float32, the bytes of equal weight together, gzip, base64."""

from __future__ import annotations

import base64
import gzip
import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TYPES = {"f2": np.float16, "f4": np.float32, "u4": np.uint32}
Array = NDArray[Any]


def to_half(values: Array) -> tuple[NDArray[np.float16], float]:
    """float16 and the power of two to multiply it by: the largest magnitude comes to lie just below 2^15.

    Values keep 11 bits down to 2^-29 of the largest, which plain float16 would not give a KL of 1e-9. NaN stays NaN;
    infinities become NaN, for which float16 has no scale.
    """
    wide = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    largest = float(np.nanmax(np.abs(wide), initial=0.0))
    scale = 2.0 ** (np.frexp(largest)[1] - 15) if largest > 0 else 1.0
    return (wide / scale).astype(np.float16), float(scale)


class Packer:
    """Gathers named arrays into one block; equal arrays are kept once.

    places: name -> [type, offset, scale], where type is f2, f4 or u4 and the offset counts bytes of the block.
    """

    def __init__(self) -> None:
        self.places: dict[str, list[Any]] = {}
        self._parts: list[bytes] = []
        self._size = 0
        self._seen: dict[bytes, int] = {}

    def half(self, name: str, values: Array) -> None:
        """Add an array as scaled float16; as float32 where that would cost a number its digits, as a KL of 1e-10 beside one of 7."""
        halves, scale = to_half(values)
        sizes = np.abs(values, dtype=np.float64)
        if ((sizes > 0) & (sizes < scale * 2.0**-14)).any():
            self._add(name, "f4", np.where(np.isfinite(values), values, np.nan), 1.0)
        else:
            self._add(name, "f2", halves, scale)

    def exact(self, name: str, values: Array) -> None:
        """Add an array as float32."""
        self._add(name, "f4", values, 1.0)

    def ids(self, name: str, values: Array) -> None:
        """Add an array of token ids."""
        self._add(name, "u4", values, 1.0)

    def _add(self, name: str, kind: str, values: Array, scale: float) -> None:
        plain = np.ascontiguousarray(values, dtype=np.dtype(_TYPES[kind]).newbyteorder("<"))
        # all low bytes, then all high ones: exponents side by side compress well, digits do not
        raw = plain.reshape(-1).view(np.uint8).reshape(-1, plain.itemsize).T.tobytes()
        key = hashlib.blake2b(raw, digest_size=16).digest()
        if key not in self._seen:
            self._seen[key] = self._size
            self._parts.append(raw)
            self._size += len(raw)
        self.places[name] = [kind, self._seen[key], scale]

    def block(self) -> str:
        """All arrays, gzipped, as base64."""
        return base64.b64encode(gzip.compress(b"".join(self._parts), 6, mtime=0)).decode()
