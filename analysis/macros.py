"""The table macros of a run directory: questions that are asked again and again, as SQL functions with names.

Each is a file of analysis/sql that holds one CREATE MACRO; its comment says what it gives. They are built on the views, so
any DuckDB client that opens a catalog has them too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.views import SQL_DIR, quote

if TYPE_CHECKING:
    import duckdb

# In an order in which each may use those before it: DuckDB binds a macro's body when it is created.
NAMES = (
    "latest",
    "cells_source",
    "cells",
    "run_grid",
    "pairwise_grid",
    "hotspots",
    "hotspots_z",
    "layer_profile",
    "token_profile",
    "decomposition",
    "decomposition_states",
    "edges",
)


@dataclass(frozen=True)
class Macro:
    """One macro. signature: its parameters with their defaults; doc: the comment of its file; statement: CREATE MACRO."""

    name: str
    signature: str
    doc: str
    statement: str
    is_table: bool


def macro(name: str) -> Macro:
    """The macro of that name, from its file."""
    text = (SQL_DIR / f"{name}.sql").read_text(encoding="utf-8").rstrip().removesuffix(";")
    lines = text.splitlines()
    comment = [line.removeprefix("--").removeprefix(" ") for line in lines if line.startswith("--")]
    statement = "\n".join(line for line in lines if not line.startswith("--"))
    found = re.match(r"CREATE OR REPLACE MACRO (\w+)\((.*?)\) AS (TABLE\s)?", statement)
    if found is None or found[1] != name:
        raise ValueError(f"analysis/sql/{name}.sql does not create the macro {name}")
    return Macro(name, f"{name}({found[2]})", "\n".join(comment), statement, bool(found[3]))


MACROS = tuple(macro(name) for name in NAMES)


def create_macros(con: duckdb.DuckDBPyConnection) -> None:
    """Create all macros; the views must be there."""
    for one in MACROS:
        con.execute(one.statement)


def comment_sql(one: Macro) -> str:
    """A COMMENT statement, so that any client shows the doc."""
    kind = "MACRO TABLE" if one.is_table else "MACRO"
    return f"COMMENT ON {kind} {one.name} IS {quote(f'{one.signature}: {one.doc}')}"
