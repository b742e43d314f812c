"""The tensors of a checkpoint's files: opened once, read in pieces, and every byte of them counted."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from capture.assemble import Recipe
from capture.borrowed import KeyMap
from capture.errors import CheckpointError
from capture.ledger import CountedSlice, Ledger
from capture.weights import Extent, joined, places

if TYPE_CHECKING:
    from capture.remote import Source

# as safetensors has them
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
AT_A_CALL = 128 << 10  # bytes that any system reads ahead at one call; of a longer range it may drop the rest
GAP = 1 << 20  # bytes between what is mapped ahead that may be mapped, and read, as well
POPULATE_READ = 22  # MADV_POPULATE_READ, of Linux 5.14 (man 2 madvise); Python's mmap has no name for it
ROWS, FEW = 1024, 16  # rows that are compared at a time, and of what must be fetched at all
PROBES = 1 << 20  # bytes from one place of a tensor that is asked for to the next


class Stored:
    """The safetensors files of one model. `ignored_keys`: tensors that the model has no weight for, which are never read.

    source: where those files come from that are only stand-ins here.
    """

    def __init__(
        self, files: Sequence[str], label: str, directory: str, ledger: Ledger, source: Source | None = None
    ) -> None:
        self.files, self.label, self.ledger, self.source = files, label, ledger, source
        self.ignored_keys: list[str] = []
        self._handles: dict[str, Any] = {}
        self._files: dict[str, BinaryIO] = {}
        self._maps: dict[str, Any] = {}  # storages, or None
        self._places: dict[str, dict[str, Extent]] = {}
        where = f"{label} model '{directory}'"
        if not files:
            raise CheckpointError(f"{where}: transformers found no weight files in it")
        if other := next((f for f in files if not f.endswith(".safetensors")), None):
            raise CheckpointError(f"{where}: '{Path(other).name}' is not a safetensors file")

    def opened(self, file: str, key: str) -> CountedSlice:
        """One stored tensor, not read yet."""
        piece = self._handle(file).get_slice(key)
        if self.source is not None and file in self.source.files:
            piece = self.source.opened(file, key, piece)
        return CountedSlice(piece, f"{self.label}:{key}", self.ledger)

    def described(self, file: str, key: str) -> Any:
        """What knows the shape and dtype of a stored tensor; not to be read from, since its bytes may be elsewhere."""
        return self._handle(file).get_slice(key)

    def maps(self, file: str, key: str, dtype: torch.dtype) -> bool:
        """Whether a tensor, wanted in this dtype on the CPU, is a view of its file."""
        if not self._is_here(file):
            return False
        self._handle(file)
        return DTYPES.get(self._places[file][key].dtype) == dtype

    def alike(self, one: tuple[str, str], other: tuple[str, str], *, dtype: torch.dtype) -> bool:
        """Whether two tensors are equal in this dtype. All of their rows are compared where both are here, else a few."""
        a, b = self.opened(*one), self.opened(*other)
        if a.get_shape() != b.get_shape() or not a.get_shape():
            return False
        n = a.get_shape()[0]
        rows = [slice(i, i + ROWS) for i in range(0, n, ROWS)]
        if not (self._is_here(one[0]) and self._is_here(other[0])):
            rows = [slice(i, i + 1) for i in sorted({*range(0, n, -(-n // FEW)), n - 1})]
        return all(torch.equal(a[part].to(dtype), b[part].to(dtype)) for part in rows)

    def _is_here(self, file: str) -> bool:
        return self.source is None or file not in self.source.files

    def views(self, keys: Sequence[tuple[str, str]]) -> list[torch.Tensor]:
        """Tensors that `maps`: their bytes come when they are first used. The library's own way takes four times as long, at moments
        when all else waits."""
        found, read = [], []
        for file, key in keys:
            handle, place, mapped = self._handle(file), self._places[file][key], self._maps[file]
            dtype = DTYPES[place.dtype]
            if mapped is None or place.start % dtype.itemsize:
                tensor: torch.Tensor = handle.get_slice(key)[...]
            else:
                empty: Any = torch.empty(0, dtype=dtype)
                tensor = empty.set_(mapped, place.start // dtype.itemsize, place.shape)
            found.append(tensor)
            read.append((f"{self.label}:{key}", place.stop - place.start))
        self.ledger.read(*read)
        return found

    def cached(self, keys: Iterable[tuple[str, str]]) -> bool:
        """Whether the system has these in memory, as their middles and a byte of each MiB have it. False where it does not say.

        The first bytes of a tensor say nothing: the fingerprint of a large checkpoint has read those, and no others.
        """
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        byte = [bytearray(1)]
        try:
            for file, key in keys:
                number, (start, stop) = self._opened_file(file).fileno(), self._places[file][key].span
                for at in range(start, stop, max(1, min(PROBES, (stop - start) // 2))):
                    if os.preadv(number, byte, at, os.RWF_NOWAIT) != 1:
                        return False
        except OSError:  # it would have to wait; or its file system cannot tell
            return False
        return True

    def _opened_file(self, file: str) -> BinaryIO:
        if file not in self._files:
            self._files[file] = open(file, "rb")  # noqa: SIM115  for as long as the model is there
        return self._files[file]

    def announce(self, keys: Iterable[tuple[str, str]]) -> None:
        """These will be read soon, in about this order."""
        if self.source is not None:
            self.source.announce(keys)

    def read_ahead(self, keys: Iterable[tuple[str, str]]) -> None:
        """Let the system read these from its disk now. On the CPU a tensor is a view of its file, whose bytes come when they are
        first used: without this that is in the middle of a layer."""
        if not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(OSError):  # whatever it says no with, reading will tell
            for file, wanted in self._by_file(keys).items():
                number = self._opened_file(file).fileno()
                for start, stop in joined(wanted):
                    for at in range(start, stop, AT_A_CALL):
                        os.posix_fadvise(number, at, min(AT_A_CALL, stop - at), os.POSIX_FADV_WILLNEED)

    def map_ahead(self, keys: Iterable[tuple[str, str]]) -> threading.Thread | None:
        """Let the system map the pages of these, which it has in memory, before they are first touched. Few calls: after each the
        thread waits until the interpreter is free, and all else waits for it in turn."""
        ranges = []
        for file, wanted in self._by_file(keys).items():
            mapped = self._maps[file]
            if mapped is None or _madvise is None:
                return None
            for start, end in joined((a, b + GAP) for a, b in wanted):
                start -= start % mmap.PAGESIZE
                ranges.append((mapped, start, end - GAP - start))
        thread = threading.Thread(target=_map, args=(ranges,), name="map-ahead")
        try:
            thread.start()
        except RuntimeError:  # no more threads: then not
            return None
        return thread

    def _by_file(self, keys: Iterable[tuple[str, str]]) -> dict[str, list[tuple[int, int]]]:
        by_file: dict[str, list[tuple[int, int]]] = {}
        for file, key in keys:
            if self._is_here(file):
                by_file.setdefault(file, []).append(self._places[file][key].span)
        return by_file

    def cancel(self, keys: Iterable[tuple[str, str]]) -> None:
        """These will not be read after all."""
        if self.source is not None:
            self.source.cancel(keys)

    def recipes(
        self, model: PreTrainedModel, load_config: Any, meta: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, Recipe], bool]:
        """How each weight is put together, once for all loads (0.3 ms a key); and whether one without a recipe is missing."""
        keys = KeyMap(model, load_config, meta)
        for file in self.files:
            for key in self._handle(file).keys():  # noqa: SIM118  not a dict
                if not keys.add(file, key):
                    self.ignored_keys.append(key)
        return keys.recipes(), keys.one_weight_each

    def _handle(self, file: str) -> Any:
        """The library's handle of a file. With it comes, at the same moment, all else that is read of the file: what takes its
        place later is of other bytes."""
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt").__enter__()
            except Exception as error:
                raise CheckpointError(f"'{file}' is not a readable safetensors file: {error}") from error
            if self._is_here(file):
                self._places[file], self._maps[file] = places(Path(file)), _mapped(file)
        return self._handles[file]


def _find_madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return cast("Callable[[int, int, int], int]", found)


_madvise = _find_madvise()


def _map(ranges: Sequence[tuple[Any, int, int]]) -> None:
    for mapped, start, size in ranges:  # holds what is mapped as long as it takes
        assert _madvise is not None
        _madvise(mapped.data_ptr() + start, size, POPULATE_READ)


def _mapped(file: str) -> Any:
    """The storage of all bytes of a file; what is written there stays with this process. None where the system has no addresses
    left for them, as under `ulimit -v`: the library has mapped them once already."""
    try:
        return torch.UntypedStorage.from_file(file, False, os.path.getsize(file))
    except RuntimeError:
        return None
