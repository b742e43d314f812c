"""What to look at: filters over cells, and the one pair, capture, prompt and comparison that a grid shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

from analysis.errors import QueryError, near, near_label

if TYPE_CHECKING:
    import duckdb

    from analysis.metrics import Metric


@dataclass(frozen=True)
class Filters:
    """Which cells; None means all. `label` is a comparison or a pass, as the metric has it; `capture` may be a prefix.

    `between` is a range of prompt indices, both ends included: how a long report goes through a run in steps.
    """

    pair: str | None = None
    capture: str | None = None
    prompt: int | None = None
    variant: str | None = None
    label: str | None = None
    between: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Raise QueryError for a value of another type, which DuckDB would complain of in its own words."""
        if self.prompt is not None:
            if not isinstance(self.prompt, Integral):
                raise QueryError(f"prompt={self.prompt!r} is no index of a prompt, such as 0")
            object.__setattr__(self, "prompt", int(self.prompt))  # DuckDB takes no numpy.int64
        for name in ("pair", "capture", "variant", "label"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise QueryError(f"{'comparison or run' if name == 'label' else name}={value!r} is no name")

    def where(self, label: str) -> tuple[str, list[Any]]:
        """A WHERE clause (or nothing) and its parameters; `label` is the metric's label expression."""
        tests = {
            "pair = ?": self.pair,
            "starts_with(capture, ?)": self.capture,
            "prompt_idx = ?": self.prompt,
            "variant = ?": self.variant,
            f"{label} = ?": self.label,
        }
        used: dict[str, Any] = {test: value for test, value in tests.items() if value is not None}
        values: list[Any] = list(used.values())
        if self.between is not None:
            used["prompt_idx BETWEEN ? AND ?"] = self.between
            values += self.between
        return ("WHERE " + " AND ".join(used) if used else "", values)

    def with_label(self, label: str) -> Filters:
        """The same for one comparison or pass."""
        return replace(self, label=label)


EVERYTHING = Filters()


def check_filters(con: duckdb.DuckDBPyConnection, filters: Filters, metric: Metric) -> None:
    """Raise a QueryError that names the first filter that nothing matches, and what there is instead."""
    if not con.execute("SELECT count(*) > 0 FROM prompts").fetchall()[0][0]:
        raise QueryError("the run directory holds no complete capture; 'pairscope status OUT' says how far it is")
    so_far = Filters()
    wanted = (
        ("pair", filters.pair),
        ("capture", filters.capture),
        ("prompt", filters.prompt),
        ("variant", filters.variant),
    )
    for field, value in wanted:
        if value is None:
            continue
        before, so_far = so_far, replace(so_far, **{field: value})  # type: ignore[arg-type]
        where, values = so_far.where("''")
        too_large = isinstance(value, int) and abs(value) >= 1 << 31  # DuckDB cannot even compare with one of 44 digits
        if too_large or not con.execute(f"SELECT 1 FROM prompts {where} LIMIT 1", values).fetchall():
            column = "prompt_idx" if field == "prompt" else field
            where, values = before.where("''")
            known = con.execute(f"SELECT DISTINCT {column} FROM prompts {where} ORDER BY 1", values).fetchall()
            there = near(value, [k for (k,) in known])
            if field == "prompt" and known:
                there = f"There are {known[0][0]} to {known[-1][0]}."
            if field == "capture":
                where, values = so_far.where("''")
                if con.execute(f"SELECT 1 FROM captures {where} LIMIT 1", values).fetchall():
                    there = "It is an older one of its pair: open the run with all_captures=True."
            raise QueryError(f"no {field} '{value}' here. {there}")
    if filters.label is not None and filters.label not in (known_labels := labels(con, so_far, metric)):
        raise QueryError(f"no {metric.label} '{filters.label}' here. {near_label(filters.label, known_labels)}")


def labels(con: duckdb.DuckDBPyConnection, filters: Filters, metric: Metric) -> list[str]:
    """The comparisons or passes that the filters leave, by name."""
    return _labels(con, filters, "runs" if metric.record_type == "runs" else "pairwise", metric.label)


def _labels(con: duckdb.DuckDBPyConnection, filters: Filters, view: str, column: str) -> list[str]:
    where, values = replace(filters, label=None).where("''")
    # One prompt of each capture tells: all prompts of a capture have the same ones, but for those of a file. Equalities alone
    # let DuckDB skip row groups, which a join with prompts would not.
    firsts = con.execute(f"SELECT pair, capture, min(prompt_idx) FROM prompts {where} GROUP BY ALL", values).fetchall()
    found: set[str] = set()
    for pair, capture, first in firsts:
        where, values = "WHERE pair = ? AND capture = ? AND prompt_idx = ?", [pair, capture, first]
        if is_imported(con, pair, capture):
            where, values = replace(filters, pair=pair, capture=capture, label=None).where("''")
        rows = con.execute(f"SELECT DISTINCT {column} FROM {view} {where}", values).fetchall()
        found |= {name for (name,) in rows}
    return sorted(found)


def is_imported(con: duckdb.DuckDBPyConnection, pair: str, capture: str) -> bool:
    """Whether a capture came from a JSON file: each of its records may have passes and comparisons of its own."""
    return bool(
        con.execute("SELECT 1 FROM imported WHERE pair = ? AND capture = ? LIMIT 1", [pair, capture]).fetchall()
    )


def _first_record(
    con: duckdb.DuckDBPyConnection, filters: Filters, metric: Metric, pair: str, capture: str
) -> tuple[str, str, int, str] | None:
    """Pair, capture, prompt and variant of the first record of a file that has cells of the kind of the metric's."""
    where, values = replace(filters, pair=pair, capture=capture).where(metric.label)
    rows = con.execute(
        f"SELECT pair, capture, prompt_idx, variant FROM {metric.record_type} {where} "
        "ORDER BY prompt_idx, variant <> 'identity', variant LIMIT 1",
        values,
    ).fetchall()
    return rows[0] if rows else None


def one_cell_set(con: duckdb.DuckDBPyConnection, filters: Filters, metric: Metric) -> Filters:
    """Fill what the filters leave open, so that one layer x token grid is meant.

    The first pair by name that has cells of such a metric, its newest capture (of those that track the token, for the logit of
    one), its first prompt and variant (identity where there is one), and BB-SS (or BB) where there is one, else the first by name.
    """
    check_filters(con, filters, metric)
    where, values = replace(filters, label=None).where("''")
    if metric.token_id is not None:
        tracking = "(pair, capture) IN (SELECT (pair, capture) FROM tracked_tokens WHERE token_id = ?)"
        where, values = f"{where} AND {tracking}" if where else f"WHERE {tracking}", [*values, metric.token_id]
    rows = con.execute(
        f"SELECT pair, capture, prompt_idx, variant FROM prompts JOIN captures USING (pair, capture) {where} "
        "QUALIFY row_number() OVER (PARTITION BY pair, capture ORDER BY prompt_idx, variant <> 'identity', variant) = 1 "
        "ORDER BY pair, newest DESC, written DESC NULLS LAST, capture",
        values,
    ).fetchall()
    default = filters.label or ("BB" if metric.record_type == "runs" else "BB-SS")
    for row in rows:  # the cells of a damaged capture may be left out, and its prompts be there
        first = _first_record(con, filters, metric, *row[:2]) if is_imported(con, *row[:2]) else None
        chosen = Filters(*(first or row))
        known = labels(con, chosen, metric)
        if default in known or (known and filters.label is None):
            return chosen.with_label(default if default in known else known[0])
    if not rows:
        others = con.execute(
            "SELECT DISTINCT pair, capture FROM tracked_tokens WHERE token_id = ? ORDER BY ALL", [metric.token_id]
        ).fetchall()
        there = ", ".join(f"{capture} of pair '{pair}'" for pair, capture in others) or "none"
        raise QueryError(f"no capture of these tracks token {metric.token_id}; of all captures: {there}")
    if metric.record_type == "pairwise" and (
        passes := [run for row in rows for run in _labels(con, Filters(*row), "runs", "run")]
    ):
        raise QueryError(
            f"pair '{rows[0][0]}' has no comparison, passes alone: --run {passes[0]} shows one (in Python run='{passes[0]}')"
        )
    raise QueryError(f"pair '{rows[0][0]}' has no {metric.label} in '{metric.record_type}'")
