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
from capture.errors import CheckpointError
from capture.progress import Progress
from cluster.prepare_disk import GIB, hub_cache, in_use, make_room, one_at_a_time
from cluster.prepare_gate import find_gate

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
    with _online_again():
        used = prepare(entry, gate, progress or (lambda _: None), stop or (lambda: False)) if gate is not None else []
        try:
            return capture_pair(entry, out, progress=progress, stop=stop, **more)
        finally:
            for stream in used:
                stream.close()


def hub_models(entry: Entry) -> list[tuple[str, str | None]]:
    """(repository, revision) of the models of an entry that are not directories, each once."""
    both = [(entry.base_model, entry.base_revision), (entry.sft_model, entry.sft_revision)]
    return [m for m in dict.fromkeys(both) if not Path(m[0]).expanduser().is_dir()]


def prepare(entry: Entry, gate: Any, say: Say, stop: Callable[[], bool]) -> list[Any]:
    """Fetch what the entry needs first, and go offline where that is all. Returns open files that keep its models from being removed.

    Raises CheckpointError (no room, gated, missing, a hub that stays unwell) and KeyboardInterrupt where `stop` said so.
    """
    models = hub_models(entry)
    used = [in_use(repo) for repo, _ in models]
    if models:
        _in_turn(entry, models, gate, say, stop)
    from capture.run import way_of_weights

    if way_of_weights(entry) == "download":
        _go_offline(entry)
    return used


def _in_turn(entry: Entry, models: list[tuple[str, str | None]], gate: Any, say: Say, stop: Callable[[], bool]) -> None:
    """Wait for this node's other entries, then for the gate, then fetch; again after a pause where the hub is overrun."""
    who = f"{socket.gethostname()}-{os.getpid()}"
    for attempt in range(1, TRIES + 1):
        with _this_node(entry, say, stop):
            _wait(lambda: _ask(gate.ask, who), entry, "waiting for a turn at the hub", say, stop)
            try:
                _fetch(entry, models, gate, who, say, stop)
                _ask(gate.leave, who)
                return
            except CheckpointError as error:
                if not overrun(error) or attempt == TRIES:
                    _ask(gate.leave, who)
                    raise
                pause = float(_ask(gate.too_much, who)) * random.uniform(1.0, 1.3)
                log.warning("%s; trying again in %.0f s", error, pause)
        _sleep(pause, stop)


def _fetch(
    entry: Entry, models: list[tuple[str, str | None]], gate: Any, who: str, say: Say, stop: Callable[[], bool]
) -> None:
    """Check the disk for all models together, then download them, in a thread, while progress is told."""
    from capture.hub import download_bytes
    from capture.run import way_of_weights

    way = way_of_weights(entry)
    token = entry.model_kwargs.get("token")

    def measured() -> int:
        return sum(download_bytes(repo, rev, allow_pickle=entry.allow_pickle, token=token) for repo, rev in models)

    try:
        need = measured()
    except CheckpointError as error:
        if not wants_login(error) or not _log_in(gate):
            raise
        log.info("using the head's login at the hub")
        need = measured()
    if need and way != "stream":
        try:
            make_room(need, [repo for repo, _ in models])
        except CheckpointError as error:
            if way == "download":
                raise
            log.warning("%s; the weights are read all the same, and not kept", error)
    before = _cache_bytes(models)
    done = _Thread(lambda: _download(entry))
    while not done.wait(LOOK_EVERY_S):
        if stop():
            raise KeyboardInterrupt
        _ask(gate.ask, who)  # keeps the place
        fetched = max(0, _cache_bytes(models) - before)
        say(Progress(entry.name, "prepare", message=f"downloading, {fetched / GIB:.1f} of {need / GIB:.1f} GiB"))
    done.result()


def _download(entry: Entry) -> None:
    """What is there before the entry is opened: configs, tokenizer, and weights that do not come later. Checks the files once
    more, as the capture will."""
    from capture.files import check_remote_code, resolve_tokenizer
    from capture.hub import model_snapshot, model_without_weights
    from capture.run import way_of_weights

    token = entry.model_kwargs.get("token")
    remote = bool(entry.model_kwargs.get("trust_remote_code"))
    for repo, revision in hub_models(entry):

        def check(config: dict[str, Any], repo: str = repo) -> None:
            check_remote_code(config, repo, remote)

        if way_of_weights(entry) == "download":
            model_snapshot(
                repo, revision, download=True, allow_pickle=entry.allow_pickle, token=token, check_config=check
            )
        else:
            model_without_weights(repo, revision, allow_pickle=entry.allow_pickle, token=token, check_config=check)
    by_model = {entry.sft_model: entry.sft_revision, entry.base_model: entry.base_revision}
    revision = entry.tokenizer_kwargs.get("revision", by_model.get(entry.tokenizer))
    resolve_tokenizer(entry.tokenizer, revision, download=True, token=entry.tokenizer_kwargs.get("token", token))


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
    response = getattr(error.__cause__, "response", None)
    status = getattr(response, "status_code", 0) or 0
    return status == 429 or status >= 500


def wants_login(error: CheckpointError) -> bool:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    return isinstance(error.__cause__, GatedRepoError | RepositoryNotFoundError)


def _log_in(gate: Any) -> bool:
    """Take the head's login into this process's memory, unless it has one. False where there is none to take."""
    from huggingface_hub import get_token

    token = None if get_token() else _ask(gate.login)
    if token:
        os.environ["HF_TOKEN"] = token
    return bool(token)


def _cache_bytes(models: list[tuple[str, str | None]]) -> int:
    """Bytes in the cache of these models, files under way included."""
    total = 0
    for repo, _ in models:
        blobs = hub_cache() / f"models--{repo.replace('/', '--')}" / "blobs"
        total += sum(p.stat().st_size for p in blobs.glob("*") if p.exists())
    return total


@contextlib.contextmanager
def _this_node(entry: Entry, say: Say, stop: Callable[[], bool]) -> Iterator[None]:
    """The node's one place for downloading, waited for."""
    while True:
        with one_at_a_time() as held:
            if held:
                yield
                return
        say(Progress(entry.name, "prepare", message="waiting for another entry's download on this node"))
        _sleep(LOOK_EVERY_S, stop)


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


def _ask(method: Any, *args: Any) -> Any:
    """A call on the gate's actor. A gate that is gone stops nobody: its head is gone too, and the sweep with it."""
    import ray

    try:
        return ray.get(method.remote(*args), timeout=60)
    except ray.exceptions.RayError as error:
        log.warning("the gate does not answer: %s", type(error).__name__)
        return 0.0


class _Thread:
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
