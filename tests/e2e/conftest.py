"""Tests with real hosts: skipped, with the reason, where the machine does not allow them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import missing
from rehearsal import Rehearsal, rehearsal


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Rehearsal]:
    pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")
    lacks = missing()
    if lacks:
        pytest.skip(lacks)
    with rehearsal(tmp_path) as found:
        yield found
