"""Bring weights in ahead of their use and let them go behind it: a list of steps, each a few groups of weights."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from capture.checkpoint import StreamedModel

Step = Sequence[tuple[StreamedModel, Any]]  # what is loaded together: (model, group)


ANNOUNCED = 4  # steps behind the one being read whose bytes may be fetched, as far as their window reaches
AHEAD_LAYERS = (
    ANNOUNCED // 2 + 1
)  # layers behind the one at work that are announced, where each model's is a step of its own


class Loader:
    """Reads steps in order, in a thread of its own; what is being read counts as alive from the moment it may begin.

    Weights that are views of mapped files are put in place by whoever waits for them, as that takes a fraction of a millisecond;
    the thread has only their bytes read from the disk, where they are not in memory. More of it beside a layer would take one of
    the layer's own cores away, and every operation of a layer waits for all of them.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.coming: dict[int, Future[None] | None] = {}  # None: there is nothing to wait for
        self.here = 0  # steps that were loaded at hand

    def _load(self, step: int) -> None:
        for model, group in self.steps[step]:
            model.load(group)

    def load_at_hand(self) -> None:
        """Load all steps that take no time, where nothing is ever freed: one after the other that takes half of what it takes
        between layers, which leave nothing of it in the processor's cache."""
        for step in self.steps:
            for model, group in step:
                if not model.is_at_hand(group):
                    return
                model.load(group)
            self.here += 1

    def _prepare(self, step: int) -> None:
        """What the thread does."""
        for model, group in self.steps[step]:
            if model.is_view(group):
                model.read_ahead(group)
            else:
                model.load(group, ahead=True)

    def ahead(self, step: int) -> None:
        """Start to read a step, if there is one and it is not on its way."""
        if step < len(self.steps) and step not in self.coming:
            for model, group in self.steps[step]:
                model.reserve(group)
            for later in self.steps[step : step + 1 + ANNOUNCED]:
                for model, group in later:
                    model.announce(group)
            here = all(model.is_at_hand(group) for model, group in self.steps[step])
            self.coming[step] = None if here else self.thread.submit(self._prepare, step)

    def wait(self, step: int) -> None:
        """Wait until a step is there; read it here and now where nobody started to."""
        future = self.coming.pop(step, None)
        if future is not None:
            future.result()
        self._load(step)

    def get(self, step: int) -> None:
        """Wait until a step is there, and start to read the next."""
        if step >= self.here:
            self.wait(step)
        if step + 1 >= self.here:
            self.ahead(step + 1)

    def free(self, step: int) -> None:
        for model, group in self.steps[step]:
            model.free(group)

    def drop_ahead(self) -> None:
        """Take back what was read ahead: its memory is needed."""
        for step in list(self.coming):
            self.wait(step)
            self.free(step)

    def close(self) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)
