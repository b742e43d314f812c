"""ray_cluster.yaml as it lies in the repository: what it must offer, and that the rehearsal changes next to nothing of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_server import Fake

from cluster.mesh.ports import MOST_NODES
from cluster.vast.money import Caps
from cluster.vast.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def content() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))


def paths(value: Any, at: str = "") -> dict[str, Any]:
    """Every leaf by its place."""
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in paths(part, f"{at}/{name}").items()} or {at: {}}
    return {at: value}


def test_the_rehearsal_changes_names_image_and_cores_and_nothing_else(content: dict[str, Any], tmp_path: Path) -> None:
    from rehearsal import Rehearsal

    stage = Rehearsal(Fake("http://127.0.0.1:9"), tmp_path)
    stage.write_yaml()
    used = paths(yaml.safe_load(stage.yaml.read_text()))
    ours = paths(content)
    assert used.keys() == ours.keys()
    changed = {place for place in ours if ours[place] != used[place]}
    head = f"/available_node_types/{content['head_node_type']}"
    assert changed == {"/cluster_name", "/provider/offers/image", f"{head}/resources/CPU"}


@pytest.mark.parametrize(
    ("type_", "card", "gb"),
    [
        ("rtx4090", "RTX 4090", 24), ("a100-40", "A100 SXM4", 40), ("a100-80", "A100 PCIE", 80), ("rtx6000ada", "RTX 6000Ada", 48),
        ("h100", "H100 SXM", 80), ("h200", "H200", 140),
    ],
)  # fmt: skip
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_each_card_of_the_hardware_guide_can_be_had_by_1_2_4_and_8(
    content: dict[str, Any], type_: str, card: str, gb: int, n: int
) -> None:
    name = type_ if n == 1 else f"{type_}-x{n}"
    node_type = content["available_node_types"][name]
    wish = Settings.read(content["provider"]).wish(node_type["node_config"], name)
    assert (wish.num_gpus, wish.min_gpu_gb, wish.bid) == (n, gb, False)
    assert card in wish.gpus
    assert node_type["resources"]["GPU"] == n
    assert sum(r.startswith("accelerator_type:") for r in node_type["resources"]) == 1


def test_a_cluster_is_one_machine_until_more_is_asked_for(content: dict[str, Any]) -> None:
    types = content["available_node_types"]
    assert all(t.get("min_workers", 0) == 0 for t in types.values())
    assert {name for name, t in types.items() if t["max_workers"]} == {content["head_node_type"]}
    assert content["max_workers"] < MOST_NODES
    assert types[content["head_node_type"]]["max_workers"] == content["max_workers"]


def test_there_is_an_interruptible_type(content: dict[str, Any]) -> None:
    name = "rtx4090-spot"
    assert Settings.read(content["provider"]).wish(content["available_node_types"][name]["node_config"], name).bid


def test_it_has_limits_and_tokens_and_no_secret(content: dict[str, Any]) -> None:
    Caps.read(content["provider"])
    text = (ROOT / "ray_cluster.yaml").read_text()
    for commands in (content["head_start_ray_commands"], content["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]
        assert "RAY_health_check_failure_threshold=20" in commands[-1]
    for word in ("api_key:", "auth_token:", "HF_TOKEN=", "hf_"):
        assert word not in text


def test_a_worker_that_boots_is_given_up_by_its_boot_minutes_and_not_by_ray(content: dict[str, Any]) -> None:
    from ray.autoscaler.v2.instance_manager.config import InstanceReconcileConfig

    said = re.search(r"RECONCILE_ALLOCATE_STATUS_TIMEOUT_S=(\d+)", content["head_start_ray_commands"][-1])
    given_up_s = int(said[1]) if said else InstanceReconcileConfig().allocate_status_timeout_s
    assert given_up_s >= 50 * 60, "somebody may raise boot_minutes, and it would be rented again and again"


def test_every_mounted_file_is_there(content: dict[str, Any]) -> None:
    for local in content["file_mounts"].values():
        assert (ROOT / local).exists(), local
