"""The verb `plan`, as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from capture.config import load_config
from cluster.plan_cli import plan
from cluster.plan_make import make_plan

ROOT = Path(__file__).resolve().parents[2]
TABLE = str(ROOT / "configs/hardware_table.yaml")


def typed(*words, code=0):
    result = CliRunner().invoke(plan, list(words))
    assert result.exit_code == code, result.output + result.stderr
    return result


def test_the_whole_table_needs_no_network_and_loads_nothing_heavy():
    script = (
        "import sys; from cluster.plan_cli import plan\n"
        f"plan.main([{TABLE!r}], standalone_mode=False)\n"
        "print([m for m in ('torch', 'transformers', 'ray', 'vastai', 'huggingface_hub') if m in sys.modules])"
    )
    # a proxy that is not there: a request, if any were made, would fail
    env = os.environ | {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    assert done.stdout.strip().endswith("[]")
    assert "nemotron-340b" in done.stdout


def test_lines_fit_a_hundred_columns():
    lines = typed(TABLE, "--prompts", "4", "--tokens", "100").output.splitlines()
    assert max(map(len, lines)) <= 100
    assert (
        sum(line.startswith(("qwen", "llama", "deepseek", "mistral", "minitron", "nemotron")) for line in lines) >= 18
    )


@pytest.mark.parametrize("width", [80, 60, 40])
def test_no_number_is_cut_on_a_narrow_terminal(monkeypatch, width):
    """On one of 80 columns $9.79 was 9, and 19.1 min were 19.1 mi."""
    monkeypatch.setattr("cluster.plan_text.WIDTH", width)
    lines = typed(TABLE, "--offline", "--verbose").output.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("GB: download of both"))
    (dear,) = [i for i, line in enumerate(lines[:first]) if "1,623.4" in line]
    assert all(number in lines[dear].split() for number in ("1,623.4", "7.0/10.9", "3.8", "9.79"))
    assert max(map(len, lines[:first])) <= max(width, 60)
    told = [line for line in lines if line.startswith("without layer, bound by")]
    assert len(told) == 1
    assert any("64.55" in line and "666.2" in line for line in lines[first:]), "of an entry in detail"


def test_json_gives_every_entry_and_every_number_of_machines():
    rows = [json.loads(line) for line in typed(TABLE, "--json", "--nodes", "3").output.splitlines()]
    assert [r["row"] for r in rows] == ["entry"] * 18 + ["sweep"] * 3 + ["assumptions"]
    first = rows[0]
    assert first["recommended"]["runs"]
    assert first["needs"]["resident"] > first["needs"]["streamed"]
    assert rows[18]["makespan_hours"] > rows[20]["makespan_hours"]


def test_one_entry_is_shown_in_detail():
    text = typed(TABLE, "--entries", "llama-3.1-405b", "--offline").output
    assert "405,853,388,800 parameters" in text
    assert "one-at-a-time" in text
    assert "sub-layer on RTX 3060 12G" in text


def test_an_entry_that_cannot_be_planned_is_named_and_the_others_go_on(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "residual_compare:\n  prompts: [hello]\n  model_sweep:\n"
        "    - {name: unknown, base_model: no/such, sft_model: no/such2}\n"
        "    - {name: nemo, base_model: nvidia/Mistral-NeMo-12B-Base, sft_model: nvidia/Mistral-NeMo-12B-Instruct}\n"
        "    - {name: unequal, base_model: Qwen/Qwen2.5-7B, sft_model: Qwen/Qwen2.5-14B}\n"
        "    - {name: fine, base_model: Qwen/Qwen2.5-7B, sft_model: Qwen/Qwen2.5-7B-Instruct}\n"
    )
    result = typed(str(config), "--offline", code=1)
    assert "fine" in result.stdout
    for said in ("unknown cannot be planned", "mistralai/Mistral-Nemo-Base-2407", "differ in n_layers: 28 against 48"):
        assert said in result.stderr


def test_wrong_names_are_refused():
    from capture.errors import ConfigError

    result = CliRunner().invoke(plan, [TABLE, "--entries", "qwen-7"])
    assert isinstance(result.exception, ConfigError)
    assert "the nearest is" in str(result.exception) or "did you mean" in str(result.exception).lower()
    result = CliRunner().invoke(plan, [TABLE, "--offers", "nowhere.json"])
    assert isinstance(result.exception, ConfigError)


def test_saved_offers_are_what_is_chosen_from(tmp_path):
    offer = {"id": 99, "gpu_name": "RTX 3090", "num_gpus": 1, "gpu_ram": 24576, "dph_total": 0.2, "inet_down": 8000,
             "inet_down_cost": 0.0, "disk_space": 300, "compute_cap": 860}  # fmt: skip
    file = tmp_path / "offers.json"
    file.write_text(json.dumps([offer]))
    text = typed(TABLE, "--offers", str(file), "--entries", "qwen-7b").output
    assert "(offer 99)" in text


def test_all_numbers_of_a_file_of_prices_are_planned_with(tmp_path):
    text = (ROOT / "configs" / "prices.yaml").read_text()
    assert "boot_minutes: 5 " in text
    (tmp_path / "p.yaml").write_text(text.replace("boot_minutes: 5 ", "boot_minutes: 65 "))
    config, file = load_config(TABLE), str(tmp_path / "p.yaml")
    usual, slow = (make_plan(config, ["qwen-7b"], offers=offers, offline=True) for offers in (None, file))
    assert slow.sweeps[0].makespan - usual.sweeps[0].makespan == pytest.approx(1.0)
    assert any("65 minutes until a machine is up" in " ".join(line.split()) for line in slow.assumptions)


def test_the_overview_the_detail_and_json_name_one_download():
    said = typed(TABLE, "--entries", "deepseek-v3").output
    assert next(line for line in said.splitlines() if line.startswith("deepseek-v3 ")).split()[1] == "1,377.1"
    assert "download 1,377.1 GB of both" in said
    assert "1,346" not in said
    row = json.loads(typed(TABLE, "--entries", "deepseek-v3", "--json").output.splitlines()[0])
    assert round(row["download_gb"], 1) == 1377.1


def test_a_mode_that_cannot_be_shared_is_refused_with_both_keys(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "residual_compare:\n  prompts: [hello]\n  mode: sub-layer\n  model_sweep:\n"
        "    - {name: split, base_model: Qwen/Qwen2.5-7B, sft_model: Qwen/Qwen2.5-7B-Instruct, tensor_parallel: 2}\n"
    )
    said = typed(str(config), "--offline", code=1).stderr
    assert "c.yaml: residual_compare.model_sweep[0]: mode: sub-layer and tensor_parallel: 2 exclude each other" in said


def test_stars_are_explained_on_the_page_only_where_a_row_has_one():
    from types import SimpleNamespace

    from cluster.plan_page import _star
    from cluster.plan_text import PLANNED

    runs, planned = SimpleNamespace(runs=True), SimpleNamespace(runs=False)
    assert _star([runs, runs]) == ""
    assert PLANNED in _star([runs, planned])
    page = (ROOT / "docs/hardware.md").read_text(encoding="utf-8")  # tests/test_docs.py compares it with the plan
    assert " \\* |" not in page  # no row has one
    assert "star" not in page
    assert PLANNED not in page
