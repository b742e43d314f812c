"""The report: per prompt its length, what is known of it, statistics per layer or token, hotspots, tracked logits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from analysis.errors import QueryError
from analysis.grids import check_tracked
from analysis.logits import MIN_LOGIT, changes_sql, check_size, membership_sql
from analysis.metrics import DEFAULT_METRIC, Metric, RecordType, find_metric, logit_metric
from analysis.select import EVERYTHING, Filters, check_filters, labels
from analysis.summaries import (
    GROUP,
    Axis,
    cells_sql,
    correlation_sql,
    fetch_rows,
    prompt_hotspots_sql,
    statistics_sql,
)

if TYPE_CHECKING:
    import duckdb

_BATCH = 64  # prompts per query: memory stays small, and row groups hold about ten prompts


@dataclass(frozen=True)
class Question:
    """What a report is asked for. Metrics are checked when the question is made."""

    metrics: tuple[Metric, ...]
    token_ids: tuple[int, ...] = ()
    logits: tuple[Metric, ...] = ()
    axis: Axis = "layer"
    top_n: int = 5
    min_logit: float = MIN_LOGIT
    filters: Filters = EVERYTHING

    @property
    def metric(self) -> Metric:
        """The first metric: what overviews are of."""
        return self.metrics[0]


@dataclass
class MetricPart:
    """One metric of one section. statistics: a row per layer or position; hotspots: rows of layer, position, token, value."""

    metric: str
    unit: str
    statistics: list[dict[str, Any]] = field(default_factory=list)
    hotspots: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Section:
    """One prompt and one comparison or pass.

    correlations: Pearson, of the first metric with each other one, over all cells; null where it has no meaning. tracked: a
    row per tracked token. changes: the cells where a tracked token's logit differs most. membership: how often the token ids
    asked for are among the k largest shifts.
    """

    pair: str
    capture: str
    prompt_idx: int
    variant: str
    label: str
    n_tokens: int
    n_tokens_before_trimming: int
    text: str
    metadata: dict[str, Any]
    metrics: list[MetricPart]
    correlations: list[dict[str, Any]] = field(default_factory=list)
    tracked: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    membership: list[dict[str, Any]] = field(default_factory=list)

    def row(self, record_type: RecordType) -> dict[str, Any]:
        """As one JSON object; the label is called what it is, comparison or run."""
        out = asdict(self)
        name = "comparison" if record_type == "pairwise" else "run"
        return {(name if k == "label" else k): v for k, v in out.items()}


def ask(
    con: duckdb.DuckDBPyConnection,
    record_type: RecordType = "pairwise",
    metrics: Sequence[str] = (),
    *,
    axis: Axis = "layer",
    top_n: int = 5,
    token_ids: Sequence[int] = (),
    logit_source: str = "diff",
    min_logit: float = MIN_LOGIT,
    filters: Filters = EVERYTHING,
) -> Question:
    """A checked question: raises QueryError for an unknown metric, filter, logit source or token that is not tracked.

    metrics: names; by default norm_diff for pairwise, norm for runs. min_logit: a logit change counts from this size on.
    """
    check_size("--min-logit", min_logit)
    names = list(dict.fromkeys(metrics)) or [DEFAULT_METRIC[record_type]]
    found = tuple(find_metric(record_type, name) for name in names)
    check_filters(con, filters, found[0])
    if record_type == "pairwise" and not labels(con, filters, found[0]):
        raise QueryError("no comparison in what is asked for, passes alone: --record-type runs is of them")
    ids = tuple(dict.fromkeys(int(i) for i in token_ids))
    logits = tuple(logit_metric(record_type, i, logit_source) for i in ids)
    for i in ids:
        check_tracked(con, i, filters)
    return Question(found, ids, logits, axis, top_n, min_logit, filters)


def make_report(con: duckdb.DuckDBPyConnection, question: Question, limit: int | None = None) -> Iterator[Section]:
    """The sections of a report, by pair, capture, prompt and comparison or pass; at most `limit`, None for all."""
    where, values = replace(question.filters, label=None).where("''")
    prompts = fetch_rows(con, f"SELECT * FROM prompts {where} ORDER BY pair, capture, prompt_idx, variant", values)
    known = {(r["pair"], r["capture"]): r for r in fetch_rows(con, "SELECT * EXCLUDE json FROM captures")}
    by_capture: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in prompts:
        by_capture[row["pair"], row["capture"]].append(row)
    made = 0
    for (pair, capture), rows in by_capture.items():
        filters = replace(question.filters, pair=pair, capture=capture)
        names = [name for name in labels(con, filters, question.metric) if filters.label in (None, name)]
        if not names:  # another pair has the one that is asked for
            continue
        metadata = {k: v for k, v in known.get((pair, capture), {}).items() if k in _METADATA and v is not None}
        while rows and (limit is None or made < limit):
            wanted = _BATCH if limit is None else min(_BATCH, -(-(limit - made) // max(1, len(names))))
            batch, rows = rows[:wanted], rows[wanted:]
            between = (batch[0]["prompt_idx"], batch[-1]["prompt_idx"])
            parts = _Parts(con, replace(question, filters=replace(filters, between=between)))
            for prompt in batch:
                for name in names:
                    if limit is not None and made >= limit:
                        return
                    made += 1
                    yield parts.section(prompt, str(name), metadata)


Rows = dict[tuple[Any, ...], list[dict[str, Any]]]  # by pair, capture, prompt, variant and label

_METADATA = ("base_model", "sft_model", "dtype", "mode", "device", "n_layers", "complete")


class _Parts:
    """The answers for one batch of prompts, by key; one query for each part of the report."""

    def __init__(self, con: duckdb.DuckDBPyConnection, question: Question) -> None:
        self.question = question
        self.metrics = (*question.metrics, *question.logits)
        self.statistics: list[Rows] = []
        self.hotspots: list[Rows] = []
        filters = question.filters
        where, values = replace(filters, label=None).where("''")
        sql = f"SELECT pair, capture, prompt_idx, variant, position, token FROM tokens {where}"
        self.tokens = {tuple(r[:-1]): r[-1] for r in con.execute(sql, values).fetchall()}
        for metric in self.metrics:
            cells, values = cells_sql(metric, filters)
            self.statistics.append(_by_key(fetch_rows(con, statistics_sql(cells, question.axis), values)))
            cells, values = cells_sql(metric, filters, twins=False)
            self.hotspots.append(_by_key(fetch_rows(con, prompt_hotspots_sql(cells, question.top_n), values)))
        self.correlations: list[tuple[str, dict[tuple[Any, ...], float | None]]] = []
        for other in question.metrics[1:]:
            cells, values = cells_sql(question.metric, filters, other)
            rows = fetch_rows(con, correlation_sql(cells), values)
            self.correlations.append((other.name, {tuple(r[k] for k in GROUP): r["correlation"] for r in rows}))
        self.tracked = _by_key(_tracked_rows(con, question))
        self.changes: Rows = {}
        self.membership: Rows = {}
        if question.metric.record_type == "pairwise":
            sql, values = changes_sql(
                filters, question.token_ids, question.min_logit, per_prompt=question.top_n, twins=False
            )
            self.changes = _by_key(fetch_rows(con, sql, values))
            if question.token_ids:
                sql, values = membership_sql(filters, question.token_ids)
                self.membership = _by_key(fetch_rows(con, sql, values))

    def section(self, prompt: dict[str, Any], label: str, metadata: dict[str, Any]) -> Section:
        key = (prompt["pair"], prompt["capture"], prompt["prompt_idx"], prompt["variant"], label)
        parts = []
        for i, metric in enumerate(self.metrics):
            part = MetricPart(metric.name, metric.unit, self.statistics[i].get(key, []), self.hotspots[i].get(key, []))
            self._name_tokens(key, [*part.statistics, *part.hotspots])
            parts.append(part)
        changes, membership = self.changes.get(key, []), self.membership.get(key, [])
        self._name_tokens(key, changes)
        first = self.question.metric.name
        return Section(
            pair=key[0],
            capture=key[1],
            prompt_idx=key[2],
            variant=key[3],
            label=label,
            n_tokens=prompt["n_tokens"],
            n_tokens_before_trimming=prompt["n_tokens_before_trimming"],
            text=prompt["text"],
            metadata=metadata,
            metrics=parts,
            correlations=[
                {"metric": first, "with": name, "correlation": found.get(key)} for name, found in self.correlations
            ],
            tracked=self.tracked.get(key, []),
            changes=changes,
            membership=membership,
        )

    def _name_tokens(self, key: tuple[Any, ...], rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if "position" in row:
                row["token"] = self.tokens.get((*key[:-1], row["position"]))


def _by_key(rows: list[dict[str, Any]]) -> Rows:
    out: Rows = defaultdict(list)
    for row in rows:
        out[tuple(row.pop(k) for k in GROUP)].append(row)
    return out


def _tracked_rows(con: duckdb.DuckDBPyConnection, question: Question) -> list[dict[str, Any]]:
    """Per prompt, label and tracked token its mean logits, and where it is (or changes) most."""
    metric, filters = question.metric, question.filters
    where, values = filters.where(metric.label)
    if metric.record_type == "runs":
        view, size = "tracked", "logit"
        means = "avg(logit) AS mean, min(logit) AS min, max(logit) AS max"
    else:
        view, size = "tracked_pairwise", "diff"
        means = "avg(base) AS base, avg(sft) AS sft, avg(diff) AS diff"
    hot = f"max(struct_pack(size := abs({size}), minus_layer := -layer, minus_position := -position, value := {size}))"
    return fetch_rows(
        con,
        f"SELECT * EXCLUDE (slot, hot), hot.value AS largest, -hot.minus_layer AS layer, -hot.minus_position AS position\n"
        f"FROM (\n"
        f"SELECT pair, capture, prompt_idx, variant, label, slot, token_id, name, {means}, {hot} AS hot\n"
        f"FROM (SELECT * RENAME (label AS name, {metric.label} AS label) FROM {view} {where})\n"
        f"WHERE isfinite({size})\nGROUP BY ALL\n)\nORDER BY pair, capture, prompt_idx, variant, label, slot",
        values,
    )
