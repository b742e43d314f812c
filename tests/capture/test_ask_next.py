"""The commands under `next:`: each has an answer for what was captured."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from capture.ask_next import commands
from capture.config import load_config


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({}, ["report OUT", "grid OUT --metric kl_divergence", "avg(kl_divergence) AS kl FROM pairwise WHERE comparison = 'BB-SS'"]),
        ({"lens": {"enabled": False}}, ["report OUT", "grid OUT --metric norm_diff", "avg(norm_diff) AS norm_diff FROM pairwise"]),
        ({"multi_pass": {"runs": ["BB"]}}, ["report OUT --record-type runs", "grid OUT --run BB", "FROM runs WHERE run = 'BB'"]),
        ({"multi_pass": {"runs": ["BS", "SB"]}}, ["report OUT", "grid OUT --metric kl_divergence", "comparison = 'BS-SB'"]),
    ],
)  # fmt: skip
def test_what_is_shown_next_fits_the_entry(tmp_path: Path, block: dict[str, Any], says: list[str]) -> None:
    (tmp_path / "model").mkdir()
    pair = {"name": "a", "base_model": "./model", "sft_model": "./model"}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"residual_compare": {"prompts": ["one"], "model_sweep": [pair]} | block}))
    config = load_config(str(path))
    lines = commands("OUT", [config.entry("a")])
    assert lines[:2] == [f"pairscope {says[0]}", f"pairscope {says[1]}"]
    assert says[2] in lines[2]
    assert "SELECT pair, layer" in lines[2]


def test_without_knowing_the_entries_the_usual_is_shown() -> None:
    assert "WHERE comparison = 'BB-SS'" in commands("OUT", [])[2]


@pytest.mark.parametrize("out", ["my results/it's", "s3://bucket/prod?endpoint_override=host:9000&scheme=http"])
def test_what_is_shown_can_be_pasted_into_a_shell(out: str) -> None:
    for line in commands(out, []):
        words = subprocess.run(
            ["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, text=True
        ).stdout
        assert words.split("\0")[2] == out
