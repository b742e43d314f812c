"""What a node does before an entry's models are opened: their files are fetched, one entry at a time, when its turn comes.

Runs in the entry's actor, as the first stage of its attempt, so that its log and its errors are the attempt's. Where weights
are downloaded first the process works offline afterwards: what was fetched is what is read, and fifty workers ask the hub
nothing more. Where they come while the capture computes, only the small files are fetched in turn, and room is made on the disk
for weights that will be kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from capture.config import Entry
from capture.errors import CheckpointError, HubFailedError
from capture.progress import Progress
from cluster.prepare_disk import GIB, Keeping, in_use, make_room, mark_fetched, one_at_a_time
from cluster.prepare_files import cache_bytes, download, hub_models
from cluster.prepare_gate import find_gate
from cluster.vast.cards import check_card

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
TRIES = 6  # at a hub that says that it is too much, or that it is unwell

Say = Callable[[Progress], None]


def capture_prepared(
    entry: Entry, out: str, *, progress: Say | None = None, stop: Callable[[], bool] | None = None, **more: Any
) -> Any:
    """capture.run.capture_pair after the node was prepared, where the sweep has a gate; elsewhere just that."""
    from capture.run import capture_pair

    gate = find_gate()
    used: list[Any] = []
    check_card(entry)
    with _online_again():
        if gate is not None:
            entry, used = prepare(entry, gate, progress or (lambda _: None), stop or (lambda: False))
        try:
            return capture_pair(entry, out, progress=progress, stop=stop, **more)
        finally:
            for stream in used:
                stream.close()


def prepare(entry: Entry, gate: Any, say: Say, stop: Callable[[], bool]) -> tuple[Entry, list[Any]]:
    """Fetch what the entry needs first, and go offline where that is all. Returns the entry, whose weights are streamed where there
    is no room to keep them, and open files that keep its models from being removed.

    Raises CheckpointError (no room, gated, missing, a hub that stays unwell) and KeyboardInterrupt where `stop` said so.
    """
    from capture.run import way_of_weights

    models = hub_models(entry)
    used = [in_use(repo) for repo, _ in models]
    if models:
        nbytes, seconds = ask(gate.came_ahead, entry.name, node_id()) or (0, 0.0)
        if nbytes:
            log.info(
                "fetched ahead of its turn: %.2f GiB in %.0f s, while another entry computed", nbytes / GIB, seconds
            )
        entry = _in_turn(entry, models, gate, say, stop)
    if way_of_weights(entry) == "download":
        _go_offline(entry)
    return entry, used


def keeping(entry: Entry, gate: Any) -> Keeping:
    """What stays in this node's cache."""
    sweep, needed = ask(gate.wanted) or ("", frozenset())
    return Keeping(sweep, needed, None if entry.cache_gib is None else int(entry.cache_gib * GIB))


def node_id() -> str:
    """Ray's name of this node."""
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def _in_turn(
    entry: Entry, models: list[tuple[str, str | None]], gate: Any, say: Say, stop: Callable[[], bool]
) -> Entry:
    """Wait for this node's other entries, then for the gate, then fetch; again after a pause where the hub is overrun."""
    who = f"{socket.gethostname()}-{os.getpid()}"
    for attempt in range(1, TRIES + 1):
        with _this_node(entry, say, stop):
            _wait(lambda: ask(gate.ask, who), entry, "waiting for a turn at the hub", say, stop)
            try:
                entry = _fetch(entry, models, gate, who, say, stop)
                ask(gate.leave, who)
                return entry
            except CheckpointError as error:
                if not overrun(error) or attempt == TRIES:
                    ask(gate.leave, who)
                    raise
                pause = float(ask(gate.too_much, who)) * random.uniform(1.0, 1.3)
                log.warning("%s; trying again in %.0f s", error, pause)
        _sleep(pause, stop)
    raise AssertionError("the last try returns or raises")


