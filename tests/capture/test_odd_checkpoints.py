"""A checkpoint that says odd things of itself: no capture of other weights than its id stands for, and one error, never a bug."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_pair, to_fp8
from transformers import AutoModelForCausalLM, PreTrainedModel

from capture.config import FOUR_PASSES, Entry
from capture.errors import CheckpointError, PairscopeError, UnsupportedModelError
from capture.files import resolve_model
from capture.layout import RunDir
from capture.run import capture_pair
from cluster.plan_models import directory_sizes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_pair("llama", tmp_path_factory.mktemp("models"), num_hidden_layers=2)


@pytest.fixture
def sft(made: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.sft, tmp_path / "sft"))


@pytest.fixture
def refused(made: Any, sft: Path, tmp_path: Path) -> Callable[..., str]:
    """The one line that a capture ends with."""

    def ask(tokenizer: Path = made.tokenizer, mode: str = "streamed") -> str:
        entry = Entry(name="a", base_model=str(made.base), sft_model=str(sft), tokenizer=str(tokenizer), device="cpu",
                      prompts=("a b",), top_k=3, mode=mode)  # fmt: skip
        with pytest.raises(PairscopeError) as caught:
            capture_pair(entry, str(tmp_path / "out"))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return ask


def say(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "named", [{"hidden_act": "bogus"}, {"rope_scaling": {"rope_type": "bogus"}, "rope_parameters": None}]
)
def test_a_name_in_a_config_that_the_library_does_not_know_is_told_as_that(
    sft: Path, refused: Callable[..., str], named: dict[str, Any]
) -> None:
    say(sft, **named)
    assert "looks for 'bogus' in vain, which its config.json names or lacks" in refused()


def test_weights_that_only_its_config_names_are_not_read(made: Any, sft: Path, refused: Callable[..., str]) -> None:
    shutil.copy(made.base / "model.safetensors", sft / "other.safetensors")
    outside = {"metadata": {}, "weight_map": {"lm_head.weight": str(made.base / "model.safetensors")}}
    (sft / "other.safetensors.index.json").write_text(json.dumps(outside))
    for name in ("other.safetensors", "other.safetensors.index.json", "adapter_model.bin", 5):
        say(sft, transformers_weights=name)
        assert "transformers_weights" in refused()
        with pytest.raises(UnsupportedModelError, match="transformers_weights"):
            resolve_model(str(sft))


@pytest.mark.parametrize("pickled", [False, True])
def test_an_adapter_beside_the_weights_is_left_out_where_the_library_would_apply_it(
    pickled: bool,
    made: Any,
    sft: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if pickled:
        torch.save(load_file(sft / "model.safetensors"), sft / "pytorch_model.bin")
        (sft / "model.safetensors").unlink()
    entry = Entry(name="a", base_model=str(made.base), sft_model=str(sft), tokenizer=str(made.tokenizer), device="cpu",
                  prompts=("a b",), top_k=3, allow_pickle=True)  # fmt: skip
    before = capture_pair(entry, str(tmp_path / "before"))
    applied = []
    for module in ("models.auto.auto_factory", "integrations.peft"):  # as if PEFT were installed
        monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: True)
    monkeypatch.setattr(PreTrainedModel, "load_adapter", lambda self, path, **_: applied.append(path))
    (sft / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/model"}))
    AutoModelForCausalLM.from_pretrained(sft)
    assert applied.pop() == sft
    after = capture_pair(entry, str(tmp_path / "after"))
    assert applied == []
    assert "the adapter beside its weights is left out" in caplog.text
    markers = [RunDir(str(tmp_path / o)).marker(r.path) for o, r in (("before", before), ("after", after))]
    assert markers[0]["files"] == markers[1]["files"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "x"), ("hidden_size", -1), ("num_hidden_layers", 0), ("num_attention_heads", 0), ("num_attention_heads", -2),
        ("num_key_value_heads", 0), ("vocab_size", 0), ("vocab_size", -1), ("pad_token_id", 10**9), ("head_dim", 0), ("dtype", []),
        ("rope_parameters", 5), ("quantization_config", 5), ("quantization_config", [1]), ("text_config", 5),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": "x"}),
    ],
)  # fmt: skip
def test_odd_values_of_a_config_are_one_line(sft: Path, refused: Callable[..., str], key: str, value: Any) -> None:
    say(sft, **{key: value})
    assert str(sft) in (said := refused()) or "Llama" in said or key in said
    with contextlib.suppress(PairscopeError):  # what a plan looks at may be in order
        directory_sizes(sft, "sft", "auto", source="here")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer.json", "model", {"type": "Odd"}), ("tokenizer.json", "pre_tokenizer", 5), ("tokenizer.json", "added_tokens", [{"id": -1}]),
        ("tokenizer.json", "normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("tokenizer_config.json", "model_max_length", "x"),
    ],
)  # fmt: skip
def test_odd_values_of_a_tokenizer_are_one_line(
    made: Any, tmp_path: Path, refused: Callable[..., str], file: str, key: str, value: Any
) -> None:
    tokenizer = Path(shutil.copytree(made.tokenizer, tmp_path / "tokenizer"))
    (tokenizer / file).write_text(json.dumps(json.loads((tokenizer / file).read_text()) | {key: value}))
    assert f"the tokenizer '{tokenizer}'" in refused(tokenizer)


def test_a_config_that_would_have_tuples_returned_is_read_like_any_other(made: Any, sft: Path, tmp_path: Path) -> None:
    say(sft, return_dict=False)
    entry = Entry(name="a", base_model=str(made.base), sft_model=str(sft), tokenizer=str(made.tokenizer), device="cpu",
                  prompts=("a b",), top_k=3)  # fmt: skip
    assert capture_pair(entry, str(tmp_path / "out")).state == "complete"


@pytest.mark.parametrize("nested", [False, True])
def test_weights_stored_in_a_way_that_the_library_does_not_know_are_not_read_without_their_scales(
    nested: bool, sft: Path, refused: Callable[..., str]
) -> None:
    """It warns of an unknown method, and then takes them for plain weights."""
    weights = load_file(sft / "model.safetensors")
    for key in [k for k in weights if k.endswith("proj.weight")]:
        weights[key], weights[f"{key}_scale"] = to_fp8(weights[key], None)
    save_file(weights, sft / "model.safetensors", metadata={"format": "pt"})
    stored = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    say(sft, **({"text_config": stored} if nested else stored))
    assert "is stored quantized by 'modelopt', which transformers" in refused(mode="auto")


def test_an_index_that_is_a_directory_is_named(sft: Path, refused: Callable[..., str]) -> None:
    (sft / "model.safetensors").unlink()
    (sft / "model.safetensors.index.json").mkdir()
    assert "'model.safetensors.index.json' cannot be read" in refused()


@pytest.mark.parametrize("mode", ["streamed", "sub-layer"])
def test_an_embedding_that_is_no_number_is_told_of_the_model_that_has_it(
    mode: str, made: Any, sft: Path, tmp_path: Path
) -> None:
    """Not of the architecture, nor of the other model, whose blocks are given it as well."""
    weights = load_file(sft / "model.safetensors")
    weights["model.embed_tokens.weight"][1, 5] = torch.nan  # <s>, which every prompt has
    save_file(weights, sft / "model.safetensors", metadata={"format": "pt"})
    entry = Entry(name="a", base_model=str(made.base), sft_model=str(sft), tokenizer=str(made.tokenizer), device="cpu",
                  prompts=("a b",), top_k=3, mode=mode)  # fmt: skip
    with pytest.raises(
        CheckpointError, match=r"^sft model '.*sft': its embedding of token 1 holds NaN or infinity in float32"
    ):
        capture_pair(entry, str(tmp_path / "out"))
    others = entry.model_copy(update={"passes": FOUR_PASSES[:2], "comparisons": ()})
    assert capture_pair(others, str(tmp_path / "out")).state == "complete"  # both begin with base's embeddings


@pytest.mark.parametrize("mode", ["streamed", "sub-layer"])
@pytest.mark.parametrize(
    ("arch", "spoil", "says"),
    [
        ("llama", lambda weights, key: {key: weights[key][:-1].clone()}, "has shape"),
        ("llama", lambda weights, key: {key: to_fp8(weights[key], None)[0]}, "is stored in FP8 without the scales"),
        ("llama", lambda weights, key: {key: (100 * weights[key]).to(torch.int8)}, "is stored as I8, which are codes of a quantized"),
        ("mixtral", lambda weights, key: {k: torch.zeros(3, 3) for k in weights if "layers.3" in k and "experts.1." in k}, "has shape"),
    ],
)  # fmt: skip
def test_what_headers_say_of_the_last_layer_ends_a_capture_before_the_first(
    arch: str, spoil: Callable[..., dict[str, torch.Tensor]], says: str, mode: str, tmp_path: Path
) -> None:
    paths = make_pair(arch, tmp_path / "pair")
    file = paths.sft / "model.safetensors"
    weights = load_file(file)
    save_file(weights | spoil(weights, "model.layers.3.self_attn.q_proj.weight"), file, metadata={"format": "pt"})
    entry = Entry(name="a", base_model=str(paths.base), sft_model=str(paths.sft), tokenizer=str(paths.tokenizer), device="cpu",
                  prompts=("a b",), top_k=3, mode=mode)  # fmt: skip
    stages = []
    with pytest.raises(CheckpointError, match=rf"sft model .*layers\.3\..* {says}"):
        capture_pair(entry, str(tmp_path / "out"), progress=lambda p: stages.append(p.stage))
    assert set(stages) == {"open"}
