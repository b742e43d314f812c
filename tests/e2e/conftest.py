"""Tests with real hosts: skipped, with the reason, where the machine does not allow them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import missing
from hosts_loopback import missing_loopback, user
from rehearsal import Rehearsal, rehearsal

REQUIRED = "PAIRSCOPE_REHEARSAL"  # set to `required` by .ci/run: there, not to rehearse at all is a failure


def _needs(lacks: str, *, one_is_enough: bool = False) -> None:
    """Skip, saying what is missing. one_is_enough: hosts of either kind would do, and there are none."""
    if one_is_enough and lacks and os.environ.get(REQUIRED) == "required":
        pytest.fail(lacks)
    pytest.importorskip("vastai", reason="the Vast SDK is not installed: pip install 'pairscope[vast]'")
    if lacks:
        pytest.skip(lacks)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Rehearsal]:
    """Hosts that are machines of their own, with one open port each."""
    _needs(missing())
    with rehearsal(tmp_path) as found:
        yield found


@pytest.fixture
def loopback_stage(tmp_path: Path) -> Iterator[Rehearsal]:
    """Hosts that share this machine's loopback."""
    _needs(missing_loopback())
    with rehearsal(tmp_path, "loopback", user()) as found:
        yield found


@pytest.fixture
def any_stage(tmp_path: Path) -> Iterator[Rehearsal]:
    """The former where the machine allows them, else the latter."""
    apart = missing()
    _needs(f"{apart}; {missing_loopback()}" if apart and missing_loopback() else "", one_is_enough=True)
    with rehearsal(tmp_path, *(["loopback", user()] if apart else [])) as found:
        yield found
