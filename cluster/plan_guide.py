"""The hardware guide that this project began with, cell by cell, and whether its machines can hold what it says.

The guide keeps both models whole on the GPUs, one prompt at a time, and counts GPUs "assuming tensor-parallel inference".
"""

from __future__ import annotations

from dataclasses import dataclass

from capture.degrees import degree_error
from capture.footprint import activation_bytes
from cluster.offers import SHARE, Offer
from cluster.plan import EntryPlan

TOKENS = (10, 50, 100, 250)
# The guide's names of cards: as Vast spells them and MiB.
CARDS = {
    "T4": ("Tesla T4", 15360),
    "3060": ("RTX 3060", 12288),
    "A4000": ("RTX A4000", 16376),
    "4090": ("RTX 4090", 24564),
    "A100-40": ("A100 SXM4", 40960),
    "6000Ada": ("RTX 6000Ada", 49140),
    "A100-80": ("A100 SXM4", 81920),
    "H100": ("H100 SXM", 81559),
}
# entry of configs/hardware_table.yaml -> (GPUs, card) for prompts of 10, 50, 100 and 250 tokens. Where the guide leaves two cards
# to choose from, one of them stands here.
CELLS: dict[str, tuple[tuple[int, str], ...]] = {
    "qwen-0.5b": ((1, "T4"), (1, "T4"), (1, "T4"), (1, "T4")),
    "qwen-1.5b": ((1, "3060"), (1, "3060"), (1, "A4000"), (1, "4090")),
    "qwen-3b": ((1, "4090"), (1, "4090"), (1, "4090"), (1, "6000Ada")),
    "qwen-7b": ((1, "A100-40"), (1, "A100-40"), (1, "A100-40"), (1, "A100-80")),
    "qwen-14b": ((1, "A100-80"), (1, "A100-80"), (1, "A100-80"), (1, "A100-80")),
    "qwen-32b": ((2, "A100-80"), (2, "A100-80"), (2, "A100-80"), (2, "A100-80")),
    "qwen-72b": ((4, "A100-80"), (4, "A100-80"), (4, "A100-80"), (6, "A100-80")),
    "qwen-math-1.5b": ((1, "3060"), (1, "3060"), (1, "A4000"), (1, "4090")),
    "qwen-math-7b": ((1, "A100-40"), (1, "A100-40"), (1, "A100-40"), (1, "A100-80")),
    "qwen-math-72b": ((4, "A100-80"), (4, "A100-80"), (4, "A100-80"), (6, "A100-80")),
    "llama-3.1-8b": ((1, "A100-40"), (1, "A100-40"), (1, "6000Ada"), (1, "6000Ada")),
    "llama-3.1-70b": ((4, "H100"), (4, "H100"), (4, "H100"), (6, "H100")),
    "llama-3.1-405b": ((12, "H100"), (12, "H100"), (12, "H100"), (16, "H100")),
    "deepseek-v3": ((2, "H100"), (2, "H100"), (3, "H100"), (4, "H100")),
    "deepseek-v3.1": ((3, "H100"), (3, "H100"), (4, "H100"), (5, "H100")),
    "mistral-nemo-12b": ((1, "6000Ada"), (1, "6000Ada"), (1, "6000Ada"), (1, "A100-80")),
    "minitron-8b": ((1, "4090"), (1, "4090"), (1, "6000Ada"), (1, "6000Ada")),
    "nemotron-340b": ((6, "H100"), (8, "H100"), (10, "H100"), (12, "H100")),
}


@dataclass(frozen=True)
class Cell:
    """One cell: so many GPUs of a card for prompts of `tokens`. GB of 10^9 bytes over all GPUs: the weights of both models as they are
    stored, the need with states and work, the memory as sold, and what of it tensors may use. split: why the model cannot
    be split so, None where it can."""

    gpus: int
    gpu: str
    memory_mib: int
    tokens: int
    weights_gb: float
    need_gb: float
    memory_gb: float
    usable_gb: float
    split: str | None

    @property
    def impossible(self) -> bool:
        """The weights alone are more than the cards hold."""
        return self.weights_gb > self.memory_gb

    @property
    def too_tight(self) -> bool:
        """The weights fit, but not with the work beside them."""
        return not self.impossible and self.need_gb > self.usable_gb

    @property
    def name(self) -> str:
        return f"{self.gpus}x {self.gpu} {self.memory_mib / 1024:.0f}G"

    @property
    def verdict(self) -> str:
        """What is wrong with it, in a few words; empty where nothing is."""
        found = ["impossible"] if self.impossible else ["too tight"] if self.too_tight else []
        return ", ".join(found + ["no valid split"] * (self.split is not None))


def cells(plans: dict[int, EntryPlan]) -> list[Cell]:
    """The four cells of one entry. plans: tokens -> the entry planned for one prompt of so many tokens."""
    found = []
    for tokens, (gpus, card) in zip(TOKENS, CELLS[plans[TOKENS[0]].name], strict=True):
        entry = plans[tokens]
        assert entry.work is not None
        gpu, mib = CARDS[card]
        base = entry.models[0]
        weights = sum(m.read_bytes for m in entry.models) / 1e9
        memory = gpus * mib * 2**20 / 1e9
        found.append(
            Cell(
                gpus, gpu, mib, tokens, weights, weights + activation_bytes(entry.work.walk) / 1e9, memory, SHARE * memory - gpus,
                degree_error(base.model_type, base.heads, base.kv_heads, gpus),
            )
        )  # fmt: skip
    return found


def offers_of(cell: Cell, offers: list[Offer]) -> list[Offer]:
    """The machines of a list that are the cell's."""
    return [o for o in offers if (o.gpu, o.gpus, o.memory_mib) == (cell.gpu, cell.gpus, cell.memory_mib)]
