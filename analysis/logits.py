"""Tracked tokens: where their logits differ, and how often they are among the largest shifts.

A difference is base - sft: the logit in base_run minus that in sft_run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.errors import QueryError
from analysis.grids import check_tracked
from analysis.metrics import find_metric, logit_metric
from analysis.select import Filters, check_filters, one_cell_set
from analysis.summaries import GROUP, NO_TWINS, fetch_rows

if TYPE_CHECKING:
    import duckdb

MIN_LOGIT = 0.5  # a smaller change of a logit is not worth a line of a report
_GROUP = ", ".join(GROUP)


def check_size(name: str, value: float) -> None:
    """Raise a QueryError for what is no number that a change can be as large as."""
    if not math.isfinite(value):
        raise QueryError(f"{name} {value} is no size")


def changes_sql(
    filters: Filters,
    token_ids: Sequence[int] = (),
    min_logit: float = MIN_LOGIT,
    min_norm_diff: float = 0.0,
    per_prompt: int | None = None,
    *,
    twins: bool = True,
) -> tuple[str, list[Any]]:
    """The cells where a tracked token's logit changed by min_logit or more and the states by min_norm_diff or more.

    Columns: pair, capture, prompt_idx, variant, label (comparison), layer, position, token_id, name, norm_diff, logit_diff;
    the largest |logit_diff| first. per_prompt: at most so many for each prompt and comparison. twins=False: one of two layers that
    are the same to the lens. Raises QueryError for a size that is no number.
    """
    check_size("the least change of a logit", min_logit)
    check_size("the least change of a state", min_norm_diff)
    where, values = filters.where("comparison")
    chosen = f"AND t.token_id IN ({', '.join(str(int(i)) for i in token_ids)})" if token_ids else ""
    few = (
        f"QUALIFY row_number() OVER (PARTITION BY {_GROUP} ORDER BY {_ORDER}) <= {int(per_prompt)}\n"
        if per_prompt
        else ""
    )
    sql = (
        "SELECT pair, capture, prompt_idx, variant, comparison AS label, t.layer, t.position, t.token_id, t.label AS name,\n"
        "  p.norm_diff::DOUBLE AS norm_diff, t.diff AS logit_diff\n"
        f"FROM (SELECT * FROM tracked_pairwise {where or 'WHERE true'}{'' if twins else f' {NO_TWINS}'}) AS t\n"
        "JOIN pairwise AS p USING (pair, capture, prompt_idx, variant, comparison, layer, position)\n"
        f"WHERE isfinite(t.diff) AND abs(t.diff) >= {float(min_logit)} AND p.norm_diff >= {float(min_norm_diff)} {chosen}"
    )
    return f"SELECT * FROM (\n{sql}\n)\n{few}ORDER BY {_GROUP}, {_ORDER}", values


_ORDER = "abs(logit_diff) DESC, layer, position, token_id"


def membership_sql(filters: Filters, token_ids: Sequence[int]) -> tuple[str, list[Any]]:
    """Per prompt, comparison, token and direction: in how many cells it is among the k largest shifts, and the largest there; at
    ties the lower layer, then the earlier position."""
    where, values = filters.where("comparison")
    ids = ", ".join(str(int(i)) for i in token_ids)
    sql = (
        "SELECT * EXCLUDE hot, hot.value AS largest, -hot.minus_layer AS layer, -hot.minus_position AS position\nFROM (\n"
        "SELECT pair, capture, prompt_idx, variant, comparison AS label, token_id, direction, count(*) AS cells,\n"
        "  max(struct_pack(size := abs(shift), minus_layer := -layer, minus_position := -position, value := shift)) AS hot\n"
        f"FROM topk_shift {where or 'WHERE true'} AND token_id IN ({ids})\n"
        f"GROUP BY ALL\n)\nORDER BY {_GROUP}, token_id, direction DESC"
    )
    return sql, values


def relevant_logit_changes(
    con: duckdb.DuckDBPyConnection,
    *,
    min_abs_logit: float = 1.0,
    min_norm_diff: float = 0.0,
    token_ids: Sequence[int] | None = None,
    pair: str | None = None,
    prompt: int | None = None,
    comparison: str | None = None,
    variant: str | None = None,
    capture: str | None = None,
) -> list[dict[str, Any]]:
    """The cells where a tracked token's logit and the state both changed, the largest |logit_diff| first.

    Rows: pair, capture, prompt_idx, variant, comparison, layer, position, token_id, name, norm_diff, logit_diff (base - sft).
    """
    filters = Filters(pair, capture, prompt, variant, comparison)
    check_filters(con, filters, find_metric("pairwise", "norm_diff"))
    for token_id in token_ids or ():
        check_tracked(con, token_id, filters)
    sql, values = changes_sql(filters, token_ids or (), min_abs_logit, min_norm_diff)
    return fetch_rows(con, f"SELECT * RENAME (label AS comparison) FROM (\n{sql}\n)\nORDER BY {_ORDER}", values)


def tracked_token_trajectory(
    con: duckdb.DuckDBPyConnection,
    token_id: int,
    *,
    pair: str | None = None,
    prompt: int | None = None,
    comparison: str | None = None,
    variant: str | None = None,
    capture: str | None = None,
) -> list[dict[str, Any]]:
    """A tracked token through the layers of one prompt and comparison, next to how far the states are apart.

    Rows, a row per layer and position: layer, position, token, norm_diff, logit_base, logit_sft, logit_diff (base - sft).
    """
    filters = Filters(pair, capture, prompt, variant, comparison)
    check_tracked(con, token_id, filters)
    one = one_cell_set(con, filters, logit_metric("pairwise", token_id))
    where, values = one.where("comparison")
    return fetch_rows(
        con,
        "SELECT layer, position, k.token, p.norm_diff::DOUBLE AS norm_diff, t.base::DOUBLE AS logit_base,\n"
        "  t.sft::DOUBLE AS logit_sft, t.diff AS logit_diff\n"
        f"FROM (SELECT * FROM pairwise {where}) AS p\n"
        "LEFT JOIN (SELECT * FROM tracked_pairwise WHERE token_id = ?) AS t\n"
        "  USING (pair, capture, prompt_idx, variant, comparison, layer, position)\n"
        "LEFT JOIN tokens AS k USING (pair, capture, prompt_idx, variant, position)\nORDER BY layer, position",
        [*values, int(token_id)],
    )
