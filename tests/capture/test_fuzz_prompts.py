"""Any prompts, from a file or from the config, in whatever bytes: tokens of just these texts, or one error of ours that can be printed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz_config import fuzz
from tiny import make_tokenizer

from capture.config import load_config
from capture.errors import PairscopeError, PromptError
from capture.printable import escape
from capture.prompts import Prompts, tokenize
from capture.run import capture_pair

TOKENIZER = make_tokenizer()
MILLION = 1_000_000
ODD = (
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f600", "\u202eevil\u202c", "שלום עולם", "مرحبا", "e\u0301" * 9, "\x1b[2J\x1b]0;title\x07",
    "a\x00b", "a\u2028b\u2029c\x85d", "\ufeffmark", "=1+1", "<script>alert(1)</script>", "'; DROP TABLE runs; --", "\ud7ff\ue000\uffff", "\U0010ffff",
)  # fmt: skip

signs = st.characters(exclude_categories=["Cs"])
lines = st.text(st.one_of(signs, st.sampled_from("\u202e\u2028\x00\x1b\r\ufeff \t\U0001f600\u05e9")), max_size=30)


def taken(config: Path) -> Prompts | str:
    """What a config's prompts come to, or the error, as the command line prints it."""
    try:
        (entry,) = load_config(config, {}).entries()
        return tokenize(entry, TOKENIZER)
    except PairscopeError as error:
        said = escape(str(error), keep="\n")
        assert said.encode()
        assert len(said) < 5000, "an error does not repeat a whole prompt"
        return said


def of_file(folder: Path, content: bytes) -> Prompts | str:
    (folder / "p.txt").write_bytes(content)
    (folder / "c.yaml").write_text("residual_compare: {base_model: org/a, sft_model: org/b, prompt_file: p.txt}")
    return taken(folder / "c.yaml")


@fuzz(150)
@given(st.one_of(st.binary(max_size=200), st.lists(lines, max_size=5).map(lambda some: "\n".join(some).encode())))
def test_a_file_of_any_bytes_is_its_lines_or_an_error(tmp_path: Path, content: bytes) -> None:
    found = of_file(tmp_path, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        assert isinstance(found, str)
        assert "p.txt' as UTF-8" in found
        return
    wanted = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line.strip()]
    if not wanted:
        assert isinstance(found, str)
        assert "has no prompts; 'p.txt' holds none" in found
        return
    assert isinstance(found, Prompts), found
    assert [p.text for p in found.items] == wanted


@fuzz(100)
@given(st.lists(lines, max_size=4), st.booleans())
def test_any_texts_in_the_config_are_taken_as_they_are_or_named(
    tmp_path: Path, texts: list[str], as_json: bool
) -> None:
    content: dict[str, Any] = {"residual_compare": {"base_model": "org/a", "sft_model": "org/b", "prompts": texts}}
    as_yaml = yaml.safe_dump(content, allow_unicode=True)
    (tmp_path / "c.yaml").write_text(json.dumps(content) if as_json else as_yaml, encoding="utf-8")
    found = taken(tmp_path / "c.yaml")
    if texts and all(texts):
        assert isinstance(found, Prompts), found
        assert [p.text for p in found.items] == texts
    else:
        assert isinstance(found, str)
        assert "no prompts" in found or "expected text that is not empty" in found


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \t\r\n", b"\xef\xbb\xbf", b"\xff\xfe" + "a".encode("utf-16-le")])
def test_files_without_a_prompt_are_said_to_have_none_or_to_be_no_utf8(tmp_path: Path, content: bytes) -> None:
    found = of_file(tmp_path, content)
    assert isinstance(found, str)
    assert "p.txt" in found


@pytest.mark.slow
def test_huge_files_are_read_and_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    found = of_file(tmp_path, "\U0001f600".encode() * MILLION)
    assert isinstance(found, Prompts)
    assert len(found.items[0].text) == MILLION
    found = of_file(tmp_path, b"a\n" * 20_000)
    assert isinstance(found, Prompts)
    assert len(found.items) == 20_000
    (tmp_path / "p.txt").unlink()
    os.mkfifo(tmp_path / "p.txt")  # a read would never end
    assert "no file 'p.txt'" in str(taken(tmp_path / "c.yaml"))
    (tmp_path / "c.yaml").write_text("residual_compare: {base_model: org/a, sft_model: org/b, prompt_file: /dev/zero}")
    assert "no file '/dev/zero'" in str(taken(tmp_path / "c.yaml"))


def captured(paths: Any, folder: Path, prompts: list[str], **more: Any) -> list[str]:
    """The texts of a capture of these prompts, from a config that is written as JSON."""
    block = {
        "base_model": str(paths.base), "sft_model": str(paths.sft), "tokenizer": str(paths.tokenizer), "device": "cpu",
        "prompts": prompts, "noise_floor": False,
    }  # fmt: skip
    (folder / "c.yaml").write_text(json.dumps({"residual_compare": block | more}))
    (entry,) = load_config(folder / "c.yaml", {}).entries()
    done = capture_pair(entry, str(folder / "out"))
    table = pq.read_table(Path(done.path) / "prompts.parquet", partitioning=None).sort_by("prompt_idx")
    return list(table["text"].to_pylist())


def test_odd_prompts_are_captured_and_come_back_whole(pairs: Any, tmp_path: Path) -> None:
    assert captured(pairs("llama"), tmp_path, list(ODD)) == list(ODD)


@pytest.mark.slow
def test_a_million_characters_are_captured_where_they_are_trimmed_and_refused_where_a_model_ends_before(
    pairs: Any, tmp_path: Path
) -> None:
    prompts = ["one", "a b " * (MILLION // 4)]
    assert captured(pairs("llama"), tmp_path, prompts, trim_prompts=True) == prompts
    with pytest.raises(PromptError, match="500002 tokens; the base model has positions for 256 only"):
        captured(pairs("gpt2"), tmp_path, prompts)
