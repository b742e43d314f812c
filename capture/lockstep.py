"""Walk layer l of base and layer l of sft together, over all passes and batches at once.

Passes that share blocks run as one batch: BB and SB through base's layers, BS and SS through sft's. So four passes cost
two forwards, each checkpoint is read once however many prompts there are, and two layers of each model (one in use, one
being read ahead) are all the weights in memory. Resident mode is the same walk with nothing freed.

A *slot* is one distinct residual state. Passes share a slot as long as their states are equal bit for bit: where both
embeddings agree on the tokens in use, or where both models' first layers are equal (adapters, frozen layers). Nothing
equal is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from capture.batches import Batch
from capture.checkpoint import EMBEDDING, HEAD, REST, StreamedModel, layers_equal
from capture.config import Owner, Pass
from capture.group import local
from capture.replay import Recording, record, run_layer, run_tail


@dataclass
class State:
    """The residual after one layer, of one batch: `slots[slot_of[pass]]` is [B, T, D]. previous: the layer before."""

    layer: int
    batch: int
    slots: list[Tensor]
    slot_of: dict[str, int]
    previous: list[Tensor] | None
    previous_slot_of: dict[str, int]


class Loader:
    """Brings layers in, one ahead, and lets them go behind; in resident mode nothing is let go."""

    def __init__(self, models: Sequence[StreamedModel], *, streamed: bool) -> None:
        self.models, self.streamed = models, streamed
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.ahead: dict[int, Future[None]] = {}

    def _load(self, layer: int) -> None:
        for model in self.models:
            model.load(("layer", layer))

    def get(self, layer: int) -> None:
        """Wait until the layer is there, and start reading the next."""
        future = self.ahead.pop(layer, None)
        if future is None:
            self._load(layer)
        else:
            future.result()
        if layer + 1 < self.models[0].n_layers:
            for model in self.models:
                model.reserve(("layer", layer + 1))
            self.ahead[layer + 1] = self.thread.submit(self._load, layer + 1)

    def done(self, layer: int) -> None:
        if self.streamed:
            for model in self.models:
                model.free(("layer", layer))

    def close(self) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)


class Pair:
    """Both models of a pair, opened, and how their passes share work.

    models: {"base": ..., "sft": ...}; the same object twice where both are one checkpoint. After `begin`, `tails` holds
    each model's final norm and `same_embeddings`, `same_tail`, `same_head` say what both models have in common.
    """

    def __init__(self, base: StreamedModel, sft: StreamedModel, passes: Sequence[Pass]) -> None:
        self.models: dict[Owner, StreamedModel] = {"base": base, "sft": sft}
        self.passes = list(passes)
        self.n_layers = base.n_layers
        self.same_config = _numerics(base.config.to_dict()) == _numerics(sft.config.to_dict())
        self.shared_layers = 0

    def _unique(self) -> list[StreamedModel]:
        return list({id(m): m for m in self.models.values()}.values())

    @property
    def owners(self) -> list[Owner]:
        return [o for o in ("base", "sft") if any(p.model == o for p in self.passes)]

    @torch.no_grad()
    def begin(self, batches: Sequence[Batch]) -> None:
        """Load embeddings, heads and the rest; make every batch's entering states; record every layer's arguments."""
        for model in self._unique():
            for group in (EMBEDDING, REST, HEAD):
                model.load(group)
        base, sft = self.models["base"], self.models["sft"]
        embeds = [{o: m.embedding(b.ids_BT) for o, m in self.models.items()} for b in batches]
        for model in self._unique():
            if not model.tied:
                model.free(EMBEDDING)
        self.same_embeddings = all(torch.equal(e["base"], e["sft"]) for e in embeds)
        self.same_tail = self.same_config and layers_equal(base, sft, [REST])
        self.same_scaling = self.same_config and base.head_weight.shape == sft.head_weight.shape
        self.same_head = self.same_config and base.tied == sft.tied and _heads_equal(base, sft)
        sources = {o: self._sources(o) for o in self.owners}
        # Passes of one comparison run at equal batch shapes: both models stack their passes, or none does.
        self.stacked = len({len(s) for s in sources.values()}) == 1
        self.recordings: list[dict[Owner, Recording]] = []
        self.states: list[list[Tensor]] = []
        entries: list[dict[str, Tensor]] = []
        for batch, embed in zip(batches, embeds, strict=True):
            by_owner: dict[Owner, Recording] = {}
            entry: dict[str, Tensor] = {}
            for owner in self.owners:
                by_owner[owner], found = self._enter(owner, batch, [embed[s] for s in sources[owner]])
                for p in self.passes:
                    if p.model == owner:
                        entry[p.name] = found[sources[owner].index(self._source(p))]
            self.recordings.append(by_owner)
            entries.append(entry)
        self.tails = {o: self.recordings[0][o].tail for o in self.owners}
        self.slot_of = self._merge(entries)
        n_slots = max(self.slot_of.values()) + 1
        first = [next(p for p, s in self.slot_of.items() if s == slot) for slot in range(n_slots)]
        self.states = [[entry[p] for p in first] for entry in entries]

    def _source(self, p: Pass) -> Owner:
        return "base" if self.same_embeddings else p.embeddings

    def _sources(self, owner: Owner) -> list[Owner]:
        """Whose embeddings the passes of one model's blocks start from, each once."""
        return list(dict.fromkeys(self._source(p) for p in self.passes if p.model == owner))

    def _enter(self, owner: Owner, batch: Batch, embeds: list[Tensor]) -> tuple[Recording, list[Tensor]]:
        """Record one model on one batch; the states that enter its layer 0, one for each source of embeddings."""
        model, n = self.models[owner], len(embeds)
        if not self.stacked or n == 1:
            recordings = [record(model, e, mask_BT=batch.mask_BT, positions_BT=batch.positions_BT) for e in embeds]
            return recordings[0], [r.entry_BTD for r in recordings]
        mask = None if batch.mask_BT is None else batch.mask_BT.repeat(n, 1)
        positions = None if batch.positions_BT is None else batch.positions_BT.repeat(n, 1)
        recording = record(model, torch.cat(embeds), mask_BT=mask, positions_BT=positions)
        return recording, list(recording.entry_BTD.chunk(n))

    def _merge(self, entries: list[dict[str, Tensor]]) -> dict[str, int]:
        """Give passes whose entering states are equal in every batch the same slot."""
        slot_of: dict[str, int] = {}
        firsts: list[str] = []
        for p in self.passes:
            for slot, other in enumerate(firsts):
                if all(torch.equal(e[p.name], e[other]) for e in entries):
                    slot_of[p.name] = slot
                    break
            else:
                slot_of[p.name] = len(firsts)
                firsts.append(p.name)
        return slot_of

    @torch.no_grad()
    def walk(self, *, streamed: bool, stop: Callable[[], bool] | None = None, start: int = 0) -> Iterator[State]:
        """Yield the state of every batch at layer -1, 0, ..., L-1 and, after the final norm, L; layers outermost.

        start: the first layer to run; `go_on_from` has then put the states that enter it in place.
        """
        if start == 0:
            for b, slots in enumerate(self.states):
                yield State(-1, b, slots, self.slot_of, None, self.slot_of)
        loader = Loader(self._unique(), streamed=streamed)
        try:
            for layer in range(start, self.n_layers):
                loader.get(layer)
                jobs, slot_of = self._jobs(layer)
                for b in range(len(self.states)):
                    if stop is not None and stop():
                        raise KeyboardInterrupt
                    previous = self.states[b]
                    self.states[b] = self._step(layer, b, jobs)
                    yield State(layer, b, self.states[b], slot_of, previous, self.slot_of)
                self.slot_of = slot_of
                loader.done(layer)
        finally:
            loader.close()
        yield from self._finish()

    def go_on_from(self, states: list[list[Tensor]], slot_of: dict[str, int], shared_layers: int) -> None:
        """Put states in place that an earlier walk had come to: [batch][slot] -> [B, T, D]."""
        self.states, self.slot_of, self.shared_layers = states, slot_of, shared_layers

    def _jobs(self, layer: int) -> tuple[list[tuple[Owner, list[int]]], dict[str, int]]:
        """What to run at this layer: (model, its input slots) in the order of the output slots; and passes' new slots."""
        inputs = {
            o: list(dict.fromkeys(self.slot_of[p.name] for p in self.passes if p.model == o)) for o in self.owners
        }
        shared = False
        if len(inputs) == 2 and set(inputs["base"]) == set(inputs["sft"]) and self.same_config:
            shared = layers_equal(self.models["base"], self.models["sft"], [("layer", layer)])
            self.shared_layers += shared
        if shared:
            jobs = [(self.owners[0], inputs[self.owners[0]])]
        else:
            jobs = [(o, inputs[o]) for o in self.owners]
        out = {(o, s): i for i, (o, s) in enumerate((o, s) for o, slots in jobs for s in slots)}
        slot_of = {p.name: out[(self.owners[0] if shared else p.model, self.slot_of[p.name])] for p in self.passes}
        return jobs, slot_of

    def _step(self, layer: int, batch: int, jobs: list[tuple[Owner, list[int]]]) -> list[Tensor]:
        result: list[Tensor] = []
        for owner, slots in jobs:
            module = self.models[owner].layers[layer]
            call = self.recordings[batch][owner].calls[layer]
            states = [self.states[batch][s] for s in slots]
            if self.stacked and len(states) > 1:
                result += run_layer(module, torch.cat(states), call).chunk(len(states))
            else:
                result += [run_layer(module, s, call) for s in states]
        return result

    def _finish(self) -> Iterator[State]:
        same = self.owners[0] if self.same_tail else None
        keys: dict[str, tuple[int, Owner]] = {p.name: (self.slot_of[p.name], same or p.model) for p in self.passes}
        order = list(dict.fromkeys(keys.values()))
        slot_of = {name: order.index(key) for name, key in keys.items()}
        for b, slots in enumerate(self.states):
            final = [run_tail(self.tails[o], slots[s]) for s, o in order]
            yield State(self.n_layers, b, final, slot_of, slots, self.slot_of)


def _heads_equal(base: StreamedModel, sft: StreamedModel) -> bool:
    if base is sft:
        return True
    a, b = ({k: local(v) for k, v in m.head.state_dict().items()} for m in (base, sft))
    equal = a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)
    return base.group.all(equal, base.device)


def _numerics(config: dict[str, object]) -> dict[str, object]:
    """A config without the keys that cannot change a number."""
    names = {
        "_name_or_path",
        "transformers_version",
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
    }
    return {k: v for k, v in config.items() if k not in names}
