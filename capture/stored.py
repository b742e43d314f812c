"""The tensors of a checkpoint's files: opened once, read in pieces, and every byte of them counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from capture.assemble import Recipe
from capture.borrowed import KeyMap
from capture.errors import CheckpointError
from capture.ledger import CountedSlice, Ledger

if TYPE_CHECKING:
    from capture.remote import Source


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

    def announce(self, keys: Iterable[tuple[str, str]]) -> None:
        """These will be read soon, in about this order."""
        if self.source is not None:
            self.source.announce(keys)

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
