"""What this project borrows from the private parts of transformers; nothing else touches them.

Written for one range of versions (`SUPPORTED`). Each loan is covered by a test of its own in tests/capture/test_checkpoint.py
or tests/capture/test_assemble.py:

- `PreTrainedModel._load_pretrained_model`: replaced for the duration of one `from_pretrained` by a function that records
  the model (all weights on meta), its files and the load config. Dtype, quantizer, key conversion and the finalisation of
  non-persistent buffers stay the library's own.
- `core_model_loading.rename_source_key` and the operations of `WeightConverter`: which stored tensors make which weight, and
  how. `MergeModulelist`, `Concatenate` and `Fp8Dequantize` are done by capture/assemble.py, in place; whatever else a
  converter asks for is left to
- `core_model_loading.convert_and_load_state_dict_in_model`, which loads a set of keys at once.
- `DtensorShardOperation.shard_tensor`: which part of a stored tensor is a rank's.
- `build_glob_alternation`: which weights stay in float32 in a model of lower precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, core_model_loading
from transformers.core_model_loading import Concatenate, MergeModulelist
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from capture.assemble import Part, Recipe
from capture.errors import UnsupportedModelError
from capture.group import is_distributed

SUPPORTED = ("5.23.0", "5.24")
SCALE, ACTIVATION_SCALE = "_scale_inv", "activation_scale"  # ends of names beside an FP8 weight


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
def recording(record: dict[str, Any]) -> Iterator[None]:
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


def kept_in_float32(load_config: Any, names: Sequence[str]) -> dict[str, torch.dtype]:
    """The weights that the library loads in another dtype than the model's, by name."""
    plan = load_config.dtype_plan or {}
    if not plan:
        return {}
    pattern, by_group, _ = core_model_loading.build_glob_alternation(list(plan))
    found = {name: pattern.search(name) for name in names}
    return {name: plan[by_group[match.lastgroup]] for name, match in found.items() if match}


class KeyMap:
    """Maps each key of a checkpoint to the weight that it is stored for; then each weight to its recipe."""

    def __init__(self, model: PreTrainedModel, load_config: Any, meta: Mapping[str, torch.Tensor]) -> None:
        mapping = load_config.weight_mapping or []
        self.renamings = [m for m in mapping if isinstance(m, core_model_loading.WeightRenaming)]
        self.converters = [m for m in mapping if isinstance(m, core_model_loading.WeightConverter)]
        self.by_pattern = {p: c for c in self.converters for p in c.source_patterns}
        self.prefix, self.meta = model.base_model_prefix, meta
        self._found: dict[str, list[tuple[str, str, str | None]]] = {}  # weight -> [(key, file, pattern)]

    def add(self, file: str, key: str) -> bool:
        """Take in one key; False where the model has no such weight."""
        target, pattern = core_model_loading.rename_source_key(
            key, self.renamings, self.converters, self.prefix, self.meta
        )
        if target not in self.meta and key in self.meta:
            target, pattern = key, None
        if target not in self.meta:
            return False
        self._found.setdefault(target, []).append((key, file, pattern))
        return True

    @property
    def one_weight_each(self) -> bool:
        """False where one stored tensor may fill several weights, so that a weight without a key need not be missing."""
        return all(len(c.target_patterns) == 1 for c in self.converters)

    def recipes(self) -> dict[str, Recipe]:
        """How each weight is put together from what is stored."""
        return {target: self._recipe(found) for target, found in self._found.items()}

    def _recipe(self, found: list[tuple[str, str, str | None]]) -> Recipe:
        # In the library's order: it sets each expert's place.
        found = sorted(found, key=lambda item: core_model_loading.dot_natural_key(item[0]))
        keys = tuple((file, key) for key, file, _ in found)
        pattern = found[0][2]
        if pattern is None:
            return (
                Recipe((Part(*keys[0]),))
                if len(found) == 1
                else Recipe(by_library="several keys of one name", keys=keys)
            )
        converter = self.by_pattern[pattern]
        operations = list(converter.operations)
        if type(operations[0]) is Fp8Dequantize:
            operations.pop(0)
        known = [type(o) for o in operations] in ([], [MergeModulelist], [MergeModulelist, Concatenate], [Concatenate])
        merged = bool(operations) and type(operations[0]) is MergeModulelist
        if not known or len(converter.target_patterns) > 1 or (merged and operations[0].dim != 0):
            return Recipe(by_library=", ".join(type(o).__name__ for o in operations), keys=keys)
        stored: dict[str, list[tuple[str, str]]] = {}
        for key, file, of in found:
            stored.setdefault(str(of), []).append((file, key))
        parts = []
        columns = [p for p in converter.source_patterns if p in stored and not p.endswith((SCALE, ACTIVATION_SCALE))]
        for column, name in enumerate(columns):
            scales = stored.get(name + SCALE, [])
            if scales and len(scales) != len(stored[name]):
                return Recipe(by_library="scales for some of the experts only", keys=keys)
            for i, (file, key) in enumerate(stored[name]):
                parts.append(Part(file, key, i if merged else None, column, scales[i] if scales else None))
        axis = operations[-1].dim if operations and type(operations[-1]) is Concatenate else None
        if not parts or (not merged and len(parts) != len(columns)) or (len(columns) > 1 and axis is None):
            return Recipe(by_library=f"an unusual set of keys, {', '.join(stored)}", keys=keys)
        return Recipe(tuple(parts), axis)


