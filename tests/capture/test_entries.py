"""From a config to entries: what is inherited, where paths start, which passes, which pairs may run, whose errors are whose."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from capture.config import Config, load_config
from capture.errors import ConfigError, PromptError

PAIR = "base_model: org/base\nsft_model: org/sft\nprompts: [x]\n"


def load(directory: Path, block: str) -> Config:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "c.yaml"
    path.write_text("residual_compare:\n" + "".join(f"  {line}\n" for line in block.splitlines()), encoding="utf-8")
    return load_config(path, {})


def test_a_sweep_takes_its_entries_and_a_single_pair_is_named_from_its_models(tmp_path: Path) -> None:
    sweep = "model_sweep:\n- {name: a, base_model: x, sft_model: y}\n- {name: b, base_model: x, sft_model: z}"
    config = load(tmp_path, PAIR + sweep)
    assert [e.name for e in config.entries()] == ["a", "b"]
    assert config.entry("org_base_to_org_sft").sft_model == "org/sft"
    assert [e.name for e in load(tmp_path, PAIR).entries()] == ["org_base_to_org_sft"]


def test_an_unknown_entry_names_the_near_one_and_lists_them(tmp_path: Path) -> None:
    config = load(tmp_path, PAIR + "model_sweep: [{name: qwen-7b, base_model: x, sft_model: y}]")
    with pytest.raises(
        ConfigError, match=r"no entry 'qwen7b' \(did you mean 'qwen-7b'\?\); entries: qwen-7b, org_base"
    ):
        config.entry("qwen7b")


def test_a_block_without_any_pair_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no pair; set base_model and sft_model, or list pairs in model_sweep"):
        load(tmp_path, "prompts: [x]").entries()


def test_an_entry_inherits_what_it_leaves_out(tmp_path: Path) -> None:
    block = (
        "prompts: [x]\ndtype: fp16\ndevice: cpu\nmode: streamed\ngpus: 0.5\nmodel_kwargs: {a: 1}\ntokenizer_kwargs: {b: 2}\n"
        "model_sweep:\n- {name: own, base_model: x, sft_model: y, dtype: bf16, device: cuda, mode: resident, gpus: 0, "
        "model_kwargs: {}, base_revision: r1, notes: n}\n- {name: bare, base_model: x, sft_model: y}"
    )
    own, bare = load(tmp_path, block).entries()
    assert (own.dtype, own.device, own.mode, own.gpus, own.model_kwargs) == ("bfloat16", "cuda", "resident", 0, {})
    assert (own.base_revision, own.sft_revision, own.notes) == ("r1", None, "n")
    assert (bare.dtype, bare.device, bare.mode, bare.gpus) == ("float16", "cpu", "streamed", 0.5)
    assert (bare.model_kwargs, bare.tokenizer_kwargs) == ({"a": 1}, {"b": 2})


def test_an_entry_may_have_statistics_and_a_memory_cap_of_its_own(tmp_path: Path) -> None:
    block = (
        "prompts: [x]\nlayers: 2\nlens: {norm: none}\nspectrum: true\ndevice_memory_gib: 8\nmodel_sweep:\n"
        "- {name: own, base_model: x, sft_model: y, layers: [0, 3], lens: {enabled: false}, spectrum: false, "
        "device_memory_gib: 4}\n- {name: bare, base_model: x, sft_model: y}"
    )
    own, bare = load(tmp_path, block).entries()
    assert (own.layers, own.lens.enabled, own.spectrum, own.device_memory_gib) == ((0, 3), False, False, 4)
    assert (bare.layers, bare.lens.norm, bare.spectrum, bare.device_memory_gib) == (2, "none", True, 8)


def test_the_home_of_nobody_is_no_directory(tmp_path: Path) -> None:
    where = r"c\.yaml: residual_compare\.{}: no {} '~nobody_here/m'"
    pair = "base_model: ~nobody_here/m\nsft_model: org/sft\nprompts: [x]\n"
    with pytest.raises(ConfigError, match=where.format("base_model", "directory")):
        load(tmp_path, pair).entries()
    with pytest.raises(ConfigError, match=where.format("prompt_file", "file")):
        load(tmp_path, PAIR + "prompt_file: ~nobody_here/m").entries()


def test_a_lens_none_of_whose_layers_is_captured_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"residual_compare\.lens\.layers: none of \[3\] is among layers, \[0, 1\]"):
        load(tmp_path, PAIR + "layers: [0, 1]\nlens: {layers: [3]}").entries()
    entry = "model_sweep: [{name: a, base_model: x, sft_model: y, layers: [0], lens: {layers: [3, 2]}}]"
    with pytest.raises(
        ConfigError, match=r"residual_compare\.model_sweep\[0\]\.lens\.layers: none of \[3, 2\] is among"
    ):
        load(tmp_path, "prompts: [x]\n" + entry).entries()
    load(tmp_path, PAIR + "layers: [0, 1]\nlens: {layers: [3], enabled: false}").entries()
    assert caplog.text == ""
    load(tmp_path, PAIR + "layers: [0, 1]\nlens: {layers: [1, 3, -1]}").entries()
    assert "org_base_to_org_sft: lens.layers names [3, -1], which layers leaves out: they get no lens" in caplog.text


def test_the_tokenizer_of_another_pair_is_not_inherited(tmp_path: Path) -> None:
    sweep = (
        "model_sweep: [{name: a, base_model: x, sft_model: y}, {name: b, base_model: x, sft_model: y, tokenizer: t}]\n"
    )
    a, b = load(tmp_path, PAIR + "tokenizer: gpt2\nbase_revision: r1\n" + sweep).entries()
    assert (a.tokenizer, b.tokenizer, a.base_revision) == ("y", "t", None)
    (a, _) = load(tmp_path, "prompts: [x]\ntokenizer: shared\n" + sweep).entries()
    assert a.tokenizer == "shared"


def test_an_entry_survives_pickling_and_cannot_be_changed(tmp_path: Path) -> None:
    (entry,) = load(tmp_path, PAIR).entries()
    assert pickle.loads(pickle.dumps(entry)) == entry
    with pytest.raises(ValueError, match="frozen"):
        entry.top_k = 3


# -- paths -----------------------------------------------------------------------------------------------------------


def test_a_directory_is_found_beside_the_config_then_up_to_the_project_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, here = tmp_path / "above" / "project", tmp_path / "here"
    for directory in (project / "configs" / "near", project / "mid", here / "far", tmp_path / "above" / "outside"):
        directory.mkdir(parents=True)
    (project / "pyproject.toml").touch()
    monkeypatch.chdir(here)
    block = "prompts: [x]\nmodel_sweep:\n- {name: a, base_model: near, sft_model: ./mid, tokenizer: far}\n"
    (entry,) = load(project / "configs", block).entries()
    assert entry.base_model == str(project / "configs" / "near")
    assert entry.sft_model == str(project / "mid")
    assert entry.tokenizer == str(here / "far")
    (entry,) = load(project / "configs", PAIR.replace("org/base", "outside")).entries()
    assert entry.base_model == "outside"  # above the project: a hub id


@pytest.mark.parametrize("value", ["./gone", "../gone", "/gone/model", "~/gone-model", "gone.safetensors", "a/b/c"])
def test_a_path_that_is_not_there_is_an_error(tmp_path: Path, value: str) -> None:
    block = f"prompts: [x]\nmodel_sweep:\n- {{name: a, base_model: org/x, sft_model: {value}}}\n"
    with pytest.raises(ConfigError, match=r"model_sweep\[0\]\.sft_model: no directory '"):
        load(tmp_path, block).entries()


def test_a_weight_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"is a file; name the directory that holds config\.json"):
        load(tmp_path, PAIR.replace("org/sft", "model.safetensors")).entries()


def test_an_entry_s_own_error_does_not_stop_the_others(tmp_path: Path) -> None:
    block = "prompts: [x]\nmodel_sweep:\n- {name: bad, base_model: ./gone, sft_model: y}\n- {name: good, base_model: x, sft_model: y}"
    config = load(tmp_path, block)
    (bad, error), (good, entry) = config.checked_entries()
    assert (bad, good) == ("bad", "good")
    assert isinstance(error, ConfigError)
    assert not isinstance(entry, ConfigError)
    with pytest.raises(ConfigError, match=r"\./gone"):
        config.entries()


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_of_the_file_come_first_and_know_their_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffone \r\n\r\n  \ntwo\u2028half\n".encode())
    block = PAIR.replace("[x]", "[three]") + "prompt_file: p.txt"
    (entry,) = load(tmp_path, block).entries()
    assert entry.prompts == ("one", "two\u2028half", "three")
    file = str(tmp_path / "p.txt")
    assert entry.prompt_sources == (
        f"{file}:1", f"{file}:4", f"{tmp_path / 'c.yaml'}: residual_compare.prompts[0]"
    )  # fmt: skip


def test_only_the_production_file_is_trimmed_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    for name in ("prod_prompts.txt", "other.txt"):
        (tmp_path / name).write_text("one\n")
    trims = []
    for name, more in (("prod_prompts.txt", ""), ("other.txt", ""), ("prod_prompts.txt", "\ntrim_prompts: false")):
        (entry,) = load(tmp_path, PAIR + f"prompt_file: {name}{more}").entries()
        trims.append(entry.trim_prompts)
    assert trims == [True, False, False]


def test_no_prompts_no_file_and_a_file_without_prompts_are_errors_of_the_whole_sweep(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    models = "base_model: a\nsft_model: b\n"
    with pytest.raises(PromptError, match="has no prompts; give prompts or prompt_file"):
        load(tmp_path, models).checked_entries()
    with pytest.raises(PromptError, match=r"has no prompts; 'empty\.txt' holds none"):
        load(tmp_path, models + "prompt_file: empty.txt").checked_entries()
    with pytest.raises(ConfigError, match=r"residual_compare\.prompt_file: no file 'gone\.txt'"):
        load(tmp_path, models + "prompt_file: gone.txt").checked_entries()
    with pytest.raises(ConfigError, match=r"cannot read '.*latin\.txt' as UTF-8"):
        load(tmp_path, models + "prompt_file: latin.txt").checked_entries()
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(ConfigError, match=r"'.*p\.jsonl' would be measured braces and all"):
        load(tmp_path, models + "prompt_file: p.jsonl").checked_entries()


# -- passes ----------------------------------------------------------------------------------------------------------


def test_multi_pass_compares_all_pairs_of_the_four_passes_by_default(tmp_path: Path) -> None:
    (entry,) = load(tmp_path, PAIR).entries()
    assert [c.name for c in entry.comparisons] == ["BB-BS", "BB-SB", "BB-SS", "BS-SB", "BS-SS", "SB-SS"]
    assert [(p.name, p.embeddings, p.model, p.unembedding) for p in entry.passes] == [
        ("BB", "base", "base", "base"),
        ("BS", "base", "sft", "sft"),
        ("SB", "sft", "base", "base"),
        ("SS", "sft", "sft", "sft"),
    ]
    assert entry.embedding_variants == {}


def test_without_multi_pass_there_is_one_comparison_per_embedding_variant(tmp_path: Path) -> None:
    variants = """multi_pass: {enabled: false}
