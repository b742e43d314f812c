"""The tensors of a checkpoint's files: opened once, read in pieces, and every byte of them counted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from capture.assemble import Recipe
from capture.borrowed import KeyMap
from capture.errors import CheckpointError
from capture.ledger import CountedSlice, Ledger
from capture.weights import joined, places

if TYPE_CHECKING:
    from capture.remote import Source

# as safetensors has them
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


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
        self._maps: dict[str, torch.Tensor] = {}
        self._places: dict[str, dict[str, tuple[int, int]]] = {}
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

    def maps(self, file: str, key: str, dtype: torch.dtype) -> bool:
        """Whether a tensor, wanted in this dtype on the CPU, is a view of its file."""
        here = self.source is None or file not in self.source.files
        return here and DTYPES.get(self._handle(file).get_slice(key).get_dtype()) == dtype

    def view(self, file: str, key: str) -> torch.Tensor:
        """A tensor that `maps`: its bytes come when they are first used. The library's own way takes four times as long, at moments
        when all else waits."""
        piece = self._handle(file).get_slice(key)
        start, stop = self._place(file, key)
        dtype = DTYPES[piece.get_dtype()]
        if start % dtype.itemsize:
            tensor: torch.Tensor = piece[...]
        else:
            tensor = self._map(file)[start:stop].view(dtype).view(piece.get_shape())
        self.ledger.read(f"{self.label}:{key}", stop - start)
        return tensor

    def _map(self, file: str) -> torch.Tensor:
        """All bytes of a file; what is written there stays with this process."""
        if file not in self._maps:
            self._maps[file] = torch.from_file(file, shared=False, size=os.path.getsize(file), dtype=torch.uint8)
        return self._maps[file]

    def cached(self, keys: Iterable[tuple[str, str]]) -> bool:
        """Whether the system has the first byte of each of these in memory, and with it, as good as always, all others. False
        where it does not say."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        byte = [bytearray(1)]
        try:
            for file, key in keys:
                if os.preadv(self._opened_file(file).fileno(), byte, self._place(file, key)[0], os.RWF_NOWAIT) != 1:
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
        by_file: dict[str, list[tuple[int, int]]] = {}
        for file, key in keys:
            if self.source is None or file not in self.source.files:
                by_file.setdefault(file, []).append(self._place(file, key))
        for file, wanted in by_file.items():
            number = self._opened_file(file).fileno()
            for start, stop in joined(wanted):
                os.posix_fadvise(number, start, stop - start, os.POSIX_FADV_WILLNEED)

    def _place(self, file: str, key: str) -> tuple[int, int]:
        """First byte of a tensor in its file, and the one behind the last."""
        if file not in self._places:
            self._places[file] = places(Path(file))
        return self._places[file][key]

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
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt").__enter__()
            except Exception as error:
                raise CheckpointError(f"'{file}' is not a readable safetensors file: {error}") from error
        return self._handles[file]
