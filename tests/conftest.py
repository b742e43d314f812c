"""What is read when torch and transformers are first imported, by whichever test that is; and which tests come first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask the network
# two workers on two cores: more threads make models this small five times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")

LONG = {"e2e", "faults"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: a worker that begins one of them last leaves the others idle."""
    items.sort(key=lambda item: LONG.isdisjoint(Path(item.path).parts))