def _fetch(
    entry: Entry, models: list[tuple[str, str | None]], gate: Any, who: str, say: Say, stop: Callable[[], bool]
) -> Entry:
    """Check the disk for all models together, then download them, in a thread, while progress is told."""
    from capture.hub import download_bytes
    from capture.run import way_of_weights

    way, keep = way_of_weights(entry), keeping(entry, gate)
    token = entry.model_kwargs.get("token")
    for repo, _ in models:
        mark_fetched(repo, keep.sweep)

    def measured() -> int:
        return sum(download_bytes(repo, rev, allow_pickle=entry.allow_pickle, token=token) for repo, rev in models)

    try:
        need = measured()
    except CheckpointError as error:
        if not wants_login(error) or not log_in(gate):
            raise
        log.info("using the head's login at the hub")
        need = measured()
    if way != "stream":
        try:
            make_room(need, [repo for repo, _ in models], keep)
        except CheckpointError as error:
            if way == "download":
                raise
            log.warning("%s; the weights are read all the same, and not kept", error)
            if keep.most is not None:  # a disk is looked at once more, model by model
                entry = entry.model_copy(update={"weights": "stream"})
    before = cache_bytes(models)
    done = InThread(lambda: download(entry))
    while not done.wait(LOOK_EVERY_S):
        if stop():
            raise KeyboardInterrupt
        ask(gate.ask, who)  # keeps the place
        fetched = max(0, cache_bytes(models) - before)
        say(Progress(entry.name, "prepare", message=f"downloading, {fetched / GIB:.1f} of {need / GIB:.1f} GiB"))
    done.result()
    return entry


def _go_offline(entry: Entry) -> None:
    """From here on this process reads the cache, and the login is forgotten; a tokenizer elsewhere on the hub was fetched too."""
    os.environ.pop("HF_TOKEN", None)
    if not hub_models(entry) and not Path(entry.tokenizer).expanduser().is_dir():
        return  # local models with a tokenizer of the hub's, which nobody has fetched
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "huggingface_hub.constants" in sys.modules:  # read from the environment when it was imported
        sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def _online_again() -> Iterator[None]:
    """After the block the process may ask the hub again, as before it: its next entry has other files to fetch."""
    names = ("HF_HUB_OFFLINE", "HF_TOKEN")
    before = {name: os.environ.get(name) for name in names}
    constants: Any = sys.modules.get("huggingface_hub.constants")
    offline = constants.HF_HUB_OFFLINE if constants is not None else None
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if constants is None and (constants := sys.modules.get("huggingface_hub.constants")) is not None:
            offline = (before["HF_HUB_OFFLINE"] or "").upper() in {"1", "ON", "YES", "TRUE"}  # as it reads it itself
        if constants is not None:
            constants.HF_HUB_OFFLINE = offline


def overrun(error: CheckpointError) -> bool:
    """True where the hub said 429, or failed itself."""
    cause: BaseException | None = error
    while cause is not None:  # the library may have put an error of its own before what the hub said
        status = getattr(getattr(cause, "response", None), "status_code", 0) or 0
        if status == 429 or status >= 500:
            return True
        cause = cause.__cause__
    return isinstance(error, HubFailedError)


def wants_login(error: CheckpointError) -> bool:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    return isinstance(error.__cause__, GatedRepoError | RepositoryNotFoundError)


def log_in(gate: Any) -> bool:
    """Take the head's login into this process's memory, unless it has one. False where there is none to take."""
    from huggingface_hub import get_token

    token = None if get_token() else ask(gate.login)
    if token:
        os.environ["HF_TOKEN"] = token
    return bool(token)


@contextlib.contextmanager
def _this_node(entry: Entry, say: Say, stop: Callable[[], bool]) -> Iterator[None]:
    """The node's one place for downloading, waited for."""
    while True:
        with one_at_a_time() as held:
            if held:
                yield
                return
        say(Progress(entry.name, "prepare", message="waiting for another entry's download on this node"))
        _sleep(0.25, stop)  # one that is ahead of its turn gives way at once


def _wait(ask: Callable[[], float], entry: Entry, what: str, say: Say, stop: Callable[[], bool]) -> None:
    while wait_s := ask():
        say(Progress(entry.name, "prepare", message=what))
        _sleep(min(wait_s, 30.0) * random.uniform(1.0, 1.3), stop)


def _sleep(seconds: float, stop: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if stop():
            raise KeyboardInterrupt
        time.sleep(min(0.2, max(0.0, until - time.monotonic())))


def ask(method: Any, *args: Any) -> Any:
    """A call on the gate's actor. A gate that is gone stops nobody: its head is gone too, and the sweep with it."""
    import ray

    try:
        return ray.get(method.remote(*args), timeout=60)
    except ray.exceptions.RayError as error:
        log.warning("the gate does not answer: %s", type(error).__name__)
        return 0.0


class InThread:
    """A function in a thread, its result or what it raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.error: BaseException | None = None
        self.work = work
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error = error

    def wait(self, seconds: float) -> bool:
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def result(self) -> None:
        if self.error is not None:
            raise self.error
