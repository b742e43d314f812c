"""What the lens reads, and in how large pieces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from capture.errors import ConfigError
from capture.lens_kernel import Kernel
from capture.lens_sums import Fused
from capture.topk import Vocabulary

LEAST_IN_CACHE, MOST_IN_CACHE = 200_000, 400_000  # logits of one slot gone through at a time on a CPU
LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # as Linux tells it: 32768K
BYTES_A_CELL = 160  # of the last cache, for each of them: two threads' workspaces fill half of it
ROWS_TOGETHER = 12  # so many times that is worked on together where it is small
ROWS_IN_STEP = 4  # so many times that by ranks of a group
CELLS_ON_DEVICE = 25_600_000  # logits of one slot that the statistics work on at a time, on a GPU
ROWS_AT_ONCE = 320  # rows of a slot for which a product's weights weigh little beside its arithmetic
GROUPS, FEW_GROUPS = 8, 4  # of layers, at least: a walk commits between them
LARGE_HEAD = 64 << 20  # bytes that a product goes through: as long as small layers take, so that two groups are enough
SMALL_GROUP = 256 << 20  # bytes of one model's layers: walked again in a second or two, so that few groups are enough
TILE_BYTES = {"cpu": 512 << 20, "cuda": 1 << 30}  # logits of all slots of one tile


@dataclass
class LensPlan:
    """Which layers the lens reads, and how. layers: -1..L; n_vocab: rows compared; n_tokens: ids that may be in top-k lists.

    vocabulary: this rank's share of it. rows: rows whose statistics are worked on at a time; at_once: of those, the rows whose
    vocabulary is gone through at a time. compiled: the compiled way of the processor or of the device, or why it is not taken, in
    words. layers_at_once: whose rows go through one product together.
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
    at_once: int
    compiled: Kernel | Fused | str = ""
    layers_at_once: int = 1

    @property
    def kernel(self) -> Kernel | None:
        return self.compiled if isinstance(self.compiled, Kernel) else None

    @property
    def fused(self) -> Fused | None:
        return None if isinstance(self.compiled, Kernel | str) else self.compiled

    def ends_group(self, layer: int, n_layers: int) -> bool:
        """Whether the rows that wait go through their product behind this layer. Layer L is layer L-1 after the final norm."""
        return (layer + 2) % self.layers_at_once == 0 or layer >= n_layers - 1

    def tile_rows(self, n_slots: int, tile_bytes: int | None = None) -> int:
        """Rows of one tile: as many as tile_bytes hold logits of."""
        return max(1, (tile_bytes or self.tile_bytes) // (n_slots * self.n_vocab * 4))

    def statistics_rows(self, *, exact: bool = False) -> int:
        """Rows whose statistics are worked on at a time. exact: where shifts are sums of products, which take more."""
        return max(1, self.rows * 3 // 4 if exact else self.rows)


def statistics_rows(n_vocab: int, *, on_cpu: bool, alone: bool) -> tuple[int, int]:
    """(rows, at_once) of LensPlan for the logits of n_vocab entries. alone: no other rank has a share of them; each step of a
    group waits for all of its ranks, so that it takes all of its rows at once."""
    if not on_cpu:
        rows = max(1, CELLS_ON_DEVICE // n_vocab)
        return rows, rows
    at_once = max(1, _cells_in_cache() // n_vocab)
    return (ROWS_TOGETHER * at_once, at_once) if alone else (ROWS_IN_STEP * at_once, ROWS_IN_STEP * at_once)


@cache
def _cells_in_cache() -> int:
    try:
        size = 1024 * int(LAST_CACHE.read_text().strip().removesuffix("K"))
    except (OSError, ValueError):  # another system, or it does not say
        size = 0
    return min(MOST_IN_CACHE, max(LEAST_IN_CACHE, size // BYTES_A_CELL))


def layers_at_once(n_tokens: int, n_layers: int, layer_bytes: int, head_bytes: int, *, alone: bool) -> int:
    """Of how many layers the rows of all n_tokens tokens go through one product. layer_bytes: of one model's largest layer;
    head_bytes: of the product's weights. alone: no other rank has a share of them; ranks, whose shares may differ by some bytes,
    must come to the same number."""
    small = [(n_layers + 2) // groups for groups in ((2, FEW_GROUPS) if head_bytes >= LARGE_HEAD else (FEW_GROUPS,))]
    most = next((few for few in small if alone and few * layer_bytes <= SMALL_GROUP), (n_layers + 2) // GROUPS)
    return max(1, min(-(-ROWS_AT_ONCE // n_tokens), most))


def plan_layers(layers: str | int | tuple[int, ...], n_layers: int, key: str) -> frozenset[int]:
    """The layers chosen under a config key: all; every n-th and L; or a list, in which -1 is the entering state.

    Raises ConfigError for a layer that the model has not.
    """
    every = range(-1, n_layers + 1)
    if layers == "all":
        return frozenset(every)
    if isinstance(layers, int):
        return frozenset(range(0, n_layers, layers)) | {n_layers}
    assert not isinstance(layers, str)
    if wrong := [layer for layer in layers if layer not in every]:
        raise ConfigError(
            f"residual_compare.{key} names the layer {wrong[0]}; this model has -1 (what enters block 0) to {n_layers} "
            "(after the final norm)"
        )
    return frozenset(layers)
