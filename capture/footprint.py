"""How many bytes a capture needs on its device: one arithmetic for the engine and the planner.

No torch, no file is read, nothing is loaded. The engine fills `Activations` with what it measured without data
(capture/measure.py), the planner with the formulas below; `needs` is the same for both. All sizes are bytes of tensors as they
stand in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

# All modes, from the one with the most weights in memory to the one with the fewest.
MODES = {
    "resident": "both models stay loaded",
    "one-at-a-time": "one model is loaded, then the other; states wait in main memory",
    "streamed": "a layer of each model in use, the next of each being read: 4 layer buffers",
    "streamed-2": "one layer in use, the next being read, the models taking turns: 2 layer buffers",
    "sub-layer": "one matrix in use, the next being read; the unembedding in chunks; matrices are read once a batch",
}
# What `mode: auto` takes, the first that fits. Not one-at-a-time: streamed needs less and reads while it computes.
AUTO = ("resident", "streamed", "streamed-2", "sub-layer")
# What this version runs. Everything else is arithmetic for planning; when the engine learns it, add it here.
RUNNABLE = frozenset(MODES)
RUNNABLE_DEGREES = frozenset({1, 2, 4, 8})  # GPUs that one capture is split over
RUNNABLE_STORED = frozenset({"float32", "bfloat16", "float16", "float8"})  # dtypes of checkpoints

# Share of the free memory that `mode: auto` fills. Main memory is shared with all else that runs on the machine.
ROOM = {"cuda": 0.95, "cpu": 0.5}

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}

# Sizes of the engine's work, equal to those of capture/collector.py and capture/unembed.py (a test compares them).
LENS_TILE_BYTES = 1 << 30
LENS_STATISTICS_CELLS = 400_000 * 64
LENS_HEAD_CHUNK = 16384
# [rows, V] float32 tensors that the statistics of lens.lens_tile may take beside the logits: an upper bound, for plans without torch;
# before a capture they are measured where that can be done (capture/measure_lens.py)
LENS_TEMPORARIES = 40
STATISTICS_CELLS = 1 << 19  # numbers of a state that the residual statistics work on at a time
STATISTICS_CELLS_ON_CPU = 1 << 17  # ten float64 tensors of so many stay in a processor's cache
# float64 tensors of that size alive at most in statistics.residuals: a direction for each pass, and besides those
STATISTICS_TEMPORARIES = 3
WAITING_CELLS = 1 << 18  # numbers of a slot's states, of several batches and layers, that wait for them together
FP8_STRIP = 1 << 22  # elements of an FP8 weight that are multiplied with their scales at a time (capture/assemble.py)


@dataclass(frozen=True)
class ModelBytes:
    """One model's weights by group, as capture/checkpoint.py names the groups.

    embedding holds a tied unembedding too, and head is 0 then. layers: each layer in order. replicated: the bytes of each
    layer that tensor parallelism does not divide (empty: none). matrix: the largest single matrix of any layer; row: one
    row of the unembedding. fused: layers hold fused experts. leaves: the most that sub-layer mode has of the layers at a
    time, where that is known. loading: what each layer takes beside itself while it is read (empty: nothing).
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
    leaves: int = 0
    loading: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.rest + sum(self.layers)

    @property
    def reading(self) -> tuple[int, ...]:
        return self.loading or (0,) * len(self.layers)

    @property
    def ends(self) -> int:
        """What stays beside the layers: unembedding (with a tied embedding) and rest."""
        return self.head + self.rest + (self.embedding if self.tied else 0)

    @property
    def most_leaves(self) -> int:
        """Of sub-layer mode: the two largest matrices. Fused experts are one: then it is taken to be the whole layer."""
        return self.leaves or (max(self.layers) if self.fused else 2 * self.matrix)

    @property
    def chunk(self) -> int:
        """A chunk of the unembedding."""
        return min(self.embedding if self.tied else self.head, LENS_HEAD_CHUNK * self.row)

    @property
    def last_chunk(self) -> int:
        """The chunk that stays when all have been used."""
        whole = self.embedding if self.tied else self.head
        return (whole % self.chunk or self.chunk) if self.chunk else 0


