"""How batches enter both models: the state of every pass before layer 0, and what each model calls its layers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from capture.batches import Batch
from capture.checkpoint import StreamedModel
from capture.config import Owner, Pass
from capture.errors import CheckpointError, UnsupportedModelError
from capture.groups import EMBEDDING
from capture.home import Home
from capture.replay import Recording, calls_hold_states, check_padding, record


class Entering:
    """Embeds all batches, then lets one after the other enter. Shapes: B batch rows, T tokens, D hidden size.

    Once embedded: same_embeddings, whether both models' agree on the tokens in use. sources: for the passes of one model's
    blocks, whose embeddings they start from, each once. stacked: whether passes with the same blocks run as one batch: both models
    stack theirs, or none does, since the passes of one comparison run at equal batch shapes.
    """

    def __init__(
        self, models: dict[Owner, StreamedModel], passes: Sequence[Pass], batches: Sequence[Batch], home: Home
    ) -> None:
        self.models, self.passes, self.batches, self.home = models, list(passes), batches, home
        self.embeds: dict[Owner, list[Tensor]] = {}
        self._checked: set[Owner] = set()  # that padding leaves positions as they are

    def embed(self) -> None:
        """Both models' embeddings of every batch. One table at a time, but for those that are unembeddings as well."""
        for owner, model in self.models.items():
            if owner == "sft" and model is self.models["base"]:
                self.embeds[owner] = list(self.embeds["base"])
                continue
            model.load(EMBEDDING)
            self.embeds[owner] = [self.home.put([self._embedded(owner, b.ids_BT)])[0] for b in self.batches]
            if not model.tied:
                model.free(EMBEDDING)
        self.same_embeddings = all(map(torch.equal, self.embeds["base"], self.embeds["sft"]))
        self.sources: dict[Owner, list[Owner]] = {}
        for p in self.passes:
            sources = self.sources.setdefault(p.model, [])
            if self._source(p) not in sources:
                sources.append(self._source(p))
        self.stacked = len({len(s) for s in self.sources.values()}) == 1

    def _embedded(self, owner: Owner, ids_BT: Tensor) -> Tensor:
        """[B, T, D]. Raises CheckpointError where one that a pass begins with is not finite: nothing in a batch with it could be
        checked, and what follows the layers would get the blame."""
        model = self.models[owner]
        embeds_BTD = model.embed(ids_BT)
        if any(p.embeddings == owner for p in self.passes) and not bool(embeds_BTD.isfinite().all()):
            token = int(ids_BT[~embeds_BTD.isfinite().all(-1)][0])
            raise CheckpointError(
                f"{model.label} model '{model.directory}': its embedding of token {token} holds NaN or infinity in "
                f"{str(embeds_BTD.dtype).removeprefix('torch.')}, so that there is nothing to compare; name another checkpoint or dtype, or "
                "prompts without that token"
            )
        return embeds_BTD

    def _source(self, p: Pass) -> Owner:
        return "base" if self.same_embeddings else p.embeddings

    def enter(self, b: int) -> tuple[dict[Owner, Recording], dict[str, Tensor]]:
        """Record batch b, once: each model's recording, and the state [B, T, D] of every pass. Equal states are one tensor."""
        by_owner: dict[Owner, Recording] = {}
        entry: dict[str, Tensor] = {}
        for owner, sources in self.sources.items():
            found = self.home.get([self.embeds[s][b] for s in sources])
            by_owner[owner], states = self._record(owner, self.batches[b], found)
            for p in self.passes:
                if p.model == owner:
                    state = states[sources.index(self._source(p))]
                    equal = (s for s in entry.values() if torch.equal(s, state))
                    entry[p.name] = next(equal, state)
        for embeds in self.embeds.values():
            embeds[b] = torch.empty(0)
        kept: dict[int, Tensor] = {}
        for state in entry.values():
            if id(state) not in kept:
                kept[id(state)] = self.home.put([state])[0]
        return by_owner, {name: kept[id(state)] for name, state in entry.items()}

    @property
    def divisible(self) -> bool:
        """Whether a batch may go through layers in parts: what they are called with is recorded anew for those, without states."""
        return not any(calls_hold_states(self.models[o]) for o in self.sources)

    def enter_part(self, batch: Batch) -> dict[Owner, Recording]:
        """Each model's recording of a part of a batch, whatever its states: no argument of a layer depends on them, or it is not
        divided."""
        model = next(iter(self.models.values()))
        shape = (*batch.ids_BT.shape, model.config.hidden_size)
        empty = torch.zeros(shape, dtype=model.model.dtype, device=model.device)
        return {o: self._record(o, batch, [empty] * len(sources))[0] for o, sources in self.sources.items()}

    def _record(self, owner: Owner, batch: Batch, embeds: list[Tensor]) -> tuple[Recording, list[Tensor]]:
        """Record one model on one batch; the states that enter its layer 0, one for each source of embeddings."""
        model, n = self.models[owner], len(embeds)
        if batch.mask_BT is not None and owner not in self._checked:
            check_padding(model, left=not bool(batch.mask_BT[:, 0].all()))
            self._checked.add(owner)
        if not self.stacked and n > 1 and calls_hold_states(model):
            raise UnsupportedModelError(
                f"{type(model.model).__name__} gives its layers the states that enter the first one as well, and passes of the {owner} "
                "model's blocks cannot run as one batch here: name as many passes through base's blocks as through sft's, with the same "
                "embeddings, or through those of one model with one embedding"
            )
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
