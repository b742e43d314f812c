"""What a capture reports while it runs: small, picklable, made for a callback."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where one capture is.

    stage: "open" (files, tokenizer), "layers" (the walk) or "write" (last tables).
    layer, n_layers: layers done of all. tokens_per_second: tokens x layers done / n_layers per second of the walk.
    seconds_left: estimate for the walk; None before the first layer is done. here: all its weights have come, and the line to
    the hub is free for somebody else's.
    """

    entry: str
    stage: str
    layer: int = 0
    n_layers: int = 0
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    message: str = ""
    here: bool = False
