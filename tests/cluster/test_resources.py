"""The sizing arithmetic, without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_work import make_entry

from capture.settings import LocalRun
from cluster.connect import node_types
from cluster.resources import GIB, Request, Sizing, cpu_memory, gpus_wanted, refusal, request, sizing

LAPTOP = {"CPU": 2.0, "memory": 16.0 * GIB}
BIG = {"CPU": 32.0, "GPU": 8.0, "memory": 200.0 * GIB, "accelerator_type:H100": 1.0}


@pytest.mark.parametrize(
    ("device", "gpus", "has_gpus", "wanted"),
    [
        ("cpu", None, True, 0),
        ("cuda", None, False, 1),
        ("cuda:1", None, True, 1),
        (None, None, True, 1),
        (None, None, False, 0),
        (None, 2, False, 2),
        ("cuda", 0.5, True, 0.5),
        (None, 0, True, 0),
    ],
)
def test_gpus_come_from_the_entry_then_from_its_device(
    device: str | None, gpus: float | None, has_gpus: bool, wanted: float
) -> None:
    assert gpus_wanted(make_entry(device=device, gpus=gpus), has_gpus) == wanted


def ask(has_gpus: bool = True, visible: str | None = None, **fields: object) -> Request:
    entry = make_entry(**fields)
    return request(entry, cluster_has_gpus=has_gpus, sized=Sizing(2, 2.0, 4), visible_devices=visible)


def test_an_entry_on_the_cpu_hides_the_gpus_and_takes_its_cores() -> None:
    wanted = ask(device="cpu")
    assert (wanted.gpus, wanted.cpus, wanted.exclusive) == (0, 2, None)
    assert wanted.env == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}


def test_an_entry_on_cuda_leaves_the_choice_of_the_card_to_ray() -> None:
    wanted = ask(device="cuda:0", accelerator_type="H100")
    assert "CUDA_VISIBLE_DEVICES" not in wanted.env
    assert wanted.env["OMP_NUM_THREADS"] == "4"
    assert wanted.options() == {"num_gpus": 1, "num_cpus": 1, "max_restarts": 0, "accelerator_type": "H100"}


def test_an_entry_that_numbers_its_card_sees_the_machine_as_the_driver_does() -> None:
    assert ask(device="cuda:1").env["CUDA_VISIBLE_DEVICES"] is None
    guarded = ask(visible="3,4", device="cuda:0", local_run=LocalRun(enabled=True))
    assert (guarded.env["CUDA_VISIBLE_DEVICES"], guarded.exclusive) == ("3,4", "cuda:0")


def test_a_refusal_compares_need_with_have() -> None:
    assert refusal(Request(2, 1), [LAPTOP, BIG]) is None
    assert refusal(Request(1, 1), [LAPTOP]) == "asks for 1 GPU on one node; the largest node of this Ray has 0"
    assert refusal(Request(0, 64), [LAPTOP, BIG]) == "asks for 64 CPU on one node; the largest node of this Ray has 32"
    assert refusal(Request(1, 1, accelerator_type="A100"), [BIG]) == "asks for accelerator type A100; this Ray has H100"
    assert refusal(Request(1, 1, accelerator_type="H100"), [LAPTOP, BIG]) is None


def test_needs_that_only_different_nodes_have_are_refused() -> None:
    many_cores = {"CPU": 64.0, "memory": 10.0 * GIB}
    assert refusal(Request(0, 48), [BIG, many_cores]) is None
    reason = refusal(Request(1, 48), [BIG, many_cores])
    assert reason == "asks for 1 GPU, 48 CPUs on one node; no node of this Ray has all of that"


@pytest.mark.parametrize(
    ("entries", "jobs", "nodes", "threads"),
    [
        (1, None, [LAPTOP], 2),  # alone: all cores
        (2, None, [LAPTOP], 1),
        (9, None, [LAPTOP], 1),
        (3, None, [BIG], 10),
        (9, 2, [BIG], 16),
        (9, 1, [LAPTOP, BIG], 32),  # never more than one node has
        (1, 8, [BIG], 32),  # more jobs than entries: no core lies idle for it
    ],
)
def test_threads_share_the_cores_out(
    entries: int, jobs: int | None, nodes: list[dict[str, float]], threads: int
) -> None:
    assert sizing(entries, jobs, nodes).threads == threads


def test_more_jobs_than_cores_are_placed_all_the_same() -> None:
    sized = sizing(8, 6, [LAPTOP])
    assert sized.threads == 1
    assert 6 * sized.cpus <= 2.0 < 7 * sized.cpus


def test_part_of_a_gpu_must_be_less_than_one() -> None:
    assert refusal(Request(0.5, 1), [BIG]) is None
    assert refusal(Request(1.5, 1), [BIG], growing=True) == "asks for 1.5 GPUs; more than one must be a whole number"
    assert refusal(Request(16, 1), [BIG], growing=True) is None


def test_threads_beside_a_gpu_are_its_share_of_the_node() -> None:
    assert sizing(4, None, [BIG]).gpu_threads == 4


def test_memory_is_reserved_for_weights_up_to_what_the_largest_node_has() -> None:
    assert cpu_memory(None, [LAPTOP], None) == GIB  # the process alone
    assert cpu_memory(10 * GIB, [LAPTOP], None) == 13 * GIB
    assert cpu_memory(1, [LAPTOP], None) == cpu_memory(200 * 2**20, [LAPTOP], None) == 1.25 * GIB  # in steps
    assert cpu_memory(100 * GIB, [LAPTOP], None) == int(0.95 * 16 * GIB)
    assert cpu_memory(10 * GIB, [LAPTOP], jobs=2) == 0


def test_a_waiting_request_is_known_again_in_rays_list() -> None:
    wanted = Request(8, 1, accelerator_type="H100")
    assert wanted.is_asked_by({"GPU": 8.0, "CPU": 1.0, "accelerator_type:H100": 0.001})
    assert not wanted.is_asked_by({"GPU": 8.0, "CPU": 1.0})
    assert not wanted.is_asked_by({"GPU": 4.0, "CPU": 1.0, "accelerator_type:H100": 0.001})


H100S = {"CPU": 128.0, "GPU": 8.0, "accelerator_type:H100": 1.0}


def test_more_than_a_growing_cluster_can_ever_have_is_told_at_once() -> None:
    types = [{"CPU": 8.0, "GPU": 1.0, "accelerator_type:RTX4090": 1.0}, H100S]
    head = {"CPU": 8.0, "memory": 16.0 * GIB}
    assert refusal(Request(8, 1), [head], growing=True, types=types) is None
    reason = refusal(Request(16, 1), [head], growing=True, types=types)
    assert reason == "asks for 16 GPU on one node; the largest node that this cluster can have has 8"
    wrong = refusal(Request(1, 1, accelerator_type="A100"), [head], growing=True, types=types)
    assert wrong == "asks for accelerator type A100; this cluster can have H100, RTX4090"
    assert refusal(Request(1, 1, ranks=8), [head], growing=True, types=types) is None
    assert refusal(Request(1, 1, ranks=16), [head], growing=True, types=types) is not None


def test_what_types_do_not_tell_is_not_held_against_them() -> None:
    assert refusal(Request(1, 1, memory_bytes=GIB), [LAPTOP], growing=True, types=[H100S]) is None
    assert refusal(Request(16, 1), [LAPTOP], growing=True) is None  # no types are known


def test_types_of_nodes_come_from_the_config_that_ray_up_left(tmp_path: Path) -> None:
    file = tmp_path / "ray_bootstrap_config.yaml"
    assert node_types(file) == ()
    file.write_text(
        "available_node_types:\n  head: {resources: {CPU: 4}, max_workers: 0}\n"
        "  h100: {resources: {CPU: 16, GPU: 1, 'accelerator_type:H100': 1}, max_workers: 3}\n"
    )
    assert node_types(file) == ({"CPU": 16.0, "GPU": 1.0, "accelerator_type:H100": 1.0},)
    file.write_text("available_node_types: [")
    assert node_types(file) == ()
