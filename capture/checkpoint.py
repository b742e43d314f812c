"""Open a checkpoint without loading it, then load and free one group of weights at a time.

This is the only module that touches private functions of transformers, and it is written for one range of versions
(`SUPPORTED`). What it borrows, each covered by a test of its own in tests/capture/test_checkpoint.py:

- `PreTrainedModel._load_pretrained_model`: replaced for the duration of one `from_pretrained` by a function that records
  the model (all weights on meta), its files and the load config. Dtype, quantizer, key conversion and the finalisation of
  non-persistent buffers stay the library's own.
- `core_model_loading.rename_source_key`: maps each checkpoint key to its parameter.
- `core_model_loading.convert_and_load_state_dict_in_model`: loads one group of keys: renames, fuses experts, casts.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, core_model_loading
from transformers.distributed import DistributedConfig
from transformers.utils import logging as hf_logging

from capture.degrees import check_degree
from capture.errors import CheckpointError, UnsupportedModelError
from capture.group import ALONE, Group, local, vocabulary_shard
from capture.ledger import CountedSlice, Ledger

SUPPORTED = ("5.23.0", "5.24")
EMBEDDING, HEAD, REST = "embedding", "head", "rest"


def check_version() -> None:
    """Raise unless the installed transformers is one that this module was written for."""
    from packaging.version import Version

    low, high = SUPPORTED
    if not Version(low) <= Version(transformers.__version__) < Version(high):
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} is installed; capture needs >= {low} and < {high}, because it uses "
            f"private functions of that version. Run: pip install -c constraints.txt transformers"
        )


@contextmanager
def _recording(record: dict[str, Any]) -> Iterator[None]:
    """Make from_pretrained stop short of reading weights, and keep what it would have read them with."""
    original = PreTrainedModel.__dict__["_load_pretrained_model"]

    def instead(model: PreTrainedModel, state_dict: Any, files: list[str] | None, load_config: Any, *_: Any) -> Any:
        record.update(files=files, load_config=load_config)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor._is_hf_initialized = True
        for _, buffer in model.named_non_persistent_buffers():
            buffer._is_hf_initialized = False
        info = core_model_loading.LoadStateDictInfo(
            missing_keys=set(), unexpected_keys=set(), mismatched_keys=set(), conversion_errors={}, error_msgs=[],
            skipped_pp_keys=set(),
        )  # fmt: skip
        return info, None

    PreTrainedModel._load_pretrained_model = staticmethod(instead)
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = original


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
    ) -> None:
        """group: the ranks that share the model's weights; None is this process alone. whole: load everything at once by the library's own means and free nothing: for pickled checkpoints."""
        check_version()
        self.label, self.device, self.ledger, self.directory = label, device, ledger, directory
        self.whole, self.group = whole, group or ALONE
        self.linear_head: bool | None = None  # found out and kept by capture/unembed.py
        if self.group.size > 1:
            check_degree(directory, self.group.size, label)
            model_kwargs = model_kwargs | {
                "distributed_config": DistributedConfig(tp_size=self.group.size, tp_plan="auto")
            }
        self.loaded: dict[Any, int] = {}  # group -> bytes, from the moment that its reading may begin
        self._ready: set[Any] = set()
        record: dict[str, Any] = {}
        hf_logging.disable_progress_bar()  # else one bar per group
        try:
            with nullcontext() if whole else _recording(record):
                self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **model_kwargs)
        except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
            text = str(error)
            if "does not recognize this architecture" in text or "Unrecognized configuration class" in text:
                raise UnsupportedModelError(
                    f"{label} model '{directory}': transformers {transformers.__version__} has no causal language model for the "
                    "model_type in its config.json"
                ) from error
            raise CheckpointError(f"{label} model '{directory}' cannot be opened: {text}") from error
        self.ignored_keys: list[str] = []
        self.layers_name, self.layers = _find_layers(self.model)
        if whole:
            self.model.to(device)
            self._name_groups()
            for group in self.groups():
                self.reserve(group)
                self._ready.add(group)
            return
        if not record.get("files"):
            raise CheckpointError(f"{label} model '{directory}': transformers found no weight files in it")
        self.load_config = dataclasses.replace(record["load_config"], device_map={"": device})
        self.files: list[str] = record["files"]
        if not all(f.endswith(".safetensors") for f in self.files):
            raise CheckpointError(
                f"{label} model '{directory}': '{Path(self.files[0]).name}' is not a safetensors file"
            )
        self._move_buffers()
        self._name_groups()
        self._map_keys()

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
    def head_weight(self) -> torch.Tensor:
        """The unembedding [V, D]."""
        weight: torch.Tensor = self.head.weight  # type: ignore[assignment]
        return weight

    def head_shard(self) -> tuple[int, torch.Tensor, torch.Tensor | None]:
        """(id of the first row, rows [V, D], bias [V] or None) of the unembedding that this rank holds."""
        first, weight = vocabulary_shard(self.head_weight)
        bias = getattr(self.head, "bias", None)
        return first, weight, None if bias is None else local(bias)

    @property
    def n_embeddings(self) -> int:
        """Rows of the embedding: ids below it are known."""
        weight: torch.Tensor = self.embedding.weight  # type: ignore[assignment]
        return weight.shape[0]

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    def _move_buffers(self) -> None:
        for name, buffer in list(self.model.named_non_persistent_buffers()):
            if buffer.device != self.device:
                owner, _, leaf = name.rpartition(".")
                self.model.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)

    def _name_groups(self) -> None:
        self.ties: dict[str, str] = {}  # target -> source
        if self.embedding is None or self.head is None:
            raise UnsupportedModelError(f"{type(self.model).__name__} has no input embedding or no unembedding")
        names = {id(m): n for n, m in self.model.named_modules(remove_duplicate=False)}
        embedding, head = names[id(self.embedding)] + ".", names[id(self.head)] + "."
        ties = self.model.all_tied_weights_keys.items()
        self.tied = any({t.startswith(head), s.startswith(head)} == {True, False} for t, s in ties)
        # Tied weights are one group: they come and go together.
        self._prefix = {embedding: EMBEDDING, head: EMBEDDING if self.tied else HEAD}
        self._tensors: dict[Any, list[str]] = {g: [] for g in self.groups()}
        self._meta: dict[str, torch.Tensor] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            self._tensors[self.group_of(name)].append(name)
            self._meta[name] = tensor

    def groups(self) -> list[Any]:
        return [EMBEDDING, HEAD, REST, *(("layer", i) for i in range(self.n_layers))]

    def group_of(self, name: str) -> Any:
        """The group that a parameter belongs to."""
        if name.startswith(self.layers_name + "."):
            return ("layer", int(name[len(self.layers_name) + 1 :].split(".")[0]))
        for prefix, group in self._prefix.items():
            if name.startswith(prefix):
                return group
        return REST

    def _map_keys(self) -> None:
        """Map every checkpoint key to its group once: 0.3 ms a key, so not again at every load."""
        mapping = self.load_config.weight_mapping or []
        renamings = [m for m in mapping if isinstance(m, core_model_loading.WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, core_model_loading.WeightConverter)]
        prefix = self.model.base_model_prefix
        self._keys: dict[Any, list[tuple[str, str]]] = {g: [] for g in self.groups()}
        found: set[str] = set()
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as handle:
                    keys = list(handle.keys())
            except Exception as error:
                raise CheckpointError(f"'{file}' is not a readable safetensors file: {error}") from error
            for key in keys:
                target, _ = core_model_loading.rename_source_key(key, renamings, converters, prefix, self._meta)
                if target not in self._meta and key in self._meta:
                    target = key
                if target not in self._meta:
                    self.ignored_keys.append(key)
                    continue
                self._keys[self.group_of(target)].append((file, key))
                found.add(target)
        self._tie(found)
        if all(len(c.target_patterns) == 1 for c in converters):  # else one key may fill several weights
            for name in self._meta:
                if name not in found and self.ties.get(name) not in found:
                    self._lacks(name)

    def _lacks(self, name: str) -> None:
        raise CheckpointError(
            f"{self.label} model '{self.directory}' lacks the weight '{name}'. The checkpoint is incomplete, or its "
            "config.json is of another model"
        )

    def _tie(self, found: set[str]) -> None:
        """Which parameter stands in for which. As in the library: whichever of the two the checkpoint holds is the source."""
        for target, source in self.model.all_tied_weights_keys.items():
            if target in found and source not in found:
                target, source = source, target
            self.ties[target] = source
        self._both = {t for t, s in self.ties.items() if t in found and s in found}

    # -- loading -----------------------------------------------------------------------------------------------------

    def reserve(self, group: Any) -> None:
        """Count a group's bytes as alive from now on: reading may begin at any moment."""
        if group not in self.loaded:
            self.loaded[group] = self.group_bytes(group)
            self.ledger.add(self.loaded[group])

    def load(self, group: Any) -> None:
        """Read one group from its files. Raises CheckpointError where a weight is missing, misshapen or unreadable."""
        if group in self._ready:
            return
        self.reserve(group)
        handles: dict[str, Any] = {}
        state: dict[str, Any] = {}
        try:
            for file, key in self._keys[group]:
                if file not in handles:
                    handles[file] = safe_open(file, framework="pt").__enter__()
                state[key] = CountedSlice(handles[file].get_slice(key), f"{self.label}:{key}", self.ledger)
            if state:
                info, _ = core_model_loading.convert_and_load_state_dict_in_model(self.model, state, self.load_config)
                self._check(group, info)
        except (OSError, RuntimeError, ValueError) as error:
            if _is_out_of_memory(error):
                raise
            raise CheckpointError(f"{self.label} model '{self.directory}', {_name(group)}: {error}") from error
        finally:
            for handle in handles.values():
                handle.__exit__(None, None, None)
        self._apply_ties(group)
        self._require(group)
        nbytes = self._live_bytes(group)
        self.ledger.add(nbytes - self.loaded[group])
        self.loaded[group] = nbytes
        self._ready.add(group)

    def _check(self, group: Any, info: Any) -> None:
        if info.conversion_errors or info.error_msgs:
            first = next(iter(info.conversion_errors.values()), None) or info.error_msgs[0]
            raise CheckpointError(f"{self.label} model '{self.directory}', {_name(group)}: {first}")
        if info.mismatched_keys:
            name, got, expected = min(info.mismatched_keys, key=str)
            raise CheckpointError(
                f"{self.label} model '{self.directory}': '{name}' has shape {tuple(got)} in the checkpoint, the config says "
                f"{tuple(expected)}"
            )

    def _live_bytes(self, group: Any) -> int:
        """Bytes of a group's tensors that hold data, a tied tensor once."""
        tensors = {id(t): t for t in map(self._get, self._tensors[group]) if not t.is_meta}
        return sum(local(t).nbytes for t in tensors.values())

    def _get(self, name: str) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        tensor = module._parameters.get(leaf)
        found = tensor if tensor is not None else module._buffers.get(leaf)
        assert found is not None, name
        return found

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = tensor
        else:
            module._buffers[leaf] = tensor

    def _apply_ties(self, group: Any) -> None:
        """Let a tied weight be the very same Parameter as its source."""
        for target, source in self.ties.items():
            if self.group_of(target) != group or self._get(source).is_meta:
                continue
            both = (local(self._get(target)), local(self._get(source)))
            if target in self._both and not self.group.all(torch.equal(*both), self.device):
                continue  # both stored and different: the library does not tie them either
            self._set(target, self._get(source))

    def _require(self, group: Any) -> None:
        """Raise if a weight of the group is still on meta."""
        for name in self._tensors[group]:
            if self._get(name).is_meta:
                self._lacks(name)

    def free(self, group: Any) -> None:
        """Put the group's weights back on meta."""
        if group not in self.loaded or self.whole:
            return
        self._ready.discard(group)
        for name in self._tensors[group]:
            self._set(name, self._meta[name])
        self.ledger.add(-self.loaded.pop(group))

    def layer_bytes(self) -> list[int]:
        """Bytes of each layer as it will stand in memory, from the shapes and dtypes on meta."""
        return [self.group_bytes(("layer", i)) for i in range(self.n_layers)]

    def group_bytes(self, group: Any) -> int:
        """Bytes of one group when loaded; a tied tensor counts once."""
        tensors = {id(t): t for t in (self._meta[n] for n in self._tensors[group] if n not in self.ties)}
        return sum(local(t).nbytes for t in tensors.values())


def _name(group: Any) -> str:
    return f"layer {group[1]}" if isinstance(group, tuple) else f"group '{group}'"


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def _find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers: the outermost ModuleList as long as the config says."""
    config = model.config.get_text_config()
    wanted = config.num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of {wanted} decoder layers; its layers cannot be walked one by one"
        )
    return min(lists, key=lambda item: item[0].count("."))


def free_memory() -> None:
    """Collect garbage and give cached device memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def layers_equal(base: StreamedModel, sft: StreamedModel, groups: Sequence[Any]) -> bool:
    """True if both models hold the same weights, bit for bit, in all the given (loaded) groups."""
    if base is sft:
        return True
    for group in groups:
        if len(base._tensors[group]) != len(sft._tensors[group]):
            return False  # the same on all ranks
        for a, b in zip(base._tensors[group], sft._tensors[group], strict=True):
            x, y = local(base._get(a)), local(sft._get(b))
            if x.shape != y.shape or x.dtype != y.dtype or not torch.equal(x, y):
                return base.group.all(False, base.device)
    return base.group.all(True, base.device)
