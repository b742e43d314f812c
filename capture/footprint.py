"""How many bytes a capture needs on its device, from sizes alone: no torch, no file is read, nothing is loaded.

The engine and the planner share this arithmetic. All sizes are bytes of tensors as they stand in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

# All modes that are planned, from the one with the most weights in memory to the one with the fewest.
MODES = {
    "resident": "both models stay loaded",
    "one-at-a-time": "one model is loaded, then the other; states wait in main memory",
    "streamed": "a layer of each model in use, the next of each being read: 4 layer buffers",
    "streamed-2": "one layer in use, the next being read, the models taking turns: 2 layer buffers",
    "sub-layer": "one matrix in use, the next being read; the unembedding in chunks",
}
# What this version runs. Everything else is arithmetic for planning; when the engine learns it, add it here.
RUNNABLE = frozenset({"resident", "streamed"})
RUNNABLE_DEGREES = frozenset({1, 2, 4, 8})  # GPUs that one capture is split over
RUNNABLE_STORED = frozenset({"float32", "bfloat16", "float16"})  # dtypes of checkpoints

RESIDENT_SHARE = 0.5  # mode auto keeps both models where their weights take less than this share of the free memory

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}

# Sizes of the engine's work, equal to those of capture/collector.py and capture/unembed.py (a test compares them).
LENS_TILE_BYTES = 1 << 30
LENS_STATISTICS_CELLS = 400_000 * 64
LENS_HEAD_CHUNK = 16384
# [rows, V] float32 tensors alive at most in lens.pair_stats, beside each slot's probabilities
LENS_TEMPORARIES = 8
# float64 [rows, D] tensors alive at most in statistics.cosine_distance
STATISTICS_TEMPORARIES = 6
# A layer of fused experts takes 2.6 times its size while it is put together, as transformers does it (measured).
FUSED_LOADING = 1.6


@dataclass(frozen=True)
class ModelBytes:
    """One model's weights by group, as capture/checkpoint.py names the groups.

    embedding holds a tied unembedding too, and head is 0 then. layers: each layer in order. replicated: the bytes of each
    layer that tensor parallelism does not divide (empty: none). matrix: the largest single matrix of any layer; row: one
    row of the unembedding. fused: layers hold fused experts.
    """

    embedding: int
    head: int
    rest: int
    layers: tuple[int, ...]
    tied: bool = False
    replicated: tuple[int, ...] = ()
    matrix: int = 0
    row: int = 0
    fused: bool = False

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.rest + sum(self.layers)


def weight_bytes(models: Sequence[ModelBytes]) -> dict[str, int]:
    """The most bytes of weights alive at once, by mode. models: base and sft, or one of them where both are the same.

    Embeddings that are no unembedding at the same time are freed after the first states are made. So each peak is the
    larger of two moments: all ends loaded (embedding, unembedding, rest), or the ends without such embeddings and layers:
    resident all of them, streamed the largest two consecutive layers of every model, streamed-2 the largest two in the
    order base 0, sft 0, base 1, sft 1, ...; one-at-a-time the same for the larger model, or both unembeddings at the end.
    sub-layer: the two largest matrices, `rest`, and two chunks of the unembedding.
    """
    kept = sum(m.head + m.rest for m in models)
    embeddings = sum(m.embedding for m in models)
    freed = sum(m.embedding for m in models if not m.tied)
    layers = [sum(sizes) for sizes in zip(*(m.layers for m in models), strict=True)]
    turns = [size for sizes in zip(*(m.layers for m in models), strict=True) for size in sizes]
    start, later = kept + embeddings, kept + embeddings - freed
    alone = max(max(m.embedding, sum(m.layers) + (m.embedding if m.tied else 0)) + m.head + m.rest for m in models)
    heads = sum(m.head + m.rest + (m.embedding if m.tied else 0) for m in models)
    chunks = 2 * max(min(m.embedding if m.tied else m.head, LENS_HEAD_CHUNK * m.row) for m in models)
    return {
        "resident": max(start, later + sum(layers)),
        "one-at-a-time": max(alone, heads),
        "streamed": max(start, later + _largest_two(layers)),
        "streamed-2": max(start, later + _largest_two(turns)),
        "sub-layer": sum(m.rest for m in models) + 2 * max(m.matrix for m in models) + chunks,
    }


def _largest_two(sizes: Sequence[int]) -> int:
    """The largest sum of two consecutive sizes; of one where there is only one."""
    return max((a + b for a, b in itertools.pairwise(sizes)), default=sizes[0])


def loading_bytes(models: Sequence[ModelBytes], mode: str) -> int:
    """What a layer takes beyond its own size while it is read. Layers are read one after the other, of one model at a time."""
    if mode == "sub-layer":
        return 0
    return max((int(FUSED_LOADING * max(m.layers)) for m in models if m.fused), default=0)


def rank_share(model: ModelBytes, degree: int) -> ModelBytes:
    """One model's bytes on each of `degree` GPUs under transformers' tensor-parallel plans.

    The matrices of the layers and the unembedding are divided; the embedding (with a tied unembedding), the rest, and what
    `replicated` counts stand on every GPU in full.
    """
    if degree == 1:
        return model
    whole = model.replicated or (0,) * len(model.layers)
    shares = tuple(_ceil(size - same, degree) + same for size, same in zip(model.layers, whole, strict=True))
    return replace(
        model,
        head=_ceil(model.head, degree),
        layers=shares,
        replicated=(),
        matrix=max(_ceil(model.matrix, degree), min(model.matrix, max(whole))),
        row=_ceil(model.row, degree),
    )


def _ceil(size: int, parts: int) -> int:
    return -(-size // parts)


@dataclass(frozen=True)
class Walk:
    """What is walked. tokens: of all prompts together; batch_tokens: of the largest batch; passes: all, and of the model
    that has most of them; hidden, ffn, heads, kv_heads, head_dim, vocab as in the model's config; element: bytes of one
    number of a state; lens: whether the lens is on."""

    tokens: int
    batch_tokens: int
    passes: int
    passes_of_one: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    element: int
    lens: bool = True


def state_bytes(walk: Walk) -> int:
    """The states of all passes between two layers, and what the model gave its layers with them (rotary tables).

    passes x tokens x hidden, and 2 x head_dim a token for each pass, each of `element` bytes.
    """
    return walk.passes * walk.tokens * (walk.hidden + 2 * walk.head_dim) * walk.element


def forward_bytes(walk: Walk) -> int:
    """One layer at work on its largest batch: hidden states, queries, keys, values and the feed-forward's products.

    rows x (4 hidden + 3 ffn + (heads + 2 kv_heads) x head_dim) elements, rows = batch tokens x the passes of one model that
    run together, and the new states of all passes. Measured once at 14.6 MB where this says 15.5 MB.
    """
    rows = walk.batch_tokens * walk.passes_of_one
    wide = 4 * walk.hidden + 3 * walk.ffn + (walk.heads + 2 * walk.kv_heads) * walk.head_dim
    return (rows * wide + walk.passes * walk.batch_tokens * walk.hidden) * walk.element


def lens_bytes(walk: Walk) -> int:
    """One tile of the lens: float32 logits of all passes, a chunk of the unembedding in float32, and the statistics."""
    if not walk.lens:
        return 0
    per_row = walk.passes * walk.vocab * 4
    tile = min(walk.batch_tokens, max(1, LENS_TILE_BYTES // per_row))
    rows = min(tile, max(1, LENS_STATISTICS_CELLS // walk.vocab))
    chunk = min(LENS_HEAD_CHUNK, walk.vocab)
    upcast = 0 if walk.element == 4 else chunk * walk.hidden * 4 + tile * walk.passes_of_one * chunk * 4
    return tile * per_row + upcast + rows * walk.vocab * 4 * (walk.passes + LENS_TEMPORARIES)


def statistics_bytes(walk: Walk) -> int:
    """Norms, differences and cosines of one batch in float64, and the new states of all passes beside them."""
    new = walk.passes * walk.batch_tokens * walk.hidden * walk.element
    return walk.batch_tokens * walk.hidden * 8 * STATISTICS_TEMPORARIES + new


def activation_bytes(walk: Walk) -> int:
    """What the device needs beside weights: the states, and the largest of forward, statistics and lens, one at a time."""
    new = walk.passes * walk.batch_tokens * walk.hidden * walk.element
    return state_bytes(walk) + max(forward_bytes(walk), statistics_bytes(walk), lens_bytes(walk) + new)
