"""Walk layer l of base and layer l of sft together, over all passes and batches at once.

Passes that share blocks run as one batch: BB and SB through base's layers, BS and SS through sft's. So four passes cost
two forwards, and each checkpoint is read once however many prompts there are. How many weights are alive at a time is the
mode's choice (capture/footprint.py lists them); every mode runs the same layers on the same batches, so that all states are
equal bit for bit:

- resident, streamed: layer l of both models, then its states are handed out; resident frees nothing.
- streamed-2, sub-layer: layer l of base over all batches, then layer l of sft, then the states are handed out.
- one-at-a-time: all layers of base, then all of sft, then the states, which have waited in main memory, are handed out.

A *slot* is one distinct residual state. Passes share a slot as long as their states are equal bit for bit: where both
embeddings agree on the tokens in use, or where both models' first layers are equal (adapters, frozen layers). Nothing
equal is computed twice, but for layers whose weights are never in memory at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capture.batches import Batch
from capture.checkpoint import EMBEDDING, HEAD, REST, StreamedModel, layers_equal
from capture.config import Owner, Pass
from capture.entering import Entering
from capture.home import Home
from capture.loader import Loader
from capture.parts import Parts, Split
from capture.replay import run_layer, run_tail
from capture.sublayer import SubLayer
from capture.unembed import heads_equal

Job = tuple[Owner, list[int]]  # a model and the slots that go through its layer
Fresh = dict[Owner, list[list[Tensor]]]  # what a layer made: [batch] -> states of a model's input slots
Stop = Callable[[], bool] | None


@dataclass
class State:
    """The residual after one layer, of one batch: `slots[slot_of[pass]]` is [B, T, D]. previous: the layer before."""

    layer: int
    batch: int
    slots: list[Tensor]
    slot_of: dict[str, int]
    previous: list[Tensor] | None
    previous_slot_of: dict[str, int]


class Pair:
    """Both models of a pair, opened, and how their passes share work.

    models: {"base": ..., "sft": ...}; the same object twice where both are one checkpoint. After `begin`, `tails` holds
    each model's final norm and `same_embeddings`, `same_tail`, `same_head` say what both models have in common; `states` are
    [batch][slot] -> [B, T, D], wherever `home` keeps them, and `parts` says which batches go through layers in parts.
    """

    def __init__(self, base: StreamedModel, sft: StreamedModel, passes: Sequence[Pass]) -> None:
        self.models: dict[Owner, StreamedModel] = {"base": base, "sft": sft}
        self.passes = list(passes)
        self.n_layers = base.n_layers
        self.same_config = _numerics(base.config.to_dict()) == _numerics(sft.config.to_dict())
        self.shared_layers = 0

    def unique(self) -> list[StreamedModel]:
        """The models, one where both are the same checkpoint."""
        return list({id(m): m for m in self.models.values()}.values())

    @property
    def owners(self) -> list[Owner]:
        """Whose blocks the passes go through."""
        return [o for o in ("base", "sft") if any(p.model == o for p in self.passes)]

    def close(self) -> None:
        """Let all weights go."""
        for model in self.unique():
            for group in model.groups():
                model.free(group)

    # -- entering ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, batches: Sequence[Batch], *, mode: str = "streamed", spill: bool = False) -> None:
        """Load the ends; make every batch's entering states; record every layer's arguments.

        mode: one of footprint.MODES, for `walk`. spill: states of batches that are not at work wait in main memory.
        """
        self.mode, self.batches = mode, list(batches)
        self.home = Home(self.models["base"].device, spill=spill)
        if mode == "sub-layer":
            self._cancel_first()
        self.inside = [SubLayer(m) for m in self.unique()] if mode == "sub-layer" else []
        entering = Entering(self.models, self.passes, self.batches, self.home)
        entering.embed()
        self._tidy()
        for model in self.unique():
            for group in (REST, HEAD):
                model.load(group)
        base, sft = self.models["base"], self.models["sft"]
        self.same_embeddings, self.stacked = entering.same_embeddings, entering.stacked
        self.same_tail = self.same_config and layers_equal(base, sft, [REST])
        self.same_head = self.same_config and base.tied == sft.tied and heads_equal(base, sft)
        entered = [entering.enter(b) for b in range(len(self.batches))]
        recorded, entries = [r for r, _ in entered], [e for _, e in entered]
        self.parts = Parts(entering, recorded)
        self.tails = {o: recording.tail for o, recording in recorded[0].items()}
        names = [p.name for p in self.passes]
        first_of = [next(q for q in names if all(e[q] is e[p] for e in entries)) for p in names]
        firsts = list(dict.fromkeys(first_of))
        self.slot_of = {p: firsts.index(first) for p, first in zip(names, first_of, strict=True)}
        self.states = [[entry[p] for p in firsts] for entry in entries]

    def _tidy(self) -> None:
        """What large weights that are gone leave is for states as well."""
        self.models["base"].upload.tidy()

    def _cancel_first(self) -> None:
        """What was announced before it was known where the walk begins, and in which pieces weights are read."""
        for model in self.unique():
            model.cancel_first()

    # -- walking -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def walk(self, *, stop: Stop = None, start: int = 0, last: int | None = None) -> Iterator[State]:
        """Yield the state of every batch at layer -1, 0, ..., L-1 and, after the final norm, L; layers outermost.

        start: the first layer to run; `go_on_from` has then put the states that enter it in place. last: the last one, where
        others go on. stop: asked before every batch's turn; KeyboardInterrupt where it says True. A state is good until the
        next is asked for.
        """
        if start:
            self._cancel_first()
        end = self.n_layers if last is None else last + 1
        if start == 0:
            for b in range(len(self.states)):  # a name for them would hold the last batch's to the end of the walk
                yield State(-1, b, self.home.get(self.states[b]), self.slot_of, None, self.slot_of)
        if self.mode == "one-at-a-time":
            yield from self._one_at_a_time(range(start, end), stop)
        elif self.mode in ("streamed-2", "sub-layer"):
            yield from self._in_turns(range(start, end), stop)
        else:
            yield from self._together(range(start, end), stop)
        if end == self.n_layers:
            yield from self._finish()

    def go_on_from(
        self, states: list[list[Tensor]], slot_of: dict[str, int], shared_layers: int, splits: Sequence[Split] = ()
    ) -> None:
        """Put in place what an earlier walk had come to: states [batch][slot] -> [B, T, D], and how batches were split.

        Raises ValueError where the states are not of these batches and slots, or not of the shape and dtype that enter layer 0;
        Mamba's layers go on in float32.
        """
        wide = {torch.float32} if getattr(self.models["base"].config, "residual_in_fp32", False) else set()
        n_slots = len(set(slot_of.values()))
        if [len(slots) for slots in states] != [n_slots] * len(self.batches):
            raise ValueError(f"not {len(self.batches)} batches of {n_slots} slots each")
        for b, (entering, *_) in enumerate(self.states):
            for state in states[b]:
                if state.shape != entering.shape or state.dtype not in {entering.dtype} | wide:
                    raise ValueError(f"batch {b}: {state.dtype} {tuple(state.shape)}")
        self.states = [self.home.put(slots) for slots in states]
        self.slot_of, self.shared_layers = slot_of, shared_layers
        for split in splits:
            self.parts.split(split)

    def _walked(self) -> list[StreamedModel]:
        return list({id(self.models[o]): self.models[o] for o in self.owners}.values())

    def _together(self, layers: range, stop: Stop) -> Iterator[State]:
        """Layer l of both models, batch by batch; the layers after it are being read meanwhile."""
        loader = Loader([[(m, ("layer", i)) for m in self._walked()] for i in layers])
        if self.mode == "resident":
            loader.load_at_hand()
        try:
            for step, layer in enumerate(layers):
                loader.get(step)
                inputs = self._inputs()
                jobs, slot_of = self._jobs(inputs, self._may_share(inputs) and self._same_weights(layer))
                for b in range(len(self.states)):
                    _ask(stop)
                    new = self.parts.attempt(b, layer, lambda b=b, layer=layer, jobs=jobs: self._step(layer, b, jobs))  # type: ignore[misc]
                    yield from self._hand_out(layer, b, new, slot_of)
                self._next(slot_of)
                if self.mode != "resident":
                    loader.free(step)
        finally:
            loader.close()

    def _in_turns(self, layers: range, stop: Stop) -> Iterator[State]:
        """Layer l of one model, then of the other, each over all batches: at most two layers' weights are alive.

        Both models' layers are there together only to be compared: where they are equal, the first's results stand for both.
        In sub-layer mode matrices come and go inside a layer, so the results are compared instead.
        """
        models = self._walked()
        loader = Loader([[(m, ("layer", i))] for i in layers for m in models])
        try:
            for number, layer in enumerate(layers):
                step = number * len(models)
                loader.get(step)
                inputs = self._inputs()
                first, *others = self.owners
                fresh = {first: [self._turn(first, inputs[first], layer, b, stop) for b in range(len(self.states))]}
                if len(models) == 2:
                    loader.wait(step + 1)
                known = not self.inside or len(models) == 1  # one checkpoint is equal to itself, unread
                shared = self._may_share(inputs) and known and self._same_weights(layer)
                loader.free(step)
                loader.ahead(step + 2)
                if others and not shared:
                    self._other_turn(first, others[0], layer, fresh, loader, stop)
                    shared = bool(self.inside) and self._may_share(inputs) and self._same_results(fresh)
                if len(models) == 2:
                    loader.free(step + 1)
                    loader.ahead(step + 3)
                jobs, slot_of = self._jobs(inputs, shared)
                for b in range(len(self.states)):
                    new = [t for owner, _ in jobs for t in self.home.get(fresh[owner][b])]
                    for of_owner in fresh.values():
                        of_owner[b] = []
                    yield from self._hand_out(layer, b, new, slot_of)
                self._next(slot_of)
        finally:
            loader.close()
            for leaves in self.inside:
                leaves.close()

    def _other_turn(self, first: Owner, second: Owner, layer: int, fresh: Fresh, loader: Loader, stop: Stop) -> None:
        """The second model's turn at a layer. A batch that must be split for it goes through the first's layer again, too,
        as both sides of a comparison run at equal shapes; that layer's weights are then read once more."""
        inputs = self._inputs()
        fresh[second] = []
        for b in range(len(self.states)):
            parts = {first: self.parts.of(b, layer)}
            fresh[second].append(self._turn(second, inputs[second], layer, b, stop))
            parts[second] = self.parts.of(b, layer)
            while parts[first] != parts[second]:
                owner = first if parts[first] < parts[second] else second
                model, group = self.models[owner], ("layer", layer)
                away = group not in model.loaded
                if away:
                    loader.drop_ahead()
                    model.load(group)
                fresh[owner][b] = self._turn(owner, inputs[owner], layer, b, stop)
                parts[owner] = self.parts.of(b, layer)
                if away:
                    model.free(group)

    def _one_at_a_time(self, layers: range, stop: Stop) -> Iterator[State]:
        """All layers of one model, then of the other; their states wait in main memory until both are there."""
        waiting = Home(self.home.device, spill=True)
        ends = [(m, EMBEDDING if m.tied else HEAD) for m in self.unique()]
        for model, group in ends:
            model.free(group)
        inputs = self._inputs()
        kept: dict[Owner, list[list[list[Tensor]]]] = {}
        ran: dict[Owner, tuple[Split, ...]] = {}
        while late := [
            o for o in self.owners if ran.get(o) != tuple(self.parts.splits)
        ]:  # a split for one holds for both
            owner = late[0]
            kept[owner] = self._alone(owner, inputs[owner], layers, waiting, stop)
            ran[owner] = tuple(self.parts.splits)
        self._tidy()
        for model, group in ends:
            model.load(group)
        for number, layer in enumerate(layers):
            fresh = {owner: by_layer[number] for owner, by_layer in kept.items()}
            inputs = self._inputs()
            jobs, slot_of = self._jobs(inputs, self._may_share(inputs) and self._same_results(fresh))
            for b in range(len(self.states)):
                _ask(stop)
                new = [t for owner, _ in jobs for t in waiting.get(fresh[owner][b])]
                for of_owner in fresh.values():
                    of_owner[b] = []
                yield from self._hand_out(layer, b, new, slot_of)
            self._next(slot_of)

    def _alone(
        self, owner: Owner, slots: list[int], layers: range, waiting: Home, stop: Stop
    ) -> list[list[list[Tensor]]]:
        """One model's states after each layer, [layer][batch] -> those of its input slots."""
        model = self.models[owner]
        loader = Loader([[(model, ("layer", i))] for i in layers])
        found: list[list[list[Tensor]]] = []
        try:
            for step, layer in enumerate(layers):
                loader.get(step)
                found.append([])
                for b in range(len(self.states)):
                    before = found[-2][b] if step else [self.states[b][s] for s in slots]
                    new = self._turn_on(owner, waiting.get(self.home.get(before)), layer, b, stop)
                    found[-1].append(waiting.put(new))
        finally:
            loader.close()
        for i in layers:
            model.free(("layer", i))
        return found

    # -- one layer -----------------------------------------------------------------------------------------------------

    def _inputs(self) -> dict[Owner, list[int]]:
        """The slots that each model's layer is run on."""
        return {o: list(dict.fromkeys(self.slot_of[p.name] for p in self.passes if p.model == o)) for o in self.owners}

    def _may_share(self, inputs: dict[Owner, list[int]]) -> bool:
        """True if both models' layers are given the same states, so that equal weights give equal results."""
        return len(inputs) == 2 and set(inputs["base"]) == set(inputs["sft"]) and self.same_config

    def _same_weights(self, layer: int) -> bool:
        shared = layers_equal(self.models["base"], self.models["sft"], [("layer", layer)])
        self.shared_layers += shared
        return shared

    def _same_results(self, fresh: Fresh) -> bool:
        pairs = zip(fresh["base"], fresh["sft"], strict=True)
        shared = all(torch.equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True))
        self.shared_layers += shared
        return shared

    def _jobs(self, inputs: dict[Owner, list[int]], shared: bool) -> tuple[list[Job], dict[str, int]]:
        """What to run at this layer: (model, its input slots) in the order of the output slots; and passes' new slots."""
        jobs = [(o, inputs[o]) for o in (self.owners[:1] if shared else self.owners)]
        out = {(o, s): i for i, (o, s) in enumerate((o, s) for o, slots in jobs for s in slots)}
        slot_of = {p.name: out[(self.owners[0] if shared else p.model, self.slot_of[p.name])] for p in self.passes}
        return jobs, slot_of

    def _step(self, layer: int, b: int, jobs: Sequence[Job]) -> list[Tensor]:
        states = self.home.get(self.states[b])
        return [t for owner, slots in jobs for t in self._run(owner, [states[s] for s in slots], layer, b)]

    def _turn(self, owner: Owner, slots: list[int], layer: int, b: int, stop: Stop) -> list[Tensor]:
        before = self.home.get([self.states[b][s] for s in slots])
        return self.home.put(self._turn_on(owner, before, layer, b, stop))

    def _turn_on(self, owner: Owner, before: list[Tensor], layer: int, b: int, stop: Stop) -> list[Tensor]:
        _ask(stop)
        return self.parts.attempt(b, layer, lambda: self._run(owner, before, layer, b))

    def _run(self, owner: Owner, states: list[Tensor], layer: int, b: int) -> list[Tensor]:
        """One layer on one batch's states, in as many parts as the batch was split into."""
        module = self.models[owner].layers[layer]
        if self.parts.of(b, layer) == 1:
            return self._ran(module, states, self.parts.call(owner, layer, b))
        found = [torch.empty_like(s) for s in states]
        for part, call in self.parts.calls(owner, layer, b):
            for into, one in zip(found, self._ran(module, [s[part] for s in states], call), strict=True):
                into[part] = one
        return found

    def _ran(self, module: nn.Module, states: list[Tensor], call: Any) -> list[Tensor]:
        if self.stacked and len(states) > 1:
            return list(run_layer(module, torch.cat(states), call).chunk(len(states)))
        return [run_layer(module, s, call) for s in states]

    def _hand_out(self, layer: int, b: int, new: list[Tensor], slot_of: dict[str, int]) -> Iterator[State]:
        state = State(layer, b, new, slot_of, self.home.get(self.states[b]), self.slot_of)
        self.states[b] = self.home.put(new)
        yield state
        state.slots, state.previous = [], None  # whoever still holds it does not hold the memory

    def _next(self, slot_of: dict[str, int]) -> None:
        self.slot_of = slot_of

    def _finish(self) -> Iterator[State]:
        same = self.owners[0] if self.same_tail else None
        keys: dict[str, tuple[int, Owner]] = {p.name: (self.slot_of[p.name], same or p.model) for p in self.passes}
        order = list(dict.fromkeys(keys.values()))
        slot_of = {name: order.index(key) for name, key in keys.items()}
        for b in range(len(self.states)):
            slots = self.home.get(self.states[b])
            state = State(
                self.n_layers, b, [run_tail(self.tails[o], slots[s]) for s, o in order], slot_of, slots, self.slot_of
            )
            del slots
            yield state
            state.slots, state.previous = [], None


def _ask(stop: Stop) -> None:
    if stop is not None and stop():
        raise KeyboardInterrupt


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
