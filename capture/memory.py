"""How much memory a pair's weights need in each mode, and which mode to take. Both modes give the same numbers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from capture.checkpoint import EMBEDDING, HEAD, REST, StreamedModel
from capture.config import Entry
from capture.device import DeviceChoice
from capture.errors import DeviceMemoryError

RESIDENT_SHARE = 0.5  # mode auto keeps both models where they take less than this share of the free memory


@dataclass(frozen=True)
class ModeChoice:
    """mode: resident or streamed; weight_bytes: the most bytes of weights alive at once; why: for the log."""

    mode: str
    weight_bytes: int
    why: str


def weight_needs(base: StreamedModel, sft: StreamedModel) -> dict[str, int]:
    """Bytes of weights alive at most, by mode.

    Embeddings that are no unembedding at the same time are freed after the first layer's states are made, so the peak is
    the larger of two moments: all ends loaded, or the ends without such embeddings plus layers (all; or two of each
    model, the one in use and the one being read ahead).
    """
    models = [base] if base is sft else [base, sft]
    kept = sum(m.group_bytes(g) for m in models for g in (HEAD, REST))
    embeddings = sum(m.group_bytes(EMBEDDING) for m in models)
    freed = sum(m.group_bytes(EMBEDDING) for m in models if not m.tied)
    layers = [sum(sizes) for sizes in zip(*(m.layer_bytes() for m in models), strict=True)]
    two = max((a + b for a, b in itertools.pairwise(layers)), default=layers[0])
    start, later = kept + embeddings, kept + embeddings - freed
    return {"resident": max(start, later + sum(layers)), "streamed": max(start, later + two)}


def choose_mode(entry: Entry, base: StreamedModel, sft: StreamedModel, device: DeviceChoice) -> ModeChoice:
    """The entry's mode, or for `auto` resident where both models fit easily, else streamed.

    Raises DeviceMemoryError, with the arithmetic, where even the weights of the mode do not fit.
    """
    need = weight_needs(base, sft)
    gib = {mode: f"{size / 2**30:.2f} GiB" for mode, size in need.items()}
    free = f"{device.free_bytes / 2**30:.2f} GiB"
    if base.whole or sft.whole:
        mode, why = "resident", f"pickled weights cannot be read layer by layer; both models take {gib['resident']}"
    elif entry.mode != "auto":
        mode, why = entry.mode, f"asked for; {gib[entry.mode]} of weights at most"
    elif need["resident"] <= RESIDENT_SHARE * device.free_bytes:
        mode, why = "resident", f"both models take {gib['resident']} of {free} free"
    else:
        mode, why = (
            "streamed",
            f"both models would take {gib['resident']} of {free} free; streamed takes {gib['streamed']}",
        )
    if need[mode] > device.free_bytes:
        hint = "; set mode: streamed" if mode == "resident" and need["streamed"] <= device.free_bytes else ""
        raise DeviceMemoryError(
            f"mode {mode} needs {gib[mode]} for weights alone; {free} are free on {device.name}{hint}"
        )
    return ModeChoice(mode, need[mode], why)
