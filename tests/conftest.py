"""For all tests: threads, no network, which come first; and what share of the lines they ran, where slipcover counts them."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

# read when torch and transformers are first imported, by whichever test that is
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask the network
# three workers on two cores, since much of a test is waiting: more threads make models this small five times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.path.exists("/dev/nvidiactl"):  # looked at when triton is imported, and by whatever library that is
    os.environ["TRITON_INTERPRET"] = "1"

LONG = {"e2e", "faults"}


def _keep_probes() -> None:
    """Let slipcover leave its probes in lines that were hit. To take some out of code that runs, it looks through all objects, and
    what the walk under test has let go meanwhile stays alive: seen by tests of memory as states of a layer too many."""
    with suppress(ImportError):  # not installed
        from slipcover import pytest_plugin

        if (one := pytest_plugin._slipcover_instance) is not None:
            assert hasattr(one, "d_miss_threshold"), (
                "another version of slipcover: see whether it still takes probes out"
            )
            one.d_miss_threshold = 2**31 - 1  # hits; there is no setting for xdist's workers


_keep_probes()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: a worker that begins one of them last leaves the others idle."""
    items.sort(key=lambda item: LONG.isdisjoint(Path(item.path).parts))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Slipcover has put together by now what its workers saw; below fail-under it ends `make test` with an error."""
    with suppress(OSError):
        found = json.loads(Path(os.environ.get("SLIPCOVER_COVERAGE_DIR", ""), "merged.json").read_text())["summary"]
        lines = found["covered_lines"] + found["missing_lines"]
        terminalreporter.write_line(
            f"{found['percent_covered']:.1f} % of {lines:,} lines of capture, cluster and analysis ran"
        )
