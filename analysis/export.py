"""A report's rows in a file: every cell, the hotspots, the statistics, or the logit changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from analysis.errors import QueryError
from analysis.logits import changes_sql
from analysis.metrics import Metric, RecordType
from analysis.report import Question
from analysis.summaries import AXIS_COLUMN, GROUP, cells_sql, prompt_hotspots_sql, statistics_sql
from analysis.tables import copy_path, copy_query
from analysis.views import quote

if TYPE_CHECKING:
    import duckdb

Kind = Literal["cells", "hotspots", "statistics", "changes"]
KINDS: tuple[Kind, ...] = ("cells", "hotspots", "statistics", "changes")


def export_report(con: duckdb.DuckDBPyConnection, question: Question, file: str, kind: Kind = "cells") -> Path:
    """Write what the question covers to FILE.csv, .json (one object a line) or .parquet.

    cells: every cell, a column per metric, and logit_<id> for each token asked for. hotspots and statistics: those of each
    section, a row each, with the metric's name. changes: the logit changes of tracked tokens (of comparisons alone).
    """
    check_export(file, kind, question.metric.record_type)
    sql, values = {"cells": _cells, "hotspots": _hotspots, "statistics": _statistics, "changes": _changes}[kind](
        question
    )
    return copy_query(con, sql, values, file)


def check_export(file: str, kind: Kind, record_type: RecordType) -> None:
    """Raise QueryError or StoreError if such rows cannot go to such a file, before any of them is made."""
    if kind == "changes" and record_type == "runs":
        raise QueryError("logit changes are of comparisons: --record-type pairwise")
    copy_path(file)


def _column(question: Question, metric: Metric) -> str:
    i = question.logits.index(metric) if metric in question.logits else None
    return metric.name if i is None else f"logit_{question.token_ids[i]}"


def _cells(question: Question) -> tuple[str, list[Any]]:
    first, *others = (*question.metrics, *question.logits)
    sql, values = cells_sql(first, question.filters, finite=False)
    columns, joins = [f'c.value AS "{first.name}"'], []
    for i, metric in enumerate(others):
        cells, more = cells_sql(metric, question.filters, finite=False)
        joins.append(f"LEFT JOIN (\n{cells}\n) AS m{i} USING ({', '.join(GROUP)}, layer, position)\n")
        columns.append(f'm{i}.value AS "{_column(question, metric)}"')
        values = [*values, *more]
    return (
        f"SELECT pair, capture, prompt_idx, variant, label AS {first.label}, layer, position, token, {', '.join(columns)}\n"
        f"FROM (\n{sql}\n) AS c\n{''.join(joins)}LEFT JOIN tokens USING (pair, capture, prompt_idx, variant, position)\n"
        f"ORDER BY {', '.join(GROUP)}, layer, position"
    ), values


def _union(question: Question, one: Any, order: str, *, tokens: bool, twins: bool = True) -> tuple[str, list[Any]]:
    """One query per metric, under each other; `tokens` adds the token's text by position."""
    parts, values = [], []
    for i, metric in enumerate((*question.metrics, *question.logits)):
        cells, more = cells_sql(metric, question.filters, twins=twins)
        parts.append(f"SELECT {i} AS place, {quote(_column(question, metric))} AS metric, * FROM (\n{one(cells)}\n)")
        values += more
    texts = (
        "LEFT JOIN (SELECT pair, capture, prompt_idx, variant, position, token FROM tokens)\n"
        "USING (pair, capture, prompt_idx, variant, position)\n"
    )
    return (
        f"SELECT * EXCLUDE place RENAME (label AS {question.metric.label})\nFROM (\n"
        + "\nUNION ALL\n".join(parts)
        + f"\n)\n{texts if tokens else ''}ORDER BY {', '.join(GROUP)}, place, {order}"
    ), values


def _hotspots(question: Question) -> tuple[str, list[Any]]:
    order = "abs(value) DESC, layer, position"
    return _union(question, lambda cells: prompt_hotspots_sql(cells, question.top_n), order, tokens=True, twins=False)


def _statistics(question: Question) -> tuple[str, list[Any]]:
    column = AXIS_COLUMN[question.axis]
    return _union(question, lambda cells: statistics_sql(cells, question.axis), column, tokens=question.axis == "token")


def _changes(question: Question) -> tuple[str, list[Any]]:
    sql, values = changes_sql(question.filters, question.token_ids, question.min_logit, twins=False)
    return f"SELECT * RENAME (label AS comparison) FROM (\n{sql}\n)", values
