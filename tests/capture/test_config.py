"""Loading a config: which file, what is an error and how it reads, what comes from the environment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from capture.config import Config, load_config
from capture.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def write(directory: Path, text: str, name: str = "c.yaml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def load(directory: Path, block: str, environ: dict[str, str] | None = None) -> Config:
    body = "".join(f"  {line}\n" for line in block.strip().splitlines())
    return load_config(write(directory, f"residual_compare:\n{body}"), environ or {})


def message(directory: Path, block: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(directory, block, environ)
    return str(caught.value)


SEED_SHAPED = """
model:
  name: gpt2
training: {epochs: 3, epochs_again: 4}
residual_compare:
  base_model: "gpt2"
  sft_model: "gpt2"
  tokenizer: "gpt2"
  tokenizer_kwargs: {}
  model_kwargs: {trust_remote_code: false}
  device: null
  dtype: "auto"
  top_k: 10
  prompts: ["One.", "Two."]
  prompt_file: null
  prompt_variants: ["identity", "dual_channel"]
  prompt_variant_options:
    dual_channel: {base_prefix: "B: ", sft_prefix: "S: ", order: "sft_first"}
    shuffle_sentences: {seed: 7}
  tracked_token_ids: [1, 2]
  tracked_token_strings: ["ĠYes"]
  interesting_token_map: {eos: "<|endoftext|>"}
  embedding_variants:
    - name: default
      base: {embedding_source: base, unembedding_source: base}
      sft: {embedding_source: sft, unembedding_source: sft}
  multi_pass:
    enabled: true
    runs:
      - {name: BB, model: base, embedding_source: base}
      - {name: BS, model: sft, embedding_source: base}
      - {name: SB, model: base, embedding_source: sft}
      - {name: SS, model: sft, embedding_source: sft}
    pairwise_differences: [["BB", "BS"], ["BB", "SS"]]
  model_sweep:
    - name: qwen-0.5b
      base_model: Qwen/Qwen2.5-0.5B
      sft_model: Qwen/Qwen2.5-0.5B-Instruct
      dtype: bf16
      estimated_vram_gb: 4
      notes: tiny
  local_run:
    enabled: false
    min_vram_gb: 24
    require_gpu_name_substring: "4090"
    cuda_device_index: 0
    allowed_pairs:
      - {base: gpt2, sft: gpt2, device: cuda, dtype: float16, notes: "a check"}
