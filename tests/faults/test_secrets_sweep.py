"""A sweep through a Ray of its own, with secrets in its environment and its config: they are in nothing that it leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from secrets_search import Planted

ROOT = Path(__file__).parents[2]
IN_CONFIG = "token of the config"


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """For Ray's session: a short name, since the sockets in it may have 107 characters."""
    made = Path(tempfile.mkdtemp(prefix="ps-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.mark.slow
def test_no_secret_is_left_by_a_sweep_whether_its_entries_work_or_not(
    entry: Any, ray_folder: Path, tmp_path: Path
) -> None:
    planted = Planted()
    planted.add(IN_CONFIG, "planted-in-the-config-0123456789")
    token = {"token": planted.environment[IN_CONFIG]}
    pair = {"base_model": entry.base_model, "sft_model": entry.sft_model, "tokenizer": entry.tokenizer}
    pair |= {"model_kwargs": token, "tokenizer_kwargs": token}
    broken = shutil.copytree(entry.sft_model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"cut")
    sweep = [
        {"name": "works"} | pair,
        {"name": "cut"} | pair | {"sft_model": str(broken)},
        {"name": "elsewhere"} | pair | {"sft_model": "org/not-here"},  # a worker asks the hub for it, offline
    ]
    config = {"prompts": list(entry.prompts[:2]), "device": "cpu", "model_sweep": sweep}
    (tmp_path / "c.yaml").write_text(json.dumps({"residual_compare": config}))
    out = tmp_path / "out"
    environment = os.environ | planted.environment | {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local", "RAY_AUTH_MODE": "token",
        "RAY_TMPDIR": str(ray_folder), "PYTHONPATH": str(ROOT), "PAIRSCOPE_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    with planted.watched() as seen:
        done = subprocess.run(
            [sys.executable, "-m", "pairscope", "sweep", str(tmp_path / "c.yaml"), "--out", str(out)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=tmp_path, timeout=400,
        )  # fmt: skip
    rows = [json.loads(p.read_text()) for p in out.glob("manifest/*.json")]
    states = {row["entry"]: row["state"] for row in rows}
    assert states == {"works": "complete", "cut": "failed", "elsewhere": "failed"}, done.stdout
    assert list(ray_folder.glob("ray/session_*/logs/gcs_server.out")), "Ray's logs are there to be searched"
    assert planted.found([out, ray_folder, tmp_path / "home"], {"what was printed": done.stdout}) == []
    assert seen == []
    # ... which says something only if a log with a secret in it would have been found
    for log in (out / rows[0]["log"], next(ray_folder.glob("ray/session_[0-9]*/logs/raylet.out"))):
        with log.open("a") as stream:
            stream.write(f"retrying with {planted.environment['HF_TOKEN']}\n")
        assert planted.found([out, ray_folder]) == [f"HF_TOKEN in {log}"]
        log.unlink()
