"""`ray up` itself, as typed: bad input ends in one line that says what to do, an exit code, and nothing rented."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_server import Fake, running_fake
from provider_stage import ROOT, config

pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    with running_fake("--boot", "0.05,0.05") as found:
        yield found


def ray_up(fake: Fake, folder: Path, change: dict[str, Any], **environment: str) -> subprocess.CompletedProcess[str]:
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(config(**change)))
    env = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(folder), "TMPDIR": str(folder), "VAST_URL": fake.url,
           "VAST_API_KEY": "full-rights", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **environment}  # fmt: skip
    return subprocess.run(
        ["ray", "up", "-y", str(file)],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=180,
    )


@pytest.mark.parametrize(
    ("change", "environment", "said"),
    [
        ({}, {"VAST_API_KEY": "made-up"}, "VastKeyError: list instances: Vast does not know this API key"),
        ({}, {"VAST_API_KEY": "no-new-keys"}, "VAST_HEAD_API_KEY"),
        ({"max_price_per_hour": 0.1}, {}, "CapError: 1x RTX 4090"),
    ],
)
def test_bad_input_is_one_line_and_rents_nothing(
    fake: Fake, tmp_path: Path, change: dict[str, Any], environment: dict[str, str], said: str
) -> None:
    done = ray_up(fake, tmp_path, change, **environment)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert fake.bill() == []
