"""Model facts that come with the project, configs/models.yaml: sizes of known models without asking the hub."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

from capture.errors import CheckpointError
from capture.footprint import DTYPE_BYTES, ModelBytes
from cluster.plan_sizes import ModelSizes, fp8_loading, memory_dtype

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@functools.cache
def facts() -> tuple[dict[str, Any], ...]:
    """The records of configs/models.yaml, in order. Empty where the file did not come with the installation."""
    file = CONFIGS / "models.yaml"
    return tuple(yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER)["models"]) if file.is_file() else ()


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def sizes_from_facts(model: str, dtype: str) -> ModelSizes | None:
    """Sizes of a hub id that the facts know, None for others.

    Raises CheckpointError for an id that exists in a format that cannot be loaded, naming one that can.
    """
    for record in facts():
        repos = record["repos"]
        if model in (*repos.values(), *record.get("also", ())):
            return _sizes(model, record, dtype)
        if model in record.get("unreadable", ()):
            kind = record["unreadable"][model]
            raise CheckpointError(
                f"'{model}' holds {kind}, which transformers cannot load; use {repos['base']} and {repos['sft']}"
            )
    return None


def _sizes(model: str, record: dict[str, Any], dtype: str) -> ModelSizes:
    in_memory = memory_dtype(dtype, record["stored"])
    element = DTYPE_BYTES[in_memory]
    ends = record["elements"]
    runs = [tuple(run) for run in record["layer_runs"]]
    layers = tuple(size * element for count, size, _, _ in runs for _ in range(count))
    weights = ModelBytes(
        ends["embedding"] * element, ends["head"] * element, ends["rest"] * element, layers, record["tied"],
        tuple(same * element for count, _, _, same in runs for _ in range(count)), ends["matrix"] * element,
        record["hidden"] * element, bool(record.get("fused_experts")),
        loading=fp8_loading(record["stored"], len(layers)),
    )  # fmt: skip
    stored = record["checkpoint_bytes"]
    return ModelSizes(
        model, "models.yaml", record["model_type"], record["parameters"], record["stored"], in_memory, stored,
        record.get("read_bytes", stored), weights, tuple(used for count, _, used, _ in runs for _ in range(count)),
        record["hidden"], record["ffn"], record["heads"], record["kv_heads"], record["head_dim"], record["vocab"],
        record["gated"], record.get("note"),
    )  # fmt: skip
