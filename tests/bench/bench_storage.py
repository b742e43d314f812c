"""Bytes of a capture's tables against the same content as JSON, and what other encodings would make of them.

    python tests/bench/bench_storage.py [--config configs/demo_smollm2.yaml] [--pair smollm2-docstrings]

Without --config both demonstration pairs are measured, the SmolLM2 pair where `make demo-smollm2` has made it. JSON is what
`pairscope export-json` writes, indented by two as the earlier program writes it. Bytes are the same in every run; the seconds
that an encoding takes are of this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measured import ROOT, Bench

BAR = 1 / 20
PAIRS = {"smollm2": ("configs/demo_smollm2.yaml", "smollm2-docstrings"), "pydoc": ("configs/demo.yaml", "pydoc")}
LISTS = ("runs_topk", "pairwise_topk")


def captured(config: Path, pair: str, out: Path) -> Path:
    """The directory of a capture of one entry of a config."""
    from capture.config import load_config
    from capture.run import capture_pair

    return Path(capture_pair(load_config(config).entry(pair), str(out)).path)


def json_bytes(out: Path, pair: str, capture: str) -> tuple[int, int]:
    """Bytes of the capture as JSON: as `export-json` writes it, and indented by two."""
    from analysis.json_export import export_json
    from analysis.opened import open_run

    file = out / "exported.json"
    export_json(open_run(str(out)), pair, capture, file)
    indented = len(json.dumps(json.loads(file.read_text()), indent=2))
    return file.stat().st_size, indented


def encodings(table: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Ways to write one table: name -> (the table as written, options of Parquet's writer)."""
    import numpy as np
    import pyarrow as pa

    from capture.tables import round_to_half

    def leaf(field: Any) -> str:
        return f"{field.name}.list.element" if pa.types.is_list(field.type) else str(field.name)

    def inner(field: Any) -> Any:
        return field.type.value_type if pa.types.is_list(field.type) else field.type

    floats = [leaf(f) for f in table.schema if pa.types.is_floating(inner(f))]
    ids = [leaf(f) for f in table.schema if pa.types.is_list(f.type) and pa.types.is_integer(inner(f))]
    others = [leaf(f) for f in table.schema if leaf(f) not in floats]

    def options(level: int = 3, values: str = "BYTE_STREAM_SPLIT", of_ids: str = "BYTE_STREAM_SPLIT") -> dict[str, Any]:
        dictionary = [n for n in others if of_ids == "dictionary" or n not in ids] + (
            floats if values == "dictionary" else []
        )
        encoding = {n: values for n in floats if values != "dictionary"}
        encoding |= {n: of_ids for n in ids if of_ids != "dictionary"}
        return {
            "compression": "zstd",
            "compression_level": level,
            "use_dictionary": dictionary,
            "column_encoding": encoding,
        }

    found = {"as written: zstd 3, bytes of floats and ids apart": (table, options())}
    found |= {f"zstd {level}": (table, options(level)) for level in (1, 6, 9, 19)}
    found |= {f"floats {v}": (table, options(values=v)) for v in ("PLAIN", "dictionary")}
    if ids:
        found |= {f"ids {e}": (table, options(of_ids=e)) for e in ("PLAIN", "dictionary", "DELTA_BINARY_PACKED")}
        half, rounded, by_id, lists = table, table, table, [f.name for f in table.schema if pa.types.is_list(f.type)]
        for of_ids, of_values in zip(lists[::2], lists[1::2], strict=True):
            columns = {name: table[name].combine_chunks() for name in (of_ids, of_values)}
            flat = {name: column.values.to_numpy().reshape(len(column), -1) for name, column in columns.items()}
            order = np.argsort(flat[of_ids], axis=1, kind="stable")
            offsets = columns[of_ids].offsets
            for name in columns:
                sorted_ = pa.array(np.take_along_axis(flat[name], order, axis=1).reshape(-1))
                by_id = by_id.set_column(
                    by_id.schema.get_field_index(name), name, pa.ListArray.from_arrays(offsets, sorted_)
                )
            for of, array in ((half, flat[of_values].astype(np.float16)), (rounded, round_to_half(flat[of_values]))):
                column = pa.ListArray.from_arrays(offsets, pa.array(array.reshape(-1)))
                made = of.set_column(of.schema.get_field_index(of_values), of_values, column)
                half, rounded = (made, rounded) if of is half else (half, made)
        found["lists by rising id, ids DELTA_BINARY_PACKED"] = (by_id, options(of_ids="DELTA_BINARY_PACKED"))
        found["lists by rising id"] = (by_id, options())
        found["values in float16"] = (half, options())
        found["values rounded to float16, as topk_values: float16"] = (rounded, options())
    keys = [
        c
        for c in ("prompt_idx", "variant", "run", "base_run", "sft_run", "position", "layer")
        if c in table.schema.names
    ]
    codes = [table[c].combine_chunks() for c in keys]
    numbers = [(c.indices if pa.types.is_dictionary(c.type) else c).to_numpy() for c in codes]
    found["rows by position, then layer"] = (table.take(pa.array(np.lexsort(numbers[::-1]))), options())
    return found


