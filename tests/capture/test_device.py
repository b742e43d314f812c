"""Choosing a device: what is taken and why, and the guards of local_run, over a torch.cuda that is made up."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from capture.config import Entry, LocalRun
from capture.device import GIB, _host_memory, choose_device
from capture.errors import DeviceError

RTX_4090 = ("NVIDIA GeForce RTX 4090", 25_393_692_672)  # what the driver says of a card sold with 24 GB
CARDS = [RTX_4090, ("NVIDIA T4", 15_655_829_504)]


def entry(**fields: Any) -> Entry:
    return Entry(name="e", base_model="b", sft_model="s", tokenizer="t", prompts=("x",), **fields)


def guarded(index: int = 0, **guards: Any) -> Entry:
    return entry(device=f"cuda:{index}", local_run=LocalRun(enabled=True, cuda_device_index=index, **guards))


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(CARDS))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: CARDS[i][0])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (CARDS[i][1] - GIB, CARDS[i][1]))


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("cards")
def test_an_open_device_takes_cuda_where_it_is() -> None:
    choice = choose_device(entry())
    assert (choice.device, choice.name, choice.index) == ("cuda:0", RTX_4090[0], 0)
    assert (choice.total_bytes, choice.free_bytes) == (RTX_4090[1], RTX_4090[1] - GIB)
    assert choice.reason == "device is not set and CUDA is there"


@pytest.mark.usefixtures("no_cuda")
def test_an_open_device_takes_the_cpu_where_there_is_no_cuda_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="capture.device"):
        choice = choose_device(entry())
    assert (choice.device, choice.name, choice.index) == ("cpu", "cpu", None)
    assert 0 < choice.free_bytes <= choice.total_bytes
    assert "device is not set and there is no CUDA" in caplog.text


@pytest.mark.usefixtures("cards")
def test_a_named_device_is_taken() -> None:
    assert choose_device(entry(device="cpu")).device == "cpu"
    assert choose_device(entry(device="cuda")).device == "cuda:0"
    assert choose_device(entry(device="cuda:1")).name == "NVIDIA T4"


@pytest.mark.usefixtures("no_cuda")
def test_asking_for_cuda_without_it_is_an_error_and_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(
        DeviceError, match=r"device: cuda: there is no CUDA: .*CUDA_VISIBLE_DEVICES is ''.*set device: cpu"
    ):
        choose_device(entry(device="cuda"))
    with pytest.raises(DeviceError, match=r"local_run\.enabled: there is no CUDA"):
        choose_device(guarded())


@pytest.mark.usefixtures("cards")
def test_an_index_out_of_range_says_which_there_are() -> None:
    for asked in (entry(device="cuda:2"), guarded(index=2)):
        with pytest.raises(DeviceError, match=r"there is no CUDA device 2 .*: the indices are 0 to 1"):
            choose_device(asked)


@pytest.mark.usefixtures("cards")
def test_the_wrong_gpu_is_an_error_that_names_both() -> None:
    assert choose_device(guarded(require_gpu_name_substring="rtx 4090")).index == 0
    with pytest.raises(DeviceError, match="GPU 1 is 'NVIDIA T4', and require_gpu_name_substring is '4090'"):
        choose_device(guarded(index=1, require_gpu_name_substring="4090"))


@pytest.mark.usefixtures("cards")
def test_too_little_memory_is_an_error_with_both_figures() -> None:
    assert choose_device(guarded(min_vram_gb=24)).total_bytes == RTX_4090[1]  # 23.6 GiB, and sold as 24 GB
    with pytest.raises(
        DeviceError, match=r"GPU 1 \(NVIDIA T4\) has 14\.6 GiB \(15\.7 GB\), and min_vram_gb asks for 22\.4 GiB"
    ):
        choose_device(guarded(index=1, min_vram_gb=24))


@pytest.mark.usefixtures("cards")
def test_an_approved_gpu_is_logged_by_name_index_and_memory(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="capture.device"):
        choose_device(guarded(index=1))
    assert caplog.messages == ["Local GPU run: NVIDIA T4 (index 1, 14.6 GiB)"]


@pytest.mark.usefixtures("cards")
def test_a_cap_lowers_what_may_be_used_and_not_what_is_there() -> None:
    choice = choose_device(entry(device_memory_gib=2))
    assert (choice.free_bytes, choice.total_bytes) == (2 * GIB, RTX_4090[1])
    assert "capped at 2 GiB" in choice.reason
    assert choose_device(entry(device_memory_gib=1000)).free_bytes == RTX_4090[1] - GIB


def test_main_memory_is_what_the_container_may_use(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 999 kB\nMemAvailable:    2048 kB\n")
    total, free = _host_memory(meminfo, tmp_path / "none")
    assert free == 2048 * 1024
    assert total > free
    group = tmp_path / "cgroup"
    group.mkdir()
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("700000\n")
    (group / "memory.stat").write_text("anon 400000\ninactive_file 300000\n")
    assert _host_memory(meminfo, group) == (1_000_000, 600_000)
    (group / "memory.max").write_text("max\n")
    assert _host_memory(meminfo, group) == (total, free)
