"""A pytest plugin that keeps what tests saw of faults, for docs/reliability.md: `-p recorder`, PYTHONPATH=tests/faults.

A test of tests/faults tells by the fixture `told`; what a test elsewhere shows is said in the catalog (`shown_by`). The folder
that PAIRSCOPE_RELIABILITY names gets a file for every fault whose tests all passed. It is a plugin and no part of a conftest.py:
pytest asks a conftest.py about the tests below its own folder alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from catalog import FAULTS

FOLDER = "PAIRSCOPE_RELIABILITY"
_failed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if FOLDER not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:  # who runs the workers hears of all tests
        return
    if report.when != "call" and not report.failed:
        return
    for row in rows_of(report):
        file = Path(os.environ[FOLDER]) / f"{row['fault']}.json"
        if report.failed:
            _failed.add(row["fault"])
            file.unlink(missing_ok=True)
        elif report.passed and row["fault"] not in _failed:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(row))


def rows_of(report: pytest.TestReport) -> list[dict[str, Any]]:
    """What a test told, and what the catalog says that it shows."""
    test = report.nodeid.split("[")[0]
    told = [row for name, row in report.user_properties if name == "fault"]
    shown = [
        {"fault": key, "sees": known.sees, "seconds": None, "again": known.again}
        for key, known in FAULTS.items()
        if test in known.shown_by
    ]
    return [row | {"test": test} for row in (*told, *shown)]