embedding_variants:
- {name: default}
- {name: same, base: {embedding_source: base}, sft: {embedding_source: sft, unembedding_source: sft}}
- {name: sft_unembed, base: {unembedding_source: sft}}
- {name: base_embed, sft: {embedding_source: base}}
- {name: crossed, base: {embedding_source: sft, unembedding_source: sft}, sft: {unembedding_source: base}}
"""
    (entry,) = load(tmp_path, PAIR + variants).entries()
    assert entry.embedding_variants == {
        "default": "BB-SS",
        "same": "BB-SS",
        "sft_unembed": "BBS-SS",
        "base_embed": "BB-BS",
        "crossed": "SBS-SSB",
    }
    assert [c.name for c in entry.comparisons] == ["BB-SS", "BBS-SS", "BB-BS", "SBS-SSB"]
    assert [p.name for p in entry.passes] == ["BB", "SS", "BBS", "BS", "SBS", "SSB"]
    (entry,) = load(tmp_path, PAIR + "multi_pass: {enabled: false}").entries()
    assert entry.embedding_variants == {"default": "BB-SS"}


# -- local_run -------------------------------------------------------------------------------------------------------

GUARDED = (
    "prompts: [x]\ndtype: float32\nmodel_sweep:\n- {name: listed, base_model: x, sft_model: y, device: cpu, dtype: bf16}\n"
    "- {name: other, base_model: x, sft_model: z}\n"
    "local_run:\n  enabled: true\n  cuda_device_index: 1\n  allowed_pairs:\n"
)


def test_an_allowed_pair_runs_on_the_local_gpu_with_its_own_settings(tmp_path: Path) -> None:
    block = GUARDED + "  - {base: x, sft: y, dtype: fp16, tokenizer: t, model_kwargs: {a: 1}, tokenizer_kwargs: {b: 2}}"
    entry = load(tmp_path, block).entry("listed")
    assert (entry.device, entry.dtype, entry.tokenizer) == ("cuda:1", "float16", "t")
    assert (entry.model_kwargs, entry.tokenizer_kwargs) == ({"a": 1}, {"b": 2})
    assert load(tmp_path, GUARDED + "  - {base: x, sft: y, device: cuda}").entry("listed").dtype == "bfloat16"


def test_a_pair_that_is_not_listed_is_that_entry_s_error(tmp_path: Path) -> None:
    (_, listed), (_, other) = load(tmp_path, GUARDED + "  - {base: x, sft: y}").checked_entries()
    assert not isinstance(listed, ConfigError)
    assert isinstance(other, ConfigError)
    assert "local_run.allowed_pairs does not list the pair of 'other', 'x' and 'z'" in str(other)


def test_a_directory_is_the_same_pair_however_it_is_written(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    block = GUARDED + f"  - {{base: ./x, sft: {tmp_path}/y}}"
    assert load(tmp_path, block).entry("listed").device == "cuda:1"


def test_guards_that_contradict_themselves_are_an_error(tmp_path: Path) -> None:
    for device in ("cpu", "cuda:0"):
        with pytest.raises(ConfigError, match=rf"allowed_pairs\[0\]\.device is '{device}' but cuda_device_index is 1"):
            load(tmp_path, GUARDED + f"  - {{base: x, sft: y, device: {device}}}")
    with pytest.raises(ConfigError, match="allowed_pairs lists twice 'x -> y'"):
        load(tmp_path, GUARDED + "  - {base: x, sft: y}\n  - {base: x, sft: y}")


def test_guards_that_are_off_change_nothing(tmp_path: Path) -> None:
    block = GUARDED.replace("enabled: true", "enabled: false") + "  - {base: x, sft: y, dtype: fp16}"
    listed, other = load(tmp_path, block).entries()
    assert (listed.device, listed.dtype, other.device, other.dtype) == ("cpu", "bfloat16", None, "float32")
