"""A made-up run directory whose every number is known.

Pair `alpha`: four passes, six comparisons, two prompts (5 and 3 tokens), two tracked tokens, top-3 lists, and a capture id of
digits only. Pair `beta`: passes BB and SS alone, one prompt in two variants, and a lens on the last layer only. A third pair,
`gamma`, is partial.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from capture.schema import SCHEMA_VERSION, arrow_schema

PASSES = ("BB", "BS", "SB", "SS")
COMPARISONS = tuple((a, b) for i, a in enumerate(PASSES) for b in PASSES[i + 1 :])
ALPHA, BETA, GAMMA = "0012345678901234", "beta0000beta0000", "gamma000gamma000"
TRACKED = ((7, "Ġyes", "agrees"), (9, "no", "no"))
TOP_K = 3
Cells = NDArray[np.float32]


@dataclass
class Capture:
    """One capture's numbers. cells: by prompt, variant and pass or comparison ("BB-SS"), then by column, [layers, tokens]."""

    pair: str
    capture: str
    passes: tuple[str, ...]
    layers: tuple[int, ...]
    n_layers: int
    tokens: dict[tuple[int, str], list[str]]
    cells: dict[tuple[int, str, str], dict[str, Any]] = field(default_factory=dict)
    tracked: tuple[tuple[int, str, str], ...] = TRACKED

    @property
    def comparisons(self) -> tuple[tuple[str, str], ...]:
        return tuple((a, b) for a, b in COMPARISONS if a in self.passes and b in self.passes)


def _numbers(rng: np.random.Generator, shape: tuple[int, ...], *, sign: bool = False) -> Cells:
    values = rng.normal(size=shape) if sign else rng.gamma(2.0, size=shape)
    return values.astype(np.float32)


def make_capture(
    pair: str, capture: str, passes: tuple[str, ...], n_layers: int, tokens: dict[tuple[int, str], list[str]],
    lens_layers: set[int], seed: int,
) -> Capture:  # fmt: skip
    rng = np.random.default_rng(seed)
    out = Capture(pair, capture, passes, tuple(range(-1, n_layers + 1)), n_layers, tokens)
    no_lens = [i for i, layer in enumerate(out.layers) if layer not in lens_layers]
    for (prompt, variant), texts in tokens.items():
        shape = (len(out.layers), len(texts))
        for name in passes:
            c: dict[str, Any] = {k: _numbers(rng, shape) for k in ("norm", "entropy")}
            c["norm_delta"] = _numbers(rng, shape, sign=True)
            c["cosine_distance_prev"] = (_numbers(rng, shape) * 1e-3).astype(np.float32)
            c["norm_delta"][0] = c["cosine_distance_prev"][0] = np.nan
            c["next_token_logprob"] = -_numbers(rng, shape)
            c["next_token_logprob"][:, -1] = np.nan
            c["tracked_logits"] = _numbers(rng, (*shape, len(TRACKED)), sign=True)
            c["logits"] = np.sort(_numbers(rng, (*shape, TOP_K), sign=True), axis=-1)[..., ::-1].copy()
            c["ids"] = rng.integers(0, 50, size=(*shape, TOP_K)).astype(np.int32)
            for k in ("entropy", "next_token_logprob", "tracked_logits"):
                c[k][no_lens] = np.nan
            out.cells[prompt, variant, name] = c
        for a, b in out.comparisons:
            c = {k: _numbers(rng, shape) for k in ("norm_diff", "kl_divergence", "kl_reverse")}
            c["cosine_distance"] = (_numbers(rng, shape) * 1e-6).astype(np.float32)
            c["top1_agree"] = rng.random(shape) < 0.5
            for k in ("increased", "decreased"):
                c[k] = np.sort(_numbers(rng, (*shape, TOP_K)), axis=-1)[..., ::-1] * (1 if k == "increased" else -1)
                c[f"{k}_ids"] = rng.integers(0, 50, size=(*shape, TOP_K)).astype(np.int32)
            for k in ("kl_divergence", "kl_reverse"):
                c[k][no_lens] = np.nan
            out.cells[prompt, variant, f"{a}-{b}"] = c
    return out


def keep_layers(capture: Capture, *kept: int) -> Capture:
    """The same with some layers alone in its tables, as `layers:` of a config has it."""
    at = [capture.layers.index(layer) for layer in kept]
    cells = {key: {name: values[at] for name, values in c.items()} for key, c in capture.cells.items()}
    return replace(capture, layers=kept, cells=cells)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return None if np.isnan(value).any() else value.tolist()
    if isinstance(value, np.floating):
        return None if np.isnan(value) else float(value)
    return value.item() if isinstance(value, np.generic) else value


