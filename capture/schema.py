"""The tables of a capture, declared as data: one list, from which the Arrow schemas, the DuckDB views, the docs page and
the checks are made. No heavy imports here: all three packages import this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Column:
    """One column: `type` is one of the keys of ARROW_TYPES; `unit` is for people; `doc` is one line."""

    name: str
    type: str
    doc: str
    unit: str = ""
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    """One table: its grain ("one row per ..."), its key columns (rows are sorted by them) and the other columns."""

    name: str
    grain: str
    keys: tuple[Column, ...]
    columns: tuple[Column, ...]
    optional: bool = False

    @property
    def all_columns(self) -> tuple[Column, ...]:
        return self.keys + self.columns


PAIR = Column("pair", "category", "name of the entry in the config's sweep")
CAPTURE = Column("capture", "category", "capture id: hash of pair, revisions, prompts and settings")
PROMPT = Column("prompt_idx", "int32", "index of the prompt in the config's order, from 0")
VARIANT = Column("variant", "category", "prompt variant; identity is the prompt itself")
RUN = Column("run", "category", "pass: first letter whose embeddings, second whose blocks (B base, S sft)")
BASE_RUN = Column("base_run", "category", "first pass of the comparison, the one subtracted")
SFT_RUN = Column("sft_run", "category", "second pass of the comparison, the one subtracted from")
LAYER = Column(
    "layer",
    "int16",
    "-1: state entering block 0; 0..L-1: output of block l, before any final norm; L: after the final norm",
)
POSITION = Column("position", "int32", "token position in the prompt, from 0")

_CELL = (PAIR, CAPTURE, PROMPT, VARIANT)

TABLES: tuple[Table, ...] = (
    Table(
        "prompts",
        "prompt, variant",
        _CELL,
        (
            Column("text", "string", "the text that was tokenised"),
            Column("n_tokens", "int32", "tokens captured", "tokens"),
            Column("n_tokens_before_trimming", "int32", "tokens before trimming to the shortest prompt", "tokens"),
        ),
    ),
    Table(
        "tokens",
        "prompt, variant, position",
        (*_CELL, POSITION),
        (
            Column("token_id", "int32", "id given to both models; -1 where an imported file does not say"),
            Column("token", "string", "the id decoded alone; bytes that are no text on their own show as U+FFFD"),
            Column("is_special", "bool", "true for the tokenizer's special tokens"),
        ),
    ),
    Table(
        "vocabulary",
        "token id",
        (PAIR, CAPTURE, Column("token_id", "int32", "an id that occurs in a prompt or in a top-k list")),
        (Column("token", "string", "the id decoded alone; bytes that are no text on their own show as U+FFFD"),),
    ),
    Table(
        "tracked_tokens",
        "tracked token",
        (PAIR, CAPTURE, Column("slot", "int16", "place of this token in runs.tracked_logits, from 0")),
        (
            Column("token_id", "int32", "id of the tracked token"),
            Column("token", "string", "the tokenizer's own spelling of it"),
            Column("label", "string", "the name given in interesting_token_map, else the token's spelling"),
        ),
    ),
    Table(
        "runs",
        "prompt, variant, run, layer, position",
        (*_CELL, RUN, LAYER, POSITION),
        (
            Column("norm", "float32", "Euclidean norm of the residual state", "residual"),
            Column("norm_delta", "float32", "norm minus the norm one layer before; null at layer -1", "residual", True),
            Column(
                "cosine_distance_prev", "float32", "1 - cosine between this state and the one a layer before", "1", True
            ),
            Column("entropy", "float32", "entropy of the lens distribution", "nats", True),
            Column(
                "next_token_logprob",
                "float32",
                "log-probability that the lens gives to the prompt's next token; null at the last position",
                "nats",
                True,
            ),
            Column("tracked_logits", "list<float32>", "lens logits of the tracked tokens, by slot", "logit", True),
        ),
    ),
    Table(
        "runs_topk",
        "prompt, variant, run, layer, position",
        (*_CELL, RUN, LAYER, POSITION),
        (
            Column("ids", "list<int32>", "the k token ids of largest lens logit, largest first, smaller id at ties"),
            Column("logits", "list<float32>", "their logits", "logit"),
        ),
    ),
    Table(
        "pairwise",
        "prompt, variant, comparison, layer, position",
        (*_CELL, BASE_RUN, SFT_RUN, LAYER, POSITION),
        (
            Column("cosine_distance", "float32", "1 - cosine between the two states", "1"),
            Column("norm_diff", "float32", "Euclidean norm of the difference of the two states", "residual"),
            Column("kl_divergence", "float32", "KL(sft_run || base_run) of the lens distributions", "nats", True),
            Column("kl_reverse", "float32", "KL(base_run || sft_run) of the lens distributions", "nats", True),
            Column("top1_agree", "bool", "true if both lenses rank the same token first", "", True),
        ),
    ),
    Table(
        "pairwise_topk",
        "prompt, variant, comparison, layer, position",
        (*_CELL, BASE_RUN, SFT_RUN, LAYER, POSITION),
        (
            Column("increased_ids", "list<int32>", "the k ids whose logit rose most from base_run to sft_run"),
            Column("increased", "list<float32>", "their shifts, largest rise first", "logit"),
            Column("decreased_ids", "list<int32>", "the k ids whose logit fell most"),
            Column("decreased", "list<float32>", "their shifts (negative), largest fall first", "logit"),
        ),
    ),
    Table(
        "spectrum",
        "variant, comparison, layer",
        (PAIR, CAPTURE, VARIANT, BASE_RUN, SFT_RUN, LAYER),
        (
            Column(
                "singular_values",
                "list<float32>",
                "singular values of the tokens x hidden matrix of differences (sft_run minus base_run), largest first",
                "residual",
                True,
            ),
            Column(
                "effective_rank",
                "float32",
                "exp of the entropy of the singular values' shares; null where nothing differs",
                "1",
                True,
            ),
            Column(
                "participation_ratio",
                "float32",
                "(sum of squares)^2 / sum of fourth powers of the singular values; null where nothing differs",
                "1",
                True,
            ),
            Column(
                "mean_shift_share",
                "float32",
                "share of the squared differences that is one shift common to all tokens; null where nothing differs",
                "1",
                True,
            ),
        ),
        optional=True,
    ),
    Table(
        "imported",
        "record, part, layer, position",
        (PAIR, CAPTURE, PROMPT, VARIANT),
        (
            Column("part", "string", "record, or a pass or comparison of it: run 0, run 1, ... pairwise 0, ..."),
            Column("layer", "int16", "layer of a cell; null for the record or the part itself", "", True),
            Column("position", "int32", "position of a cell; null for the record or the part itself", "", True),
            Column("json", "string", "what the file says there and the other tables do not, as JSON"),
        ),
        optional=True,
    ),
)

BY_NAME = {table.name: table for table in TABLES}


@cache
def arrow_schema(name: str) -> Any:
    """The pyarrow schema of one table; strings that repeat are dictionary-encoded."""
    import pyarrow as pa

    types = {
        "category": pa.dictionary(pa.int32(), pa.string()),
        "string": pa.string(),
        "bool": pa.bool_(),
        "int16": pa.int16(),
        "int32": pa.int32(),
        "float32": pa.float32(),
        "list<int32>": pa.list_(pa.int32()),
        "list<float32>": pa.list_(pa.float32()),
    }
    fields = [pa.field(c.name, types[c.type], nullable=c.nullable) for c in BY_NAME[name].all_columns]
    return pa.schema(fields, metadata={"pairscope_schema_version": str(SCHEMA_VERSION), "pairscope_table": name})


@dataclass(frozen=True)
class ManifestField:
    """One field of a manifest row."""

    name: str
    type: str
    doc: str


STAGES = ("open", "layers", "lens", "write")  # of a capture, each with a peak of its own

MANIFEST: tuple[ManifestField, ...] = (
    ManifestField("attempt", "VARCHAR", "id of the attempt; also the name of its manifest file and its log"),
    ManifestField("entry", "VARCHAR", "entry of the config's sweep"),
    ManifestField("capture", "VARCHAR", "capture id, once known"),
    ManifestField("state", "VARCHAR", "running, complete, failed or interrupted"),
    ManifestField("started", "TIMESTAMP", "UTC; never before an earlier attempt's, whatever the clock does"),
    ManifestField("finished", "TIMESTAMP", "UTC; null while running"),
    ManifestField("seconds", "DOUBLE", "wall clock of the attempt"),
    ManifestField("node", "VARCHAR", "host name of the worker"),
    ManifestField("gpu", "VARCHAR", "device name, or cpu"),
    ManifestField("mode", "VARCHAR", "how many weights were in memory at a time: a mode of the config"),
    ManifestField("error_class", "VARCHAR", "class of the error, null when complete"),
    ManifestField("error", "VARCHAR", "the error in one line"),
    ManifestField("log", "VARCHAR", "path of the log file below the run directory"),
    ManifestField("n_prompts", "BIGINT", "prompts times variants"),
    ManifestField("n_tokens", "BIGINT", "tokens over all prompts"),
    ManifestField("peak_memory_bytes", "BIGINT", "peak device memory (live weight bytes on CPU)"),
    ManifestField("planned_memory_bytes", "BIGINT", "what was planned: weights, states and work, on a CPU too"),
    *(
        ManifestField(f"peak_{stage}_bytes", "BIGINT", f"peak device memory of the stage {stage} (live weights on CPU)")
        for stage in STAGES
    ),
    ManifestField("dollars", "DOUBLE", "cost of the attempt, where a rate is known"),
    ManifestField("driver", "VARCHAR", "the process that keeps this row: host, process id, birth"),
)
