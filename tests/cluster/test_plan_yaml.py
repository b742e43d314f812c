"""The plan, ray_cluster.yaml and the playbook agree: every machine that is recommended can be rented as the file stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from capture.config import load_config
from cluster.plan import Plan
from cluster.plan_make import make_plan
from cluster.plan_yaml import _machines, cluster_lines

ROOT = Path(__file__).resolve().parents[2]
YAML = ROOT / "ray_cluster.yaml"


@pytest.fixture(scope="module")
def prod() -> Plan:
    return made("prod_config")


def made(name: str, **options: Any) -> Plan:
    return make_plan(load_config(str(ROOT / f"configs/{name}.yaml")), offline=True, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [("prod_config", {}), ("dev_config", {}), ("hardware_table", {}), ("hardware_table", {"gbit": 10.0})],
)
def test_each_recommended_machine_is_a_node_type(name: str, options: dict[str, Any]) -> None:
    plan = made(name, **options)
    lines = cluster_lines(plan, YAML)
    assert len(lines) == len(_machines(plan)) > 0
    assert not [line for line in lines if "is no node type" in line]


def test_the_disk_of_the_file_holds_the_production_sweep_and_the_playbook_says_how_much_that_is(prod: Plan) -> None:
    (line,) = cluster_lines(prod, YAML)
    assert line.startswith("RTX 3060 12G is node type rtx3060 of ")
    assert line.endswith("(to be its head_node_type, which is rtx4090); disk_gb 200 holds all of it")
    most = max(m.disk_gb for one in prod.sweeps for m in one.machines)
    assert f"{most:.0f} GB of disk" in (ROOT / "docs/playbook.md").read_text()
    assert f"({most:.0f} for prod_config)" in YAML.read_text()


def test_what_must_be_changed_is_said(prod: Plan, tmp_path: Path) -> None:
    content = yaml.safe_load(YAML.read_text())
    file = tmp_path / "ray_cluster.yaml"
    content["head_node_type"] = "rtx3060"
    content["provider"]["offers"]["disk_gb"] = 100
    file.write_text(yaml.safe_dump(content))
    assert cluster_lines(prod, file) == [
        f"RTX 3060 12G is node type rtx3060 of {file} (its head_node_type); set disk_gb: 150 there, it is 100"
    ]
    del content["available_node_types"]["rtx3060"]
    file.write_text(yaml.safe_dump(content))
    assert cluster_lines(prod, file) == [
        f"RTX 3060 12G is no node type of {file}: add one, or plan with the cards that are there"
    ]


def test_what_the_file_leaves_out_or_spells_otherwise_is_taken_as_it_is_rented(prod: Plan, tmp_path: Path) -> None:
    content = yaml.safe_load(YAML.read_text())
    file = tmp_path / "ray_cluster.yaml"
    del content["provider"]["offers"]["disk_gb"]
    types = content["available_node_types"]
    types["larger"] = {"node_config": {**types["rtx3060"]["node_config"], "gpus": "RTX 3060 Ti", "min_gpu_gb": 12.5}}
    types["rtx3060"]["node_config"]["gpus"] = ["RTX_3060"]
    file.write_text(yaml.safe_dump(content))
    (line,) = cluster_lines(prod, file)
    assert line.startswith("RTX 3060 12G is node type rtx3060 of ")
    assert line.endswith("; set disk_gb: 150 there, it is 100")


@pytest.mark.parametrize(
    "text", [None, "", "- a", "available_node_types: 5", "provider: [", "{provider: {}, head_node_type: 1}"]
)
def test_where_there_is_no_cluster_to_speak_of_nothing_is_said(prod: Plan, tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_text(text)
    assert cluster_lines(prod, file) == []


def test_the_larger_a100_is_the_type_that_asks_for_it() -> None:
    from cluster.offers import assumed_offers, prices
    from cluster.plan_yaml import node_type

    content = yaml.safe_load(YAML.read_text())
    types = {name: one["node_config"] for name, one in content["available_node_types"].items()}
    found = {(o.gpu, round(o.memory_mib / 1024), o.gpus): node_type(types, o) for o in assumed_offers(prices(), None)}
    assert found["A100 SXM4", 40, 1] == "a100-40"
    assert found["A100 SXM4", 80, 2] == "a100-80-x2"
    assert found["RTX 4090", 24, 1] == "rtx4090"
    assert found["Tesla T4", 15, 1] is None
