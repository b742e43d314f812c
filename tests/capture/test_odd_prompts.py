"""Prompts with anything in them: tokens, or one error that names the prompt."""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer

from capture.config import Entry
from capture.errors import PromptError
from capture.prompts import tokenize
from capture.variants import VARIANTS

TOKENIZER = make_tokenizer()


def entry(text: str) -> Entry:
    return Entry(
        name="a", base_model="b", sft_model="c", tokenizer="t", prompts=(text,), prompt_variants=tuple(VARIANTS)
    )


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "\x1b[2J\x9b",
        "\u202eabc",
        "\U0001f642" * 3,
        "e\u0301" * 100,
        "\ufeff",
        "a\u2028b",
        "שלום עולם",
        "a" * 100_000,
    ],
)
def test_odd_texts_are_tokenised_and_come_back_whole(text: str) -> None:
    found = tokenize(entry(text), TOKENIZER).items[0]
    assert TOKENIZER.decode(found.ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["", " \n\t", "\ud800", "a\udcff", "\udc00\ud800"])
def test_what_is_no_text_is_an_error_that_names_the_prompt(text: str) -> None:
    with pytest.raises(PromptError, match="prompt 0"):
        tokenize(entry(text), TOKENIZER)


def test_white_space_is_a_prompt_where_it_is_tokens() -> None:
    for text in (" ", "\n", " \t "):
        alone = entry(text).model_copy(update={"prompt_variants": ("identity",)})
        assert TOKENIZER.decode(tokenize(alone, TOKENIZER).items[0].ids, skip_special_tokens=True) == text
        with pytest.raises(PromptError, match=r"prompt 0 \(prompt 0\), variant reverse_sentences: only white space"):
            tokenize(entry(text), TOKENIZER)  # of which nothing is left


@settings(derandomize=True, deadline=None, database=None, max_examples=60, phases=[Phase.generate])
@given(st.text(st.characters(), max_size=40))
def test_any_text_in_every_variant_is_tokens_or_an_error_of_ours(text: str) -> None:
    try:
        items = tokenize(entry(text), TOKENIZER).items
    except PromptError:
        return
    assert len(items) == len(VARIANTS)