@dataclass(frozen=True)
class Weights:
    """The most bytes of weights alive in each stage: while the first states are made; while layers run; while logits are made;
    while lenses read those."""

    open: int
    layers: int
    products: int
    lens: int

    @property
    def peak(self) -> int:
        return max(self.open, self.layers, self.products, self.lens)


def weights(models: Sequence[ModelBytes], mode: str) -> Weights:
    """Weights alive in one mode. models: base and sft, or one of them where both are the same.

    Embedding tables are read one after the other; only one that is an unembedding as well stays. Then both models' ends
    stay, and of the layers: resident all; streamed the largest two consecutive layers of every model; streamed-2 the largest
    two in the order base 0, sft 0, base 1, sft 1, ...; one-at-a-time all of one model, in whose time no unembedding is there.
    sub-layer: two leaves, and a chunk of each unembedding, of which the last one stays.
    """
    rests = sum(m.rest for m in models)
    if mode == "sub-layer":
        stay = rests + sum(m.chunk for m in models)
        left = rests + sum(m.last_chunk for m in models)
        return Weights(stay, stay + max(m.most_leaves + max(m.reading) for m in models), stay, left)
    tables = [sum(m.embedding for m in models[:i] if m.tied) + one.embedding for i, one in enumerate(models)]
    ends = sum(m.ends for m in models)
    opening = max(*tables, ends)
    if mode == "one-at-a-time":
        return Weights(
            opening, rests + max(_all(list(zip(m.layers, m.reading, strict=True))) for m in models), ends, ends
        )
    steps = [list(step) for step in zip(*(list(zip(m.layers, m.reading, strict=True)) for m in models), strict=True)]
    both = [(sum(size for size, _ in step), max(more for _, more in step)) for step in steps]
    turns = [one for step in steps for one in step]
    held = {"resident": _all, "streamed": _largest_two, "streamed-2": _largest_two}[mode]
    layers = held(turns if mode == "streamed-2" else both)
    return Weights(opening, *3 * [ends + layers])


def weight_bytes(models: Sequence[ModelBytes]) -> dict[str, int]:
    """The most bytes of weights alive at once, by mode."""
    return {mode: weights(models, mode).peak for mode in MODES}


Steps = Sequence[tuple[int, int]]  # bytes of what is read in one step; what that takes beside them


def _all(steps: Steps) -> int:
    """The most while all steps are read one after the other."""
    so_far = itertools.accumulate(size for size, _ in steps)
    return max(size + more for size, (_, more) in zip(so_far, steps, strict=True))


def _largest_two(steps: Steps) -> int:
    """The most while every step is read when the one before it is in use."""
    pairs = (a + b + more for (a, _), (b, more) in itertools.pairwise(steps))
    return max([sum(steps[0]), *pairs])


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
        leaves=0,
    )


