"""Prompts: variants, ids, trimming, tracked tokens, and ids that a model lacks. The tokenizers are made here, on the spot."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from capture.config import Entry
from capture.errors import CheckpointError, PromptError, UnsupportedModelError
from capture.prompts import check_ids, count_ids, load_tokenizer, token_texts, tokenize, tracked_tokens
from capture.variants import OPTIONS, VARIANTS, make_variant


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0..255), then 256 <|endoftext|> and 257 the merged pair "ab"; with `bos` 256 comes first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"<|endoftext|>": 256, "ab": 257}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "yes": 1, "no": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def entry(*prompts: str, **fields: Any) -> Entry:
    return Entry(name="e", base_model="b", sft_model="s", tokenizer="t", prompts=prompts, **fields)


# -- texts ------------------------------------------------------------------------------------------------------------


def test_texts_of_ids_are_those_of_each_alone_and_of_none_there_are_none() -> None:
    tokenizer = byte_tokenizer()
    ids = [257, 97, 32, 200, 256, 97]
    assert token_texts(tokenizer, ids) == {i: tokenizer.decode([i]) for i in ids}
    assert token_texts(tokenizer, []) == {}


# -- variants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "options", "text", "expected"),
    [
        ("identity", {}, " As is.", " As is."),
        ("mirror_halves", {}, "abcd", "cdab"),
        ("mirror_halves", {}, "abcde", "cdeab"),
        ("reverse_sentences", {}, "One. Two?  Three!", "Three! Two? One."),
        ("reverse_sentences", {}, 'He said "no." She left.', 'She left. He said "no."'),
        ("reverse_sentences", {}, "Pi is 3.14 or so.", "Pi is 3.14 or so."),
        ("symmetric_concat", {}, "abc", "abc cba"),
        ("symmetric_concat", {"separator": "|"}, "abc", "abc|cba"),
        ("base_prefixed", {}, "x", "[BASE] x"),
        ("sft_prefixed", {}, "x", "[SFT] x"),
        ("sft_prefixed", {"prefix": ">"}, "x", ">x"),
        ("dual_channel", {}, "x", "[BASE] x\n\n[SFT] x"),
        ("dual_channel", {"order": "sft_first", "sft_prefix": "S:"}, "x", "S:x\n\n[BASE] x"),
    ],
)
def test_each_variant_is_the_text_that_it_says(variant: str, options: dict[str, Any], text: str, expected: str) -> None:
    assert make_variant(text, variant, {variant: options}) == expected


def test_shuffling_is_drawn_from_the_seed_and_loses_nothing() -> None:
    text = "One. Two. Three. Four. Five. Six."
    orders = [make_variant(text, "shuffle_sentences", {"shuffle_sentences": {"seed": s}}) for s in range(4)]
    assert len(set(orders)) > 1
    assert all(sorted(o.split()) == sorted(text.split()) for o in orders)
    assert make_variant(text, "shuffle_sentences", {}) == orders[0]  # the default seed is 0


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=80))
def test_no_variant_fails_or_drops_a_visible_character(text: str) -> None:
    for variant in VARIANTS:
        made = make_variant(text, variant, {})
        assert not set("".join(text.split())) - set(made)


def test_options_belong_to_variants_that_exist() -> None:
    assert set(OPTIONS) <= set(VARIANTS)


# -- tokenising ------------------------------------------------------------------------------------------------------


def test_items_come_by_prompt_then_by_variant_with_the_ids_of_their_text() -> None:
    tokenizer = byte_tokenizer()
    made = tokenize(entry("abc", "Z", prompt_variants=("mirror_halves", "identity")), tokenizer)
    assert [(p.prompt_idx, p.variant, p.text) for p in made.items] == [
        (0, "mirror_halves", "bca"), (0, "identity", "abc"), (1, "mirror_halves", "Z"), (1, "identity", "Z")
    ]  # fmt: skip
    assert made.items[1].ids == (257, tokenizer.convert_tokens_to_ids("c"))
    assert (made.trimmed_to, made.n_tokens, made.longest) == (None, 7, 3)
    assert made.tokens[257] == "ab"


def test_special_tokens_are_added_only_where_the_config_lets_the_tokenizer() -> None:
    tokenizer = byte_tokenizer(bos=True)
    added = tokenize(entry("c"), tokenizer)
    assert added.items[0].ids[0] == 256
    assert added.special_ids == {256}
    bare = tokenize(entry("c", add_special_tokens=False), tokenizer)
    assert (len(bare.items[0].ids), bare.special_ids) == (1, frozenset())


def test_trimming_cuts_ids_to_the_shortest_of_all_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    with caplog.at_level(logging.INFO, logger="capture.prompts"):
        made = tokenize(entry("abab", "xyz", "defghi", trim_prompts=True), tokenizer)
    assert [len(p.ids) for p in made.items] == [2, 2, 2]  # abab is two tokens: by tokens, not by characters
    assert [p.n_tokens_before_trimming for p in made.items] == [2, 3, 6]
    assert [p.text for p in made.items] == ["abab", "xyz", "defghi"]
    assert made.items[1].ids == tuple(tokenizer("xyz")["input_ids"][:2])
    assert "Normalized 3 prompts to 2 tokens (longest was 6)" in caplog.messages


def test_bytes_that_are_no_text_alone_show_as_the_replacement_character() -> None:
    made = tokenize(entry("é"), byte_tokenizer())
    assert list(made.tokens.values()) == ["\ufffd", "\ufffd"]


def test_a_prompt_of_zero_tokens_names_index_place_and_variant() -> None:
    def mute(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": []}

    with pytest.raises(PromptError, match=r"prompt 0 \(p\.txt:1\), variant identity: no tokens"):
        tokenize(entry("a", "b", prompt_sources=("p.txt:1", "p.txt:7")), mute)


def test_an_empty_prompt_is_an_error_even_where_the_tokenizer_adds_a_token() -> None:
    with pytest.raises(PromptError, match=r"prompt 1 \(p\.txt:7\) is empty"):
        tokenize(entry("a", "", prompt_sources=("p.txt:1", "p.txt:7")), byte_tokenizer(bos=True))
    words = word_tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[UNK] $A", special_tokens=[("[UNK]", 0)]
    )
    assert words("  ")["input_ids"] == [0]
    with pytest.raises(PromptError, match=r"prompt 1 \(p\.txt:7\), variant identity: only white space"):
        tokenize(entry("yes", "  ", prompt_sources=("p.txt:1", "p.txt:7")), words)


def test_no_prompts_at_all_is_an_error() -> None:
    with pytest.raises(PromptError, match="entry 'e' has no prompts"):
        tokenize(entry(), byte_tokenizer())


# -- ids that a model lacks ------------------------------------------------------------------------------------------


def test_an_id_at_or_above_a_model_s_rows_names_token_id_and_model() -> None:
    made = tokenize(entry("xab", prompt_sources=("p.txt:3",)), byte_tokenizer())
    check_ids(made, {"base": 258, "sft": 300})
    with pytest.raises(PromptError, match=r"prompt 0 \(p\.txt:3\).*token 'ab' has id 257, but the sft model has 257"):
        check_ids(made, {"base": 300, "sft": 257})


def test_a_tracked_id_that_a_model_lacks_is_an_error_too() -> None:
    made = tokenize(entry("x"), byte_tokenizer())
    with pytest.raises(PromptError, match=r"tracked token 'pair' .*id 257, but the base model has 257 embedding rows"):
        check_ids(made, {"base": 257, "sft": 300}, [(257, "ab", "pair")])


# -- tracked tokens --------------------------------------------------------------------------------------------------


def test_tracked_tokens_are_ids_then_strings_then_the_map_each_once() -> None:
    tokenizer = byte_tokenizer()
    z = tokenizer.convert_tokens_to_ids("Z")
    tracked = entry(
        "x",
        tracked_token_ids=(257, 256, 257),
        tracked_token_strings=("Ġ", "ab"),
        interesting_token_map={"eos": "<|endoftext|>", "zed": "Z"},
    )
    space = tokenizer.convert_tokens_to_ids("Ġ")
    assert tracked_tokens(tracked, tokenizer) == [
        (257, "ab", "ab"), (256, "<|endoftext|>", "eos"), (space, "Ġ", "Ġ"), (z, "Z", "zed")
    ]  # fmt: skip


def test_a_row_that_the_tokenizer_never_uses_can_be_tracked() -> None:
    assert tracked_tokens(entry("x", tracked_token_ids=(300,)), byte_tokenizer()) == [(300, "", "300")]


def test_a_token_behind_a_gap_in_the_ids_keeps_its_name() -> None:
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "yes": 1, "no": 7}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    assert (len(tokenizer), count_ids(tokenizer)) == (3, 8)
    tracked = entry("x", tracked_token_ids=(7, 5, 8))
    assert tracked_tokens(tracked, tokenizer) == [(7, "no", "no"), (5, "", "5"), (8, "", "8")]


def test_a_string_that_is_not_one_token_shows_what_it_tokenises_to() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(
        PromptError, match=r"tracked_token_strings\[0\]: 'abc' is not one token.*tokenises to \['ab', 'c'\]"
    ):
        tracked_tokens(entry("x", tracked_token_strings=("abc",)), tokenizer)
    with pytest.raises(PromptError, match=r"interesting_token_map\.gap: ' ' .*; in the tokenizer's spelling it is 'Ġ'"):
        tracked_tokens(entry("x", interesting_token_map={"gap": " "}), tokenizer)
    with pytest.raises(PromptError, match="'maybe' is not one token"):
        tracked_tokens(entry("x", tracked_token_strings=("maybe",)), word_tokenizer())  # has an unknown token
    assert tracked_tokens(entry("x", tracked_token_strings=("[UNK]", "no")), word_tokenizer())[0][0] == 0


# -- loading ---------------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_is_loaded_with_the_entry_s_kwargs(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    made = entry("x").model_copy(update={"tokenizer": str(tmp_path), "tokenizer_kwargs": {"padding_side": "left"}})
    assert load_tokenizer(made).padding_side == "left"
    assert load_tokenizer(entry("x"), str(tmp_path)).eos_token == "<|endoftext|>"


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the tokenizer 't' cannot be loaded: ") as caught:
        load_tokenizer(entry("x"), str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_fine_tune_that_was_saved_without_a_tokenizer_is_told_to_name_one(tmp_path: Path) -> None:
    """Transformers says to install sentencepiece, which changes nothing."""
    for name in ("config.json", "model.safetensors", "special_tokens_map.json"):
        (tmp_path / name).write_text('{"model_type": "llama"}')
    with pytest.raises(
        CheckpointError, match="cannot be loaded: no file of a tokenizer is there; name one with `tokenizer:`"
    ):
        load_tokenizer(entry("x"), str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(entry("x"), str(tmp_path))
    assert "no file of a tokenizer" not in str(caught.value)


def test_a_tokenizer_with_code_of_its_own_is_refused_and_its_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Own", null]}}')
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer_kwargs: \{trust_remote_code: true\}"):
        load_tokenizer(entry("x"), str(tmp_path))
    assert not (tmp_path / "ran").exists()
