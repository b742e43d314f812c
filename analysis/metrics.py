"""Metrics by name: which view holds one, and what it means. A metric is any number of `runs` or of `pairwise_full`."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from analysis.errors import QueryError, near
from analysis.views import BY_VIEW
from capture.schema import Column

RecordType = Literal["runs", "pairwise"]
RECORD_TYPES: tuple[RecordType, ...] = ("runs", "pairwise")
DEFAULT_METRIC: dict[RecordType, str] = {"runs": "norm", "pairwise": "norm_diff"}
_NUMBERS = ("float32", "float64", "bool")
_KEYS = {"layer", "position", "prompt_idx"}


@dataclass(frozen=True)
class Metric:
    """One number per cell. view: the cheapest view that has it; sql: an expression of type DOUBLE in it.

    label: the expression that names what a cell belongs to: a pass (`run`) or a comparison (`comparison`). token_id: of a tracked
    token's logit; only captures that track it have such cells.
    """

    name: str
    record_type: RecordType
    view: str
    sql: str
    label: str
    unit: str
    doc: str
    token_id: int | None = None


def of_lens(name: str, unit: str) -> bool:
    """Whether a metric comes from the lens: without one, or at a layer that it does not read, no cell has a number."""
    return unit in ("nats", "logit") or name == "top1_agree"


def _metric(record_type: RecordType, view: str, column: Column) -> Metric:
    label = "run" if record_type == "runs" else "comparison"
    return Metric(column.name, record_type, view, f"{column.name}::DOUBLE", label, column.unit, column.doc)


def metrics(record_type: RecordType) -> dict[str, Metric]:
    """All metrics of a record type by name; those of `pairwise` come from it where they can, else `pairwise_full`."""
    if record_type not in RECORD_TYPES:
        raise QueryError(f"no record type '{record_type}'. {near(record_type, RECORD_TYPES)}")
    found: dict[str, Metric] = {}
    for view in ("runs",) if record_type == "runs" else ("pairwise", "pairwise_full"):
        for column in BY_VIEW[view].columns:
            if column.type in _NUMBERS and column.name not in _KEYS and column.name not in found:
                found[column.name] = _metric(record_type, view, column)
    return found


def find_metric(record_type: RecordType, name: str) -> Metric:
    """The metric of that name, or a QueryError that names the near ones."""
    known = metrics(record_type)
    if name not in known:
        other: RecordType = "pairwise" if record_type == "runs" else "runs"
        also = f" It is a metric of --record-type {other}." if name in metrics(other) else ""
        raise QueryError(f"no metric '{name}' for record type '{record_type}'. {near(name, known)}{also}")
    return known[name]


LOGIT_SOURCES = ("base", "sft", "diff")


def logit_metric(record_type: RecordType, token_id: int, source: str = "diff") -> Metric:
    """The lens logit of one tracked token: of a pass, or of a comparison's base side, sft side or their difference."""
    if not isinstance(token_id, Integral):
        raise QueryError(f"token_id={token_id!r} is no id of a token, such as 7")
    if source not in LOGIT_SOURCES:
        raise QueryError(f"no logit source '{source}'. {near(source, LOGIT_SOURCES)}")
    if record_type == "runs":
        view, column, label, doc = "tracked", "logit", "run", "lens logit"
    else:
        view, column, label = "tracked_pairwise", source, "comparison"
        doc = {
            "base": "lens logit in base_run",
            "sft": "lens logit in sft_run",
            "diff": "lens logit, base_run - sft_run",
        }[source]
    name = f"logit {int(token_id)}" + ("" if record_type == "runs" else f" {source}")
    table = f"(SELECT * FROM {view} WHERE token_id = {int(token_id)})"
    doc = f"{doc} of token {int(token_id)}"
    return Metric(name, record_type, table, f"{column}::DOUBLE", label, "logit", doc, int(token_id))


def choose_metric(
    name: str | None = None,
    *,
    comparison: str | None = None,
    run: str | None = None,
    token_id: int | None = None,
    source: str = "diff",
) -> Metric:
    """What a grid is of: a metric by name, by default kl_divergence, or norm with `run`; or the logit of a token.

    A name that only passes have is of a pass, even without `run`. Raises QueryError for what excludes each other.
    """
    if comparison and run:
        raise QueryError("a grid is of a comparison or of a run: --comparison and --run exclude each other")
    if name and token_id is not None:
        raise QueryError("a grid is of a metric or of a token's logit: --metric and --token-id exclude each other")
    only_runs = name is not None and name in metrics("runs") and name not in metrics("pairwise")
    record_type: RecordType = "runs" if run or (only_runs and not comparison) else "pairwise"
    if token_id is not None:
        return logit_metric(record_type, token_id, source)
    if name and name not in metrics(record_type):  # a grid has no --record-type, which the report's error names
        if only_runs:
            raise QueryError(f"'{name}' is a metric of passes, and --comparison is not: --run BB shows it")
        if name in metrics("pairwise"):
            raise QueryError(f"'{name}' is a metric of comparisons, and --run is not: --comparison BB-SS shows it")
    return find_metric(record_type, name or ("norm" if run else "kl_divergence"))
