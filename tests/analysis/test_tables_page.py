"""The page of tables and views is up to date and says something of each column."""

from __future__ import annotations

from pathlib import Path

from analysis.tables_page import tables_page
from analysis.views import STORED_DOC, VIEWS
from capture.schema import TABLES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tables.md"


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == tables_page(), "run: python -m analysis.tables_page > docs/tables.md"


def test_every_view_and_column_has_a_doc_and_is_on_the_page() -> None:
    page = tables_page()
    for view in VIEWS:
        assert view.doc
        assert view.grain
        assert f"### {view.name}\n" in page
        for column in view.columns:
            assert column.doc.strip(), f"{view.name}.{column.name}"
            assert f"| `{column.name}` |" in page


def test_every_stored_table_says_what_it_is() -> None:
    assert {t.name for t in TABLES} == set(STORED_DOC)
