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
LOGIT = 1e-5  # absolute error of an entropy, and of a float32 logit or log-probability up to 10


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
    if column == "entropy":
        return np.full_like(size, LOGIT)
    return LOGIT * np.maximum(1, size / 10)  # next_token_logprob, tracked_logits


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
    lists = [("ids", "logits")] if "ids" in want else [("increased_ids", "increased"), ("decreased_ids", "decreased")]
    cells = list(zip(want["prompt_idx"], want["layer"], want["position"], strict=True))
    sides = ["run"] if "ids" in want else ["base_run", "sft_run"]
    sources = [
        np.stack([reference.logits[p, run, layer][t] for run, (p, layer, t) in zip(want[side], cells, strict=True)])
        for side in sides
    ]
    scores = sources[-1] - sources[0] if len(sources) > 1 else sources[0]
    # float32 logits; a shift has the errors of two of them
    allowed = sum(LOGIT * np.maximum(1, np.abs(source).max(1, keepdims=True) / 10) for source in sources)
    problems = []
    for ids, values in lists:
        if want[ids].shape != got[ids].shape or want[ids].shape != got[values].shape:
            problems.append(f"{ids}: lists of another length than {want[ids].shape[1]}")
            continue
        faults = _topk_faults(
            scores, allowed, want[values], got[ids].astype(int), got[values], falling=ids != "decreased_ids"
        )
        for fault, bad in faults.items():
            if bad.any():
                row = int(np.argmax(bad))
                problems.append(f"{ids}: {fault} in {bad.sum()} of {len(bad)} lists: {got[ids][row]} {got[values][row]} for "
                                f"{want[ids][row]} {want[values][row]} at {cells[row]}")  # fmt: skip
                break
    return problems


def _topk_faults(
    scores: np.ndarray, allowed: np.ndarray, want: np.ndarray, ids: np.ndarray, values: np.ndarray, *, falling: bool
) -> dict[str, np.ndarray]:
    """What is wrong with which of N lists: scores [N, V], allowed [N, 1], the others [N, K]; bool [N] by fault.

    An id may stand for another whose score is as good; equal values stand by rising id.
    """
    beyond = (ids < 0) | (ids >= scores.shape[1])
    found = np.take_along_axis(scores, np.where(beyond, 0, ids), axis=1)
    ahead = np.diff(values) if not falling else -np.diff(values)
    return {
        "an id that may not be there": beyond.any(1),
        "an id twice": (np.diff(np.sort(ids)) == 0).any(1),
        "values that are not those of the ids": (np.abs(values - found) > allowed).any(1),
        "other ids": (np.abs(found - want) > 2 * allowed).any(1),
        "values out of order": (ahead < 0).any(1),
        "equal values not by rising id": ((ahead == 0) & (np.diff(ids) < 0)).any(1),
    }


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
