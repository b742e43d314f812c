"""What this machine has, found without torch: GPUs, memory, versions, logins, tools. Nothing here raises or shows a secret."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from capture.device import _host_memory as host_memory

GIB = 1024**3
MIB = 1024**2
COMPILERS = ("c++", "g++", "clang++")
MESH_SILENT_S = 15.0  # its daemon writes every three
SWITCH_SILENT_S = 120.0  # it looks every 20 s


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as the driver counts it (CUDA_VISIBLE_DEVICES is not applied). Memory in bytes."""

    index: int
    name: str
    uuid: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Check:
    """One line of `pairscope doctor`. `remedy` says what to do where `ok` is false."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def _nvidia_smi(*query: str) -> list[list[str]]:
    """Rows of an nvidia-smi query; none where there is no driver or it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        answer = subprocess.run(
            ["nvidia-smi", *query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs that the driver knows."""
    found = []
    for row in _nvidia_smi("--query-gpu=index,name,uuid,memory.total,memory.free"):
        with contextlib.suppress(ValueError):
            index, name, uuid, total, free = row
            found.append(Gpu(int(index), name, uuid, int(total) * MIB, int(free) * MIB))
    return found


def gpu_lines() -> list[str]:
    """A line per GPU with its memory and the processes that hold some of it; memory can stay taken after a worker died."""
    found = gpus()
    holders: dict[str, list[str]] = {}
    for row in _nvidia_smi("--query-compute-apps=gpu_uuid,pid,used_memory") if found else []:
        with contextlib.suppress(ValueError):
            uuid, pid, used = row
            holders.setdefault(uuid, []).append(f"pid {pid} holds {used} MiB")
    return [
        f"GPU {g.index}: {g.name}, {g.total_bytes / GIB:.1f} GiB, {g.free_bytes / GIB:.1f} GiB free"
        + (f" ({'; '.join(holders[g.uuid])})" if g.uuid in holders else "")
        for g in found
    ]


def checks() -> list[Check]:
    """Everything `pairscope doctor` shows, in order."""
    return [
        _python(),
        *_packages(),
        *_gpus(),
        _lens(),
        _memory(),
        _disk(),
        _hf_login(),
        _vast_key(),
        *_tools(),
        *_switch(),
        *_mesh(),
    ]


def _python() -> Check:
    return Check("python", sys.version_info >= (3, 11), platform.python_version(), "use Python 3.11 or newer")


def _packages() -> list[Check]:
    lines = []
    for package in ("torch", "transformers", "ray", "pyarrow", "duckdb"):
        try:
            lines.append(Check(package, True, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            lines.append(Check(package, False, "not installed", "pip install pairscope"))
    return lines


def _gpus() -> list[Check]:
    found = gpus()
    if not found:
        return [
            Check("GPU", False, "none seen by nvidia-smi", "small pairs run on the CPU; large ones need an NVIDIA GPU")
        ]
    lines = [
        Check(f"GPU {g.index}", True, f"{g.name}, {g.total_bytes / GIB:.1f} GiB, {g.free_bytes / GIB:.1f} GiB free")
        for g in found
    ]
    try:
        import torch

        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        built = f"torch built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch built without CUDA"
    except Exception as error:
        n, built = 0, f"torch does not import: {error}"
    remedy = "install the torch build that matches this driver, and check CUDA_VISIBLE_DEVICES"
    return [*lines, Check("torch and CUDA", n > 0, f"{built}, {n} of {len(found)} GPUs usable", remedy)]


def cxx() -> str | None:
    """The C++ compiler that the lens's kernel is built with: $CXX, or one of the usual ones; None where there is none."""
    return os.environ.get("CXX") or next((c for c in COMPILERS if shutil.which(c)), None)


def _lens() -> Check:
    """What the compiled lens needs: Triton on a GPU, else a compiler."""
    remedy = "captures do without, with the plain lens, which takes up to twice as long: "
    if gpus():
        there = importlib.util.find_spec("triton") is not None
        return Check(
            "lens kernels", there, f"triton {'is there' if there else 'not installed'}", remedy + "pip install triton"
        )
    compiler = cxx()
    where = shutil.which(compiler) if compiler else None
    return Check(
        "lens kernel", where is not None, where or f"{compiler or 'no C++ compiler'} not found", remedy + "install g++"
    )


def _memory() -> Check:
    total, available = host_memory()
    found = f"{total / GIB:.1f} GiB, {available / GIB:.1f} GiB available"
    return Check("memory", available > 2 * GIB, found, "free some: torch alone needs about 1 GiB a process")


def _disk() -> Check:
    usage = shutil.disk_usage(".")
    found = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} GiB in {os.getcwd()}"
    return Check("disk", usage.free > 5 * GIB, found, "free some: checkpoints and captures take gigabytes")


def _hf_login() -> Check:
    remedy = "only gated models need it: `hf auth login`, or set HF_TOKEN"
    try:
        from huggingface_hub import get_token

        present = get_token() is not None
    except Exception as error:
        return Check("Hugging Face login", False, f"unknown: {error}", remedy)
    return Check("Hugging Face login", present, "present" if present else "none", remedy)


def _vast_key() -> Check:
    """The vastai tools look in the environment first, then in these two files."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    files = [config / "vastai" / "vast_api_key", Path("~/.vast_api_key").expanduser()]
    present = bool(os.environ.get("VAST_API_KEY")) or any(f.is_file() and f.stat().st_size > 0 for f in files)
    remedy = "only renting needs it: `vastai set api-key KEY`, or set VAST_API_KEY"
    return Check("Vast key", present, "present" if present else "none", remedy)


def _tools() -> list[Check]:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    remedy = {
        "sshd": "only the rehearsal cluster needs it: install openssh-server",
        "ssh": "only rented clusters need it: install openssh-client",
        "rsync": "only rented clusters need it: install rsync",
    }
    lines = []
    for tool, what in remedy.items():
        where = shutil.which(tool, path=path)
        lines.append(Check(tool, where is not None, where or "not found", what))
    return lines


def _switch() -> list[Check]:
    """On a node of a rented cluster: whether the switch works that ends the machine at its limits."""
    folder = Path(os.environ.get("PAIRSCOPE_HOME") or Path.home() / ".pairscope")
    if not (folder / "mesh" / "node.json").exists():
        return []
    remedy = "this machine may not end by itself now: see at home that `ray down` or `pairscope vast destroy` ends it"
    try:
        silent = time.time() - (folder / "deadman.beat").stat().st_mtime
    except OSError:
        return [Check("dead-man's switch", False, "it does not run", remedy)]
    if silent > SWITCH_SILENT_S:
        return [Check("dead-man's switch", False, f"it has not looked for {silent:.0f} s", remedy)]
    return [Check("dead-man's switch", True, f"looked {max(silent, 0.0):.0f} s ago")]


def _mesh() -> list[Check]:
    """On a node of a rented cluster: each of its tunnels, from the file that the mesh's daemon writes every few seconds."""
    folder = Path(os.environ.get("PAIRSCOPE_HOME") or Path.home() / ".pairscope") / "mesh"
    if not (folder / "node.json").exists():
        return []
    remedy = "start it: cd ~/pairscope && python3 -m cluster.mesh up"
    try:
        found = json.loads((folder / "status.json").read_text())
        silent = time.time() - found["at"]
        lines = [
            Check(
                "mesh",
                True,
                f"node {found['k']} of a mesh with places for {found['slots']}, {len(found['tunnels'])} tunnels",
            )
        ]
        for t in found["tunnels"]:
            state = f"up for {t['seconds']:.0f} s" if t["alive"] else f"down: {t['last_error'] or 'ssh is trying'}"
            text = f"{t['to']}, {state}, started {t['starts']}x"
            lines.append(Check(f"tunnel to node {t['k']}", t["alive"], text, "it is tried again every two seconds"))
    except FileNotFoundError:
        return [Check("mesh", False, "its daemon is not running", remedy)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [Check("mesh", False, f"its state cannot be read: {error}", remedy)]
    if silent > MESH_SILENT_S:
        return [Check("mesh", False, f"its daemon has been silent for {silent:.0f} s", remedy)]
    return lines
