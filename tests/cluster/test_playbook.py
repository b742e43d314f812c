"""docs/playbook.md: its Ray commands exist, its errors and rights are those of the code. pairscope's verbs: tests/test_docs.py."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from cluster.vast import errors, headkey

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/playbook.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def ray_commands() -> list[str]:
    """Lines of code blocks, a trailing backslash joined, and what stands in back quotes; without environment in front."""
    lines = [line for text in (TEXT, README) for line in text.replace("\\\n", " ").splitlines()]
    shown = [m for line in lines for m in re.findall(r"^(?:[A-Z_]+=\S+ )*(ray [a-z].*)$", line)]
    return sorted({*shown, *re.findall(r"`(ray [a-z][^`]*)`", TEXT)})


@pytest.mark.parametrize("line", ray_commands())
def test_a_command_of_rays_exists_with_its_options(line: str) -> None:
    import click
    from ray.scripts.scripts import cli

    words = shlex.split(line, comments=True)[1:]
    command: click.Command | None = cli
    while isinstance(command, click.Group) and words:
        command = command.get_command(click.Context(command), words.pop(0))
        assert command is not None, line
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}  # type: ignore[union-attr]
    ours = words[: words.index("--")] if "--" in words else words
    assert {w for w in ours if w.startswith("--")} <= options, line


def test_some_commands_were_found() -> None:
    verbs = {line.split()[1] for line in ray_commands()}
    assert {"up", "down", "dashboard", "exec", "job"} <= verbs


def test_every_error_that_it_explains_is_one_of_ours() -> None:
    named = set(re.findall(r"`([A-Z]\w+Error)`", TEXT))
    assert {"VastKeyError", "NoOfferError", "CapError", "VersionError", "NotGoneError"} <= named
    for name in named:
        assert hasattr(errors, name), name


def test_it_asks_for_the_rights_that_the_code_needs() -> None:
    for right in (*headkey.RIGHTS["api"], "user_write", "user_read"):
        assert f"`{right}`" in TEXT
    assert f"*{headkey.name('…')}*" in TEXT
    assert headkey.GIVEN in TEXT


def test_paths_and_keys_of_the_yaml_are_as_it_says() -> None:
    content = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    assert f"~/.pairscope/clusters/{content['cluster_name']}/auth_token" in TEXT
    assert f"--cluster {content['cluster_name']}" in TEXT
    for key in ("max_price_per_hour", "max_total_dollars", "max_hours", "boot_minutes", "head_silence_minutes"):
        assert f"`{key}`" in TEXT
        assert key in content["provider"]
    assert "`rtx4090-spot`" in TEXT
    assert "rtx4090-spot" in content["available_node_types"]
    assert f"({content['provider']['boot_minutes']:g} at most" in TEXT


def test_a_command_of_the_environment_comes_after_the_environment_in_each_terminal() -> None:
    installed = TEXT.index("make install && source")
    for command in ("vastai set api-key", "`hf auth login`", "pairscope doctor"):
        assert TEXT.index(command) > installed, command
    for block in re.findall(r"```sh\n(.*?)```", TEXT.split("## 5.")[1].split("Entries wait")[0], re.DOTALL):
        assert "source .venv/bin/activate" in block
    assert TEXT.split("## 5.")[1].count("VAST_API_KEY") == 2


def test_a_limit_can_be_raised_and_it_says_what_that_ends() -> None:
    (row,) = (line for line in TEXT.splitlines() if line.startswith("| a limit was reached |"))
    assert "restarts Ray" in row


def test_the_readme_leads_to_it() -> None:
    section = README.split("## Rented machines")[1].split("\n## ")[0]
    assert "(docs/playbook.md)" in section
