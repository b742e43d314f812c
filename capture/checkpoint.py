"""Open a checkpoint without loading it, then load and free one group of weights at a time.

What is private to transformers is borrowed by capture/borrowed.py; how one weight is put together is in capture/assemble.py.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.distributed import DistributedConfig

from capture import borrowed
from capture.assemble import FP8, Misshapen, Place, Recipe, assemble, check, held
from capture.degrees import check_degree, whole_attention_plan
from capture.errors import CheckpointError, UnsupportedModelError
from capture.group import ALONE, Group, is_plain, local, vocabulary_shard
from capture.groups import EMBEDDING, HEAD, REST, Groups
from capture.ledger import CountedSlice, Ledger, is_out_of_memory
from capture.opening import find_layers, open_model
from capture.quantize import quantization_of
from capture.stored import Stored
from capture.sublayer import HeadRows, embed_rows
from capture.upload import Upload, upload_to

if TYPE_CHECKING:
    from capture.remote import Source

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
LIBRARY_LOADING = 1.6  # bytes beside a weight's own while transformers puts it together, as a share of it (measured)


class StreamedModel:
    """One causal LM whose weights are loaded and freed by group: embedding, head, rest, and ("layer", i).

    `model` is the transformers model; weights that are not loaded are on meta. `label` is "base" or "sft".
    """

    def __init__(
        self,
        directory: str,
        *,
        label: str,
        dtype: str,
        device: torch.device,
        model_kwargs: dict[str, Any],
        ledger: Ledger,
        whole: bool = False,
        group: Group | None = None,
        source: Source | None = None,
        upload: Upload | None = None,
    ) -> None:
        """upload: the way to the device; by default one of its own. source: where weights that are not in `directory` come from.
        group: the ranks that share the model's weights; None is this process alone. whole: load everything at once by the library's
        own means and free nothing: for pickled checkpoints; quantized weights are loaded so in any case."""
        borrowed.check_version()
        self.label, self.device, self.ledger, self.directory = label, device, ledger, directory
        self.group = group or ALONE
        self.upload = upload or upload_to(device)
        # found out and kept by capture/unembed.py
        self.linear_head: bool | None = None
        self.scaled_probe: torch.Tensor | None = None
        self.head_place: tuple[nn.Module, str] | None = None
        self.head_sample: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.calls_hold_states: bool | None = None  # likewise by capture/replay.py
        self.quantization = quantization_of(directory, model_kwargs, label)
        self.whole = whole or self.quantization.method is not None
        self.by_leaf = False  # layers are loaded leaf by leaf: capture/sublayer.py
        self.head_rows: HeadRows | None = None
        self.loaded: dict[Any, int] = {}  # group -> bytes, from the moment that its reading may begin
        self._ready: set[Any] = set()
        self._read_ahead: set[Any] = set()  # of those that are not ready
        self._room: dict[Any, Any] = {}  # of those that are not ready, as Upload.room has it
        self._mapped: set[Any] = set()  # of those that are views, what lay in memory
        self._views: dict[Any, bool] = {}
        self.model, record = open_model(
            directory, label, dtype, model_kwargs, self.quantization, device, whole=self.whole, ranks=self._ranks()
        )
        self.layers_name, self.layers = find_layers(self.model)
        if self.whole:
            for name in record["lacks"]:
                self._lacks(name)
            if self.quantization.method is None:
                self.model.to(device)
            self.weights = Groups(self.model, self.layers_name, self.n_layers)
            for each in self.groups():
                self.reserve(each)
                self._ready.add(each)
            return
        self.stored = Stored(record.get("files") or [], label, directory, ledger, source)
        self.load_config = dataclasses.replace(record["load_config"], device_map={"": device})
        self._move_buffers()
        self.weights = Groups(self.model, self.layers_name, self.n_layers)
        self._map_keys()

    def _ranks(self) -> DistributedConfig | None:
        """How the weights are divided among ranks; None where they are not."""
        if self.group.size == 1:
            return None
        if self.quantization.method is not None:
            raise UnsupportedModelError(
                f"{self.label} model '{self.directory}' has weights quantized by {self.quantization.method}, which stay on one "
                "GPU; set tensor_parallel: 1"
            )
        apart = self.group.whole_attention
        check_degree(self.directory, self.group.size, self.label, whole_attention=apart)
        # no entry for attention in the plan: it is undivided as it is, and an empty plan is none
        plan: Any = (apart and whole_attention_plan(self.directory)) or "auto"
        return DistributedConfig(tp_size=self.group.size, tp_plan=plan)

    @property
    def ignored_keys(self) -> list[str]:
        """Stored tensors that the model has no weight for."""
        return [] if self.whole else self.stored.ignored_keys

    # -- structure ---------------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def base(self) -> nn.Module:
        """The model without its head: what turns embeddings into the last hidden state."""
        return self.model.base_model

    @property
    def embedding(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @property
    def head_weight(self) -> torch.Tensor | HeadRows:
        """The unembedding [V, D]; in sub-layer mode only slices of its rows are tensors."""
        if self.head_rows is not None:
            return self.head_rows
        weight: torch.Tensor = self.head.weight  # type: ignore[assignment]
        return weight

    def head_shard(self) -> tuple[int, torch.Tensor | HeadRows, torch.Tensor | None]:
        """(id of the first row, rows [V, D], bias [V] or None) of the unembedding that this rank holds."""
        bias = getattr(self.head, "bias", None)
        if self.head_rows is not None:
            return 0, self.head_rows, bias
        first, weight = vocabulary_shard(self.head.weight)  # type: ignore[arg-type]
        return first, weight, None if bias is None else local(bias)

    @property
    def n_embeddings(self) -> int:
        """Rows of the embedding: ids below it are known."""
        weight: torch.Tensor = self.embedding.weight  # type: ignore[assignment]
        return weight.shape[0]

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    def embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """What the embedding module gives for one batch of ids [B, T]: [B, T, D]."""
        if self.by_leaf:
            return embed_rows(self, ids_BT)
        embeds: torch.Tensor = self.embedding(ids_BT)
        return embeds

    def _move_buffers(self) -> None:
        for name, buffer in list(self.model.named_non_persistent_buffers()):
            if buffer.device != self.device:
                owner, _, leaf = name.rpartition(".")
                self.model.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)

    @property
    def tied(self) -> bool:
        """Whether the unembedding is the embedding."""
        return self.weights.tied

    @property
    def ties(self) -> dict[str, str]:
        """Of tied weights, target -> source."""
        return self.weights.ties

    def groups(self) -> list[Any]:
        return list(self.weights.by_group)

    def names(self, group: Any) -> list[str]:
        """The weights of a group, by name."""
        return self.weights.by_group[group]

    def meta(self, name: str) -> torch.Tensor:
        """A weight as it will stand, without data."""
        return self.weights.meta[name]

    def recipe(self, name: str) -> Recipe | None:
        """How a weight, or the one that it is tied to, is put together; None where nothing is stored for it."""
        return self._recipes.get(name) or self._recipes.get(self.ties.get(name, ""))

    def split(self, leaves: dict[Any, list[str]]) -> None:
        """From now on load layers leaf by leaf: what is named in `leaves` leaves its layer's group for one of its own, and
        embedding and unembedding are read by rows."""
        self.weights.split(leaves)
        self._views.clear()
        self.head_rows, self.by_leaf = HeadRows(self), True

    def _map_keys(self) -> None:
        """Find out once for every weight which stored tensors make it: 0.3 ms a key, so not again at every load."""
        meta = self.weights.meta
        self._recipes, all_stored = self.stored.recipes(self.model, self.load_config, meta)
        self.weights.tie(set(self._recipes))
        for target, source in self.weights.untie_layers():
            if source in self._recipes:
                self._recipes.setdefault(target, self._recipes[source])
        ends = self.names(EMBEDDING) if self.tied else []
        for name in [n for n in ends if n in self.weights.both_stored and self.ties[n] in ends]:
            if not self._alike(name, self.ties[name]):  # else two would stand where one was counted
                self.weights.untie_ends(name)
        for name, dtype in borrowed.kept_in_float32(self.load_config, list(meta)).items():
            if meta[name].dtype != dtype:  # so that its bytes are counted as it will stand
                with torch.no_grad():
                    meta[name] = self.weights.as_weight(name, meta[name].to(dtype))
                self.weights.set(name, meta[name])
        if all_stored:
            for name in meta:
                if name not in self._recipes and self.ties.get(name) not in self._recipes:
                    self._lacks(name)
        for group in self.groups():
            for name in self.names(group):
                if name in self._recipes and not self._recipes[name].by_library:
                    self._check(group, name)
        left = {recipe.by_library for recipe in self._recipes.values() if recipe.by_library}
        if left:
            log.info("%s model: transformers puts some weights together by itself, which takes more memory: %s",
                     self.label, "; ".join(sorted(left)))  # fmt: skip

    def _check(self, group: Any, name: str) -> None:
        """Raise what loading a weight would, but for what its bytes say: the last layer's turn may come in hours. Of all of it, also
        where ranks share it, so that all of them say the same."""
        whole = torch.empty(self.meta(name).shape, dtype=self.meta(name).dtype, device="meta")
        place = Place(
            whole.shape, whole.dtype, whole.device, partial(borrowed.share_of, whole), 0, self.quantization.block
        )
        try:
            check(self._recipes[name], place, self.stored.described)
        except Misshapen as error:
            self._misshapen(name, error.got, error.expected)
        except ValueError as error:
            raise CheckpointError(f"{self.label} model '{self.directory}', {_name(group)}: {error}") from error

    def _alike(self, one: str, other: str) -> bool:
        """Whether two stored weights are equal; of those that must be fetched a few rows are looked at, and loading tells of the rest."""
        recipes = self._recipes[one], self._recipes[other]
        if not all(recipe.is_plain for recipe in recipes):
            return True
        return self.stored.alike(*((r.parts[0].file, r.parts[0].key) for r in recipes), dtype=self.meta(one).dtype)

    def _lacks(self, name: str) -> None:
        raise CheckpointError(
            f"{self.label} model '{self.directory}' lacks the weight '{name}'. The checkpoint is incomplete, or its "
            "config.json is of another model"
        )

    # -- loading -----------------------------------------------------------------------------------------------------

    def reserve(self, group: Any) -> None:
        """Count a group's bytes as alive from now on: reading may begin at any moment."""
        if group not in self.loaded:
            self.loaded[group] = self.group_bytes(group)
            self.ledger.add(self.loaded[group])
            self._room[group] = self.upload.room()

    def announce(self, group: Any) -> None:
        """A group will be loaded soon: what can be read ahead of that is. Ranks read shares, which nobody knows before."""
        if not self.whole and self.stored.source is not None and self.group.size == 1 and group not in self._ready:
            self.stored.announce(self._keys(group))

    def announce_first(self, *, layer: bool) -> None:
        """What is read before layers are, and layer 0."""
        for group in (EMBEDDING, REST, HEAD, *([("layer", 0)] if layer else [])):
            self.announce(group)

    def cancel_first(self) -> None:
        """Of these, what is not loaded yet."""
        for group in (EMBEDDING, REST, HEAD, ("layer", 0)):
            if group not in self.loaded:
                self.cancel(group)

    def cancel(self, group: Any) -> None:
        """A group that was announced will not be loaded after all."""
        if not self.whole:
            self.stored.cancel(self._keys(group))

    def _keys(self, group: Any) -> list[tuple[str, str]]:
        """File and key of all that a group is made of."""
        recipes = (self._recipes.get(name) for name in self.names(group))
        return [key for recipe in recipes if recipe is not None for key in recipe.sources()]

    def is_view(self, group: Any) -> bool:
        """Whether all of a group's weights will be views of their files as they lie on this machine."""
        if group not in self._views:
            self._views[group] = (
                not self.whole and self.group.size == 1 and self.device.type == "cpu"
                and all(self._is_view(name) for name in self.names(group))
            )  # fmt: skip
        return self._views[group]

    def _is_view(self, name: str) -> bool:
        recipe = self._recipes.get(name)
        if recipe is None:
            return True  # tied, or missing
        plain = recipe.is_plain and is_plain(self.meta(name))
        return plain and self.stored.maps(recipe.parts[0].file, recipe.parts[0].key, self.meta(name).dtype)

    def is_at_hand(self, group: Any) -> bool:
        """Whether loading a group takes no time: it is there, or will be views of what is in memory, as far as can be told."""
        if group in self._ready or group in self._mapped:
            return True
        return self.is_view(group) and self.stored.cached(self._keys(group))

    def map_ahead(self, *, stay: bool) -> threading.Thread | None:
        """Have the system map the pages of all layers, in a thread, where they will be views of what is in memory: when a layer first
        touches them, all of its cores wait. None where they are not that. stay: nothing will be freed, and the system is not asked
        again whether it has them in memory."""
        layers = [group for group in self.groups() if isinstance(group, tuple)]
        if not all(self.is_view(group) and self.stored.cached(self._keys(group)) for group in layers):
            return None
        if stay:
            self._mapped.update(layers)
        return self.stored.map_ahead([key for group in layers for key in self._keys(group)])

    def read_ahead(self, group: Any) -> None:
        """Let the system read a group's bytes from its disk."""
        self._read_ahead.add(group)
        self.stored.read_ahead(self._keys(group))

    def load(self, group: Any, *, ahead: bool = False) -> None:
        """Read one group from its files. ahead: who uses it will ask for it again, and wait then for what is still on its way.

        Raises CheckpointError where a weight is missing, misshapen or unreadable.
        """
        if group not in self._ready:
            self.reserve(group)
            self.announce(group)
            if group not in self._read_ahead and not self.is_at_hand(group):
                self.read_ahead(group)
            self._read_ahead.discard(group)
            with self.upload.on_stream(self._room.pop(group, None)):
                self._load(group)
            self.upload.arriving((self, group))
            self._ready.add(group)
        if not ahead:
            self.upload.wait((self, group))

    def _load(self, group: Any) -> None:
        view = self.is_view(group)
        try:
            if view:
                self._put_views(group)
            else:
                self._put_assembled(group)
        except (OSError, RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"{self.label} model '{self.directory}', {_name(group)}: {error}") from error
        self._apply_ties(group)
        for name in self.names(group):
            if not (view and name in self._recipes) and self.weights.get(name).is_meta:
                self._lacks(name)
        if view and self.ties.keys().isdisjoint(self.names(group)):
            return  # of shapes and dtypes that were reserved
        nbytes = self.weights.live_bytes(group)
        self.ledger.add(nbytes - self.loaded[group])
        self.loaded[group] = nbytes

    def _put_views(self, group: Any) -> None:
        """All this is Python between two layers, while the processor's other cores wait."""
        names = [name for name in self.names(group) if name in self._recipes]
        parts = [self._recipes[name].parts[0] for name in names]
        tensors = self.stored.views([(part.file, part.key) for part in parts])
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.shape != self.meta(name).shape:
                self._misshapen(name, tensor.shape, self.meta(name).shape)
            self.weights.set(name, self.weights.as_weight(name, tensor))

    def _put_assembled(self, group: Any) -> None:
        left = []
        for name in self.names(group):
            recipe = self._recipes.get(name)
            if recipe is not None and recipe.by_library:
                left.append(recipe)
            elif recipe is not None:
                try:
                    self.weights.set(name, self._assembled(name, recipe))
                except Misshapen as error:
                    self._misshapen(name, error.got, error.expected)
        if left:
            self._load_by_library(group, left)

    def _assembled(self, name: str, recipe: Recipe) -> torch.Tensor:
        meta = self.meta(name)
        if is_plain(meta) and recipe.is_plain:  # what nearly all are: without the way through shares and parts
            source = self.opened(recipe.parts[0].file, recipe.parts[0].key)
            if source.get_shape() == list(meta.shape) and source.get_dtype() not in FP8:
                return self.weights.as_weight(name, self.upload.put(source[...], meta.dtype, self.device))
        if borrowed.interleaved(meta) and recipe.parts[0].expert is None:
            (part,) = recipe.parts
            share = borrowed.read_share(meta, self.opened(part.file, part.key), CPU)
            tensor = self.upload.put(share, meta.dtype, self.device)
        else:
            place = Place(local(meta).shape, meta.dtype, self.device, partial(borrowed.share_of, meta),
                          borrowed.first_expert(meta), self.quantization.block, self.upload)  # fmt: skip
            tensor = assemble(recipe, place, self.opened, self.ledger)
        return self.weights.as_weight(name, borrowed.wrapped(tensor, meta))

    def opened(self, file: str, key: str) -> CountedSlice:
        """One stored tensor, not read yet. What is read of it is counted."""
        return self.stored.opened(file, key)

    def _load_by_library(self, group: Any, recipes: Sequence[Recipe]) -> None:
        state = {key: self.opened(file, key) for recipe in recipes for file, key in recipe.keys}
        with held(self.ledger, int(LIBRARY_LOADING * self.group_bytes(group))), self.upload.off_stream():
            errors, misshapen = borrowed.load_by_library(self.model, state, self.load_config)
        if errors:
            raise CheckpointError(f"{self.label} model '{self.directory}', {_name(group)}: {errors[0]}")
        for name, got, expected in misshapen:
            self._misshapen(name, got, expected)

    def _misshapen(self, name: str, got: Sequence[int], expected: Sequence[int]) -> None:
        raise CheckpointError(
            f"{self.label} model '{self.directory}': '{name}' has shape {tuple(got)} in the checkpoint, the config says "
            f"{tuple(expected)}"
        )

    def _apply_ties(self, group: Any) -> None:
        """Let a tied weight be the very same Parameter as its source."""
        for target, source in self.ties.items():
            if target not in self.names(group) or self.weights.get(source).is_meta:
                continue
            both = (local(self.weights.get(target)), local(self.weights.get(source)))
            if target in self.weights.both_stored and not self.group.all(torch.equal(*both), self.device):
                continue  # both stored and different: the library does not tie them either
            self.weights.set(target, self.weights.get(source))

    def free(self, group: Any) -> None:
        """Put the group's weights back on meta."""
        if group not in self.loaded or self.whole:
            return
        if group not in self._ready:
            self.cancel(group)
        self._ready.discard(group)
        if self.head_rows is not None and group == (EMBEDDING if self.tied else HEAD):
            self.head_rows.release()
        self._room.pop(group, None)
        weights = (local(self.weights.get(name)) for name in self.names(group))
        self.upload.leaving((self, group), (w for w in weights if not w.is_meta))
        for name in self.names(group):
            self.weights.set(name, self.meta(name))
        self.upload.left()
        self.ledger.add(-self.loaded.pop(group))

    def layer_bytes(self) -> list[int]:
        """Bytes of each layer as it will stand in memory, from the shapes and dtypes on meta; all of it, even where it comes leaf
        by leaf."""
        found = [0] * self.n_layers
        for group in self.groups():
            if isinstance(group, tuple):
                found[group[1]] += self.group_bytes(group)
        return found

    def group_bytes(self, group: Any) -> int:
        """Bytes of one group when loaded; a tied tensor counts once."""
        return self.weights.nbytes(group)


def _name(group: Any) -> str:
    return f"layer {group[1]}" if isinstance(group, tuple) else f"group '{group}'"


def layers_equal(base: StreamedModel, sft: StreamedModel, groups: Sequence[Any]) -> bool:
    """True if both models hold the same weights, bit for bit, in all the given (loaded) groups.

    False without a look where that would mean to read them (layers that come leaf by leaf) or to know a backend's formats.
    """
    if base is sft:
        return True
    if base.by_leaf and any(isinstance(group, tuple) for group in groups):
        return False
    for group in groups:
        if len(base.names(group)) != len(sft.names(group)):
            return False  # the same on all ranks
        for a, b in zip(base.names(group), sft.names(group), strict=True):
            x, y = local(base.weights.get(a)), local(sft.weights.get(b))
            same = is_plain(x) and is_plain(y) and x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)
            if not same:
                return base.group.all(False, base.device)
    return base.group.all(True, base.device)
