"""The documents tell the truth: generated pages are fresh, and every command shown exists with its options."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

import pairscope
from capture.settings import Settings

ROOT = Path(__file__).parent.parent
PAGES = runpy.run_path(str(ROOT / "docs/generate.py"))["PAGES"]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("**/*.md"))]
TEXTS += sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_up_to_date(name):
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == PAGES[name](), "run: make docs"


def shown_commands():
    """(file, command line) of every pairscope command in the documents."""
    for path in TEXTS:
        for line in re.findall(
            r"^[ #]*`?(pairscope [a-z].*?)(?:`.*)?$", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            yield path.name, line
        for line in re.findall(r"`(pairscope [a-z][^`\n]*)`", path.read_text(encoding="utf-8")):
            yield path.name, line


@pytest.mark.parametrize(("file", "line"), sorted(set(shown_commands())))
def test_a_command_shown_exists_with_its_options(file, line):
    words = shlex.split(line, comments=True)
    if words[1] == "VERB":
        return
    command = pairscope.cli.get_command(None, words[1])
    assert command is not None, f"{file}: no verb {words[1]}"
    if isinstance(command, pairscope.click.Group) and len(words) > 2:
        command = command.get_command(None, words[2])
        assert command is not None, f"{file}: no {words[1]} {words[2]}"
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    for word in words[2:]:
        if re.match(r"--?[a-z]", word):
            assert word.split("=")[0] in options, f"{file}: {line}"


def test_no_shown_query_takes_one_mean_over_several_comparisons():
    shown = [
        pairscope.cli.get_help(pairscope.click.Context(pairscope.cli)),
        (ROOT / "Makefile").read_text(),
        *(t.read_text() for t in TEXTS),
    ]
    shown += [(ROOT / "analysis/query.py").read_text(), (ROOT / "analysis/cli.py").read_text()]
    queries = [
        q
        for text in shown
        for q in re.findall(r"SELECT[^;\"`]*?avg\(kl_divergence\)[^;\"`]*", text)
        if "FROM pairwise" in q
    ]
    assert len(queries) >= 8
    for query in queries:
        assert re.search(r"comparison = .{0,3}'BB-SS|GROUP BY (\w+, )*comparison", query), query
        assert re.search(r"pair = |SELECT pair|GROUP BY (\w+, )*pair|prompt_idx = ", query), query


def test_every_verb_says_what_it_does_and_shows_an_example():
    for verb in pairscope.VERBS:
        command = pairscope.cli.get_command(None, verb)
        assert command.help, verb
        text = command.get_help(pairscope.click.Context(command, info_name=verb))
        assert f"pairscope {verb}" in text.split("Example")[-1], f"{verb} --help has no example"


def test_the_configs_of_the_readme_are_valid():
    for block in re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL):
        Settings(**yaml.safe_load(block)["residual_compare"])


def test_every_page_is_found_from_the_readme():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert linked == {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}


def test_links_between_documents_lead_somewhere():
    for path in (p for p in TEXTS if p.suffix == ".md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