def _ceil(size: int, parts: int) -> int:
    return -(-size // parts)


@dataclass(frozen=True)
class Activations:
    """What the device needs beside weights, each at most.

    states: of all passes and batches between two layers; batch: of those, the largest batch's. calls, batch_calls: likewise
    what the model gave its layers with them (masks, rotary tables). opening: while first states are made, beside
    them; less by what is held from the first layer on.
    forward: a layer at work on a batch, with the new states; statistics, lens: of one batch, beside its states; products: while
    the lens's logits are made.
    """

    states: int
    batch: int
    calls: int
    batch_calls: int
    opening: int
    forward: int
    statistics: int
    products: int
    lens: int


@dataclass(frozen=True)
class Need:
    """Bytes on the device in each stage, weights included; weights: of those, at most."""

    open: int
    layers: int
    lens: int
    weights: int

    @property
    def peak(self) -> int:
        return max(self.open, self.layers, self.lens)


def needs(
    models: Sequence[ModelBytes], mode: str, act: Activations, *, spill: bool = False, on_host: bool = False
) -> Need:
    """What a capture needs at most in each stage.

    spill: states of batches that are not at work wait in main memory. on_host: the device is the main memory, so that states
    which wait there count too.

    While a layer runs on a batch there are the states that entered it, of all batches, and those that it makes, of this batch;
    where the models take turns those of all batches. When they are compared, both are there.
    """
    held = weights(models, mode)
    alone = act.batch + act.batch_calls if spill and not on_host else act.states + act.calls
    others = 0 if spill and not on_host else act.states - act.batch  # made, and waiting for the other model's turn
    waiting = 0
    if mode in ("streamed-2", "sub-layer"):
        waiting = others
    elif mode == "one-at-a-time" and on_host:
        waiting = act.states * (len(models[0].layers) - 1) + others
    return Need(
        held.open + alone + act.opening,
        held.layers + max(alone + waiting + act.forward, alone + waiting + act.batch + act.statistics),
        max(held.products + act.products, held.lens + act.lens) + alone + waiting + act.batch,
        held.peak,
    )


SHRINK = tuple(1 << n for n in range(11))  # what lens tiles are divided by, until the rest fits


@dataclass(frozen=True)
class Way:
    """One mode with its lens tiles, and whether states that wait are in main memory."""

    mode: str
    spill: bool
    tile_bytes: int
    need: Need


def ways(
    models: Sequence[ModelBytes], mode: str, act: Callable[[int], Activations], tile_bytes: int, *, on_host: bool
) -> Iterator[Way]:
    """What a mode can do to need less, in the order in which it is tried; none of it changes a state.

    act: tile bytes -> activations. tile_bytes: of the largest lens tile. on_host: the device is the main memory.
    """
    for spill in (False,) if on_host else (False, True):
        for divisor in SHRINK:
            tile = max(1, tile_bytes // divisor)
            yield Way(mode, spill, tile, needs(models, mode, act(tile), spill=spill, on_host=on_host))


@dataclass(frozen=True)
class Walk:
    """What is walked. tokens: of all prompts together; batch_tokens: of the largest batch; passes: all, and of the model
    that has most of them; hidden, ffn, heads, kv_heads, head_dim, vocab as in the model's config; element: bytes of one
    number of a state; lens: whether the lens is on; waits: of a slot's states, `waiting`."""

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
    waits: tuple[int, int] = (0, 0)


def waiting(batch_cells: Sequence[int], layers: int) -> tuple[int, int]:
    """Numbers of a slot's states that wait for their statistics while layers run, and of those that are worked off together; each at
    most. batch_cells: of one state of each batch. layers: `layers_alike`; behind them is one more, of the final norm. As
    capture/residual_queue.py lets them wait."""
    held = together = cells = 0
    for layer in range(layers + 1 if 2 * min(batch_cells) <= WAITING_CELLS else 0):
        for new in batch_cells:
            cells = new if cells + new > WAITING_CELLS else cells + new
            together = max(together, cells)
            cells = 0 if cells + new > WAITING_CELLS else cells
            held = max(held, cells if layer < layers - 1 else 0)  # while others run
    return held, max(together, *batch_cells)


def layers_alike(passes: int, embeddings: int, n_layers: int) -> int:
    """Layers that the same statistics are wanted of: not of the first, where passes enter it as one."""
    return n_layers - (passes != embeddings)


def ffn_width(config: Mapping[str, Any], hidden: int) -> int:
    """The width of the feed-forward that one token goes through: of the dense one, or of all experts that it is sent to."""
    dense = int(config.get("intermediate_size") or config.get("n_inner") or config.get("ffn_dim") or 4 * hidden)
    routed = int(config.get("moe_intermediate_size") or 0)
    if not routed:
        return dense * int(config.get("num_experts_per_tok") or 1)
    return max(dense, routed * (int(config.get("num_experts_per_tok") or 1) + int(config.get("n_shared_experts") or 0)))


def state_bytes(walk: Walk) -> int:
    """The states of all passes between two layers: passes x tokens x hidden, each of `element` bytes."""
    return walk.passes * walk.tokens * walk.hidden * walk.element


def forward_bytes(walk: Walk) -> int:
    """One layer at work on its largest batch: hidden states, queries, keys, values and the feed-forward's products.

    rows x (5 hidden + 3 ffn + 2 (heads + 2 kv_heads) x head_dim) elements, rows = batch tokens x the passes of one model that
    run together, and the new states of the other passes.
    """
    rows = walk.batch_tokens * walk.passes_of_one
    wide = 5 * walk.hidden + 3 * walk.ffn + 2 * (walk.heads + 2 * walk.kv_heads) * walk.head_dim
    others = (walk.passes - walk.passes_of_one) * walk.batch_tokens
    return (rows * wide + others * walk.hidden) * walk.element


def lens_bytes(walk: Walk, tile_bytes: int = LENS_TILE_BYTES) -> int:
    """One tile of the lens: float32 logits of all passes, a chunk of the unembedding in float32, and the statistics."""
    if not walk.lens:
        return 0
    per_row = walk.passes * walk.vocab * 4
    tile = min(walk.batch_tokens, max(1, tile_bytes // per_row))
    rows = min(tile, statistics_rows(walk.vocab, tile_bytes, LENS_STATISTICS_CELLS))
    chunk = min(LENS_HEAD_CHUNK, walk.vocab)
    upcast = 0 if walk.element == 4 else chunk * walk.hidden * 4 + tile * walk.passes_of_one * chunk * 4
    return tile * per_row + upcast + rows * walk.vocab * 4 * LENS_TEMPORARIES


def statistics_rows(vocab: int, tile_bytes: int, cells: int) -> int:
    """Rows of a tile whose statistics are worked on at a time: `cells` logits of one pass, their work in no more than a tile."""
    return max(1, min(cells // vocab, tile_bytes // (vocab * 4 * LENS_TEMPORARIES)))


def statistics_bytes(walk: Walk, *, on_cpu: bool = False, padded: bool = False, compiled: bool = False) -> int:
    """Norms, differences and cosines in float64, some rows at a time; before that rows of several layers are put one behind the
    other, and padded ones taken out of their batches, with those before the layer. compiled: by the kernel, in place."""
    batch, (_, together) = walk.batch_tokens * walk.hidden, walk.waits
    most = max(together, batch)
    unpadded = 2 * most * walk.passes * walk.element if padded else 0
    if compiled:
        return unpadded
    joined = 2 * together * walk.passes * walk.element if together > batch else 0
    cells = min(most, max(walk.hidden, STATISTICS_CELLS_ON_CPU if on_cpu else STATISTICS_CELLS))
    return unpadded + joined + cells * 8 * (walk.passes + STATISTICS_TEMPORARIES)


def held_bytes(walk: Walk) -> int:
    """States of layers before the one at work that wait for their statistics."""
    return walk.passes * walk.waits[0] * walk.element


def activations(walk: Walk, tile_bytes: int = LENS_TILE_BYTES) -> Activations:
    """By the formulas above. Rotary tables and the like: 2 x head_dim elements a token."""
    states, batch = state_bytes(walk), state_bytes(replace(walk, tokens=walk.batch_tokens))
    rotary, held = 2 * 2 * walk.head_dim * walk.element, held_bytes(walk)
    return Activations(
        states, batch, walk.tokens * rotary + held, walk.batch_tokens * rotary + held, 2 * batch, forward_bytes(walk),
        statistics_bytes(walk), *2 * [lens_bytes(walk, tile_bytes)],
    )  # fmt: skip


def activation_bytes(walk: Walk) -> int:
    """What the device needs beside the weights of a streamed walk."""
    act = activations(walk)
    return act.states + act.calls + max(act.forward, act.batch + max(act.statistics, act.lens))
