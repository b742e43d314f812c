"""Which mode a capture runs in: memory is a promise. What each mode needs is compared with what the device has free before
anything large is loaded, and the first one that fits is taken. All modes give the same states, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from capture.checkpoint import StreamedModel
from capture.config import Entry
from capture.device import DeviceChoice
from capture.errors import DoesNotFitError, UnsupportedModelError
from capture.footprint import AUTO, MODES, ROOM, Activations, ModelBytes, Need, ways, weight_bytes
from capture.measure import model_bytes


@dataclass(frozen=True)
class ModeChoice:
    """mode: one of footprint.MODES. spill: states that wait are in main memory. tile_bytes: of the lens. parts: in how many
    parts every batch goes through the layers. need: bytes in each stage; why: for the log."""

    mode: str
    spill: bool
    tile_bytes: int
    parts: int
    need: Need
    why: str


def possible_modes(models: Sequence[StreamedModel]) -> tuple[str, ...]:
    """The modes that these models can be walked in at all."""
    if any(m.whole for m in models):
        return ("resident",)
    if models[0].group.size > 1:
        return tuple(m for m in MODES if m != "sub-layer")
    return tuple(MODES)


class Promise:
    """Chooses the mode of one entry. measure: (tile bytes, parts) -> activations; asked for once the weights alone fit."""

    def __init__(
        self, entry: Entry, models: Sequence[StreamedModel], device: DeviceChoice, layers: range | None = None
    ) -> None:
        """layers: those that this worker walks; None is all."""
        self.entry, self.device = entry, device
        self.modes = possible_modes(models)
        self.on_host = device.device == "cpu"
        self.sizes: list[ModelBytes] = [model_bytes(m) for m in models]
        if layers is not None:
            self.sizes = [_only(m, slice(layers.start, layers.stop)) for m in self.sizes]
        self._check_asked()
        self._check_weights()

    def _check_asked(self) -> None:
        asked = self.entry.mode
        if asked != "auto" and asked not in self.modes:
            raise UnsupportedModelError(
                f"mode {asked} is not possible here, only {', '.join(self.modes)}: weights of a pickled or quantized checkpoint "
                "cannot be read in parts, and ranks of a group cannot read theirs matrix by matrix; set mode: auto"
            )

    def _asked(self) -> tuple[str, ...]:
        if self.entry.mode != "auto":
            return (self.entry.mode,)
        return tuple(m for m in AUTO if m in self.modes) or self.modes

    def _check_weights(self) -> None:
        """Raise where not even the weights of any mode asked for fit: nothing needs to be measured then."""
        need = weight_bytes(self.sizes)
        mode = min(self._asked(), key=lambda m: need[m])
        if need[mode] > self.device.free_bytes:
            others = [m for m in self.modes if need[m] <= self.device.free_bytes]
            hint = f"; mode {others[0]} takes {gib(need[others[0]])} of weights" if others else self._no_other()
            raise DoesNotFitError(
                f"mode {mode} needs {gib(need[mode])} for weights alone; {gib(self.device.free_bytes)} are free on "
                f"{self.device.name}{hint}"
            )

    def _no_other(self) -> str:
        more = "" if self.entry.tensor_parallel not in (1, "auto") else ", or tensor_parallel on several"
        return f"; no mode fits: take a device with more memory{more}"

    def choose(self, measure: Callable[[int, int], Activations], tile_bytes: int, most_parts: int) -> ModeChoice:
        """The entry's mode, or for `auto` the first of AUTO that fits, with the largest lens tiles that do.

        Smaller tiles, and states in main memory, come before another mode; batches in parts come after all modes, because
        only they change numbers (within the noise floor). Raises DoesNotFitError, with the arithmetic, where nothing fits.
        """
        free = self.device.free_bytes
        share = ROOM["cpu" if self.on_host else "cuda"]
        auto = self.entry.mode == "auto"
        room = int(share * free) if auto and self.entry.device_memory_gib is None else free
        for limit in dict.fromkeys((room, free)):
            for found in self._ways(self._asked(), measure, tile_bytes, most_parts):
                if found.need.peak <= limit:
                    return self._with_reason(found)
        raise DoesNotFitError(self._refusal(measure, tile_bytes, most_parts))

    def _ways(
        self, modes: Sequence[str], measure: Callable[[int, int], Activations], tile_bytes: int, most_parts: int
    ) -> Iterator[ModeChoice]:
        parts = 1
        while True:
            for mode in modes:
                act = lambda tile, parts=parts: measure(tile, parts)  # noqa: E731
                for way in ways(self.sizes, mode, act, tile_bytes, on_host=self.on_host):
                    yield ModeChoice(mode, way.spill, way.tile_bytes, parts, way.need, "")
            if parts >= most_parts:
                return
            parts = min(2 * parts, most_parts)

    def _with_reason(self, found: ModeChoice) -> ModeChoice:
        need = f"{gib(found.need.peak)} ({gib(found.need.weights)} of weights)"
        asked = "asked for" if self.entry.mode != "auto" else "the first that fits"
        extra = ["states that wait are in main memory"] if found.spill else []
        extra += [f"batches in up to {found.parts} parts"] if found.parts > 1 else []
        why = "; ".join([f"{asked}: needs {need} of {gib(self.device.free_bytes)} free", *extra])
        return ModeChoice(found.mode, found.spill, found.tile_bytes, found.parts, found.need, why)

    def _refusal(self, measure: Callable[[int, int], Activations], tile_bytes: int, most_parts: int) -> str:
        def least(modes: Sequence[str]) -> ModeChoice:
            return min(self._ways(modes, measure, tile_bytes, most_parts), key=lambda w: w.need.peak)

        mine = least(self._asked())
        text = (
            f"mode {mine.mode} needs {gib(mine.need.peak)} at least: {gib(mine.need.weights)} of weights, "
            f"{gib(mine.need.peak - mine.need.weights)} of states and work, with the smallest lens tiles"
            f"{f' and batches in {mine.parts} parts' if mine.parts > 1 else ''}; {gib(self.device.free_bytes)} are free on "
            f"{self.device.name}"
        )
        best = least(self.modes)
        if best.need.peak <= self.device.free_bytes:
            return f"{text}; set mode: {best.mode}, which needs {gib(best.need.peak)}"
        return f"{text}{self._no_other()}; shorter prompts or a smaller batching.max_tokens need less"


def _only(model: ModelBytes, layers: slice) -> ModelBytes:
    return replace(model, layers=model.layers[layers], loading=model.loading[layers])


def gib(size: float) -> str:
    """Bytes for people: 1.25 GiB, 3.1 MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"
