"""What the lens reads, and in how large pieces."""

from __future__ import annotations

from dataclasses import dataclass

from capture.errors import ConfigError
from capture.topk import Vocabulary

CELLS_IN_CACHE = 400_000  # logits of one slot that the statistics work on at a time, on a CPU
TILE_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # logits of all slots of one tile


@dataclass
class LensPlan:
    """Which layers the lens reads, and how. layers: -1..L; n_vocab: rows compared; n_tokens: ids that may be in top-k lists.

    vocabulary: this rank's share of it. rows: rows whose statistics are worked on at a time.
    """

    layers: frozenset[int]
    final_norm: bool
    n_vocab: int
    n_tokens: int
    top_k: int
    vocabulary: Vocabulary
    keep_topk: bool
    tracked: tuple[int, ...]
    tile_bytes: int
    rows: int


def plan_lens_layers(layers: str | int | tuple[int, ...], enabled: bool, n_layers: int) -> frozenset[int]:
    """The layers that the lens reads: all; every n-th and L; or a list, in which -1 is the entering state.

    Raises ConfigError for a layer that the model has not.
    """
    every = range(-1, n_layers + 1)
    if not enabled:
        return frozenset()
    if layers == "all":
        return frozenset(every)
    if isinstance(layers, int):
        return frozenset(range(0, n_layers, layers)) | {n_layers}
    assert not isinstance(layers, str)
    if wrong := [layer for layer in layers if layer not in every]:
        raise ConfigError(
            f"residual_compare.lens.layers names the layer {wrong[0]}; this model has -1 (what enters block 0) to {n_layers} "
            "(after the final norm)"
        )
    return frozenset(layers)
