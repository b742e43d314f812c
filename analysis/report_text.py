"""A report as lines of text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from analysis.metrics import of_lens
from analysis.report import MetricPart, Question, Section
from analysis.summaries import Axis, box_sql, cells_sql, fetch_rows, top_rows
from analysis.tables import fit, plain_table
from capture.printable import escape

if TYPE_CHECKING:
    import duckdb

_STATISTICS = ("mean", "median", "min", "max", "std")


def table_lines(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Iterator[str]:
    """Rows of dicts as aligned lines, indented by two; token texts in quotes, so that spaces show."""
    shown = [[_quoted(row[c]) if c == "token" else row[c] for c in columns] for row in rows]
    return plain_table(columns, shown, indent="  ")


def overview_lines(con: duckdb.DuckDBPyConnection, question: Question) -> Iterator[str]:
    """Over all that is asked for: box statistics per pair and comparison (or pass), and the largest cells."""
    metric = question.metric
    cells, values = cells_sql(metric, question.filters)
    boxes = fetch_rows(con, box_sql(cells), values)
    unit = f" [{metric.unit}]" if metric.unit not in ("", "1") else ""
    yield f"{metric.name}{unit}: {metric.doc}"
    if not boxes:
        yield f"  no cell has a number{_why_none(metric.name, metric.unit)}"
        yield ""
        return
    several = len({(b["pair"], b["capture"]) for b in boxes}) > len({b["pair"] for b in boxes})
    keys = ("pair", "capture", "label") if several else ("pair", "label")
    rows = [{**b, metric.label: b["label"]} for b in boxes]
    columns = (*keys[:-1], metric.label, "n", "min", "q1", "median", "q3", "max", "mean", "std")
    yield from table_lines(rows, columns)
    if len(boxes) == 1 and question.filters.prompt is not None:
        yield ""  # one section will follow, with the same cells
        return
    yield f"  largest |{metric.name}| of all"
    rows = [{**h, metric.label: h["label"]} for h in top_rows(con, metric, question.top_n, question.filters)]
    variant = ("variant",) if any(row["variant"] != "identity" for row in rows) else ()
    place = ("prompt_idx", *variant, metric.label, "layer", "position")
    yield from table_lines(rows, (*keys[:-1], *place, "token", "value"))
    yield ""


def _why_none(metric: str, unit: str) -> str:
    return " (was the lens on?)" if of_lens(metric, unit) else ""


def _quoted(token: str | None) -> str | None:
    return None if token is None else f'"{escape(token)}"'


def section_lines(section: Section, axis: Axis, columns: int) -> Iterator[str]:
    """The lines of one section; only the prompt's text is cut to `columns`."""
    variant = "" if section.variant == "identity" else f" ({section.variant})"
    trimmed = section.n_tokens_before_trimming - section.n_tokens
    of = f", trimmed from {section.n_tokens_before_trimming}" if trimmed else ""
    yield f"== {escape(section.pair)}, prompt {section.prompt_idx}{escape(variant)}, {escape(section.label)}: {section.n_tokens} tokens{of} =="
    yield fit(f'  "{escape(section.text)}"', columns)
    known = [f"{k} {v}" for k, v in {"capture": section.capture, **section.metadata}.items() if v is not True]
    yield from textwrap.wrap(
        escape(", ".join(known)),
        columns,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    for part in section.metrics:
        yield from _part_lines(part, axis)
    for row in section.correlations:
        if row["correlation"] is not None:
            yield f"  correlation of {row['metric']} and {row['with']} over all cells: {row['correlation']:.4f}"
    if section.tracked:
        yield ""
        yield from _tracked_lines(section.tracked)
    if section.changes:
        yield ""
        yield "  tracked logits that changed most (base - sft)"
        rows = [{**r, "tracked": f"{r['token_id']} {escape(r['name'])}"} for r in section.changes]
        yield from table_lines(rows, ("layer", "position", "token", "tracked", "norm_diff", "logit_diff"))
    if section.membership:
        yield ""
        yield "  cells where a token is among the largest shifts (sft - base), and the largest"
        yield from table_lines(section.membership, ("token_id", "direction", "cells", "largest", "layer", "position"))
    yield ""


def _part_lines(part: MetricPart, axis: Axis) -> Iterator[str]:
    unit = f" [{part.unit}]" if part.unit not in ("", "1") else ""
    yield ""
    if not part.statistics:
        yield f"  {part.metric}: no cell has a number{_why_none(part.metric, part.unit)}"
        return
    yield f"  {part.metric}{unit} by {axis}"
    keys = ("layer",) if axis == "layer" else ("position", "token")
    yield from table_lines(part.statistics, (*keys, *_STATISTICS))
    yield f"  largest |{part.metric}|"
    yield from table_lines(part.hotspots, ("layer", "position", "token", "value"))


def _tracked_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    pairwise = "diff" in rows[0]
    names = ("base", "sft", "diff") if pairwise else ("mean", "min", "max")
    yield f"  tracked logits{': means, and the largest difference (diff = base - sft)' if pairwise else ', and the largest'}"
    shown = [{**r, "token": f"{r['token_id']} {escape(r['name'])}"} for r in rows]
    columns = ("token", *names, "largest", "layer", "position")
    yield from plain_table(columns, [[r[c] for c in columns] for r in shown], indent="  ")
