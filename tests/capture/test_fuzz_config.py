"""Any config, however odd: it loads, or it is one of our errors that names the file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from capture.config import ENV_OVERRIDES, load_config
from capture.entries import Entry
from capture.errors import ConfigError
from capture.printable import escape
from capture.settings import Settings


def fuzz(examples: int) -> settings:
    """The same examples every time, small enough as they come; a folder that they share is no matter here."""
    calm = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(
        derandomize=True, deadline=None, database=None, max_examples=examples, suppress_health_check=calm, phases=[Phase.generate]
    )  # fmt: skip


WHOLE: dict[str, Any] = {
    "base_model": "org/base",
    "sft_model": "org/sft",
    "tokenizer_kwargs": {"use_fast": True},
    "model_kwargs": {"attn_implementation": "eager"},
    "prompts": ["one", "two"],
    "prompt_variants": ["identity"],
    "prompt_variant_options": {},
    "tracked_token_ids": [1, 2],
    "interesting_token_map": {"label": "token"},
    "embedding_variants": [{"name": "default"}],
    "multi_pass": {"enabled": True},
    "model_sweep": [
        {"name": "a", "base_model": "org/base", "sft_model": "org/sft", "spans": {"layers": 2}, "lens": {"layers": [0, 1]}},
        {"name": "b", "base_model": "org/base", "sft_model": "org/sft", "tensor_parallel": 2, "mode": "streamed"},
    ],
    "local_run": {"enabled": False, "allowed_pairs": [{"base": "org/base", "sft": "org/sft"}]},
    "lens": {"norm": "final", "layers": 2},
    "layers": "all",
    "batching": {"padding": "right", "max_tokens": 64},
    "output": {"compression_level": 3},
    "spans": {"seconds": 300, "workers": 1},
    "device_memory_gib": 1.5,
}  # fmt: skip

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.dates(), st.datetimes(), st.binary(max_size=8), text,
    st.sampled_from(["", "auto", "cuda:99999999999999999999", "../../x", "/etc/passwd", "\x00", "a\x00b", "~nobody", "\U0001f600", "‮evil", "1e999", "nan", "all", "x" * 5000]),
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(text, scalars), inner, max_size=4)), max_leaves=8
)  # fmt: skip


def tried(file: Path, environ: dict[str, str] | None = None) -> None:
    """What `sweep --dry-run` and `plan` do with a config before they look at a model."""
    try:
        config = load_config(file, environ or {})
        for _, entry in config.checked_entries():
            assert isinstance(entry, Entry | ConfigError)
            if isinstance(entry, Entry):
                entry.as_json()
    except ConfigError as error:
        said = str(error)
    else:
        return
    assert said
    assert escape(said, keep="\n").encode()  # as the command line prints it


@fuzz(100)
@given(st.binary(max_size=300))
def test_bytes_as_a_config_are_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "c.yaml", {})


@fuzz(100)
@given(st.text("{}[]:,-&*!|>#%@?'\"\n\t 0a~<=.", max_size=60))
def test_yaml_s_own_signs_in_any_order_are_an_error_or_a_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.yaml").write_text(f"residual_compare: {content}")
    tried(tmp_path / "c.yaml")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return (
        [path, *(p for k in keys for p in places(value[k], (*path, k)))]
        if path
        else [p for k in keys for p in places(value[k], (k,))]
    )


PLACES = [*places(WHOLE), *((key,) for key in Settings.model_fields if key not in WHOLE)]


@fuzz(300)
@given(st.lists(st.tuples(st.sampled_from(PLACES), values), min_size=1, max_size=3))
def test_a_whole_config_with_any_values_put_in_loads_or_is_an_error(
    tmp_path: Path, changes: list[tuple[tuple[Any, ...], Any]]
) -> None:
    block = copy.deepcopy(WHOLE)
    for path, value in changes:
        at: Any = block
        try:
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value
        except (KeyError, TypeError, IndexError):
            pass  # the change before took the place away
    try:
        content = yaml.safe_dump({"residual_compare": block}, allow_unicode=True)
    except (yaml.YAMLError, TypeError):
        return
    (tmp_path / "c.yaml").write_text(content, encoding="utf-8")
    tried(tmp_path / "c.yaml")


@fuzz(100)
@given(
    st.dictionaries(
        st.sampled_from(sorted(ENV_OVERRIDES)),
        st.one_of(text, st.sampled_from(["{", "{}", "[1]", "NaN", "[" * 5000, "cuda"])),
    )
)
def test_any_environment_overrides_or_is_an_error(tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / "c.yaml").write_text("residual_compare: {base_model: org/a, sft_model: org/b, prompts: [x]}")
    tried(tmp_path / "c.yaml", environ)


@pytest.mark.parametrize(
    "content",
    [
        "residual_compare: " + "[" * 1_500,
        "residual_compare: " + "{a: " * 3_000 + "}" * 3_000,
        "residual_compare: " + "- " * 5_000 + "x",
        "residual_compare: &a [*a]",
        "residual_compare: &a {model_kwargs: *a}",
        "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8))
        + "residual_compare: {prompts: *i}",
        "residual_compare: {top_k: " + "9" * 6_000 + "}",
        "residual_compare: {top_k: 0x" + "f" * 6_000 + "}",
        "residual_compare: {? [a, b] : 1}",
        "residual_compare: {? {a: b} : 1}",
        "residual_compare: !!python/object/apply:os.system [id]",
        "residual_compare: {<<: [1, 2]}",
        "residual_compare: {prompts: [2001-99-99]}",
        "residual_compare: {a: !!timestamp x, b: !!binary '%%'}",
        "residual_compare: {top_k: 1:99:99}",
        "--- a\n--- b\n",
        "\x00", "\ufeff", "%YAML 9.9\n--- {}\n", "residual_compare:\n\t- x",
    ],
)  # fmt: skip
def test_what_parsers_are_known_to_fall_over(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "c.yaml", {}).entries()
