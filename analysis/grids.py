"""Build layer x token grids from a run directory: of comparisons, of passes, of tracked logits and of top-k shifts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.errors import QueryError, near, near_label
from analysis.grid import Grid, GridStack, stack
from analysis.metrics import Metric, RecordType, find_metric, logit_metric
from analysis.select import EVERYTHING, Filters, labels, one_cell_set
from analysis.views import quote
from capture.errors import StoreError

if TYPE_CHECKING:
    import duckdb

_FLOORS = ("norm_diff", "norm_diff_relative", "cosine_distance")  # the metrics that captures measure a noise floor of
_PROVENANCE = (
    "base_model", "sft_model", "base_revision", "sft_revision", "tokenizer", "dtype", "lens_norm", "mode", "device", "gpu",
    "written", "path",
)  # fmt: skip


def grid_sql(metric: Metric) -> str:
    """The query of a grid's cells; its parameters are pair, capture, prompt, variant and comparison or pass."""
    return (
        f"SELECT layer, position, {metric.sql} AS value\n"
        f"FROM {metric.view}\n"
        f"WHERE pair = ? AND capture = ? AND prompt_idx = ? AND variant = ? AND {metric.label} = ?"
    )


def build_grid(con: duckdb.DuckDBPyConnection, metric: Metric, filters: Filters = EVERYTHING) -> Grid:
    """The grid of a metric; what the filters leave open is chosen as in select.one_cell_set."""
    chosen = one_cell_set(con, filters, metric)
    key = [chosen.pair, chosen.capture, chosen.prompt, chosen.variant]
    cells = con.execute(grid_sql(metric), [*key, chosen.label]).fetchnumpy()
    found = con.execute(
        "SELECT position, token, is_special FROM tokens WHERE pair = ? AND capture = ? AND prompt_idx = ? AND variant = ?",
        key,
    ).fetchall()
    texts = {position: (token, special) for position, token, special in found}
    if np.ma.is_masked(cells["layer"]) or np.ma.is_masked(cells["position"]):
        raise StoreError(
            f"'{chosen.label}' of pair '{chosen.pair}' has cells without a layer or position: its tables are not as written"
        )
    layers, rows = np.unique(cells["layer"], return_inverse=True)
    positions, columns = np.unique(cells["position"], return_inverse=True)
    values = np.full((len(layers), len(positions)), np.nan)
    values[rows, columns] = np.ma.filled(np.ma.asarray(cells["value"], dtype=np.float64), np.nan)
    provenance, n_layers, floors = _said(con, str(chosen.pair), str(chosen.capture))
    return Grid(
        values=values,
        layers=layers.astype(np.int64),
        positions=positions.astype(np.int64),
        tokens=tuple(texts.get(p, ("", False))[0] for p in positions.tolist()),
        special=tuple(bool(texts.get(p, ("", False))[1]) for p in positions.tolist()),
        metric=metric.name,
        unit=metric.unit,
        doc=metric.doc,
        pair=str(chosen.pair),
        capture=str(chosen.capture),
        prompt_idx=int(chosen.prompt or 0),
        variant=str(chosen.variant),
        label=str(chosen.label),
        n_layers=n_layers,
        floor=_floor(floors, metric, str(chosen.label), layers),
        provenance=provenance,
        sql=_filled(grid_sql(metric), [*key, chosen.label]),
    )


def _filled(sql: str, values: list[Any]) -> str:
    """The query with its parameters written in, to be pasted elsewhere."""
    first, *others = sql.split("?")  # all at once: a value may have a question mark of its own
    written = [quote(value) if isinstance(value, str) else str(value) for value in values]
    return first + "".join(value + part for value, part in zip(written, others, strict=True))


def _said(con: duckdb.DuckDBPyConnection, pair: str, capture: str) -> tuple[dict[str, Any], int | None, dict[str, Any]]:
    """What capture.json says of where the numbers come from, L, and the noise floor by pass, metric and layer."""
    sql = f"SELECT {', '.join(_PROVENANCE)}, n_layers, json FROM captures WHERE pair = ? AND capture = ?"
    rows = con.execute(sql, [pair, capture]).fetchall()
    if not rows:
        return {}, None, {}
    *known, n_layers, text = rows[0]
    provenance = {k: v for k, v in zip(_PROVENANCE, known, strict=True) if v is not None}
    said = json.loads(text or "{}").get("noise_floor") or {}
    return provenance, n_layers, said.get("by_run_and_layer") or {}


def _floor(floors: dict[str, Any], metric: Metric, label: str, layers: Any) -> Any:
    """[layers] the larger noise floor of a comparison's two passes, or None: as in the view pairwise_floor."""
    lists = [floors.get(run, {}).get(metric.name) for run in label.split("-")] if metric.name in _FLOORS else []
    known = [dict(enumerate(values, start=-1)) for values in lists if values]
    if metric.record_type != "pairwise" or not known:
        return None
    # numpy's maximum, as a state that overflows has NaN, which Python's takes or leaves by its place
    return np.array([np.max([k.get(int(layer), np.nan) for k in known]) for layer in layers], dtype=np.float64)


