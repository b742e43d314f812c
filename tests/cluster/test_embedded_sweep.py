"""The embedded pair through real actors and the real engine, against the same capture made in this process."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from capture.cli import capture as capture_verb
from capture.layout import RunDir
from cluster.cli import sweep as sweep_verb

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo.yaml"


def checksums(out: Path, pair: str) -> dict[str, Any]:
    (found,) = [c for c in RunDir(str(out)).captures() if c.pair == pair]
    return {f["name"]: f["sha256"] for f in found.marker["files"] if f["name"] != "capture.json"}


@pytest.fixture(scope="module")
def swept(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both entries of the demonstration, one worker after the other: the pair comes second, in a process that was used."""
    out = tmp_path_factory.mktemp("swept")
    config = yaml.safe_load(DEMO.read_text().replace("configs/pairs", f"{ROOT}/configs/pairs"))
    config["residual_compare"]["model_sweep"].reverse()
    turned = out / "turned.yaml"
    turned.write_text(yaml.safe_dump(config, sort_keys=False))
    result = CliRunner().invoke(sweep_verb, [str(turned), "--out", str(out), "--jobs", "1", "--json"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {r["entry"]: r["state"] for r in rows} == {"pydoc": "complete", "pydoc-self": "complete"}
    assert all(r["n_tokens"] > 0 and r["mode"] == "resident" for r in rows)
    logs = [(out / r["log"]).read_text() for r in rows]
    assert len({re.search(r", pid (\d+),", log)[1] for log in logs}) == 1  # type: ignore[index]
    return out


def test_the_log_of_a_real_capture_names_its_device_and_mode(swept: Path) -> None:
    for row in RunDir(str(swept)).manifest_rows():
        log = (swept / row["log"]).read_text()
        assert "Device: cpu" in log
        assert "mode resident" in log


def test_a_second_sweep_has_nothing_left_to_do(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connected(cpus: int | None = None) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr("cluster.sweep.connected", connected)
    result = CliRunner().invoke(sweep_verb, [str(DEMO), "--out", str(swept)])
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, f"nothing left to do: 2 of 2 complete in {swept}")


def test_a_capture_without_ray_gives_the_same_bytes(swept: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # as one actor on two cores has; the order of sums depends on it
    try:
        result = CliRunner().invoke(capture_verb, [str(DEMO), "--pair", "pydoc", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert checksums(tmp_path, "pydoc") == checksums(swept, "pydoc")
