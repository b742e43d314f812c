"""The page of a large capture opens quickly: 20 prompts of 250 tokens, 34 layers, four passes, six comparisons.

Slow, and it needs Debian's chromium and chromium-driver. `pytest -s` shows the figures; `make bench-page` writes them as a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from measured import Bench

from analysis import open_run
from analysis.html_page import write_page
from capture.schema import SCHEMA_VERSION, arrow_schema

PROMPTS, TOKENS, LAYERS, K = 20, 250, 34, 10
PASSES = ("BB", "BS", "SB", "SS")
COMPARISONS = [f"{a}-{b}" for i, a in enumerate(PASSES) for b in PASSES[i + 1 :]]


def write_large(out: Path) -> None:
    """A capture of random numbers, which compress worse than real ones."""
    folder = out / "captures" / "pair=large" / "capture=1a2b3c4d5e6f7a8b"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    head = {"pair": "large", "capture": "1a2b3c4d5e6f7a8b", "variant": "identity"}
    files = []

    def write(table: str, columns: dict[str, Any], n: int) -> None:
        schema = arrow_schema(table)
        whole = {f.name: pa.array([head[f.name]] * n) if f.name in head else columns[f.name] for f in schema}
        arrays = [pa.array(whole[f.name]).cast(f.type) if not isinstance(whole[f.name], pa.Array) else whole[f.name].cast(f.type)
                  for f in schema]  # fmt: skip
        parquet.write_table(
            pa.Table.from_arrays(arrays, schema=schema), folder / f"{table}.parquet", row_group_size=100_000
        )
        data = (folder / f"{table}.parquet").read_bytes()
        files.append(
            {"name": f"{table}.parquet", "rows": n, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        )

    prompt, position = (a.reshape(-1) for a in np.mgrid[0:PROMPTS, 0:TOKENS])
    write("prompts", {"prompt_idx": np.arange(PROMPTS), "text": [f"prompt {i} " * 60 for i in range(PROMPTS)],
                      "n_tokens": np.full(PROMPTS, TOKENS), "n_tokens_before_trimming": np.full(PROMPTS, TOKENS)}, PROMPTS)  # fmt: skip
    write("tokens", {"prompt_idx": prompt, "position": position, "token_id": position, "token": [f" word{p}" for p in position],
                     "is_special": position == 0}, prompt.size)  # fmt: skip
    write("tracked_tokens", {"slot": [0], "token_id": [7], "token": ["yes"], "label": ["yes"]}, 1)
    for table, labels in (("runs", PASSES), ("pairwise", COMPARISONS)):
        p, label, layer, position = (
            a.reshape(-1) for a in np.mgrid[0:PROMPTS, 0 : len(labels), -1 : LAYERS - 1, 0:TOKENS]
        )
        n = p.size
        cell: dict[str, Any] = {"prompt_idx": p, "layer": layer, "position": position}
        for i, column in enumerate(("run",) if table == "runs" else ("base_run", "sft_run")):
            names = pa.array([text.split("-")[i] for text in labels])
            cell[column] = pa.DictionaryArray.from_arrays(pa.array(label.astype(np.int32)), names)
        numbers = {c.name: rng.lognormal(0, 2, n).astype(np.float32) for c in _floats(table)}
        if table == "runs":
            offsets = pa.array(np.arange(n + 1, dtype=np.int32))
            numbers["tracked_logits"] = pa.ListArray.from_arrays(offsets, rng.normal(size=n).astype(np.float32))
        else:
            numbers["top1_agree"] = rng.random(n) < 0.5
        write(table, cell | numbers, n)
        offsets = pa.array(np.arange(n + 1, dtype=np.int32) * K)

        def ids(offsets: Any = offsets, n: int = n) -> Any:
            skewed = (49152 * rng.random(n * K) ** 4).astype(np.int32)
            return pa.ListArray.from_arrays(offsets, skewed)

        def sizes(sign: int, offsets: Any = offsets, n: int = n) -> Any:
            falling = np.sort(rng.gamma(2.0, size=(n, K)).astype(np.float32), axis=1)[:, ::-1]
            return pa.ListArray.from_arrays(offsets, (sign * falling).reshape(-1))

        lists = ({"ids": ids(), "logits": sizes(1)} if table == "runs" else
                 {"increased_ids": ids(), "increased": sizes(1), "decreased_ids": ids(), "decreased": sizes(-1)})  # fmt: skip
        write(f"{table}_topk", cell | lists, n)
    (folder / "capture.json").write_text(json.dumps({"n_layers": LAYERS - 2, "models": {}}))
    marker = {"schema_version": SCHEMA_VERSION, "pair": "large", "capture": "1a2b3c4d5e6f7a8b", "files": files}
    (folder / "_COMPLETE").write_text(json.dumps(marker))


def _floats(table: str) -> list[Any]:
    from capture.schema import BY_NAME

    return [c for c in BY_NAME[table].columns if c.type == "float32"]


@pytest.mark.slow
def test_twenty_prompts_of_250_tokens_and_34_layers_open_in_two_seconds(tmp_path: Path, browser: Any) -> None:
    write_large(tmp_path / "out")
    con = open_run(str(tmp_path / "out"))
    bench = Bench("page", "make bench-page")
    for max_mb in (40.0, 200.0):
        start = time.perf_counter()
        made = write_page(con, tmp_path / "page.html", max_mb=max_mb)
        seconds = time.perf_counter() - start
        assert made.prompts == PROMPTS
        opened = []
        for _ in range(5):
            browser.get("about:blank")
            start = time.perf_counter()
            browser.get(f"file://{made.path}")  # returns when the whole file is read
            browser.wait_ready()
            opened.append(time.perf_counter() - start)
        drawn = int(browser.execute_script("return document.documentElement.dataset.first"))
        print(f"\n--max-mb {max_mb:g}: {made.bytes / 1e6:.1f} MB, lists of {made.lists} prompts, written in {seconds:.1f} s; grid "
              f"seen after {drawn} ms (last of 5), all read and drawn after {min(opened):.2f} to {max(opened):.2f} s")  # fmt: skip
        if max_mb == 40.0:
            what = f"page of {PROMPTS} prompts x {TOKENS} tokens x {LAYERS} layers ({made.bytes / 1e6:.1f} MB)"
            bench.add("first grid", f"{what}: first grid seen", [drawn / 1000], unit="s")
            bench.add("all", f"{what}: all read and drawn", opened, unit="s", bar=2.0)
            assert sorted(opened)[2] < 2
    if os.environ.get("PAIRSCOPE_BENCH"):
        bench.write()
