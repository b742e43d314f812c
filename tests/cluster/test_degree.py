"""`tensor_parallel: auto`: the smallest valid degree with which the entry's mode fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_work import make_entry

from capture.errors import DeviceError, DeviceMemoryError
from capture.footprint import ModelBytes
from cluster.connect import Cluster
from cluster.degree import card_of, with_degree
from cluster.plan_sizes import ModelSizes

GB = 10**9
SIZES = ModelSizes(
    "m", "directory", "llama", 8 * GB, "bfloat16", "bfloat16", 0, 16 * GB,
    ModelBytes(GB, GB, 0, (GB,) * 14), (GB // 2,) * 14, 4096, 14336, 32, 8, 128, 128256,
)  # fmt: skip
H100S = {"CPU": 128.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
CLUSTER = Cluster(False, (H100S,), growing=False)


class Models:
    """Sizes of any model."""

    def __init__(self, sizes: ModelSizes = SIZES) -> None:
        self.found = sizes

    def sizes(self, *_: Any) -> ModelSizes:
        return self.found


def degree(cluster: Cluster = CLUSTER, sizes: ModelSizes = SIZES, **fields: Any) -> int:
    settings = {"device": "cuda", "tensor_parallel": "auto", "sft_revision": "other"} | fields
    entry, why = with_degree(make_entry(**settings), cluster, Models(sizes))  # type: ignore[arg-type]
    assert why.startswith(f"tensor_parallel: {entry.tensor_parallel}: mode ")
    assert entry.tensor_parallel != "auto"
    return entry.tensor_parallel


def test_one_gpu_is_enough_where_the_mode_fits_it() -> None:
    assert degree(mode="resident") == 1


def test_the_smallest_degree_that_fits_is_taken() -> None:
    assert degree(mode="resident", device_memory_gib=25) == 2
    assert degree(mode="resident", device_memory_gib=14) == 4
    assert degree(mode="streamed", device_memory_gib=14) == 1  # a streamed pair takes less


def test_only_valid_degrees_are_taken() -> None:
    odd = replace(SIZES, heads=28, kv_heads=1)
    with pytest.raises(DeviceMemoryError, match=r"found no degree: mode resident does not fit .* with 1 GPUs"):
        degree(sizes=odd, mode="resident", device_memory_gib=25)
    assert degree(sizes=odd, mode="resident", device_memory_gib=25, replicate_attention=True) == 2


def test_no_more_gpus_than_a_node_has_are_taken() -> None:
    few = Cluster(False, (H100S | {"GPU": 2.0},), growing=False)
    with pytest.raises(DeviceMemoryError, match="with 1 or 2 GPUs"):
        degree(few, mode="resident", device_memory_gib=14)
    grows = Cluster(False, ({"CPU": 8.0},), growing=True, types=(H100S,))
    assert degree(grows, mode="resident", device_memory_gib=14) == 4


def test_the_memory_of_a_gpu_comes_from_its_kind() -> None:
    assert card_of(make_entry(device="cuda", accelerator_type="RTX4090"), CLUSTER).memory_mib == 24564
    assert card_of(make_entry(device="cuda"), CLUSTER).gpu.startswith("H100")
    unknown = Cluster(False, ({"CPU": 8.0, "GPU": 1.0},), growing=False)
    with pytest.raises(DeviceError, match="must know the memory of a GPU; set accelerator_type"):
        card_of(make_entry(device="cuda"), unknown)
    assert card_of(make_entry(device="cuda", device_memory_gib=10), unknown).memory_mib == 10240


def test_more_gpus_come_before_reading_every_matrix_again_for_every_batch() -> None:
    assert degree(mode="auto", device_memory_gib=3.5) > 1
    assert degree(mode="sub-layer", device_memory_gib=3.5) == 1


def test_quantized_weights_stay_on_one_gpu() -> None:
    four = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    assert degree(model_kwargs=four) == 1
    with pytest.raises(DeviceMemoryError, match=r"mode resident does not fit .* with 1 GPUs"):
        degree(model_kwargs=four, device_memory_gib=8)