def rows_of(capture: Capture, table: str) -> list[dict[str, Any]]:
    """The rows of one table, in the order of its keys."""
    names = arrow_schema(table).names
    top = {"pair": capture.pair, "capture": capture.capture}
    rows: list[dict[str, Any]] = []
    if table == "tracked_tokens":
        return [top | {"slot": i, "token_id": t, "token": s, "label": n} for i, (t, s, n) in enumerate(capture.tracked)]
    if table == "vocabulary":
        texts = {10 * prompt + i: t for (prompt, _), tokens in capture.tokens.items() for i, t in enumerate(tokens)}
        return [top | {"token_id": i, "token": texts[i]} for i in sorted(texts)]
    if table == "spectrum":
        variants = dict.fromkeys(variant for _, variant in capture.tokens)
        for variant, (a, b), layer in itertools.product(variants, capture.comparisons, capture.layers):
            size = layer + 2.0
            measures = {"effective_rank": 1.5, "participation_ratio": 1.25, "mean_shift_share": 0.5}
            where = {"variant": variant, "base_run": a, "sft_run": b, "layer": layer}
            rows.append(top | where | {"singular_values": [size, size / 4]} | measures)
        return rows
    for (prompt, variant), texts in capture.tokens.items():
        key = top | {"prompt_idx": prompt, "variant": variant}
        if table == "prompts":
            more = 2 if prompt else 0
            rows.append(
                key | {"text": "".join(texts), "n_tokens": len(texts), "n_tokens_before_trimming": len(texts) + more}
            )
        elif table == "tokens":
            rows += [
                key | {"position": i, "token_id": 10 * prompt + i, "token": t, "is_special": i == 0}
                for i, t in enumerate(texts)
            ]
        else:
            pairwise = table.startswith("pairwise")
            labels = [f"{a}-{b}" for a, b in capture.comparisons] if pairwise else list(capture.passes)
            for label in labels:
                cells = capture.cells[prompt, variant, label]
                who = dict(zip(("base_run", "sft_run") if pairwise else ("run",), label.split("-"), strict=True))
                for i, layer in enumerate(capture.layers):
                    for j in range(len(texts)):
                        row = key | who | {"layer": layer, "position": j}
                        row |= {n: _plain(cells[n][i, j]) for n in names if n not in row}
                        # where a state overflows the lists are there, and what they hold is NaN
                        row |= {n: cells[n][i, j].tolist() for n in ("logits", "increased", "decreased") if n in names}
                        rows.append(row)
    return rows


def write_capture(out: Path, capture: Capture, *, marker: bool = True) -> Path:
    """Write a capture's directory as the engine does."""
    path = out / "captures" / f"pair={capture.pair}" / f"capture={capture.capture}"
    path.mkdir(parents=True)
    files = []
    whole = ("prompts", "tokens", "vocabulary", "tracked_tokens", "spectrum")
    for table in (*whole, "runs", "runs_topk", "pairwise", "pairwise_topk"):
        name = f"{table}.parquet" if table in whole else f"{table}-00000.parquet"
        rows = rows_of(capture, table)
        parquet.write_table(pa.Table.from_pylist(rows, schema=arrow_schema(table)), path / name)
        data = (path / name).read_bytes()
        files.append({"name": name, "rows": len(rows), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    said = {
        "models": {"base": {"model": "org/base", "revision": "abc"}, "sft": {"model": "org/sft", "revision": "def"}},
        "tokenizer": {"name": "org/sft", "hash": "1"},
        "lens": {"norm": "final"},
        "n_layers": capture.n_layers,
        "n_prompts": len(capture.tokens),
        "dtype": "float32",
        "seconds": {"open": 1.5, "walk": 2.0},
    }
    (path / "capture.json").write_text(json.dumps(said))
    if marker:
        data = {"schema_version": SCHEMA_VERSION, "pair": capture.pair, "capture": capture.capture, "files": files}
        (path / "_COMPLETE").write_text(json.dumps(data))
    return path


def write_attempt(out: Path, attempt: str, **fields: Any) -> None:
    (out / "manifest").mkdir(exist_ok=True, parents=True)
    (out / "manifest" / f"{attempt}.json").write_text(json.dumps({"attempt": attempt, **fields}))


def alpha() -> Capture:
    tokens = {(0, "identity"): ["<s>", " a", "\n", " long-token", "界"], (1, "identity"): ["<s>", " b", "c"]}
    return make_capture("alpha", ALPHA, PASSES, 2, tokens, {-1, 0, 1, 2}, 1)


def beta() -> Capture:
    tokens = {(0, "identity"): ["x", "y"], (0, "mirror_halves"): ["y", "x"]}
    return make_capture("beta", BETA, ("BB", "SS"), 1, tokens, {1}, 2)


def gamma() -> Capture:
    return make_capture("gamma", GAMMA, ("BB", "SS"), 1, {(0, "identity"): ["x", "y"]}, {1}, 3)