def of_vocabulary(table: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Ways to write ids that rise and their texts, each of which is there once."""

    def options(ids: str, texts: str) -> dict[str, Any]:
        ways = {"token_id": ids, "token": texts}
        encoding = {column: way for column, way in ways.items() if way != "dictionary"}
        dictionary = [c for c in table.schema.names if c not in encoding]
        return {
            "compression": "zstd",
            "compression_level": 3,
            "use_dictionary": dictionary,
            "column_encoding": encoding,
        }

    return {
        "as written: ids by differences, texts by lengths": (
            table, options("DELTA_BINARY_PACKED", "DELTA_LENGTH_BYTE_ARRAY"),
        ),
        "vocabulary by dictionary": (table, options("dictionary", "dictionary")),
        "vocabulary PLAIN": (table, options("PLAIN", "PLAIN")),
        "ids by differences, texts by differences": (table, options("DELTA_BINARY_PACKED", "DELTA_BYTE_ARRAY")),
    }  # fmt: skip


def compare(directory: Path) -> dict[str, dict[str, tuple[int, float]]]:
    """Bytes and seconds of every encoding: table -> encoding -> (bytes, seconds)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: dict[str, dict[str, tuple[int, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for name in ("runs", "pairwise", *LISTS, "vocabulary"):
            files = sorted([*directory.glob(f"{name}.parquet"), *directory.glob(f"{name}-*.parquet")])
            if not files:
                continue
            table = pa.concat_tables([pq.read_table(f, partitioning=None) for f in files]).unify_dictionaries()
            for how, (content, options) in (of_vocabulary if name == "vocabulary" else encodings)(table).items():
                file = Path(folder) / "one.parquet"
                began = time.perf_counter()
                pq.write_table(content.combine_chunks(), file, row_group_size=200_000, **options)
                found.setdefault(name, {})[how] = (file.stat().st_size, time.perf_counter() - began)
    return found


def show(compared: Mapping[str, Mapping[str, tuple[int, float]]]) -> None:
    for table, ways in compared.items():
        now = next(iter(ways.values()))[0]
        print(f"\n{table}")
        for how, (nbytes, seconds) in ways.items():
            print(f"  {how:52} {nbytes:>10,} B  {nbytes / now:5.2f}  {1000 * seconds:7.0f} ms")


def measure(bench: Bench, name: str, config: Path, pair: str) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = Path(folder)
        directory = captured(config, pair, out)
        capture = directory.name.removeprefix("capture=")
        stored = sum(f.stat().st_size for f in directory.glob("*.parquet"))
        exported, indented = json_bytes(out, pair, capture)
        note = f"{stored:,} B of tables, which hold more than JSON does; {exported:,} B as export-json writes it"
        bar = BAR if name == "smollm2" else None
        bench.add(
            f"{name}-json", f"tables of {pair}", [stored / indented], over="JSON, indented by two", bar=bar, note=note
        )
        compared = compare(directory)
        show(compared)
        as_written = [sum(n) for n in zip(*(next(iter(ways.values())) for ways in compared.values()), strict=True)]
        for how in ("zstd 1", "zstd 9", "zstd 19", "floats PLAIN", "floats dictionary", "ids PLAIN", "ids DELTA_BINARY_PACKED",
                    "ids dictionary", "lists by rising id, ids DELTA_BINARY_PACKED", "lists by rising id",
                    "values in float16", "values rounded to float16, as topk_values: float16", "rows by position, then layer",
                    "vocabulary by dictionary"):  # fmt: skip
            chosen = [ways.get(how, next(iter(ways.values()))) for ways in compared.values()]
            total, seconds = (sum(numbers) for numbers in zip(*chosen, strict=True))
            note = f"{1000 * seconds:.0f} ms to write, against {1000 * as_written[1]:.0f}"
            bench.add(f"{name}-{how}", f"{pair}, {how}", [total / as_written[0]], over="as written", note=note)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a config of your own")
    parser.add_argument("--pair", help="its entry")
    parser.add_argument("--json", type=Path, help="where the figures go (default .cache/bench/storage.json)")
    args = parser.parse_args()
    if (args.config is None) != (args.pair is None):
        parser.error("--config and --pair belong together")
    if args.config is not None and not (ROOT / args.config).exists():
        parser.error(f"there is no {ROOT / args.config}")
    pairs = {args.pair: (args.config, args.pair)} if args.config else PAIRS
    bench = Bench("storage", "make bench")
    for name, (config, pair) in pairs.items():
        if name == "smollm2" and not (ROOT / ".cache" / "smollm2" / "sft").exists():
            print("the SmolLM2 pair is not there; `make demo-smollm2` makes it")
            continue
        measure(bench, name, ROOT / config, pair)
    return bench.write(args.json)


if __name__ == "__main__":
    sys.exit(main())
