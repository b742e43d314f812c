"""What `ray job submit --working-dir .` sends: the code and the configs, and little else."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 4 << 20  # Ray stops at 100 MiB; every node gets a copy, and the head keeps one


@pytest.fixture(scope="module")
def upload(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The archive that Ray makes of a tree in which somebody has worked: with history, environment, outputs and caches."""
    from ray._private.runtime_env.packaging import create_package, get_uri_for_directory

    tree = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    for name in (
        ".git/objects/pack/pack", ".venv/lib/torch.so", "out/prod/captures/pair=a/capture=b/runs.parquet", ".cache/models/weights",
        "results/captures/pair=a/capture=b/runs.parquet", "run.duckdb", "capture/__pycache__/run.pyc", ".mypy_cache/x", ".ruff_cache/x",
    ):  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(os.urandom(1 << 20))
    target = tree.parent / "package.zip"
    create_package(str(tree), target, include_gitignore=True)
    assert get_uri_for_directory(str(tree), include_gitignore=True).startswith("gcs://")
    return zipfile.ZipFile(target)


def test_the_upload_is_small(upload: zipfile.ZipFile) -> None:
    assert Path(str(upload.filename)).stat().st_size < MOST_BYTES


def test_it_holds_what_a_sweep_needs_and_nothing_of_what_lies_around(upload: zipfile.ZipFile) -> None:
    names = set(upload.namelist())
    needed = ["pairscope.py", "capture/run.py", "cluster/sweep.py", "configs/prod_config.yaml", "configs/prompts/prod_prompts.txt",
              "configs/pairs/pydoc/base/model.safetensors", "pyproject.toml"]  # fmt: skip
    assert [n for n in needed if n not in names] == []
    around = (
        ".git/",
        ".venv/",
        "out/",
        ".cache/",
        "results/captures",
        "run.duckdb",
        "tests/",
        "docs/",
        ".mypy_cache",
        ".ruff_cache",
    )
    assert [n for n in names if n.startswith(around) or "__pycache__" in n] == []
