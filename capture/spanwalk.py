"""The layers that one worker walks: what it takes up, when it commits, and what it hands to the worker of the next layers."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch

from capture.collector import Collector
from capture.entries import Entry
from capture.group import Group
from capture.ledger import Ledger
from capture.lockstep import Pair, State
from capture.manifest import now
from capture.parcels import Outbox, Parcel, ReceivedSpan, pack_states, received, unpack, unpack_states
from capture.parts import Split
from capture.relay import Done, Handover, Relay, Sent, cut
from capture.spans import Span, SpanStore, of_ours

log = logging.getLogger(__name__)

TOPK_BUDGET = 512 << 20  # bytes of top-k lists kept before their span is committed
ALONE = Relay(0, 1)


class SpanWalk:
    """Layers first..last of a pair, of the `index`-th of `count` workers; all layers where there is one.

    spans: what is computed already, here or elsewhere, in order. `begin` says with which layer the walk goes on.
    """

    def __init__(
        self,
        entry: Entry,
        pair: Pair,
        collector: Collector,
        store: SpanStore,
        *,
        relay: Relay,
        group: Group,
        ledger: Ledger,
        force: bool,
    ) -> None:
        self.entry, self.pair, self.collector, self.store = entry, pair, collector, store
        self.relay, self.group, self.ledger, self.force = relay, group, ledger, force
        self.first, self.last = layers_of(pair, relay, collector.lens.layers_at_once)
        self.spans: list[Span | ReceivedSpan] = []
        self.write_seconds = 0.0
        self.earlier: list[dict[str, Any]] = []  # the workers before this one, as they described themselves
        self.times = {"opened": now()}

    # -- taking up -----------------------------------------------------------------------------------------------------

    def begin(self, mode: str, device: torch.device, stop: Callable[[], bool] | None) -> int:
        """Read the first layers' weights, then wait for what enters them; the layer to go on with, behind the last if none.

        Where an earlier attempt committed some of these layers, the walk goes on behind them.
        """
        if self.force and self.group.rank == 0 and self.relay.count == 1:
            self.store.clear()
        # none ends with the last layer (`due`): the lens of the final norm is computed behind it
        end = min(self.last, self.pair.n_layers - 2)
        mine = [] if self.force else self.store.committed(self.first, end)
        self.start = start = mine[-1].last + 1 if mine else max(self.first, 0)
        if self.relay.index > 0 and start <= self.last:
            self._prefetch(start, mode)
        sent = self.relay.receive(stop)
        if sent and sent[-1].handover.worker["last"] != self.first - 1:
            raise AssertionError(f"what enters layer {self.first} was to come, not {sent[-1].handover.worker}")
        self.times["received"] = now()
        before = received(sent, self.relay.fetch)
        self.earlier = [one.handover.worker for one in sent]
        self.spans = [*before, *mine]
        for other in before if self.group.rank == 0 and self.relay.is_last else ():
            self.collector.restore(other.first, other.last, other.columns())
        for span in mine:
            with of_ours(self.store.span_path(span.first, span.last)):
                self.collector.restore(span.first, span.last, span.columns())
                _check_kinds(str, span.meta["host"])
                _check_kinds(int, span.meta["process"])
        if mine:
            log.info("going on at layer %d: an earlier attempt committed the layers before", start)
            with of_ours(self.store.span_path(mine[-1].first, mine[-1].last)):
                known = self._known(mine[-1].meta, start - 1)
            with of_ours(self.store.state_path(mine[-1].last)):
                self.pair.go_on_from(self.store.states(mine[-1], device), *known)
        elif sent:
            self.pair.go_on_from(self._states(sent, device), *self._known(sent[-1].handover.meta, start - 1))
        self.at = start if mine or sent else -1  # the first layer of the span under way
        self.committed = time.monotonic()
        return start

    def _known(self, meta: dict[str, Any], last: int) -> tuple[dict[str, int], int, list[Split]]:
        """What a walk knew behind layer `last`, besides the states: put back, but for what `Pair.go_on_from` takes. Raises
        ValueError, or what odd JSON leads to, where it is of another walk."""
        self.collector.restore_found(meta["found"], last)
        slot_of, shared_layers = meta["slot_of"], meta["shared_layers"]
        _check_kinds(int, shared_layers, *slot_of.values())
        slots = set(slot_of.values())
        if slot_of.keys() != {p.name for p in self.pair.passes} or slots != set(range(len(slots))):
            raise ValueError(f"other passes, or slots that are not there: {slot_of}")
        splits = [Split(*split) for split in meta.get("splits", ())]
        for s in splits:
            _check_kinds(int, s.layer, s.batch, s.parts)
            if s.batch < 0 or not 1 <= s.parts <= len(self.pair.batches[s.batch].items):
                raise ValueError(f"batch {s.batch} in {s.parts} parts")
        return slot_of, shared_layers, [s for s in splits if s not in self.pair.parts.splits]

    def _states(self, sent: tuple[Sent, ...], device: torch.device) -> list[list[torch.Tensor]]:
        worker = len(sent) - 1
        header, parts = sent[worker].handover.states, sent[worker].parts[-1]
        states = unpack_states(unpack(header, (self.relay.fetch(worker, p) for p in parts)), device)
        log.info("received %.1f MiB of states that enter layer %d", header.nbytes / 2**20, self.first)
        return states

    def _prefetch(self, start: int, mode: str) -> None:
        """Read what the walk begins with, so that it begins as soon as the states are there."""
        models, layers = self.pair.unique(), range(start, start + 1)
        if mode in ("resident", "one-at-a-time"):
            layers = range(start, self.last + 1)
        if mode == "one-at-a-time":
            models = models[:1]
        for layer in () if mode == "sub-layer" else layers:
            for model in models:
                model.load(("layer", layer))
        self.times["prefetched"] = now()
        log.info(
            "%.1f MiB of weights are read; waiting for the states that enter layer %d", self.ledger.live / 2**20, start
        )

    # -- committing ----------------------------------------------------------------------------------------------------

    def due(self, layer: int) -> bool:
        """Whether to commit behind this layer: not behind the last, whose lens the final norm's layer takes over, and not while
        rows wait for the lens."""
        if layer < 0 or layer >= self.pair.n_layers - 1 or len(self.collector.queue):
            return False
        every = self.entry.spans
        by_layers = every.layers is not None and layer - max(self.at, 0) + 1 >= every.layers
        by_time = every.seconds is not None and time.monotonic() - self.committed >= every.seconds
        return by_layers or by_time or self.collector.topk_bytes() > TOPK_BUDGET

    def commit(self, state: State) -> None:
        """Commit the span that ends with this layer; rank 0 writes, all ranks forget the lists."""
        started = time.monotonic()
        if self.group.rank == 0:
            columns = self.collector.columns(self.at, state.layer)
            meta = self._meta(state.slot_of)
            self.spans.append(
                self.store.commit(self.at, state.layer, columns, meta, self.pair.states, since=max(self.first, 0))
            )
        self.collector.forget_lists()
        self.at, self.committed = state.layer + 1, time.monotonic()
        self.write_seconds += self.committed - started

    def _meta(self, slot_of: dict[str, int]) -> dict[str, Any]:
        return {
            "slot_of": slot_of,
            "shared_layers": self.pair.shared_layers,
            "splits": [(s.layer, s.batch, s.parts) for s in self.pair.parts.splits],
            "found": self.collector.found(),
            "host": socket.gethostname(),
            "process": os.getpid(),
        }

    # -- handing over --------------------------------------------------------------------------------------------------

    def hand_over(self, mode: str) -> Handover:
        """Everything of layers first..last, for the workers of the layers behind; the parcels are in the relay's outbox."""
        meta = self._meta(self.pair.slot_of)
        mine: list[tuple[int, int, dict[str, Any], Parcel]] = []
        for span in self.spans:
            if span.first >= self.first:
                mine.append((span.first, span.last, span.meta, Parcel(lambda s=span: as_tensors(s.columns()))))  # type: ignore[misc]
        if self.at <= self.last:
            columns = self.collector.columns(self.at, self.last)
            mine.append((self.at, self.last, meta, Parcel(lambda: as_tensors(columns))))
        states = self.pair.states
        leaving = Parcel(lambda: pack_states(states))
        handover = Handover(
            tuple(Done(first, last, m, parcel.header) for first, last, m, parcel in mine),
            leaving.header,
            meta,
            self.worker(mode),
        )
        self.relay.outbox = Outbox(handover, (*(parcel for *_, parcel in mine), leaving))
        return handover

    def worker(self, mode: str) -> dict[str, Any]:
        """This worker, for capture.json: its layers, from which on it walked, where, what it read, and when (UTC)."""
        return {
            "first": self.first,
            "last": self.last,
            "began_at": self.start,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "mode": mode,
            "bytes_read": self.ledger.read_bytes,
            "weights_peak": self.ledger.peak,
            **self.times,
            "finished": now(),
        }

    def workers(self, mode: str) -> list[dict[str, Any]]:
        """All workers of the capture, in order of their layers."""
        return [*self.earlier, self.worker(mode)]


def layers_of(pair: Pair, relay: Relay, at_once: int) -> tuple[int, int]:
    """(first, last) of a worker: its share of the layers by the bytes of both models. -1 is what enters layer 0.

    at_once: layers whose rows share a product of the lens, and so a worker.
    """
    sizes = [sum(both) for both in zip(*(m.layer_bytes() for m in pair.unique()), strict=True)]
    return cut(sizes, relay.count, at_once)[relay.index]


def as_tensors(columns: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in columns.items()}


def _check_kinds(kind: type, *values: Any) -> None:
    """Raise ValueError unless all JSON values are of this kind; true is no number."""
    for value in values:
        if type(value) is not kind:
            raise ValueError(f"a value of the kind {type(value).__name__} where {kind.__name__} belongs")
