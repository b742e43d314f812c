"""One local Ray for all tests of this folder that need one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
