"""The page that the tests of it share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthetic import PASSES, alpha, beta, make_capture, write_capture

from analysis import open_run
from analysis.html_page import write_page

EVIL = "</script><script>window.hacked = 1</script>"
TOKENS = ["<s>", EVIL, ' "it\'s"', "<!--", "<img src=x onerror=window.hacked=1>", "\n", " &amp;", " end"]


@dataclass(frozen=True)
class Made:
    """Where it is, and the run that it shows."""

    address: str
    con: Any


def make_page(folder: Path) -> Made:
    """Three pairs, in one of them a prompt of markup and one of 120 tokens."""
    out = folder / "out"
    write_capture(out, alpha())
    write_capture(out, beta())
    tokens = {(0, "identity"): TOKENS, (1, "identity"): [f" w{i}" for i in range(120)]}
    path = write_capture(out, make_capture("it's", "feedfeedfeedfeed", PASSES, 3, tokens, {-1, 0, 1, 2, 3}, 5))
    said = json.loads((path / "capture.json").read_text())
    (path / "capture.json").write_text(json.dumps(said | {"lens": {"norm": "final", "layers": [-1, 0, 1, 2, 3]}}))
    con = open_run(str(out))
    done = write_page(con, folder / "page.html")
    return Made(f"file://{done.path}", con)
