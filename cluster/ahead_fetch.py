"""The actor that fetches an entry's files into its node's cache before the entry's turn. It holds no CPU and no GPU, and imports
no torch; one entry, then it is ended, so that a node where nothing else is at work counts as idle."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from capture.config import Entry
from capture.errors import CheckpointError
from capture.ranges import Stopped
from cluster.prepare import LOOK_EVERY_S, InThread, ask, keeping, log_in, node_id, overrun, wants_login
from cluster.prepare_disk import in_use, make_room, mark_fetched, one_at_a_time
from cluster.prepare_files import hub_models, without_weights
from cluster.prepare_gate import find_gate

log = logging.getLogger(__name__)

NICENESS = 10  # below the capture that computes meanwhile


@dataclass(frozen=True)
class Fetched:
    """How it ended. state: done, stopped, no room or failed, with `why` for the last two. nbytes came, in so many seconds."""

    state: str
    nbytes: int = 0
    seconds: float = 0.0
    why: str = ""


class Fetching:
    """`fetch` works in one thread while `watch` and `stop` answer in another."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._keeper: Any = None
        self._need = 0

    def fetch(self, entry: Entry) -> Fetched:
        """Fetch what of the entry's files is not here, in turn with the node's other downloads and with the other nodes.

        Never raises for what may go wrong: the entry's own turn will tell it.
        """
        with contextlib.suppress(OSError):
            os.nice(NICENESS)
        gate: Any = find_gate()
        who, began = f"{socket.gethostname()}-{os.getpid()}-ahead", time.monotonic()
        state, why = "done", ""
        used = [in_use(repo) for repo, _ in hub_models(entry)]
        try:
            with self._place():
                self._turn(gate, who)
                began = time.monotonic()
                self._all(entry, gate, who)
        except Stopped:
            state = "stopped"
        except _NoRoom as error:
            state, why = "no room", str(error)
        except Exception as error:
            if gate is not None and isinstance(error, CheckpointError) and overrun(error):
                ask(gate.too_much, who)
            state, why = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        finally:
            for stream in used:
                stream.close()
        nbytes, seconds = (self._keeper.fetched if self._keeper is not None else 0), time.monotonic() - began
        if gate is not None:  # it is there as long as the sweep
            ask(gate.leave, who)
            ask(gate.fetched_ahead, entry.name, node_id(), nbytes, seconds)
        return Fetched(state, nbytes, seconds, why)

    def watch(self) -> tuple[int, int]:
        """Bytes that have come, and that are to come in all."""
        return (self._keeper.fetched if self._keeper is not None else 0), self._need

    def stop(self) -> None:
        """End `fetch`; what has come stays for whoever goes on."""
        self._stop.set()
        if self._keeper is not None:
            self._keeper.stop()

    def _all(self, entry: Entry, gate: Any, who: str) -> None:
        """The fetching itself, in a thread, while the place at the gate is kept."""
        from capture.keep import Keeper

        keep, repos = keeping(entry, gate), [repo for repo, _ in hub_models(entry)]

        def work() -> None:
            for repo in repos:
                mark_fetched(repo, keep.sweep)
            try:
                missing = without_weights(entry)
            except CheckpointError as error:
                if not wants_login(error) or not log_in(gate):
                    raise
                missing = without_weights(entry)
            self._need = sum(file.size for file, _ in missing)
            try:
                make_room(self._need, repos, keep, ahead=True)
            except CheckpointError as error:
                raise _NoRoom(str(error)) from error
            self._keeper = Keeper(entry.model_kwargs.get("token"))
            if self._stop.is_set():
                raise Stopped
            self._keeper.fetch(missing)

        done = InThread(work)
        while not done.wait(LOOK_EVERY_S):
            ask(gate.ask, who, True)
        done.result()

    @contextlib.contextmanager
    def _place(self) -> Any:
        """The node's one place for downloading."""
        while True:
            with one_at_a_time() as held:
                if held:
                    yield
                    return
            self._pause(1.0)

    def _turn(self, gate: Any, who: str) -> None:
        while wait_s := ask(gate.ask, who, True):
            self._pause(min(wait_s, 30.0))

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped


class _NoRoom(Exception):
    """The disk, or the bound, leaves no room for an entry whose turn has not come."""
