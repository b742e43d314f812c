"""A run directory in a notebook: lazy relations, Arrow tables, grids.

import analysis
run = analysis.open("out/demo")
run.pairwise.filter("layer = 3").aggregate("comparison, avg(kl_divergence)")     # lazy: runs when shown
run.arrow("FROM hotspots('kl_divergence', 10)")                                  # a pyarrow.Table
run.grid("kl_divergence", comparison="BB-SS", prompt=0)                          # shows itself
run.stack("norm_diff", prompt=0).to_xarray()                                     # comparison x layer x position
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.errors import QueryError, near
from analysis.grid import Grid, GridStack
from analysis.grids import build_grid, build_stack, check_tracked
from analysis.metrics import choose_metric, find_metric
from analysis.query import check_query, explain
from analysis.run import open_run
from analysis.select import Filters
from analysis.views import BY_VIEW

if TYPE_CHECKING:
    import duckdb
    import pyarrow


def open(  # it is analysis.open
    out: str,
    *,
    include_partial: bool = False,
    lenient: bool = False,
    any_file: bool = False,
    all_captures: bool = False,
) -> Run:
    """Open the run directory `out` (a path or a URI) to ask it; nothing in it can be changed.

    lenient: leave out what is damaged or of another schema version, and say so in `Run.left_out`. any_file: let SQL read
    files outside `out` too. all_captures: not the newest capture of each pair alone; group by capture then. Raises
    QueryError, StoreError.
    """
    return Run(str(out), include_partial=include_partial, lenient=lenient, any_file=any_file, all_captures=all_captures)


class Run:
    """An open run directory, asked by SQL that only reads. left_out: what `lenient` left out, a sentence each."""

    def __init__(
        self, out: str, *, include_partial: bool, lenient: bool, any_file: bool, all_captures: bool = False
    ) -> None:
        self.out = out
        self.left_out: list[str] = []
        self._con: duckdb.DuckDBPyConnection = open_run(
            out,
            include_partial,
            lenient=lenient,
            left_out=self.left_out.append,
            sandbox=not any_file,
            all_captures=all_captures,
        )

    @property
    def views(self) -> list[str]:
        """The names of the tables and views; each is also an attribute: run.pairwise."""
        return sorted(BY_VIEW)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in BY_VIEW:
            raise AttributeError(f"no view '{name}'. {near(name, sorted(BY_VIEW))}")
        return self._con.table(name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *BY_VIEW]

    def sql(self, query: str) -> duckdb.DuckDBPyRelation:
        """One query that only reads, as a lazy relation: .arrow(), .show(), .df() (needs pandas), .pl() (needs polars)
        run it. Raises QueryError."""
        import duckdb

        check_query(self._con, query)
        try:
            return self._con.sql(query)
        except duckdb.Error as error:
            raise QueryError(explain(error, query)) from error

    def arrow(self, query: str) -> pyarrow.Table:
        """The answer to a query, or a whole view by its name, as a pyarrow.Table. Raises QueryError."""
        import duckdb

        relation = self._con.table(query) if query in BY_VIEW else self.sql(query)
        try:
            return relation.to_arrow_table()
        except duckdb.Error as error:
            raise QueryError(explain(error, query)) from error

    def grid(
        self,
        metric: str | None = None,
        *,
        pair: str | None = None,
        prompt: int | None = None,
        comparison: str | None = None,
        run: str | None = None,
        variant: str | None = None,
        capture: str | None = None,
        token_id: int | None = None,
        source: str = "diff",
    ) -> Grid:
        """One layer x token grid of a comparison, or of a pass with `run`; what is left open is the first there is.

        metric: by default kl_divergence, or norm with `run`. token_id: instead of a metric, the lens logit of this tracked
        token, and `source` base, sft or diff (base - sft).
        """
        chosen = choose_metric(metric, comparison=comparison, run=run, token_id=token_id, source=source)
        filters = Filters(pair, capture, prompt, variant, comparison or run)
        if token_id is not None:
            check_tracked(self._con, token_id, filters)
        return build_grid(self._con, chosen, filters)

    def stack(
        self,
        metric: str | None = None,
        *,
        pair: str | None = None,
        prompt: int | None = None,
        comparisons: tuple[str, ...] = (),
        variant: str | None = None,
        capture: str | None = None,
    ) -> GridStack:
        """The grids of all comparisons of one prompt (or of those named) as one labelled array."""
        chosen = find_metric("pairwise", metric or "kl_divergence")
        return build_stack(self._con, chosen, Filters(pair, capture, prompt, variant), tuple(comparisons))

    def close(self) -> None:
        """Close the connection."""
        self._con.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        pairs, captures = self._con.execute("SELECT count(DISTINCT pair), count(*) FROM captures").fetchall()[0]
        return f"<Run {self.out}: {captures} captures of {pairs} pairs; views: {', '.join(self.views)}>"

    def _repr_html_(self) -> str:
        from analysis.notebook import run_html

        return run_html(self)
