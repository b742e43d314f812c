"""Questions: DuckDB and pyarrow over what capture wrote. Never imports torch, ray, cluster or capture's engine.

import analysis
run = analysis.open("out/demo")
run.pairwise.filter("comparison = 'BB-SS'").aggregate("pair, layer, avg(kl_divergence) AS kl")     # a lazy DuckDB relation
run.arrow("FROM hotspots('kl_divergence', 10)")                              # a pyarrow.Table
run.grid("kl_divergence", comparison="BB-SS", prompt=0).values               # a numpy array, layers x tokens
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.errors import QueryError
    from analysis.grid import Grid, GridStack, stack
    from analysis.grids import (
        build_logit_grid,
        build_residual_grid,
        build_run_grid,
        build_run_logit_grid,
        build_topk_delta_grid,
    )
    from analysis.logits import relevant_logit_changes, tracked_token_trajectory
    from analysis.opened import Run, open
    from analysis.report import make_report
    from analysis.run import open_run, write_catalog
    from analysis.statistics import correlate_grids, layer_statistics, token_statistics
    from analysis.summaries import (
        available_residual_metrics,
        available_run_metrics,
        box_statistics,
        run_metric_hotspots,
        summarize_file_metrics,
        top_metric_hotspots,
    )
    from analysis.tables import export_rows

# module -> names, imported when first asked for: `pairscope --help` passes through here and must not load DuckDB
_WHERE = {
    "errors": ("QueryError",),
    "grid": ("Grid", "GridStack", "stack"),
    "grids": (
        "build_logit_grid", "build_residual_grid", "build_run_grid", "build_run_logit_grid", "build_topk_delta_grid",
    ),
    "logits": ("relevant_logit_changes", "tracked_token_trajectory"),
    "opened": ("Run", "open"),
    "report": ("make_report",),
    "run": ("open_run", "write_catalog"),
    "statistics": ("correlate_grids", "layer_statistics", "token_statistics"),
    "summaries": (
        "available_residual_metrics", "available_run_metrics", "box_statistics", "run_metric_hotspots",
        "summarize_file_metrics", "top_metric_hotspots",
    ),
    "tables": ("export_rows",),
}  # fmt: skip

__all__ = [
    "Grid",
    "GridStack",
    "QueryError",
    "Run",
    "available_residual_metrics",
    "available_run_metrics",
    "box_statistics",
    "build_logit_grid",
    "build_residual_grid",
    "build_run_grid",
    "build_run_logit_grid",
    "build_topk_delta_grid",
    "correlate_grids",
    "export_rows",
    "layer_statistics",
    "make_report",
    "open",
    "open_run",
    "relevant_logit_changes",
    "run_metric_hotspots",
    "stack",
    "summarize_file_metrics",
    "token_statistics",
    "top_metric_hotspots",
    "tracked_token_trajectory",
    "write_catalog",
]


def __getattr__(name: str) -> Any:
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"analysis.{module}"), name)
    raise AttributeError(f"module 'analysis' has no attribute '{name}'")
