"""The actors that work on one range of layers of one entry: one actor, or the ranks of a tensor-parallel group."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    NotIn,
    PlacementGroupSchedulingStrategy,
)

from capture.ranks import Ranks
from capture.relay import Handover, Sent
from cluster.lost import Pulse
from cluster.resources import Request


class Crew:
    """A tensor-parallel group has one placement group on one node; a single worker has none. Rank 0 leads: it writes.

    ready: resolves once the actors are placed. place: where, once that is known. task: what the leader does; running: the
    other ranks' tasks. sending: resolves once what was handed over is in the object store.
    """

    def __init__(
        self,
        actor_class: Any,
        request: Request,
        *,
        turn: tuple[int, int] = (0, 1),
        avoid: Collection[str] = (),
        never: Collection[str] = (),
    ) -> None:
        """turn: (index, count) among the crews that walk the layers of the entry in turn. avoid: nodes to leave to others,
        where there are any; only a single worker can be told so, a group goes where Ray finds room for it. never: nodes that it is
        not put on, even if it has to wait for others."""
        self.turn, self.request = turn, request
        self.placement: Any = None
        self.asked = time.monotonic()
        if request.ranks > 1:
            elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(never))})"} if never else {}
            self.placement = placement_group(
                [request.bundle()] * request.ranks,
                strategy="STRICT_PACK",
                bundle_label_selector=[elsewhere] * request.ranks,
            )
            one = {k: v for k, v in replace(request, memory_bytes=0).options().items() if k != "accelerator_type"}
            strategies = [
                PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=rank)
                for rank in range(request.ranks)
            ]
            self.actors = [
                actor_class.options(**one, scheduling_strategy=strategy).remote(request.env) for strategy in strategies
            ]
        else:
            options = request.options()
            if avoid or never:
                hard, soft = ({"ray.io/node-id": NotIn(*ids)} if ids else {} for ids in (never, avoid))
                options["scheduling_strategy"] = NodeLabelSchedulingStrategy(hard=hard, soft=soft)
            self.actors = [actor_class.options(**options).remote(request.env)]
        self.readiness = [actor.prepare.remote(turn) for actor in self.actors]
        self.ready: Any = self.readiness[0]
        self.place: dict[str, Any] | None = None
        self.began = 0.0
        self.task: Any = None
        self.running: list[Any] = []
        self.sending: Any = None
        self.sent: Sent | None = None
        self.here = False  # whether all weights of its work have come
        self.given = False  # whether it was given what enters its layers
        self.log = ""  # of the work that it was last asked to do
        self.watch: Any = None
        self.watched = 0.0
        self.pulse = Pulse()
        self.hidden, self.asked_again = False, 0.0

    @property
    def leader(self) -> Any:
        return self.actors[0]

    @property
    def node_id(self) -> str:
        """Ray's name of the node that it is on, once it has a place."""
        return str(self.place["node_id"]) if self.place is not None else ""

    def placed(self, place: dict[str, Any]) -> None:
        self.place, self.ready, self.began = place, None, time.monotonic()

    def start_over(self) -> None:
        """The work is done, and the actor goes on with another entry: its time counts for that one from now on."""
        self.task = self.watch = None
        self.watched, self.hidden, self.began = 0.0, False, time.monotonic()

    def work(self, entry: Any, out: str, log: str, *more: Any) -> None:
        """Start all ranks; rank 0 writes the attempt's log, each other one its own beside it."""
        self.log, self.here = log, False
        size = len(self.actors)
        address, port = ray.get(self.leader.meeting_place.remote()) if size > 1 else ("", 0)
        tasks = [
            actor.run.remote(
                entry, out, log if rank == 0 else f"{log.removesuffix('.log')}.rank{rank}.log", *more,
                Ranks(rank, size, address, port) if size > 1 else None,
            )
            for rank, actor in enumerate(self.actors)
        ]  # fmt: skip
        self.task, self.running = tasks[0], tasks[1:]

    def give(self, sent: tuple[Sent, ...]) -> None:
        """Let the walk begin: what all crews before this one handed over."""
        self.given = True
        for actor in self.actors:
            actor.give.options(concurrency_group="control").remote(sent)

    def send(self, handover: Handover) -> None:
        """Have everything that was handed over put into the object store, part after part; the driver owns the parts and
        holds none of them."""
        parts = tuple(
            tuple(self.leader.part.remote(parcel, i) for i in range(header.n_parts))
            for parcel, header in enumerate(handover.parcels)
        )
        self.sent = Sent(handover, parts)
        self.task, self.sending = (
            None,
            self.leader.all_sent.remote(),
        )  # an actor works in the order in which it is asked

    def out_of_sight(self) -> None:
        """The line to the leader was cut while it worked; what became of the work is asked for when the line is back."""
        self.task, self.asked_again = None, time.monotonic()
        self.hidden = True

    def look_for_it(self, before: float) -> None:
        """Ask how the work ended, if it is out of sight and was last asked for before this moment."""
        if self.hidden and self.asked_again < before:
            self.hidden, self.task = False, self.leader.outcome.remote(self.log)

    def is_to_be_watched(self, before: float) -> bool:
        """Whether it works, and was last asked for its progress before this moment."""
        return self.task is not None and self.watch is None and self.watched < before

    def ask_for_progress(self, now: float) -> None:
        self.watched = now
        self.watch = self.leader.watch.options(concurrency_group="control").remote()

    def stop(self) -> None:
        for actor in self.actors:
            actor.stop.options(concurrency_group="control").remote()

    def dollars(self) -> float | None:
        """What the place has cost so far; None where that is not known."""
        if self.place is None or self.place["dollars_per_hour"] is None:
            return None
        rate: float = self.place["dollars_per_hour"] * len(self.actors)  # each rank holds as much
        return rate * (time.monotonic() - self.began) / 3600

    def remove(self) -> None:
        """End all ranks and give their place back, whatever state they are in."""
        for actor in self.actors:
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)
        if self.placement is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self.placement)


def brought_home(sent: Sent, node_id: str | None) -> Sent:
    """What a crew on another node handed over, copied to the driver's node: the node that made it may be let go, or lost.

    The copies are made part by part while others work; whoever fetches a part waits for its copy.
    """
    home = str(ray.get_runtime_context().get_node_id())
    if node_id == home:
        return sent
    copy = ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(home, soft=False))(_same)
    return replace(sent, parts=tuple(tuple(copy.remote(part) for part in parcel) for parcel in sent.parts))


def _same(part: Any) -> Any:
    return part