def load_by_library(model: PreTrainedModel, state: dict[str, Any], load_config: Any) -> tuple[list[str], list[Any]]:
    """Load the given keys by the library's own means: (errors, [(name, shape stored, shape expected)])."""
    info, _ = core_model_loading.convert_and_load_state_dict_in_model(model, state, load_config)
    errors = [str(e) for e in (*info.conversion_errors.values(), *info.error_msgs)]
    return errors, sorted(info.mismatched_keys, key=str)


class _Asked:
    """Stands in for a stored tensor and keeps what part of it is asked for."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape, self.index = list(shape), tuple(slice(0, n) for n in shape)

    def get_shape(self) -> list[int]:
        return self._shape

    def __getitem__(self, index: Any) -> _Asked:
        if index is not Ellipsis:
            self.index = tuple(index)
        return self

    def to(self, **_: Any) -> _Asked:
        return self


def share_of(weight: torch.Tensor, shape: Sequence[int], expert: int | None) -> tuple[slice, ...] | None:
    """The part of a stored tensor [shape] that this process holds of a weight; None where it holds nothing of it.

    weight: the parameter on meta, distributed or not. expert: the stored tensor's place on the weight's first axis.
    """
    asked = _Asked(shape)
    if is_distributed(weight):
        from transformers.distributed.sharding_utils import DtensorShardOperation

        if DtensorShardOperation(weight).shard_tensor(asked, tensor_idx=expert) is None:
            return None
    return asked.index


def first_expert(weight: torch.Tensor) -> int:
    """The place on a weight's first axis where this process's share of it begins."""
    if not is_distributed(weight):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)  # type: ignore[attr-defined]
    return int(offset[0])


def interleaved(weight: torch.Tensor) -> bool:
    """True where a rank's share of a weight is several pieces of one stored tensor (gate and up stored as one)."""
    return is_distributed(weight) and any(
        hasattr(p, "dim") and not p.is_shard()
        for p in weight.placements  # type: ignore[attr-defined]
    )


def wrapped(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A rank's share as the distributed tensor that its weight on meta is; any other tensor as it is."""
    if not is_distributed(like):
        return tensor
    from transformers.distributed.sharding_utils import _dtensor_from_local_like

    shard: torch.Tensor = _dtensor_from_local_like(tensor, like)
    return shard


def read_share(weight: torch.Tensor, source: Any, device: torch.device) -> torch.Tensor:
    """This rank's share of a stored tensor, whatever pieces it consists of."""
    from transformers.distributed.sharding_utils import DtensorShardOperation

    share: torch.Tensor = DtensorShardOperation(weight).shard_tensor(source, device=device, dtype=weight.dtype)
    return share
