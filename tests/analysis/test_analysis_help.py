"""The verbs' help: quick, and with examples that can be pasted."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import click
import pytest

import analysis
from pairscope import cli

VERBS = ("status", "sql", "catalog", "report", "grid", "import-json", "export-json")


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_in_an_example(verb: str, call: Callable[..., Any]) -> None:
    lines = call(verb, "--help").out.rstrip().splitlines()
    assert "Example:" in "\n".join(lines)
    assert f"pairscope {verb}" in lines[-1] or "duckdb.connect" in lines[-1]


@pytest.mark.parametrize("verb", VERBS)
def test_examples_are_calls_that_the_verb_understands(verb: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    for line in (command.epilog or "").splitlines():
        line = line.strip()
        if line.startswith("pairscope"):
            words = shlex.split(line.split(" < ")[0])[2:]
            command.make_context(verb, words)


def test_help_loads_neither_duckdb_nor_pyarrow() -> None:
    code = (
        "import sys, analysis.cli; "
        "sys.exit(bool({'duckdb', 'pyarrow', 'numpy', 'rich', 'matplotlib', 'torch', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_offers_what_it_lists() -> None:
    for name in analysis.__all__:
        assert getattr(analysis, name) is not None
    with pytest.raises(AttributeError):
        analysis.no_such_name  # noqa: B018


def test_analysis_imports_nothing_heavy_of_the_other_packages() -> None:
    code = (
        "import sys, importlib, pkgutil, analysis\n"
        "for m in pkgutil.iter_modules(analysis.__path__):\n"
        "    if m.name != '__main__': importlib.import_module('analysis.' + m.name)\n"
        "bad = {m for m in sys.modules if m.split('.')[0] in ('torch', 'ray', 'transformers', 'cluster')}\n"
        "bad |= {m for m in sys.modules if m.startswith('capture.')} - {'capture.' + n for n in ('schema', 'layout', 'errors', 'store', 'manifest', 'printable', 'process')}\n"
        "print(bad); sys.exit(bool(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
