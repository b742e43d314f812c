"""A model's files on this machine: what is read, what is refused before work starts, and the fingerprint."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from capture.errors import CheckpointError, UnsupportedModelError
from capture.files import resolve_model, resolve_tokenizer
from capture.weights import Weights, fingerprint


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 8, generator=generator) for name in ("a.weight", "b.weight", "c.weight")}


def single(directory: Path, seed: int = 0, **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    save_file(tensors(seed), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def sharded(directory: Path) -> Path:
    single(directory)
    (directory / "model.safetensors").unlink()
    weights = tensors()
    names = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00001-of-00002.safetensors",
             "c.weight": "model-00002-of-00002.safetensors"}  # fmt: skip
    for file in set(names.values()):
        save_file({k: weights[k] for k, f in names.items() if f == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return directory


def test_a_single_file_checkpoint_is_found_with_its_bytes_and_keys(tmp_path: Path) -> None:
    files = resolve_model(str(single(tmp_path / "m")))
    assert (files.source, files.path, files.format) == ("local", str(tmp_path / "m"), "safetensors")
    assert files.weights == ("model.safetensors",)
    assert files.weight_bytes == 3 * 4 * 8 * 4
    assert files.weight_map == dict.fromkeys(tensors(), "model.safetensors")


def test_shards_come_in_order_with_the_index_s_map(tmp_path: Path) -> None:
    files = resolve_model(str(sharded(tmp_path / "m")))
    assert files.weights == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert files.weight_map["c.weight"] == "model-00002-of-00002.safetensors"
    assert files.weight_bytes == 3 * 4 * 8 * 4


def test_one_whole_file_wins_over_shards_as_in_transformers(tmp_path: Path) -> None:
    sharded(tmp_path / "m")
    assert resolve_model(str(single(tmp_path / "m"))).weights == ("model.safetensors",)


# -- files that are not whole ----------------------------------------------------------------------------------------


def refused(directory: Path, error: type[Exception] = CheckpointError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        resolve_model(str(directory), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    assert "the shard 'model-00002-of-00002.safetensors' of 2 is missing" in refused(tmp_path)


@pytest.mark.parametrize("change", [-1, -300, 3])
def test_a_shard_of_the_wrong_size_is_named_with_expected_and_actual_bytes(tmp_path: Path, change: int) -> None:
    file = sharded(tmp_path) / "model-00001-of-00002.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size + change)
    text = refused(tmp_path)
    assert str(file) in text
    assert f"{size + change} found" in text
    if change != -300:  # cut inside the header: what the whole file would be is not known
        assert f"{size} bytes expected" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is not a safetensors file (0 bytes)"),
        (b"\xff" * 64, "is not a safetensors file (64 bytes)"),
        ((40).to_bytes(8, "little") + b"{", "cut off inside its header: at least 48 bytes expected, 9 found"),
        ((2).to_bytes(8, "little") + b"}{", "corrupt safetensors header"),
        ((7).to_bytes(8, "little") + b'{"a":1}', "corrupt safetensors header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    ],
)
def test_what_is_no_safetensors_file_is_said(tmp_path: Path, content: bytes, expected: str) -> None:
    (single(tmp_path) / "model.safetensors").write_bytes(content)
    assert expected in refused(tmp_path)


def test_a_key_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path) / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["d.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(data))
    assert "model-00001-of-00002.safetensors' lacks the weight 'd.weight'" in refused(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_broken_index_is_an_error(tmp_path: Path, content: str) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json'" in refused(tmp_path)


# -- formats that are not read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "neither config.json nor weights"),
        (["config.json"], "no weights: neither model.safetensors nor model.safetensors.index.json"),
        (["config.json", "pytorch_model.bin"], "pickle can run any code when it is opened. Convert it once"),
        (["config.json", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], "or set allow_pickle: true"),
        (["config.json", "weights.pth"], "only pickled weights ('weights.pth')"),
        (["m.Q4_K_M.gguf"], "only GGUF weights ('m.Q4_K_M.gguf')"),
        (["big.nemo", "tokenizer.json"], "only a NeMo archive ('big.nemo')"),
        (["model_config.yaml", "model_weights"], "weights as zarr arrays"),
        (["params.json", "consolidated.00.pth"], "only consolidated weights"),
        (["params.json", "consolidated.safetensors"], "only consolidated weights"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter, not a model; merge it"),
        (["config.json", "model-00001-of-00002.safetensors"], "neither model.safetensors nor model.safetensors.index.json"),
    ],
)  # fmt: skip
def test_another_format_is_named_with_what_to_do(tmp_path: Path, names: list[str], expected: str) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    text = refused(tmp_path)
    assert str(tmp_path) in text
    assert expected in text


def test_weights_without_a_config_are_no_model(tmp_path: Path) -> None:
    (single(tmp_path) / "config.json").unlink()
    assert "weights but no config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(tmp_path)


def test_pickled_weights_are_taken_only_where_allowed(tmp_path: Path) -> None:
    (single(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 10)
    files = resolve_model(str(tmp_path), allow_pickle=True)
    assert (files.format, files.weights, files.weight_bytes) == ("pickle", ("pytorch_model.bin",), 10)


def test_code_of_its_own_is_refused_unless_allowed_or_not_needed(tmp_path: Path) -> None:
    own: dict[str, Any] = {"auto_map": {"AutoModelForCausalLM": "own.Own"}}
    text = refused(single(tmp_path / "odd", model_type="odd_one", **own), UnsupportedModelError)
    assert "(model type 'odd_one') runs code of its own" in text
    assert "model_kwargs: {trust_remote_code: true}" in text
    assert resolve_model(str(tmp_path / "odd"), trust_remote_code=True).weights
    assert resolve_model(str(single(tmp_path / "known", model_type="deepseek_v3", **own))).weights


def test_code_of_a_model_counts_where_it_may_run(tmp_path: Path) -> None:
    single(tmp_path, model_type="deepseek_v3")

    def revisions() -> list[str]:
        return [resolve_model(str(tmp_path), trust_remote_code=trusted).revision for trusted in (False, True)]

    ordinary = revisions()
    assert ordinary[0] == ordinary[1]
    (tmp_path / "modeling_own.py").write_text("# one")
    one = revisions()
    (tmp_path / "modeling_own.py").write_text("# two")
    two = revisions()
    assert one[0] == two[0] == ordinary[0]
    assert len({ordinary[1], one[1], two[1]}) == 3


# -- fingerprint -----------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    one = resolve_model(str(single(tmp_path / "one"))).revision
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "notes.txt").write_text("not a weight")
    os.utime(tmp_path / "two" / "model.safetensors", (1, 1))
    assert one.startswith("local:")
    assert resolve_model(str(tmp_path / "two")).revision == one
    assert resolve_model(str(single(tmp_path / "other", seed=1))).revision != one
    assert resolve_model(str(single(tmp_path / "config", rope_theta=1.0))).revision != one
    assert resolve_model(str(sharded(tmp_path / "shards"))).revision != one


def test_one_changed_bit_changes_the_full_fingerprint(tmp_path: Path) -> None:
    before = resolve_model(str(single(tmp_path))).revision
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert resolve_model(str(tmp_path)).revision != before


def test_a_large_checkpoint_is_sampled_and_its_times_count(tmp_path: Path) -> None:
    single(tmp_path)
    file, weights = tmp_path / "model.safetensors", Weights(("model.safetensors",))

    def sampled() -> str:
        return fingerprint(tmp_path, weights, full_hash_bytes=0)

    first = sampled()
    assert sampled() == first != fingerprint(tmp_path, weights)
    os.utime(file, (time.time(), 1))
    assert sampled() != first
    second = sampled()
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # the last tensor's end, within its sample
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert sampled() != second


def test_a_tokenizer_directory_is_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tok").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_tokenizer("tok") == str(tmp_path / "tok")
