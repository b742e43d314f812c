"""Which device a capture runs on, why, and the guards of local_run. Nothing falls back: a check that fails is an error."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capture.errors import DeviceError

if TYPE_CHECKING:
    from capture.entries import Entry

log = logging.getLogger(__name__)

GIB = 1 << 30


@dataclass(frozen=True)
class DeviceChoice:
    """The device: as torch names it ("cuda:0", "cpu"), its own name, its CUDA index (None on the CPU), bytes, and why it was taken.

    `free_bytes` is what a capture may use now: free memory, at most the config's device_memory_gib.
    """

    device: str
    name: str
    index: int | None
    total_bytes: int
    free_bytes: int
    reason: str


def choose_device(entry: Entry) -> DeviceChoice:
    """Choose and check the entry's device before anything loads. Raises DeviceError."""
    import torch

    choice = _local_gpu(entry, torch) if entry.local_run.enabled else _device(entry, torch)
    if entry.device_memory_gib is not None:
        cap = int(entry.device_memory_gib * GIB)
        choice = replace(choice, free_bytes=min(choice.free_bytes, cap),
                         reason=f"{choice.reason}; memory capped at {entry.device_memory_gib:g} GiB")  # fmt: skip
    if entry.local_run.enabled:
        log.info("Local GPU run: %s (index %d, %.1f GiB)", choice.name, choice.index, choice.total_bytes / GIB)
    else:
        log.info("Device: %s, %s (%.1f GiB, %.1f GiB to use): %s", choice.device, choice.name,
                 choice.total_bytes / GIB, choice.free_bytes / GIB, choice.reason)  # fmt: skip
    return choice


def _device(entry: Entry, torch: Any) -> DeviceChoice:
    if entry.device is None:
        if torch.cuda.is_available():
            return _cuda(torch, 0, "device is not set and CUDA is there")
        return _cpu("device is not set and there is no CUDA")
    if entry.device == "cpu":
        return _cpu("device: cpu")
    _need_cuda(torch, f"device: {entry.device}", "set device: cpu, or null to take what is there")
    return _cuda(torch, int(entry.device.partition(":")[2] or 0), f"device: {entry.device}")


def _local_gpu(entry: Entry, torch: Any) -> DeviceChoice:
    guards = entry.local_run
    _need_cuda(torch, "local_run.enabled", "set local_run.enabled: false to run elsewhere")
    choice = _cuda(torch, guards.cuda_device_index, "local_run")
    wanted = guards.require_gpu_name_substring
    if wanted and wanted.lower() not in choice.name.lower():
        raise DeviceError(
            f"local_run: GPU {choice.index} is '{choice.name}', and require_gpu_name_substring is '{wanted}'; choose another "
            "cuda_device_index, or change the name asked for"
        )
    if choice.total_bytes < guards.min_vram_gb * 1e9:
        raise DeviceError(
            f"local_run: GPU {choice.index} ({choice.name}) has {choice.total_bytes / GIB:.1f} GiB "
            f"({choice.total_bytes / 1e9:.1f} GB), and min_vram_gb asks for {guards.min_vram_gb * 1e9 / GIB:.1f} GiB "
            f"({guards.min_vram_gb:g} GB)"
        )
    return choice


def _need_cuda(torch: Any, asked: str, remedy: str) -> None:
    if torch.cuda.is_available():
        return
    why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
    raise DeviceError(f"{asked}: there is no CUDA: {why}{_visible()}; {remedy}")


def _cuda(torch: Any, index: int, reason: str) -> DeviceChoice:
    count = torch.cuda.device_count()
    if index >= count:
        have = "the only index is 0" if count == 1 else f"the indices are 0 to {count - 1}"
        raise DeviceError(f"there is no CUDA device {index} ({reason}): {have}{_visible()}")
    free, total = torch.cuda.mem_get_info(index)
    return DeviceChoice(f"cuda:{index}", torch.cuda.get_device_name(index), index, total, free, reason)


def _visible() -> str:
    """The usual reason for a card that is in the machine and not here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f" (CUDA_VISIBLE_DEVICES is '{visible}')" if visible is not None else ""


def _cpu(reason: str) -> DeviceChoice:
    total, free = _host_memory()
    return DeviceChoice("cpu", "cpu", None, total, free, reason)


def _host_memory(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(total, available) bytes of main memory, within the limit of the container where there is one."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    if proc.is_file():  # Linux; elsewhere nothing better is known than the total
        fields = dict(line.split(":", 1) for line in proc.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            free = int(fields["MemAvailable"].split()[0]) * 1024
    # A container's limit: cgroup 2, then 1. File pages that can be dropped count as used there, but not here.
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            cap, now = (cgroup / limit).read_text().strip(), int((cgroup / used).read_text())
            lines = dict(line.split() for line in (cgroup / stat).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if cap.isdigit() and int(cap) < total:
            droppable = int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))
            total = int(cap)
            free = min(free, max(0, total - now + droppable))
    return total, free