"""


def test_an_existing_file_of_the_block_s_full_shape_is_accepted(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SEED_SHAPED), {})
    entry = config.entry("qwen-0.5b")
    assert entry.dtype == "bfloat16"
    assert [c.name for c in entry.comparisons] == ["BB-BS", "BB-SS"]
    assert entry.interesting_token_map == {"eos": "<|endoftext|>"}
    assert config.entry("gpt2_to_gpt2").tokenizer == "gpt2"


def test_the_configs_that_ship_are_valid() -> None:
    for name in ("dev_config.yaml", "prod_config.yaml"):
        entries = load_config(ROOT / "configs" / name, {}).entries()
        assert [e.name for e in entries] == [
            "qwen-0.5b", "qwen-1.5b", "qwen-3b", "qwen-7b", "qwen-math-1.5b", "qwen-math-7b", "llama-3.1-8b"
        ]  # fmt: skip
        assert all(e.tokenizer == e.sft_model and e.dtype == "bfloat16" for e in entries)
    assert len(entries[0].prompts) == 24
    assert entries[0].trim_prompts


def test_a_key_s_error_names_file_line_key_value_and_what_was_expected(tmp_path: Path) -> None:
    text = message(tmp_path, "base_model: a\nsft_model: b\ntop_k: many")
    assert text == f"{tmp_path / 'c.yaml'}:4: residual_compare.top_k: got 'many'; expected a whole number"


def test_a_typo_gets_the_nearest_key_of_its_own_block(tmp_path: Path) -> None:
    text = message(tmp_path, "lens: {nrom: none}\nmodel_sweep:\n- {name: a, base_model: a, sft_modell: b}")
    assert "residual_compare.lens.nrom: unknown key (did you mean 'norm'?)" in text
    assert "residual_compare.model_sweep[0].sft_modell: unknown key (did you mean 'sft_model'?)" in text
    assert "residual_compare.model_sweep[0].sft_model: missing" in text


def test_all_errors_come_at_once_one_a_line_in_the_file_s_order(tmp_path: Path) -> None:
    lines = message(tmp_path, "top_k: 0\nlenz: 1\ndtype: fp31\ndevice: gpu").splitlines()
    assert [line.split(":")[1] for line in lines] == ["2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("top_k: yes", "got true; expected a number"),
        ("top_k: 1.5", "got 1.5; expected a whole number"),
        ("top_k: 0", "expected a number greater than or equal to 1"),
        ("prompts: one", "got 'one'; expected a list"),
        ("prompts: [1]", "prompts[0]: got 1; expected text"),
        ("lens: {norm: last}", "got 'last'; expected final or none"),
        ("lens: {layers: 0}", "lens.layers: got 0; expected all"),
        ("lens: {layers: [1, x]}", "lens.layers: got [1, 'x']; expected all"),
        ("noise_floor: perhaps", "got 'perhaps'; expected true or false"),
        ("dtype: fp31", "'fp31' is not a dtype; expected auto, float32"),
        ("device: cuda:x", "'cuda:x' is not a device; expected cpu, cuda"),
        ("lens: on", "lens: got true; expected keys and values"),
        ("1: 2", "residual_compare: the key 1 is not text"),
        ("prompt_variants: [mirror_halfs]", "did you mean 'mirror_halves'?"),
        ("prompt_variants: [identity, identity]", "names twice 'identity'"),
        ("prompt_variant_options: {shuffel_sentences: {}}", "did you mean 'shuffle_sentences'?"),
        ("prompt_variant_options: {shuffle_sentences: {sead: 1}}", "sead: unknown option (did you mean 'seed'?)"),
        ("prompt_variant_options: {shuffle_sentences: {seed: one}}", "got 'one'; expected a whole number"),
        ("prompt_variant_options: {dual_channel: {order: sft}}", "expected base_first or sft_first"),
        ("multi_pass: {runs: [BB, SS], pairwise_differences: [[BB, BS]]}", "names the run 'BS'; the runs are BB, SS"),
        ("multi_pass: {runs: [{name: BS, model: base}]}", "the run 'BS' is defined as BB"),
        ("multi_pass: {runs: [BB, BB]}", "two runs are named 'BB'"),
        ("multi_pass: {pairwise_differences: [[BB, BB]]}", "compares the run 'BB' with itself"),
        ("model_kwargs: {torch_dtype: float32}", "'torch_dtype' does not go here; use the key dtype"),
        (
            "model_kwargs: {adapter_kwargs: {}}",
            "'adapter_kwargs' does not go here: adapters are left out; merge it into",
        ),
        ("base_model: a", "sft_model is missing; a pair needs base_model and sft_model"),
        ("embedding_variants: []", "embedding_variants is empty"),
        ('top_k: "3"', "top_k: got '3'; expected a whole number"),
        ('gpus: "0.5"', "gpus: got '0.5'; expected a number"),
        ('noise_floor: "no"', "noise_floor: got 'no'; expected true or false"),
        ("spectrum: 1", "spectrum: got 1; expected true or false"),
        ('multi_pass: {enabled: "yes"}', "multi_pass.enabled: got 'yes'; expected true or false"),
        ('prompts: [x, ""]', "prompts[1]: got ''; expected text that is not empty"),
        ("device_memory_gib: .inf", "device_memory_gib: got Infinity; expected a finite number"),
        (
            "multi_pass: {runs: [BB, XX]}",
            "multi_pass.runs: 'XX' is not a run; expected a block, or one of BB, BS, SB, SS",
        ),
    ],
)
def test_a_wrong_value_says_what_was_expected(tmp_path: Path, block: str, expected: str) -> None:
    assert expected in message(tmp_path, block)


@pytest.mark.parametrize(
    ("kwargs", "key"),
    [(k, v) for k, vs in {
        "model_kwargs": ("variant", "subfolder", "gguf_file", "transformers_weights", "state_dict", "key_mapping", "use_safetensors",
                         "config"),
        "tokenizer_kwargs": ("subfolder", "gguf_file", "tokenizer_file", "vocab_file", "config"),
    }.items() for v in vs],
)  # fmt: skip
def test_kwargs_that_have_other_files_read_are_errors(tmp_path: Path, kwargs: str, key: str) -> None:
    expected = f"residual_compare.{kwargs}: '{key}' does not go here: it has other files read"
    assert expected in message(tmp_path, f"{kwargs}: {{{key}: x}}")
    entry = f"{{name: a, base_model: x, sft_model: y, {kwargs}: {{{key}: x}}}}"
    assert f"'{key}' does not go here" in message(tmp_path, f"model_sweep: [{entry}]")


def test_two_entries_of_one_name_are_an_error(tmp_path: Path) -> None:
    pair = "{name: a, base_model: x, sft_model: y}"
    assert "two entries named 'a'" in message(tmp_path, f"model_sweep: [{pair}, {pair}]")


def test_a_name_too_long_for_a_file_s_is_an_error(tmp_path: Path) -> None:
    name, model = "n" * 129, "m" * 90
    said = message(tmp_path, f"model_sweep: [{{name: {name}, base_model: x, sft_model: y}}]")
    assert "model_sweep[0].name: got 'nnn" in said
    assert said.endswith("expected at most 128 characters")
    with pytest.raises(ConfigError, match="list the pair in model_sweep, with a name"):
        load(tmp_path, f"base_model: org/{model}\nsft_model: org/{model}\nprompts: [x]").entries()


def test_null_means_the_default(tmp_path: Path) -> None:
    block = "base_model: a\nsft_model: b\nprompts: [x]\ndtype: null\ntop_k: null\nlens: {norm: null}\nmodel_sweep: null"
    entry = load(tmp_path, block).entry("a_to_b")
    assert (entry.dtype, entry.top_k, entry.lens.norm) == ("auto", 20, "final")


def test_null_under_an_unknown_key_is_still_an_error(tmp_path: Path) -> None:
    assert "residual_compare.top_q: unknown key (did you mean 'top_k'?)" in message(tmp_path, "top_q: null")


def test_a_key_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    text = message(tmp_path, "top_k: 3\nlens:\n  norm: none\n  norm: final")
    assert text.endswith(":5: residual_compare.lens.norm: the key is there already, at line 4")


def test_a_yaml_error_has_its_line_and_does_not_quote_it(tmp_path: Path) -> None:
    path = write(tmp_path, "residual_compare:\n  model_kwargs: {token: hf_abc\n  top_k: 3\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:3: YAML: ") as caught:
        load_config(path, {})
    assert "hf_abc" not in str(caught.value)


def test_a_missing_block_names_the_nearest_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no top-level key 'residual_compare' \(the nearest is 'residual_compar'\)"):
        load_config(write(tmp_path, "residual_compar: {}\nother: 1\n"), {})
    with pytest.raises(ConfigError, match="no top-level key 'residual_compare'"):
        load_config(write(tmp_path, ""), {})


def test_a_missing_file_names_the_nearest_beside_it(tmp_path: Path) -> None:
    write(tmp_path, SEED_SHAPED, "demo.yaml")
    with pytest.raises(ConfigError, match=r"no config file '.*dmeo\.yaml' \(did you mean 'demo\.yaml'\?\)"):
        load_config(tmp_path / "dmeo.yaml", {})
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path, {})


def test_secrets_in_kwargs_are_in_no_message_repr_or_record(tmp_path: Path) -> None:
    text = message(tmp_path, "tokenizer_kwargs: hf_abc\nmodel_kwargs: {token: 2020-01-01}")
    assert "hf_abc" not in text
    assert "2020" not in text
    block = (
        "base_model: a\nsft_model: b\nprompts: [x]\n"
        "model_kwargs: {token: hf_abc, nested: {api_secret: [hf_abc]}, attn_implementation: eager}\n"
        "tokenizer_kwargs: {use_auth_token: hf_abc, pad_token: <pad>}\n"
        "local_run: {allowed_pairs: [{base: a, sft: b, model_kwargs: {password: hf_abc}}]}"
    )
    config = load(tmp_path, block)
    entry = config.entry("a_to_b")
    assert entry.model_kwargs["token"] == "hf_abc"
    for shown in (repr(config), str(entry), json.dumps(entry.as_json())):
        assert "hf_abc" not in shown
        assert "eager" in shown
        assert "<pad>" in shown


def test_the_environment_replaces_keys_of_the_block(tmp_path: Path) -> None:
    environ = {
        "RESIDUAL_BASE_MODEL": "org/base",
        "RESIDUAL_SFT_MODEL": "org/sft",
        "RESIDUAL_TOKENIZER": "org/tok",
        "RESIDUAL_DEVICE": "cpu",
        "RESIDUAL_DTYPE": "fp32",
        "RESIDUAL_PROMPT_FILE": "p.txt",
        "RESIDUAL_TOKENIZER_KWARGS": '{"use_fast": true}',
        "RESIDUAL_MODEL_KWARGS": '{"attn_implementation": "eager"}',
    }
    write(tmp_path, "from the file\n", "p.txt")
    block = "base_model: a\nsft_model: b\ndtype: float16\ndevice: cuda"
    (entry,) = load(tmp_path, block, environ).entries()
    assert (entry.base_model, entry.sft_model, entry.tokenizer) == ("org/base", "org/sft", "org/tok")
    assert (entry.device, entry.dtype, entry.prompts) == ("cpu", "float32", ("from the file",))
    assert entry.tokenizer_kwargs == {"use_fast": True}
    assert entry.model_kwargs == {"attn_implementation": "eager"}


def test_an_error_from_the_environment_names_the_variable_and_not_the_value_of_kwargs(tmp_path: Path) -> None:
    assert message(tmp_path, "top_k: 3", {"RESIDUAL_DTYPE": "fp31"}).startswith(
        "RESIDUAL_DTYPE (environment): residual_compare.dtype: 'fp31' is not a dtype"
    )
    for text in ('{"token": "hf_abc"', '["hf_abc"]', '"hf_abc"'):
        error = message(tmp_path, "top_k: 3", {"RESIDUAL_MODEL_KWARGS": text})
        assert error.startswith("RESIDUAL_MODEL_KWARGS: ")
        assert "hf_abc" not in error


def test_an_empty_variable_counts_as_not_set(tmp_path: Path) -> None:
    config = load(tmp_path, "device: cpu", {"RESIDUAL_DEVICE": "", "RESIDUAL_MODEL_KWARGS": " "})
    assert config.settings.device == "cpu"


def test_overrides_of_the_pair_that_a_sweep_does_not_take_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = "model_sweep: [{name: a, base_model: x, sft_model: y}]"
    load(tmp_path, sweep, {"RESIDUAL_BASE_MODEL": "p", "RESIDUAL_SFT_MODEL": "q"})
    assert "RESIDUAL_BASE_MODEL, RESIDUAL_SFT_MODEL set the block's own pair" in caplog.text


def test_a_pair_from_the_environment_leaves_entries_the_tokenizer_that_the_file_has_for_them(tmp_path: Path) -> None:
    sweep = "prompts: [x]\ntokenizer: shared\nmodel_sweep: [{name: a, base_model: x, sft_model: y}]"
    environ = {"RESIDUAL_BASE_MODEL": "p/p", "RESIDUAL_SFT_MODEL": "q/q", "RESIDUAL_TOKENIZER": "t/t"}
    config = load(tmp_path, sweep, environ)
    assert (config.entry("a").tokenizer, config.entry("p_p_to_q_q").tokenizer) == ("shared", "t/t")
    own = "base_model: b\nsft_model: s\n" + sweep  # there it is the own pair's
    assert load(tmp_path, own, environ).entry("a").tokenizer == "y"


@pytest.mark.parametrize(
    ("mode", "name"),
    [(None, "dev"), ("True", "dev"), ("1", "dev"), ("YES", "dev"), ("False", "prod"), ("0", "prod"), ("", "dev")],
)
def test_dev_mode_chooses_the_config_from_the_current_directory_upwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None, name: str
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for stem in ("dev", "prod"):
        write(tmp_path / "configs", "residual_compare: {}\n", f"{stem}_config.yaml")
    monkeypatch.chdir(tmp_path / "deep" / "er")
    environ = {} if mode is None else {"DEV_MODE": mode}
    assert load_config(None, environ).path == tmp_path / "configs" / f"{name}_config.yaml"


def test_dev_mode_that_is_neither_true_nor_false_is_an_error() -> None:
    with pytest.raises(ConfigError, match="DEV_MODE is 'ture'; expected true or false"):
        load_config(None, {"DEV_MODE": "ture"})


def test_without_a_config_here_the_one_beside_the_package_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(None, {}).path == ROOT / "configs" / "dev_config.yaml"


def test_the_light_modules_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, capture.config, capture.prompts, capture.device, capture.files, capture.hub, capture.identity\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'safetensors', 'huggingface_hub', 'ray', 'duckdb'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
