"""What an error says of a name that is not there: the near ones, and what there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from analysis.errors import near, near_label


@pytest.mark.parametrize(
    ("name", "known", "says"),
    [
        ("nope", ["a", "b-lens", "c-nolens"], "There are: a, b-lens, c-nolens."),
        ("pydco", ["pydoc", "qwen"], "Did you mean 'pydoc'? There are: pydoc, qwen."),
        ("PyDoc", ["pydoc"], "Did you mean 'pydoc'?"),
        ("norm_dif", ["norm_diff", *(f"x{i}" for i in range(20))], "Did you mean 'norm_diff'?"),
        ("x", [], "There are none."),
    ],
)
def test_only_what_is_near_is_called_so_and_a_short_list_is_given_whole(name: str, known: list[str], says: str) -> None:
    assert near(name, known) == says


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("SS-BB", "There is 'BB-SS': the same two, with all signs turned"),
        ("bb-ss", "Did you mean 'BB-SS'?"),
        ("SB-BB", "There are: BB-SS, BS-SB."),
    ],
)
def test_no_other_comparison_is_near(name: str, says: str) -> None:
    assert near_label(name, ["BB-SS", "BS-SB"]).startswith(says)


def test_a_reversed_comparison_is_named_by_the_verbs(synthetic: Any, call: Callable[..., Any]) -> None:
    for verb in ("grid", "report"):
        answer = call(verb, synthetic.out, "--pair", "alpha", "--comparison", "SS-BB")
        assert answer.code == 2
        assert "no comparison 'SS-BB' here. There is 'BB-SS'" in answer.err


def test_an_unknown_column_is_compared_with_those_of_the_tables_asked(synthetic: Any, call: Callable[..., Any]) -> None:
    said = call("sql", synthetic.out, "SELECT nope FROM pairwise").err.splitlines()[-1]
    assert said.startswith("There are: base_run, capture, comparison, ")
    assert "node" not in said
    assert "entropy" not in said
