"""The page docs/tables.md, made from the declared tables and views: `python -m analysis.tables_page > docs/tables.md`."""

from __future__ import annotations

from analysis.macros import MACROS
from analysis.views import CAPTURES, DUCKDB_TYPES, MANIFEST_VIEW, SQL_VIEWS, STORED_VIEWS, View

_INTRO = """\
# Tables and views

Generated from `capture/schema.py` and `analysis/views.py` by `python -m analysis.tables_page > docs/tables.md`; do not edit.

`pairscope sql OUT "SELECT ..."` asks them; `pairscope catalog OUT` writes them into a `.duckdb` file for any client.
Only complete captures are in them; `--include-partial` adds the others, for which `captures.complete` is false.

Words: a *pass* (`run`) is one way through the pair, named by whose embeddings and whose blocks it takes: BB, BS, SB, SS.
A *comparison* is an ordered pair of passes, `BB-SS`: `base_run` and `sft_run`. Signs: `norm_delta` and `entropy_delta` of a
comparison and `diff` of a tracked logit are base minus sft; the shifts of top-k lists are sft minus base.
Layer -1 is the state that enters block 0, layers 0 to L-1 are the outputs of the blocks before any final norm, and layer L
is the last block's output after the final norm. Norms are in residual units, entropies and divergences in nats, logits raw.
"""


def tables_page() -> str:
    """The page in Markdown."""
    parts = [
        _INTRO,
        "## Stored tables\n\nParquet files of each capture. Columns marked *derived* are computed by the view.\n",
        *(_section(view) for view in STORED_VIEWS),
        "## Views over several tables\n",
        *(_section(view) for view in SQL_VIEWS),
        "## Captures and attempts\n",
        *(_section(view) for view in (CAPTURES, MANIFEST_VIEW)),
        "## Macros\n\nFunctions to ask with: `FROM hotspots('kl_divergence', 10)`. [sql.md](sql.md) shows them at work.\n",
        *(f"### {m.name}\n\n```text\n{m.signature}\n\n{m.doc}\n```\n" for m in MACROS),
    ]
    return "\n".join(parts)


def _section(view: View) -> str:
    lines = [f"### {view.name}", "", f"{view.doc[0].upper()}{view.doc[1:]}. One row per {view.grain}.", ""]
    lines += ["| column | type | unit | meaning |", "|---|---|---|---|"]
    for column in view.columns:
        kind = DUCKDB_TYPES[column.type] + (", may be null" if column.nullable else "")
        derived = " *(derived)*" if column.name in view.derived else ""
        doc = column.doc.replace("|", "\\|")
        lines.append(f"| `{column.name}` | {kind} | {column.unit} | {doc}{derived} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(tables_page(), end="")
