"""Spans: ranges of layers whose results are committed, so that a lost worker costs one span and not the whole walk.

    captures/pair=<entry>/capture=<id>/spans/
        span-<first>-<last>.safetensors   columns of layers first..last, and what the walk had found out by then
        state-<last>.safetensors          the states that leave layer `last`: where the next span goes in

A span's files are written whole or not at all, columns first, each with a checksum of all that is in it. An attempt at the
same capture, here or on another node that sees the same run directory, goes on after the last span committed; the numbers are
those of an undisturbed run. A file that cannot be read, holds other bytes than were written, or was made with another torch or
transformers, whose layers may compute otherwise, counts as none; one that is whole and does not fit the walk is not ours, and an error
(`of_ours`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load, save
from torch import Tensor

from capture.errors import StoreError
from capture.layout import SPANS, RunDir
from capture.parcels import pack_states, unpack_states

log = logging.getLogger(__name__)

SUM = "sha256"


def made_with() -> str:
    """The versions that numbers may depend on; not for which device torch was built, as any machine may go on."""
    return f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


@dataclass(frozen=True)
class Span:
    """Layers first..last, committed. meta: JSON values. columns: name -> array; read from the file when asked for."""

    store: SpanStore
    first: int
    last: int
    meta: dict[str, Any]

    def columns(self) -> dict[str, Any]:
        tensors, _ = self.store.read(self.store.span_path(self.first, self.last))
        return {name: tensor.numpy() for name, tensor in tensors.items()}


class SpanStore:
    """The committed spans of one capture. Raises StoreError where they lie behind a symbolic link."""

    def __init__(self, run: RunDir, capture_path: str) -> None:
        self.run, self.path = run, f"{capture_path}/{SPANS}"
        run.refuse_links(self.path)
        self._found: dict[int, dict[str, Tensor]] = {}  # states that `committed` has read and nobody has asked for yet

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
        self._write(self.span_path(first, last), tensors, json.dumps(meta))
        named = {name: tensor.contiguous().cpu().clone() for name, tensor in pack_states(states).items()}
        self._write(self.state_path(last), named, str(first))  # of this span, not of another that ends here too
        for info in self.run.list_dir(self.path):
            found = re.fullmatch(r"state-(\d+)\.safetensors", info.base_name)
            if found and since <= int(found[1]) < last:
                with contextlib.suppress(FileNotFoundError):  # another writer of the same capture forgot them as well
                    self.run.fs.delete_file(info.path)
        return Span(self, first, last, meta)

    def committed(self, first: int = -1, last: int | None = None) -> list[Span]:
        """The spans from layer `first` on, without a gap, that end furthest and with states behind them; else none.

        last: the last layer of this worker; what others committed behind it is theirs. An attempt that died between a span and its
        states, one with other versions, or another writer may have cut the same layers elsewhere: of theirs too what fits is taken.
        """
        cuts, behind = set(), set()
        for info in self.run.list_dir(self.path):
            if found := re.fullmatch(r"span-(-?\d+)-(\d+)\.safetensors", info.base_name):
                cuts.add((int(found[1]), int(found[2])))
            elif found := re.fullmatch(r"state-(\d+)\.safetensors", info.base_name):
                behind.add(int(found[1]))
        known: dict[tuple[int, int], Span] = {}
        for end in sorted(behind, reverse=True):
            if (last is not None and end > last) or not _chain(cuts, first, end):
                continue
            if (whole := self._whole(self.state_path(end))) is None:
                continue
            # the span that the states were written with, before another that ends with the same layer
            own = {cut for cut in cuts if cut[1] == end and str(cut[0]) == whole[1]}
            of = {cut for cut in cuts if cut[1] != end or cut in own or not own}
            while chain := _chain(of, first, end):
                bad = next((cut for cut in chain if cut not in known and not self._know(cut, known)), None)
                if bad is None:
                    self._found[end] = whole[0]
                    return [known[cut] for cut in chain]
                cuts.discard(bad)
                of.discard(bad)
        return []

    def _know(self, cut: tuple[int, int], known: dict[tuple[int, int], Span]) -> bool:
        """Put the span of these layers into `known`; False, and a line in the log, where its file cannot be relied on."""
        if (whole := self._whole(self.span_path(*cut))) is None:
            return False
        try:
            known[cut] = Span(self, *cut, json.loads(whole[1]))
        except (ValueError, RecursionError) as error:
            log.warning("'%s' is none of ours (%s); its layers are computed again", self.span_path(*cut), error)
            return False
        return True

    def states(self, span: Span, device: torch.device) -> list[list[Tensor]]:
        """The states that leave a span, [batch][slot] -> [B, T, D]: as `committed` found them, because another writer of the same
        capture forgets them when it gets further."""
        found = self._found.pop(span.last, None) or self.read(self.state_path(span.last))[0]
        return unpack_states(found, device)

    def read(self, path: str) -> tuple[dict[str, Tensor], str]:
        """(tensors, meta) of a file of ours. Raises StoreError where it holds other bytes than were written, was made with other
        versions, or is gone."""
        try:
            data = self.run.read_bytes(path)
        except FileNotFoundError as error:
            raise StoreError(
                f"'{path}' is gone: another run of the same capture began it anew (--force); run again"
            ) from error
        try:
            (size,) = struct.unpack("<Q", data[:8])
            said: dict[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
            tensors, meta = load(data), said["meta"]
        except Exception as error:  # the library's own error is of no kind, and its header may be anything
            raise StoreError(f"'{path}' is broken: {' '.join(str(error).split())}; run again") from error
        if said.get(SUM) != _sum(tensors, meta):
            raise StoreError(f"'{path}' holds other bytes than were written; run again")
        if (other := said.get("made_with")) != made_with():
            raise StoreError(f"'{path}' was made with {other or 'another version'}, not {made_with()}; run again")
        return tensors, meta

    def _write(self, path: str, tensors: dict[str, Tensor], meta: str = "") -> None:
        self.run.write_bytes(path, save(tensors, {"meta": meta, "made_with": made_with(), SUM: _sum(tensors, meta)}))

    def _whole(self, path: str) -> tuple[dict[str, Tensor], str] | None:
        """As `read`; None, and a line in the log, where a file cannot be relied on."""
        try:
            return self.read(path)
        except (OSError, StoreError) as error:
            log.warning("%s; its layers are computed again", error)
            return None

    def clear(self) -> None:
        """Forget all spans: the capture is complete, or is to be made anew."""
        if self.run.is_local or self.run.list_dir(self.path):
            with contextlib.suppress(
                OSError
            ):  # none there; or another writer is putting something there: it clears it away
                self.run.fs.delete_dir(self.path)


def _chain(cuts: set[tuple[int, int]], first: int, end: int) -> list[tuple[int, int]]:
    """Ranges of layers, one behind the other, from `first` to `end`; empty where there are none."""
    before: dict[int, list[tuple[int, int]]] = {first: []}  # layer -> ranges that lead up to it
    for a, b in sorted(cuts):
        if a in before and a <= b:  # the other way round there would be no end
            before.setdefault(b + 1, [*before[a], (a, b)])
    return before.get(end + 1, [])


@contextlib.contextmanager
def of_ours(path: str) -> Iterator[None]:
    """Turn what comes of a whole file whose contents do not fit the walk into one StoreError that names it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise StoreError(
            f"'{path}' cannot be gone on from: it is of another version or of somebody else; capture with --force"
        ) from error


def _sum(tensors: dict[str, Tensor], meta: str) -> str:
    """SHA-256 over everything in a file: names, dtypes, shapes, bytes, and what it says of itself."""
    sha = hashlib.sha256(meta.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
