"""Questions: DuckDB and pyarrow over what capture wrote. Never imports torch, ray, cluster or capture's engine.

from analysis import open_run, build_residual_grid
con = open_run("out/demo")
con.sql("SELECT layer, avg(kl_divergence) FROM pairwise GROUP BY layer ORDER BY layer")
build_residual_grid(con, "kl_divergence", comparison="BB-SS").values
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.errors import QueryError
    from analysis.grids import Grid, build_logit_grid, build_residual_grid, build_run_grid, build_topk_delta_grid
    from analysis.report import make_report
    from analysis.run import open_run, write_catalog
    from analysis.statistics import correlate_grids, layer_statistics, token_statistics
    from analysis.summaries import box_statistics, run_metric_hotspots, top_metric_hotspots

# name -> module, imported when first asked for: `pairscope --help` passes through here and must not load DuckDB
_WHERE = {
    "QueryError": "analysis.errors",
    "Grid": "analysis.grids",
    "build_logit_grid": "analysis.grids",
    "build_residual_grid": "analysis.grids",
    "build_run_grid": "analysis.grids",
    "build_topk_delta_grid": "analysis.grids",
    "make_report": "analysis.report",
    "open_run": "analysis.run",
    "write_catalog": "analysis.run",
    "correlate_grids": "analysis.statistics",
    "layer_statistics": "analysis.statistics",
    "token_statistics": "analysis.statistics",
    "box_statistics": "analysis.summaries",
    "run_metric_hotspots": "analysis.summaries",
    "top_metric_hotspots": "analysis.summaries",
}

__all__ = [
    "Grid",
    "QueryError",
    "box_statistics",
    "build_logit_grid",
    "build_residual_grid",
    "build_run_grid",
    "build_topk_delta_grid",
    "correlate_grids",
    "layer_statistics",
    "make_report",
    "open_run",
    "run_metric_hotspots",
    "token_statistics",
    "top_metric_hotspots",
    "write_catalog",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'analysis' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)
