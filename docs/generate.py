"""Write the generated pages of docs/: `make docs`. tests/test_docs.py fails when one of them is out of date."""

from __future__ import annotations

import sys
from pathlib import Path

import click

import pairscope
from analysis.tables_page import tables_page
from capture.config_page import config_page
from cluster.plan_page import hardware_page

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests" / name) for name in ("bench", "faults")]


def commands_page() -> str:
    """Every verb's --help, as a terminal of 80 columns shows it."""
    parts = ["# Commands", "", "Made by `make docs` from `pairscope VERB --help`.", ""]
    root = pairscope.cli
    settings = root.context_settings  # with -h, as the command line has it
    context = click.Context(root, info_name="pairscope", terminal_width=80, max_content_width=80, **settings)
    parts += ["```text", root.get_help(context), "```", ""]
    for verb in pairscope.VERBS:
        command = root.get_command(context, verb)
        assert command is not None, verb
        child = click.Context(command, info_name=verb, parent=context, terminal_width=80, max_content_width=80)
        parts += [f"## {verb}", "", "```text", command.get_help(child), "```", ""]
    return "\n".join(parts)


def benchmarks() -> str:
    """The page of what the benches measured, from docs/benchmarks.json."""
    from page import benchmarks_page

    return benchmarks_page()


def reliability() -> str:
    """The page of what the fault suite saw, from docs/reliability.json."""
    from reliability import reliability_page

    return reliability_page()


PAGES = {
    "benchmarks.md": benchmarks,
    "commands.md": commands_page,
    "config.md": config_page,
    "hardware.md": hardware_page,
    "reliability.md": reliability,
    "tables.md": tables_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
        print(f"docs/{name}")
