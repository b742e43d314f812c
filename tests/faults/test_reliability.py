"""docs/reliability.md is what the suite saw: every fault of the catalog, each shown by a test that exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

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


def test_every_fault_is_shown_by_a_test_that_exists() -> None:
    told = json.loads(reliability.JSON.read_text(encoding="utf-8"))["faults"]
    for key, row in told.items():
        file, _, name = row["test"].partition("::")
        name = name.rpartition("::")[2]
        assert re.search(rf"def {name}\b", (ROOT / file).read_text(encoding="utf-8")), (key, row["test"])
    texts = [p.read_text(encoding="utf-8") for p in HERE.glob("test_*.py")]
    for key, known in FAULTS.items():
        told_here = any(f'"{key}"' in text for text in texts) or key.partition("-")[0] in ("kill", "table", "span")
        assert bool(known.shown_by) or told_here, key
