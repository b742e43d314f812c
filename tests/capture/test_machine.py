"""What is read out of nvidia-smi."""

from __future__ import annotations

from pathlib import Path

import pytest

from capture.machine import gpu_lines, gpus

SMI = """#!/bin/sh
case "$1" in
  *compute-apps*) printf 'GPU-b, 4711, 1024\\n' ;;
  *) printf '0, NVIDIA L4, GPU-a, 23034, 23000\\n1, NVIDIA L4, GPU-b, 23034, 22000\\nnonsense\\n' ;;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "nvidia-smi"
    script.write_text(SMI)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return script


def test_gpus_are_read_and_broken_rows_left_out(smi: Path) -> None:
    first, second = gpus()
    assert (first.index, first.name, first.total_bytes) == (0, "NVIDIA L4", 23034 << 20)
    assert second.free_bytes == 22000 << 20


def test_processes_that_hold_memory_are_named_beside_their_gpu(smi: Path) -> None:
    assert gpu_lines() == [
        "GPU 0: NVIDIA L4, 22.5 GiB, 22.5 GiB free",
        "GPU 1: NVIDIA L4, 22.5 GiB, 21.5 GiB free (pid 4711 holds 1024 MiB)",
    ]


def test_a_driver_that_does_not_answer_means_no_gpus(smi: Path) -> None:
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert gpus() == []
    assert gpu_lines() == []
