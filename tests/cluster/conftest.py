"""One local Ray for all tests of this folder that need one, a fake Vast of a module's own with a laptop that uses it, and a head
to collect from."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from far import Far

import cluster.collect_follow
from cluster.connect import START_TRIES, TOO_SLOW


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A small Ray with a made-up pair of GPUs, so that requests for GPUs can be placed."""
    import ray

    here = str(Path(__file__).parent)  # workers get the environment of this process, and find fake_work in it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", here, prepend=os.pathsep)
        start(ray)
    yield
    ray.shutdown()


def start(ray: Any) -> None:
    for left in reversed(range(START_TRIES)):
        try:
            ray.init(
                address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False,
                logging_level=logging.ERROR, object_store_memory=100 * 1024**2,
            )  # fmt: skip
            return
        except Exception as error:
            ray.shutdown()
            if TOO_SLOW not in str(error) or not left:
                raise


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A fake Vast whose machines boot at once."""
    from fake_server import running_fake

    with running_fake("--boot", "0.05,0.05") as fake:
        yield fake


@pytest.fixture
def fake(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The same, with nothing rented, and a home folder whose key it knows."""
    from provider_stage import laptop_home

    with laptop_home(server, tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def far(tmp_path: Path) -> Far:
    return Far(tmp_path / "far")


@pytest.fixture
def near(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the head answers and sends comes at once."""
    far.near(monkeypatch)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is out of reach is asked again at once."""
    monkeypatch.setattr(cluster.collect_follow, "FIRST_PAUSE_S", 0.01)
