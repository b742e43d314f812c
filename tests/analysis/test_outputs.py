"""Where a page, an export and a catalog go: stdout, and what is there already and is no file."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("verb", ["html", "export-json"])
def test_a_hyphen_is_stdout(synthetic: Any, call: Callable[..., Any], tmp_path: Path, verb: str) -> None:
    chosen = ("--pair", "alpha") if verb == "export-json" else ("--entries", "alpha")
    kept = tmp_path / "kept"
    assert call(verb, synthetic.out, "-o", kept, *chosen).code == 0
    with chdir(tmp_path):
        done = call(verb, synthetic.out, "-o", "-", *chosen)
    assert done.code == 0
    made = re.compile(r'"made":"[^"]*"')
    assert made.sub("", done.out) == made.sub("", kept.read_text(encoding="utf-8"))
    assert "to stdout" in done.err
    assert list(tmp_path.iterdir()) == [kept], "no file of that name"


@pytest.mark.parametrize("verb", ["html", "export-json"])
def test_what_is_written_into_a_pipe_leaves_it_one(
    synthetic: Any, call: Callable[..., Any], tmp_path: Path, verb: str
) -> None:
    """As root, who may, /dev/null became a file: all that was thrown away on that machine filled its memory from then on."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    chosen = ("--pair", "alpha") if verb == "export-json" else ("--entries", "alpha")
    assert call(verb, synthetic.out, "-o", pipe, *chosen).code == 0
    reader.join(10)
    assert pipe.is_fifo()
    assert len(read[0]) > 1000


def test_a_catalog_is_not_put_in_the_place_of_a_device(
    synthetic: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in ("-", tmp_path / "pipe"):
        with chdir(tmp_path):
            done = call("catalog", synthetic.out, "-o", place)
        assert done.code == 2
        assert "needs a file of its own" in done.err
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]
