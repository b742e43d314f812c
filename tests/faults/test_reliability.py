"""docs/reliability.md is what the suite saw: every fault of the catalog, each shown by a test that exists."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import reliability
from catalog import FAULTS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_every_fault_of_the_suite_is_in_the_page() -> None:
    told = json.loads(reliability.JSON.read_text(encoding="utf-8"))["faults"]
    assert set(told) <= set(FAULTS)
    text = reliability.PAGE.read_text(encoding="utf-8")
    for key, known in FAULTS.items():
        assert f"| {known.where} | {known.what} |" in text, key


def test_the_page_is_up_to_date() -> None:
    assert reliability.PAGE.read_text(encoding="utf-8") == reliability.reliability_page(), "run: make reliability"


def exists(test: str) -> bool:
    file, _, name = test.partition("::")
    return bool(re.search(rf"def {name.rpartition('::')[2]}\b", (ROOT / file).read_text(encoding="utf-8")))


def test_every_fault_is_shown_by_a_test_that_exists() -> None:
    told = json.loads(reliability.JSON.read_text(encoding="utf-8"))["faults"]
    assert [key for key, row in told.items() if not exists(row["test"])] == []
    texts = [p.read_text(encoding="utf-8") for p in HERE.glob("test_*.py")]
    for key, known in FAULTS.items():
        told_here = any(f'"{key}"' in text for text in texts) or key.partition("-")[0] in ("kill", "table", "span")
        assert known.shown_by or told_here, key
        assert all(map(exists, known.shown_by)), key


def test_a_fault_of_a_test_elsewhere_is_recorded_when_it_passes_and_taken_back_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_shown.py").write_text("import os\ndef test_it():\n    assert 'FAIL' not in os.environ\n")
    plugin = (
        "import catalog; catalog.FAULTS = {'x': catalog.Known('a', 'b', 'c', ('test_shown.py::test_it',), 'seen')}\n"
    )
    (tmp_path / "only.py").write_text(plugin + "from recorder import *\n")
    record = tmp_path / "record"
    environment = os.environ | {"PAIRSCOPE_RELIABILITY": str(record), "PYTHONPATH": f"{tmp_path}:{HERE}"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    ask = [sys.executable, "-m", "pytest", "-q", "-p", "only", "-p", "no:cacheprovider", "test_shown.py"]
    for more, codes in (({}, 0), ({"FAIL": "1"}, 1)):
        assert subprocess.run(ask, cwd=tmp_path, env=environment | more, capture_output=True).returncode == codes
        assert [p.name for p in record.glob("*")] == ([] if more else ["x.json"])
