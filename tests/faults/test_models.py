"""Checkpoints that are not what they were, and tokenizers that are not the models'."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import invariants
import pytest
from entries import tiny_entry
from inject import damage
from tiny import PROMPTS, VOCAB, make_pair, make_tokenizer

from capture.errors import PromptError
from capture.run import capture_pair


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_pair("llama", tmp_path_factory.mktemp("models"), num_hidden_layers=2)


def test_a_local_shard_that_changed_since_the_last_run_makes_another_capture_beside_the_first(
    made: Any, told: Any, tmp_path: Path
) -> None:
    sft = shutil.copytree(made.sft, tmp_path / "sft")
    one = tiny_entry(made, sft_model=str(sft), prompts=PROMPTS[:1])
    first = capture_pair(one, str(tmp_path / "out"))
    assert capture_pair(one, str(tmp_path / "out")).state == "skipped"
    damage(sft / "model.safetensors", "flipped", 0.9)
    second = capture_pair(one, str(tmp_path / "out"))
    assert second.state == "complete"
    assert second.capture != first.capture
    assert invariants.wrong(tmp_path / "out", reported=invariants.complete(tmp_path / "out")) == []
    told(
        "shard-changed",
        sees="nothing: a capture of another id, beside the first",
        again="the capture, of the new bytes",
    )


def test_a_model_whose_own_tokenizer_makes_other_ids_is_told_and_one_that_makes_the_same_is_not(
    made: Any, told: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, sft = (shutil.copytree(path, tmp_path / path.name) for path in (made.base, made.sft))
    make_tokenizer().save_pretrained(sft)
    note = json.loads((sft / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages }}"}
    (sft / "tokenizer_config.json").write_text(json.dumps(note))  # other bytes, the same ids
    make_tokenizer().save_pretrained(base)
    whole = json.loads((base / "tokenizer.json").read_text())
    vocabulary = whole["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (base / "tokenizer.json").write_text(json.dumps(whole))
    one = tiny_entry(made, base_model=str(base), sft_model=str(sft), prompts=PROMPTS[:2])
    assert capture_pair(one, str(tmp_path / "out")).state == "complete"
    (warning,) = (r.getMessage() for r in caplog.records if "own tokenizer" in r.getMessage())
    assert re.search(
        r"the base model's own tokenizer makes other ids of prompt 0 .* from token \d+ on: \d+ \('", warning
    )
    told(
        "tokenizer-other",
        sees="the log warns: `the base model's own tokenizer makes other ids of prompt 0 …`",
        again="nothing",
    )


def test_a_tokenizer_that_is_larger_than_an_embedding_is_refused_by_the_token_that_a_model_lacks(
    made: Any, told: Any, tmp_path: Path
) -> None:
    large = make_tokenizer(VOCAB)
    large.add_tokens(["<extra>"])
    large.save_pretrained(tmp_path / "large")
    one = tiny_entry(made, tokenizer=str(tmp_path / "large"), prompts=("a b",))
    assert capture_pair(one, str(tmp_path / "out")).state == "complete", "a larger one is no harm by itself"
    with pytest.raises(PromptError) as refused:
        capture_pair(one.model_copy(update={"prompts": ("a b", "a <extra> b")}), str(tmp_path / "out"))
    assert f"prompt 1 (prompt 1), variant identity: token '<extra>' has id {VOCAB}, but the base model has {VOCAB} embedding rows" in str(refused.value)  # fmt: skip
    seen = "`PromptError: prompt 1 …: token '<extra>' has id 307, but the base model has 307 embedding rows; …`"
    told("tokenizer-larger", sees=seen, again="nothing: no work had begun")
