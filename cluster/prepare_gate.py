"""Who may download now: nodes begin one after the other, some at a time, so that fifty of them do not storm the hub.

Plain arithmetic over a clock; `gate_at_head` makes it an actor on the driver's node, where workers find it by name. It also
passes on what all of them should know: which models the sweep still needs, and what was fetched ahead of whose turn.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

NAME = "pairscope-gate"  # names of actors belong to one job
AT_ONCE = 16  # nodes that download at the same time
APART_S = 1.0  # between two beginnings
SILENT_S = 90.0  # a node that did not say for so long that it goes on has lost its place
FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 160.0  # for everybody, after the hub said that it is too much


class Gate:
    """Grants places. A place is kept by asking again, at the latest every SILENT_S seconds, and given back by `leave`.

    sweep: a name of the sweep that is the same when it is run again.
    """

    def __init__(
        self,
        at_once: int = AT_ONCE,
        apart_s: float = APART_S,
        clock: Callable[[], float] = time.monotonic,
        sweep: str = "",
    ) -> None:
        self.at_once, self.apart_s, self.clock, self.sweep = at_once, apart_s, clock, sweep
        self.heard: dict[str, float] = {}
        self.early: set[str] = set()  # those of them that fetch ahead
        self.next_start = self.next_early = self.held_until = clock()
        self.pause_s = 0.0
        self.needed: frozenset[str] = frozenset()
        self.ahead: dict[str, list[tuple[str, int, float]]] = {}

    def ask(self, who: str, early: bool = False) -> float:
        """Seconds after which to ask again; 0: begin, or go on. early: to fetch what nobody waits for yet; such a one takes no
        place from those whose turn it is."""
        now = self.clock()
        self.heard = {name: at for name, at in self.heard.items() if now - at < SILENT_S}
        start = max(self.next_early if early else self.next_start, self.held_until)
        taken = len(self.heard if early else self.heard.keys() - self.early)
        if who in self.heard or (taken < self.at_once and now >= start):
            if who not in self.heard:
                self.next_early = now + self.apart_s
                self.next_start = self.next_start if early else self.next_early
            self.heard[who] = now
            if early:
                self.early.add(who)
            return 0.0
        return max(start - now, self.apart_s)

    def leave(self, who: str) -> None:
        """Done, or given up."""
        self.heard.pop(who, None)
        self.early.discard(who)

    def too_much(self, who: str) -> float:
        """The hub said so to `who`: nobody begins for a while, longer each time. Seconds until `who` may try again."""
        self.leave(who)
        now = self.clock()
        if now >= self.held_until:  # several nodes hear the same refusal; it counts once
            calm = now - self.held_until > LONGEST_PAUSE_S
            self.pause_s = FIRST_PAUSE_S if calm else min(max(self.pause_s * 2, FIRST_PAUSE_S), LONGEST_PAUSE_S)
            self.held_until = now + self.pause_s
        return self.held_until - now

    def need(self, repos: Iterable[str]) -> None:
        """The driver says which models entries of the sweep that are not done read."""
        self.needed = frozenset(repos)

    def wanted(self) -> tuple[str, frozenset[str]]:
        """The sweep, and the models that it still needs."""
        return self.sweep, self.needed

    def fetched_ahead(self, entry: str, node: str, nbytes: int, seconds: float) -> None:
        """So much was fetched of an entry's files on a node before its turn."""
        self.ahead.setdefault(entry, []).append((node, nbytes, seconds))

    def came_ahead(self, entry: str, node: str) -> tuple[int, float]:
        """Bytes and seconds of what was fetched of an entry's files on this node."""
        mine = [(nbytes, seconds) for at, nbytes, seconds in self.ahead.get(entry, []) if at == node]
        return sum(b for b, _ in mine), sum(s for _, s in mine)

    def login(self) -> str | None:
        """The Hugging Face login of the head. It goes to a worker's memory, and there only when a model asks for one."""
        from huggingface_hub import get_token

        mounted = Path("~/.cache/huggingface/token").expanduser()  # images may keep the hub's files elsewhere
        return get_token() or (mounted.read_text().strip() or None if mounted.is_file() else None)


@contextlib.contextmanager
def gate_at_head(sweep: str) -> Iterator[None]:
    """A gate for the length of the block, in the job of the connected Ray. sweep: see Gate."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    gate = ray.remote(Gate).options(name=NAME, num_cpus=0, scheduling_strategy=here).remote(sweep=sweep)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            ray.kill(gate)


def find_gate() -> Any | None:
    """The gate's actor; None where there is none: on a Ray of our own, for a sweep of directories."""
    import ray

    if not ray.is_initialized():
        return None
    try:
        return ray.get_actor(NAME)
    except ValueError:
        return None
