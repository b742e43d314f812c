"""Compare the tables of a capture with the reference, column by column, to the tolerances that pairscope promises."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from reference_statistics import Reference, Rows

KEYS = {
    "runs": ("prompt_idx", "run", "layer", "position"),
    "runs_topk": ("prompt_idx", "run", "layer", "position"),
    "pairwise": ("prompt_idx", "base_run", "sft_run", "layer", "position"),
    "pairwise_topk": ("prompt_idx", "base_run", "sft_run", "layer", "position"),
}
LOGIT = 1e-5  # absolute error of a float32 logit or log-probability of a few units


def read_tables(directory: str | Path) -> dict[str, pa.Table]:
    """The tables runs, pairwise, runs_topk and pairwise_topk of one capture directory, those that are there."""
    found = {}
    for table in KEYS:
        files = sorted([*Path(directory).glob(f"{table}-*.parquet"), *Path(directory).glob(f"{table}.parquet")])
        if files:
            found[table] = pa.concat_tables([_decoded(pq.read_table(file, partitioning=None)) for file in files])
    return found


def disagreements(reference: Reference, tables: Mapping[str, pa.Table], *, variant: str = "identity") -> list[str]:
    """What the tables of one variant have wrong, a line per column; empty where all agree with the reference."""
    wrong = [f"{table}: in one and not in the other" for table in sorted(reference.tables.keys() ^ tables.keys())]
    for table in sorted(reference.tables.keys() & tables.keys()):
        keys = KEYS[table]
        want, got = _sorted(reference.tables[table], keys), _sorted(_rows(tables[table], variant), keys)
        missing = [column for column in want if column not in got]
        if missing or any(list(want[key]) != list(got[key]) for key in keys):
            rows = f"{len(got['layer'])} rows for {len(want['layer'])}"
            wrong.append(f"{table}: other cells than expected ({rows}) or columns missing: {missing}")
        elif table.endswith("_topk"):
            wrong += [f"{table}.{problem}" for problem in _topk_problems(reference, want, got)]
        else:
            wrong += [f"{table}.{problem}" for problem in _scalar_problems(reference, want, got)]
    return wrong


def _scalar_problems(reference: Reference, want: Rows, got: Rows) -> list[str]:
    problems = []
    for column in [c for c in want if c not in KEYS["runs"] + KEYS["pairwise"]]:
        w, g = want[column].astype(float), got[column].astype(float)
        if g.size == 0 and w.size and np.isnan(w).all():
            continue  # lists of nulls and no list at all
        if w.shape != g.shape or (np.isnan(w) != np.isnan(g)).any():
            problems.append(f"{column}: null in other cells than expected, or another length")
            continue
        error = np.nan_to_num(np.abs(g - w))
        bad = error > np.nan_to_num(_allowed(column, want))
        if column.startswith("kl_"):
            bad |= g < 0
        if column == "top1_agree":
            bad &= ~_ties_at_the_top(reference, want)
        if bad.any():
            worst = np.unravel_index(np.argmax(np.where(bad, error, -1)), bad.shape)
            cell = {key: want[key][worst[0]] for key in KEYS["runs"] + KEYS["pairwise"] if key in want}
            problems.append(f"{column}: {bad.sum()} of {bad.size} off, at worst {g[worst]} for {w[worst]} at {cell}")
    return problems


def _allowed(column: str, want: Rows) -> np.ndarray:
    """The largest absolute error that each cell may have."""
    size = np.abs(want[column].astype(float))
    if column in ("norm", "norm_diff"):
        return 1e-6 * size
    if column == "norm_delta":  # a difference of two norms has the errors of both
        return 1e-6 * (want["norm"] + np.abs(want["norm"] - want["norm_delta"]))
    if column.startswith("cosine_distance"):  # 1e-6, and 1e-3 relative from 1e-6 up; what that leaves, 1e-9, below
        return np.minimum(1e-6, 1e-3 * np.maximum(size, 1e-6))
    if column.startswith("kl_"):  # 1e-3 relative from 1e-6 up; what that leaves, 1e-9, below
        return 1e-3 * np.maximum(size, 1e-6)
    if column == "top1_agree":
        return np.zeros_like(size)
    return np.full_like(size, LOGIT)  # entropy, next_token_logprob, tracked_logits


def _ties_at_the_top(reference: Reference, want: Rows) -> np.ndarray:
    """Cells where the two best tokens of either pass are too close to call."""
    close = np.zeros(len(want["layer"]), dtype=bool)
    for i, (p, layer, t) in enumerate(zip(want["prompt_idx"], want["layer"], want["position"], strict=True)):
        for run in (want["base_run"][i], want["sft_run"][i]):
            if (p, run, layer) in reference.logits:
                second, first = np.sort(reference.logits[p, run, layer][t])[-2:]
                close[i] |= first - second <= 2 * LOGIT
    return close


def _topk_problems(reference: Reference, want: Rows, got: Rows) -> list[str]:
    problems = []
    lists = [("ids", "logits")] if "ids" in want else [("increased_ids", "increased"), ("decreased_ids", "decreased")]
    for ids, values in lists:
        if want[ids].shape != got[ids].shape or want[ids].shape != got[values].shape:
            problems.append(f"{ids}: lists of another length than {want[ids].shape[1]}")
            continue
        reasons = [_topk_reason(reference, want, got, i, ids, values) for i in range(len(want["layer"]))]
        bad = [i for i, reason in enumerate(reasons) if reason]
        if bad:
            cell = {key: want[key][bad[0]] for key in KEYS["runs"] + KEYS["pairwise"] if key in want}
            problems.append(f"{ids}: {len(bad)} of {len(reasons)} off, the first at {cell}: {reasons[bad[0]]}")
    return problems


def _topk_reason(reference: Reference, want: Rows, got: Rows, i: int, ids: str, values: str) -> str | None:
    """Why one list is wrong, or None. An id may stand for another whose reference value is as good."""
    p, layer, t = want["prompt_idx"][i], want["layer"][i], want["position"][i]
    if ids == "ids":
        scores, allowed = reference.logits[p, want["run"][i], layer][t], LOGIT
    else:  # a shift has the errors of two logits
        first, second = (reference.logits[p, want[side][i], layer][t] for side in ("base_run", "sft_run"))
        scores, allowed = second - first, 2 * LOGIT
    w, g, chosen = want[values][i], got[values][i].astype(float), got[ids][i].astype(int)
    if len(set(chosen)) < len(chosen):
        return "an id twice"
    if chosen.min() < 0 or chosen.max() >= len(scores):
        return f"an id beyond {len(scores)}"
    if np.abs(g - scores[chosen]).max() > allowed:
        return f"{values} {g} where these ids have {scores[chosen]}"
    if np.abs(scores[chosen] - w).max() > 2 * allowed:
        return f"ids {chosen} instead of {want[ids][i]}"
    fall = np.diff(g) if ids == "decreased_ids" else -np.diff(g)
    if (fall < 0).any():
        return f"{values} out of order"
    if (np.diff(chosen)[fall == 0] < 0).any():
        return f"ids {chosen} with equal {values} not by rising id"
    return None


def _sorted(rows: Rows, keys: tuple[str, ...]) -> Rows:
    order = np.lexsort([rows[key].astype(str) if rows[key].dtype == object else rows[key] for key in reversed(keys)])
    return {column: values[order] for column, values in rows.items()}


def _rows(table: pa.Table, variant: str) -> Rows:
    """Columns as arrays: numbers as float64 with NaN for null, keys and ids as they are, lists as [rows, length]."""
    chosen = table.filter(pa.array([v == variant for v in table["variant"].to_pylist()]))
    rows: Rows = {}
    for name, column in zip(chosen.column_names, chosen.columns, strict=True):
        values = column.to_pylist()
        if pa.types.is_list(column.type):
            width = max((len(v) for v in values if v is not None), default=0)
            rows[name] = np.array([[np.nan] * width if v is None else v for v in values]).reshape(len(values), width)
        elif pa.types.is_string(column.type):
            rows[name] = np.array(values, dtype=object)
        elif pa.types.is_integer(column.type):
            rows[name] = np.array(values)
        else:
            rows[name] = np.array([np.nan if v is None else float(v) for v in values])
    return rows


def _decoded(table: pa.Table) -> pa.Table:
    """Dictionary-encoded columns as plain ones, so that files with different dictionaries go together."""
    fields = [pa.field(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in table.schema]
    return table.cast(pa.schema(fields))
