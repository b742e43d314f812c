"""A tensor-parallel group in Ray: one placement group on one node, one actor a rank."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from capture.ranks import Ranks
from cluster.resources import Request


class RankGroup:
    """The actors of one group. Rank 0 leads: it writes, and the loop waits for it; `running` are the others' tasks."""

    def __init__(self, actor_class: Any, request: Request) -> None:
        self.placement = placement_group([request.bundle()] * request.ranks, strategy="STRICT_PACK")
        one = {k: v for k, v in replace(request, memory_bytes=0).options().items() if k != "accelerator_type"}
        self.actors = [
            actor_class.options(
                **one,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=rank),
            ).remote(request.env)
            for rank in range(request.ranks)
        ]
        self.running: list[Any] = []

    @property
    def leader(self) -> Any:
        return self.actors[0]

    def run(self, entry: Any, out: str, log: str, *more: Any) -> Any:
        """Start all ranks; rank 0 writes the attempt's log, each other one its own beside it. Returns rank 0's task."""
        address, port = ray.get(self.leader.meeting_place.remote())
        size = len(self.actors)
        tasks = [
            actor.run.remote(
                entry, out, log if rank == 0 else f"{log.removesuffix('.log')}.rank{rank}.log", *more,
                Ranks(rank, size, address, port),
            )
            for rank, actor in enumerate(self.actors)
        ]  # fmt: skip
        self.running = tasks[1:]
        return tasks[0]

    def remove(self) -> None:
        """End all ranks and give their place back, whatever state they are in."""
        for actor in self.actors:
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)
        with contextlib.suppress(Exception):
            remove_placement_group(self.placement)