def build_stack(
    con: duckdb.DuckDBPyConnection, metric: Metric, filters: Filters = EVERYTHING, names: tuple[str, ...] = ()
) -> GridStack:
    """The grids of one prompt for several comparisons (or passes), all where none are named, as one array."""
    chosen = one_cell_set(con, filters, metric)
    known = labels(con, chosen, metric)
    for name in names:
        if name not in known:
            raise QueryError(f"no {metric.label} '{name}' here. {near_label(name, known)}")
    one = Filters(chosen.pair, chosen.capture, chosen.prompt, chosen.variant)
    return stack(tuple(build_grid(con, metric, one.with_label(name)) for name in names or known))


def build_residual_grid(
    con: duckdb.DuckDBPyConnection,
    metric: str = "norm_diff",
    *,
    pair: str | None = None,
    prompt: int | None = None,
    comparison: str | None = None,
    variant: str | None = None,
    capture: str | None = None,
) -> Grid:
    """The grid of a pairwise metric: by default BB-SS of the first pair's first prompt."""
    return build_grid(con, find_metric("pairwise", metric), Filters(pair, capture, prompt, variant, comparison))


def build_run_grid(
    con: duckdb.DuckDBPyConnection,
    metric: str = "norm",
    *,
    pair: str | None = None,
    prompt: int | None = None,
    run: str | None = None,
    variant: str | None = None,
    capture: str | None = None,
) -> Grid:
    """The grid of a pass's metric: by default BB of the first pair's first prompt."""
    return build_grid(con, find_metric("runs", metric), Filters(pair, capture, prompt, variant, run))


def build_logit_grid(
    con: duckdb.DuckDBPyConnection,
    token_id: int,
    source: str = "diff",
    *,
    record_type: RecordType = "pairwise",
    pair: str | None = None,
    prompt: int | None = None,
    label: str | None = None,
    variant: str | None = None,
    capture: str | None = None,
) -> Grid:
    """The grid of a tracked token's lens logit. source: base, sft or diff (base - sft); of no effect for a pass.

    label: the comparison, or the pass with record_type "runs". Raises QueryError for a token that is not tracked.
    """
    filters = Filters(pair, capture, prompt, variant, label)
    check_tracked(con, token_id, filters)
    return build_grid(con, logit_metric(record_type, token_id, source), filters)


def check_tracked(con: duckdb.DuckDBPyConnection, token_id: int, filters: Filters) -> None:
    """Raise a QueryError if no capture that the filters leave tracks this token."""
    where, values = Filters(filters.pair, filters.capture).where("''")
    rows = con.execute(f"SELECT DISTINCT token_id, label FROM tracked_tokens {where} ORDER BY 1", values).fetchall()
    if token_id not in [i for i, _ in rows]:
        there = f"There are {', '.join(f'{i} ({label})' for i, label in rows)}." if rows else "No tokens are."
        raise QueryError(f"token {token_id} is not tracked. {there} Name it in tracked_token_ids and capture again.")


def build_run_logit_grid(
    con: duckdb.DuckDBPyConnection,
    token_id: int,
    *,
    pair: str | None = None,
    prompt: int | None = None,
    run: str | None = None,
    variant: str | None = None,
    capture: str | None = None,
) -> Grid:
    """The grid of a tracked token's lens logit in a pass: by default BB of the first pair's first prompt."""
    return build_logit_grid(
        con, token_id, record_type="runs", pair=pair, prompt=prompt, label=run, variant=variant, capture=capture
    )


def build_topk_delta_grid(
    con: duckdb.DuckDBPyConnection,
    token_id: int,
    direction: Literal["increase", "decrease"] = "increase",
    *,
    pair: str | None = None,
    prompt: int | None = None,
    comparison: str | None = None,
    variant: str | None = None,
    capture: str | None = None,
) -> Grid:
    """Where a token, tracked or not, is among a cell's k largest logit shifts: its shift (sft_run - base_run), else NaN.

    direction: among the rises or among the falls, which are negative.
    """
    if direction not in ("increase", "decrease"):
        raise QueryError(f"no direction '{direction}'. {near(direction, ('increase', 'decrease'))}")
    column = f"{direction}d"
    metric = Metric(
        name=f"top-k {direction} {int(token_id)}",
        record_type="pairwise",
        view="(SELECT *, base_run || '-' || sft_run AS comparison FROM pairwise_topk)",
        sql=f"{column}[list_position({column}_ids, {int(token_id)})]::DOUBLE",
        label="comparison",
        unit="logit",
        doc=f"logit shift of token {int(token_id)} where it is among the k that {column} most, sft_run - base_run",
    )
    return build_grid(con, metric, Filters(pair, capture, prompt, variant, comparison))
