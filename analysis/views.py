"""The views of a run directory, declared as data: names, grain, columns with a line of doc each, and their SQL.

Stored tables come from capture.schema; here are the columns that are derived from them, and the views that need more
than one table (their SELECTs are the files in analysis/sql).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from capture.schema import (
    BASE_RUN,
    BY_NAME,
    CAPTURE,
    LAYER,
    MANIFEST,
    PAIR,
    POSITION,
    PROMPT,
    RUN,
    SFT_RUN,
    TABLES,
    VARIANT,
    Column,
)

SQL_DIR = Path(__file__).parent / "sql"

# the column types of capture.schema, and those that only views have, as DuckDB calls them
DUCKDB_TYPES = {
    "category": "VARCHAR",
    "string": "VARCHAR",
    "bool": "BOOLEAN",
    "int16": "SMALLINT",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "timestamp": "TIMESTAMP",
    "list<int32>": "INTEGER[]",
    "list<float32>": "FLOAT[]",
}


@dataclass(frozen=True)
class View:
    """One view: `columns` are all of them in order; `derived` names those that are not stored."""

    name: str
    grain: str
    doc: str
    columns: tuple[Column, ...]
    derived: frozenset[str] = frozenset()


COMPARISON = Column("comparison", "category", "base_run and sft_run with a hyphen between, such as BB-SS")

# stored table -> (column, SQL expression over the stored columns of the same row)
DERIVED: dict[str, tuple[tuple[Column, str], ...]] = {
    "runs": (
        (
            Column("cosine_prev", "float64", "cosine between this state and the one a layer before", "1", True),
            "1 - cosine_distance_prev::DOUBLE",
        ),
    ),
    "pairwise": (
        (COMPARISON, "base_run || '-' || sft_run"),
        (Column("cosine_sim", "float64", "1 - cosine_distance", "1"), "1 - cosine_distance::DOUBLE"),
        (
            Column("kl_div", "float32", "KL(sft_run || base_run), another name of kl_divergence", "nats", True),
            "kl_divergence",
        ),
    ),
}

STORED_DOC = {
    "prompts": "the texts",
    "tokens": "the tokens of each prompt",
    "vocabulary": "the texts of all token ids that occur, in prompts and in top-k lists",
    "tracked_tokens": "the tokens whose logits are kept for every cell",
    "runs": "what each pass says of each layer and token",
    "runs_topk": "the likeliest next tokens of the lens, as lists",
    "pairwise": "how two passes differ at each layer and token; stored and cheap columns only, so scans are quick",
    "pairwise_topk": "the tokens whose logits moved most between two passes, as lists",
    "spectrum": "how many dimensions the difference of two passes has at each layer, over all tokens; where asked for",
    "imported": "what an imported JSON file says beyond the other tables, so that export-json can give it back",
}

_CELL = (PAIR, CAPTURE, PROMPT, VARIANT)
_TOKEN = (
    Column("token_id", "int32", "id of the token"),
    Column("token", "string", "its text; null where the capture has none of this id", "", True),
)
_SLOT = (
    Column("slot", "int16", "place of the tracked token, from 0"),
    Column("token_id", "int32", "id of the tracked token"),
    Column("token", "string", "the tokenizer's own spelling of it"),
    Column("label", "string", "its name in interesting_token_map, else its spelling"),
)
_JOINED = (
    Column("norm_base", "float32", "norm of the base_run state", "residual", True),
    Column("norm_sft", "float32", "norm of the sft_run state", "residual", True),
    Column("norm_delta", "float64", "norm_base minus norm_sft", "residual", True),
    Column("norm_diff_relative", "float64", "norm_diff divided by norm_base; null where that is 0", "1", True),
    Column("entropy_base", "float32", "lens entropy of base_run", "nats", True),
    Column("entropy_sft", "float32", "lens entropy of sft_run", "nats", True),
    Column("entropy_delta", "float64", "entropy_base minus entropy_sft", "nats", True),
    Column("base_cosine_prev", "float64", "cosine_prev of base_run", "1", True),
    Column("base_norm_delta", "float32", "norm_delta of base_run", "residual", True),
    Column("sft_cosine_prev", "float64", "cosine_prev of sft_run", "1", True),
    Column("sft_norm_delta", "float32", "norm_delta of sft_run", "residual", True),
)


def _stored(name: str) -> View:
    table, derived = BY_NAME[name], tuple(column for column, _ in DERIVED.get(name, ()))
    return View(
        name,
        table.grain,
        STORED_DOC.get(name, "stored table"),
        table.all_columns + derived,
        frozenset(c.name for c in derived),
    )


STORED_VIEWS = tuple(_stored(table.name) for table in TABLES)
_PAIRWISE = next(v for v in STORED_VIEWS if v.name == "pairwise")

# In an order in which each may use those before it. The SELECT of each is analysis/sql/<name>.sql.
SQL_VIEWS = (
    View(
        "pairwise_full",
        _PAIRWISE.grain,
        "pairwise with what the two passes say on their own; it reads runs twice, so ask pairwise where that will do",
        _PAIRWISE.columns + _JOINED,
        _PAIRWISE.derived | {c.name for c in _JOINED},
    ),
    View(
        "tracked",
        "prompt, variant, run, layer, position, tracked token",
        "the lens logits of the tracked tokens",
        (*_CELL, RUN, LAYER, POSITION, *_SLOT, Column("logit", "float32", "its lens logit", "logit", True)),
    ),
    View(
        "tracked_pairwise",
        "prompt, variant, comparison, layer, position, tracked token",
        "the lens logits of the tracked tokens in both passes of a comparison",
        (
            *_CELL,
            BASE_RUN,
            SFT_RUN,
            COMPARISON,
            LAYER,
            POSITION,
            *_SLOT,
            Column("base", "float32", "logit in base_run", "logit", True),
            Column("sft", "float32", "logit in sft_run", "logit", True),
            Column("diff", "float64", "base minus sft", "logit", True),
        ),
    ),
    View(
        "topk",
        "prompt, variant, run, layer, position, rank",
        "runs_topk with one row per token; none for a logit that is no number, as where a state overflowed",
        (
            *(*_CELL, RUN, LAYER, POSITION),
            Column("rank", "int64", "1 for the largest logit"),
            *_TOKEN,
            Column("logit", "float32", "its lens logit", "logit"),
        ),
    ),
    View(
        "topk_shift",
        "prompt, variant, comparison, layer, position, direction, rank",
        "pairwise_topk with one row per token; none for a shift that is no number, as where a state overflowed",
        (
            *(*_CELL, BASE_RUN, SFT_RUN, COMPARISON, LAYER, POSITION),
            Column("direction", "category", "increased or decreased"),
            Column("rank", "int64", "1 for the largest rise, or the largest fall"),
            *_TOKEN,
            Column("shift", "float32", "its logit in sft_run minus that in base_run", "logit"),
        ),
    ),
    View(
        "noise",
        "run, layer",
        "what running a prompt alone, not in its batch, changed: the noise floor; no rows where it was not measured",
        (
            *(PAIR, CAPTURE, RUN, LAYER),
            Column(
                "norm_diff",
                "float64",
                "largest norm of the difference over the tokens of one prompt; null where a state overflowed",
                "residual",
                True,
            ),
            Column(
                "norm_diff_relative", "float64", "largest such norm divided by that of the state, likewise", "1", True
            ),
            Column("cosine_distance", "float64", "largest 1 - cosine, likewise", "1", True),
        ),
    ),
    View(
        "pairwise_floor",
        _PAIRWISE.grain,
        "differences of states next to the noise floor: the larger of the two passes' at that layer",
        (
            *(*_CELL, BASE_RUN, SFT_RUN, COMPARISON, LAYER, POSITION),
            Column("norm_diff", "float32", "norm of the difference of the two states", "residual"),
            Column("norm_diff_floor", "float64", "its noise floor; null where that was not measured", "residual", True),
            Column("cosine_distance", "float32", "1 - cosine between the two states", "1"),
            Column("cosine_distance_floor", "float64", "its noise floor; null where that was not measured", "1", True),
            Column(
                "below_floor",
                "bool",
                "true where norm_diff is not above its floor: no difference is seen; null where one of them is no number",
                "",
                True,
            ),
        ),
    ),
)

CAPTURES = View(
    "captures",
    "capture",
    "what was asked and found, from capture.json and the marker; null where a capture does not say",
    (
        PAIR,
        CAPTURE,
        Column("complete", "bool", "false only under --include-partial, for a capture without a valid marker"),
        Column(
            "newest",
            "bool",
            "true for the pair's newest: the one in the other tables unless all captures are asked for",
        ),
        Column("written", "timestamp", "when the marker was written, UTC", "", True),
        Column("base_model", "string", "hub id or directory of the base checkpoint", "", True),
        Column("sft_model", "string", "hub id or directory of the fine-tuned checkpoint", "", True),
        Column("base_revision", "string", "its resolved revision", "", True),
        Column("sft_revision", "string", "its resolved revision", "", True),
        Column("tokenizer", "string", "the tokenizer of both", "", True),
        Column("dtype", "string", "dtype of the weights while running", "", True),
        Column(
            "quantization",
            "string",
            "by what each model's weights are quantized, in memory or as stored (JSON)",
            "",
            True,
        ),
        Column("lens_norm", "string", "lens.norm of the config: final or none", "", True),
        Column(
            "twin_layer",
            "int64",
            "L where the lens says the same of it as of L-1, which it reads through the final norm; null where it does not",
            "",
            True,
        ),
        Column("mode", "string", "resident or streamed", "", True),
        Column("device", "string", "device of the run", "", True),
        Column("gpu", "string", "its name", "", True),
        Column("n_layers", "int64", "blocks of the model: L", "layers", True),
        Column("n_prompts", "int64", "prompts times variants", "", True),
        Column("n_tokens", "int64", "tokens over all prompts", "tokens", True),
        Column("seconds", "float64", "wall clock, all stages", "s", True),
        Column("peak_memory_bytes", "int64", "peak device memory (live weight bytes on CPU)", "bytes", True),
        Column("bytes", "int64", "size of the capture's tables", "bytes", True),
        Column("path", "string", "directory of the capture"),
        Column("json", "string", "the whole capture.json, for json_extract", "", True),
    ),
)

MANIFEST_VIEW = View(
    "manifest",
    "attempt",
    "one row per attempt at an entry, complete or not",
    tuple(
        Column(f.name, {"VARCHAR": "string", "TIMESTAMP": "timestamp", "DOUBLE": "float64", "BIGINT": "int64"}[f.type],
               f.doc, "", True)
        for f in MANIFEST
    ),
)  # fmt: skip

VIEWS: tuple[View, ...] = (CAPTURES, MANIFEST_VIEW, *STORED_VIEWS, *SQL_VIEWS)
BY_VIEW = {view.name: view for view in VIEWS}


def quote(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def as_pattern(path: str) -> str:
    """The pattern that matches this path alone: DuckDB takes names of files for patterns, and out[1] would mean out1."""
    return re.sub(r"([\[*?])", r"[\1]", path)


def stored_sql(name: str, files: Sequence[str] = (), *, source: str | None = None, root: str | None = None) -> str:
    """The SELECT of a stored table's view: over Parquet `files`, over the relation `source`, or typed and empty.

    root: an SQL expression of a directory, as a pattern, that the files are below, for a catalog that may be moved.
    """
    derived = "".join(f",\n  {sql} AS {column.name}" for column, sql in DERIVED.get(name, ()))
    columns = BY_NAME[name].all_columns
    if not files and source is None:
        nulls = ", ".join(f"NULL::{DUCKDB_TYPES[c.type]} AS {c.name}" for c in columns)
        names = ", ".join(c.name for c in columns)
        return f"SELECT\n  {names}{derived}\nFROM (SELECT {nulls})\nWHERE false"
    if source is None:
        prefix = f"{root} || " if root else ""
        listed = ",\n  ".join(prefix + quote(as_pattern(f)) for f in files)
        # hive_partitioning would read an all-digit capture id as a number, and the columns are in the files
        source = f"read_parquet([\n  {listed}\n], hive_partitioning = false)"
    return f"SELECT\n  {', '.join(c.name for c in columns)}{derived}\nFROM {source}"


def view_sql(name: str) -> str:
    """The SELECT of one of SQL_VIEWS."""
    return (SQL_DIR / f"{name}.sql").read_text(encoding="utf-8").rstrip().removesuffix(";")


def comments_sql(view: View) -> list[str]:
    """COMMENT statements, so that any client shows the docs. `captures` and `manifest` are tables, the rest views."""
    kind = "TABLE" if view.name in ("captures", "manifest") else "VIEW"
    lines = [f"COMMENT ON {kind} {view.name} IS {quote(f'{view.doc}; one row per {view.grain}')}"]
    return lines + [f"COMMENT ON COLUMN {view.name}.{c.name} IS {quote(doc(c))}" for c in view.columns]


def doc(column: Column) -> str:
    """A column's doc with its unit."""
    return f"{column.doc} [{column.unit}]" if column.unit else column.doc
