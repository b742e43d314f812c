"""Any file as a file of residual comparisons: what can be read is imported, all else is an error of ours."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from analysis import open_run

CALM = settings(
    derandomize=True, deadline=None, database=None, max_examples=40, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
RUN_CELL = {
    "norm": 1.5,
    "norm_delta": 0.25,
    "cosine_prev": 0.9,
    "entropy": 2.0,
    "top_k": [{"token_id": 3, "logit": 1.0}],
}
PAIR_CELL = {"cosine_sim": 0.5, "norm_diff": 1.0, "kl_div": 0.1, "norm_base": 1.0, "norm_sft": 2.0, "tracked_token_logits": {"7": {"base": 1.0, "sft": 2.0}}}  # fmt: skip
LAYERS: dict[str, Any] = {"0": {"0": {}, "1": {}}, "1": {"0": {}, "1": {}}}


def layers(cell: dict[str, Any]) -> dict[str, Any]:
    return {layer: {position: copy.deepcopy(cell) for position in at} for layer, at in LAYERS.items()}


WHOLE: list[dict[str, Any]] = [
    {
        "format_version": 2,
        "prompt": "a b",
        "tokens": ["a", " b"],
        "metadata": {"prompt_idx": 0, "variant_name": "identity"},
        "runs": [{"name": "BB", "layers": layers(RUN_CELL)}, {"name": "SS", "layers": layers(RUN_CELL)}],
        "pairwise": [{"base_run": "BB", "sft_run": "SS", "layers": layers(PAIR_CELL)}],
    }
]
ODD: tuple[Any, ...] = (
    None, True, -1, 2**31, 10**40, 1e400, float("nan"), "", "\ud800", "\x00", "x" * 10_000, [], [[]], {}, {"0": {}}, {"999999999": {"0": {}}}, "2",
)  # fmt: skip


def imported(call: Callable[..., Any], folder: Path, content: bytes) -> Any:
    """The answer to `import-json`, after what it left was asked; a bug is raised by `call`."""
    file, out = folder / "a.json", folder / "out"
    file.write_bytes(content)
    answer = call("import-json", file, "--out", out, "--force", "--pair", "p")
    assert answer.code in (0, 1, 2)
    assert answer.code == 0 or answer.err
    if (out / "captures").exists() and any((out / "captures").glob("*/*/_COMPLETE")):
        with closing(open_run(str(out))) as con:
            con.execute("SELECT count(*) FROM pairwise_full")
    return answer


def changed(rng: random.Random, value: Any) -> Any:
    """The same with one place made odd, taken out or given another key."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        others = {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.15:
            return (
                others
                if rng.random() < 0.5
                else others | {rng.choice(["-1", "1e3", "x", "70000", "9" * 30, "\u0661"]): value[key]}
            )
        return value | {key: changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], changed(rng, value[at]), *value[at + 1 :]]
    return rng.choice(ODD)


def test_a_whole_file_is_imported(tmp_path: Path, call: Callable[..., Any]) -> None:
    assert imported(call, tmp_path, json.dumps(WHOLE).encode()).code == 0  # or the tests below would test nothing


@pytest.mark.parametrize("seed", range(2))
def test_a_file_with_odd_values(tmp_path: Path, call: Callable[..., Any], seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(6):
        imported(call, tmp_path, json.dumps(changed(rng, WHOLE)).encode())


def test_a_file_cut_anywhere(tmp_path: Path, call: Callable[..., Any]) -> None:
    content = json.dumps(WHOLE, indent=1).encode()
    for cut in range(0, len(content), len(content) // 5):
        assert imported(call, tmp_path, content[:cut]).code != 0


@CALM
@given(st.one_of(st.binary(max_size=60), st.text('[]{}:,"0-e.nulltrue \\u', max_size=60).map(str.encode)))
def test_bytes_that_are_no_such_file(tmp_path: Path, call: Callable[..., Any], content: bytes) -> None:
    assert imported(call, tmp_path, content).code == 2


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000, b'{"a":' * 100_000, b"[" + b'{"runs":' * 5_000, b"\xff\xfe[\x00", b"\xef\xbb\xbf", b"[1e999999]",
        b'[{"runs": [{"layers": {"0": {"1048576": {}}}}]}]', b'[{"runs": [{"layers": {"0": {"2147483647": {"norm": 1}}}}]}]',
        b'[{"prompt": "a", "prompt": "b", "runs": 1}]', b'[{"format_version": 99, "runs": {}}]', b'[{"runs": [' + b"9" * 50_000 + b"]}]",
    ],
)  # fmt: skip
def test_what_would_fill_the_stack_or_the_memory(tmp_path: Path, call: Callable[..., Any], content: bytes) -> None:
    answer = imported(call, tmp_path, content)
    assert answer.code == 2
    assert "nothing was imported" in answer.err
