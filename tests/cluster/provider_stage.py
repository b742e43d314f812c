"""The provider on a laptop and on a head, against a fake Vast: what several test files start from."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_server import Fake

ROOT = Path(__file__).parents[2]
HEAD_TAGS = {"ray-node-type": "head", "ray-user-node-type": "rtx4090", "ray-launch-config": "h" * 52, "ray-node-name": "n", "ray-node-status": "uninitialized"}  # fmt: skip
WORKER_TAGS = HEAD_TAGS | {"ray-node-type": "worker", "ray-launch-request": "5f0b1b9e-0000-4000-8000-000000000000"}


@contextmanager
def laptop_home(server: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A laptop with a key that may do all; nothing is rented and no key is left when this ends."""
    from cluster.vast import before_up

    server.control("faults", [])
    # no test here sets a machine up
    monkeypatch.setattr(before_up, "PROGRAMS", tuple(filter(shutil.which, before_up.PROGRAMS)))
    monkeypatch.setenv("PAIRSCOPE_HOME", str(folder / "laptop"))
    monkeypatch.setenv("VAST_API_KEY", "full-rights")
    monkeypatch.setenv("VAST_URL", server.url)
    monkeypatch.delenv("VAST_HEAD_API_KEY", raising=False)
    yield server
    server.control("faults", [])
    for line in server.live():
        server.control(f"vanish/{line['id']}")
    server.control("forget_keys")


def config(**provider: Any) -> dict[str, Any]:
    """ray_cluster.yaml as `ray up` has it after filling in its own defaults."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    content["provider"] |= {"poll_seconds": 0.01} | provider
    return content


def on_laptop(content: dict[str, Any] | None = None) -> Any:
    from cluster.vast.provider import VastNodeProvider

    boot = VastNodeProvider.bootstrap_config(content or config())
    return VastNodeProvider(boot["provider"], boot["cluster_name"])


def on_head(laptop: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from cluster.vast.provider import VastNodeProvider

    content = VastNodeProvider.bootstrap_config(config())
    content = laptop.prepare_for_head_node(copy.deepcopy(content))
    monkeypatch.setenv("PAIRSCOPE_HOME", str(home))
    return VastNodeProvider(content["provider"], content["cluster_name"])


def node_config() -> dict[str, Any]:
    return dict(config()["available_node_types"]["rtx4090"]["node_config"])


def ray_up(monkeypatch: pytest.MonkeyPatch, content: dict[str, Any] | None = None) -> tuple[Any, list[str]]:
    """As far as `ray up` comes before it asks: the provider, and what it has shown."""
    from cluster.vast import before_up

    monkeypatch.setattr(before_up, "ray_command", lambda: "up")
    shown: list[str] = []
    monkeypatch.setattr(before_up.cli_logger, "print", lambda text, *a, **_: shown.append(text.format(*a)))
    laptop = on_laptop(content)
    laptop.non_terminated_nodes({"ray-node-type": "head"})
    return laptop, shown
