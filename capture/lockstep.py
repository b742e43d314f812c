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

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from capture.batches import Batch, halves
from capture.checkpoint import EMBEDDING, HEAD, REST, StreamedModel, layers_equal
from capture.config import Owner, Pass
from capture.home import Home
from capture.ledger import free_memory, is_out_of_memory
from capture.loader import Loader
from capture.replay import Recording, record, run_layer, run_tail
from capture.sublayer import SubLayer
from capture.unembed import heads_equal

Job = tuple[Owner, list[int]]  # a model and the slots that go through its layer
Fresh = dict[Owner, list[list[Tensor]]]  # what a layer made: [batch] -> states of a model's input slots
Stop = Callable[[], bool] | None

log = logging.getLogger(__name__)


@dataclass
class State:
    """The residual after one layer, of one batch: `slots[slot_of[pass]]` is [B, T, D]. previous: the layer before."""

    layer: int
    batch: int
    slots: list[Tensor]
    slot_of: dict[str, int]
    previous: list[Tensor] | None
    previous_slot_of: dict[str, int]


@dataclass(frozen=True)
class Split:
    """From this layer on, batch `batch` goes through the layers in `parts` parts: whole it did not fit."""

    layer: int
    batch: int
    parts: int


class Pair:
    """Both models of a pair, opened, and how their passes share work.

    models: {"base": ..., "sft": ...}; the same object twice where both are one checkpoint. After `begin`, `tails` holds
    each model's final norm and `same_embeddings`, `same_tail`, `same_head` say what both models have in common; `states` are
    [batch][slot] -> [B, T, D], wherever `home` keeps them, and `splits` says which batches go through layers in parts.
    """

    def __init__(self, base: StreamedModel, sft: StreamedModel, passes: Sequence[Pass]) -> None:
        self.models: dict[Owner, StreamedModel] = {"base": base, "sft": sft}
        self.passes = list(passes)
        self.n_layers = base.n_layers
        self.same_config = _numerics(base.config.to_dict()) == _numerics(sft.config.to_dict())
        self.shared_layers = 0
        self.splits: list[Split] = []

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
        embeds = self._embed()
        self._tidy()
        for model in self.unique():
            for group in (REST, HEAD):
                model.load(group)
        base, sft = self.models["base"], self.models["sft"]
        self.same_embeddings = all(map(torch.equal, embeds["base"], embeds["sft"]))
        self.same_tail = self.same_config and layers_equal(base, sft, [REST])
        self.same_scaling = self.same_config and base.head_weight.shape == sft.head_weight.shape
        self.same_head = self.same_config and base.tied == sft.tied and heads_equal(base, sft)
        self.sources = {o: self._sources(o) for o in self.owners}
        # Passes of one comparison run at equal batch shapes: both models stack their passes, or none does.
        self.stacked = len({len(s) for s in self.sources.values()}) == 1
        # [batch][number of parts][part]: what the layers of each model are called with
        self.recordings: list[dict[int, list[dict[Owner, Recording]]]] = []
        entries: list[dict[str, Tensor]] = []
        for b in range(len(batches)):
            entries.append(self._enter_all(b, embeds))
            embeds["base"][b] = embeds["sft"][b] = torch.empty(0)
        self.tails = {o: self.recordings[0][1][0][o].tail for o in self.owners}
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

    def _embed(self) -> dict[str, list[Tensor]]:
        """Both models' embeddings of every batch. One table at a time, but for those that are unembeddings as well."""
        found: dict[str, list[Tensor]] = {}
        for owner, model in self.models.items():
            if owner == "sft" and model is self.models["base"]:
                found[owner] = list(found["base"])
                continue
            model.load(EMBEDDING)
            found[owner] = [self.home.put([model.embed(b.ids_BT)])[0] for b in self.batches]
            if not model.tied:
                model.free(EMBEDDING)
        return found

    def _enter_all(self, b: int, embeds: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """Record one batch; the state of every pass that enters layer 0. Equal states are one tensor."""
        by_owner: dict[Owner, Recording] = {}
        entry: dict[str, Tensor] = {}
        for owner in self.owners:
            found = self.home.get([embeds[s][b] for s in self.sources[owner]])
            by_owner[owner], states = self._enter(owner, self.batches[b], found)
            for p in self.passes:
                if p.model == owner:
                    state = states[self.sources[owner].index(self._source(p))]
                    equal = (s for s in entry.values() if torch.equal(s, state))
                    entry[p.name] = next(equal, state)
        self.recordings.append({1: [by_owner]})
        kept: dict[int, Tensor] = {}
        for state in entry.values():
            if id(state) not in kept:
                kept[id(state)] = self.home.put([state])[0]
        return {name: kept[id(state)] for name, state in entry.items()}

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
            return self._kept(recordings[0]), [r.entry_BTD for r in recordings]
        mask = None if batch.mask_BT is None else batch.mask_BT.repeat(n, 1)
        positions = None if batch.positions_BT is None else batch.positions_BT.repeat(n, 1)
        recording = record(model, torch.cat(embeds), mask_BT=mask, positions_BT=positions)
        return self._kept(recording), list(recording.entry_BTD.chunk(n))

    def _kept(self, recording: Recording) -> Recording:
        """What layers need of a recording, where it waits; the entering state goes its own way."""
        return replace(recording, entry_BTD=torch.empty(0), calls=self.home.keep(recording.calls))

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
            for b, slots in enumerate(self.states):
                yield State(-1, b, self.home.get(slots), self.slot_of, None, self.slot_of)
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
            self.split(split)

    def _walked(self) -> list[StreamedModel]:
        return list({id(self.models[o]): self.models[o] for o in self.owners}.values())

    def _together(self, layers: range, stop: Stop) -> Iterator[State]:
        """Layer l of both models, batch by batch; the layers after it are being read meanwhile."""
        loader = Loader([[(m, ("layer", i)) for m in self._walked()] for i in layers])
        try:
            for step, layer in enumerate(layers):
                loader.get(step)
                jobs, slot_of = self._jobs(self._may_share() and self._same_weights(layer))
                for b in range(len(self.states)):
                    _ask(stop)
                    new = self._try(b, layer, lambda b=b, layer=layer, jobs=jobs: self._step(layer, b, jobs))  # type: ignore[misc]
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
                shared = self._may_share() and not self.inside and self._same_weights(layer)
                loader.free(step)
                loader.ahead(step + 2)
                if others and not shared:
                    self._other_turn(first, others[0], layer, fresh, loader, stop)
                    shared = bool(self.inside) and self._may_share() and self._same_results(fresh)
                if len(models) == 2:
                    loader.free(step + 1)
                    loader.ahead(step + 3)
                jobs, slot_of = self._jobs(shared)
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
            parts = {first: self.parts(b, layer)}
            fresh[second].append(self._turn(second, inputs[second], layer, b, stop))
            parts[second] = self.parts(b, layer)
            while parts[first] != parts[second]:
                owner = first if parts[first] < parts[second] else second
                model, group = self.models[owner], ("layer", layer)
                away = group not in model.loaded
                if away:
                    loader.drop_ahead()
                    model.load(group)
                fresh[owner][b] = self._turn(owner, inputs[owner], layer, b, stop)
                parts[owner] = self.parts(b, layer)
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
        while late := [o for o in self.owners if ran.get(o) != tuple(self.splits)]:  # a split for one holds for both
            owner = late[0]
            kept[owner] = self._alone(owner, inputs[owner], layers, waiting, stop)
            ran[owner] = tuple(self.splits)
        self._tidy()
        for model, group in ends:
            model.load(group)
        for number, layer in enumerate(layers):
            fresh = {owner: by_layer[number] for owner, by_layer in kept.items()}
            jobs, slot_of = self._jobs(self._may_share() and self._same_results(fresh))
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

    def _may_share(self) -> bool:
        """True if both models' layers are given the same states, so that equal weights give equal results."""
        inputs = self._inputs()
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

    def _jobs(self, shared: bool) -> tuple[list[Job], dict[str, int]]:
        """What to run at this layer: (model, its input slots) in the order of the output slots; and passes' new slots."""
        inputs = self._inputs()
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
        return self._try(b, layer, lambda: self._run(owner, before, layer, b))

    def _run(self, owner: Owner, states: list[Tensor], layer: int, b: int) -> list[Tensor]:
        """One layer on one batch's states, in as many parts as the batch was split into."""
        module = self.models[owner].layers[layer]
        n = self.parts(b, layer)
        found = [torch.empty_like(s) for s in states] if n > 1 else []
        for part, recorded in zip(halves(self.batches[b], n), self.recordings[b][n], strict=True):
            call = self.home.take(recorded[owner].calls[layer])
            some = states if n == 1 else [s[part] for s in states]
            if self.stacked and len(states) > 1:
                out = list(run_layer(module, torch.cat(some), call).chunk(len(some)))
            else:
                out = [run_layer(module, s, call) for s in some]
            if n == 1:
                return out
            for whole, one in zip(found, out, strict=True):
                whole[part] = one
        return found

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

    # -- batches in parts ----------------------------------------------------------------------------------------------

    def parts(self, b: int, layer: int) -> int:
        """In how many parts batch b goes through a layer."""
        return max((s.parts for s in self.splits if s.batch == b and s.layer <= layer), default=1)

    def split(self, split: Split) -> None:
        """Let a batch go through this layer and all after it in parts, with arguments recorded anew for each part."""
        self.splits.append(split)
        batch = self.batches[split.batch]
        if split.parts in self.recordings[split.batch]:
            return
        recorded: list[dict[Owner, Recording]] = []
        for part in halves(batch, split.parts):
            some = batch.part(part)
            model = self.models[self.owners[0]]
            empty = torch.zeros(
                *some.ids_BT.shape, model.config.hidden_size, dtype=model.model.dtype, device=model.device
            )
            recorded.append({o: self._enter(o, some, [empty] * len(self.sources[o]))[0] for o in self.owners})
        self.recordings[split.batch][split.parts] = recorded

    def _try(self, b: int, layer: int, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Run; where memory runs out, split the batch in twice as many parts from this layer on, and run again.

        Ranks of a group cannot do this: while one runs out of memory the others wait for it inside the layer.
        """
        while True:
            try:
                return run()
            except RuntimeError as error:
                n = self.parts(b, layer)
                if not is_out_of_memory(error) or n == len(self.batches[b].items) or self.models["base"].group.size > 1:
                    raise
                why = str(error).splitlines()[0]
            free_memory()  # outside of the handler: the traceback holds what the failed attempt had made
            n = min(2 * n, len(self.batches[b].items))
            log.warning("layer %d, batch %d: %s; going on in %d parts", layer, b, why, n)
            self.split(Split(layer, b, n))


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
