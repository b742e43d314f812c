"""Property tests of the store: whatever two writers do at once, wherever they are killed, and however often they are run
again, what is complete is whole, is never doubled, and is the same in the end."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import invariants
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capture import process, spans, store
from capture.layout import RunDir
from capture.spans import SpanStore
from capture.store import CaptureWriter, category

PAIR, CAPTURE, LAYERS, TOKENS = "a", "0123456789abcdef", 3, 4


class Killed(BaseException):
    """A process is gone: no `except` of the product catches it, and what would clean up behind it does not run."""


class Writers:
    """Writers in threads, of which one moves at a time: each waits for its turn at every call to the file system.

    `order` says who moves; `die` after how many steps a writer is killed. Each has a process id of its own.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.local = threading.local()
        self.dead: set[int] = set()
        self.pids = iter(range(10_000_001, 20_000_000))
        for owner, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (store.shutil, "rmtree")):
            patch.setattr(owner, name, self._stepped(getattr(owner, name)))
        patch.setattr(os, "getpid", lambda real=os.getpid: getattr(self.local, "pid", None) or real())
        patch.setattr(process, "alive", lambda pid, when="": pid not in self.dead)
        patch.setattr(time, "sleep", lambda seconds: self._step())  # a writer that waits for another

    def _stepped(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._step()
            return inner(*args, **kwargs)

        return call

    def _step(self) -> None:
        turn = getattr(self.local, "turn", None)
        if turn is not None:
            turn.over()

    def run(self, work: Callable[[], None], order: Iterator[int], deaths: list[int | None]) -> None:
        """Run as many writers as there are deaths (None: not killed) to their ends."""
        turns = [Turn(self, work, death) for death in deaths]
        while any(not t.done for t in turns):
            t = turns[next(order) % len(turns)]
            if not t.done:
                t.go_on()
        for t in turns:
            if t.error is not None:
                raise t.error


class Turn:
    """One writer: moves to its next call of the file system when it is told to."""

    def __init__(self, writers: Writers, work: Callable[[], None], death: int | None) -> None:
        self.writers, self.work, self.left = writers, work, death
        self.pid = next(writers.pids)
        self.mine, self.theirs = threading.Semaphore(0), threading.Semaphore(0)
        self.done, self.error = False, None
        self.thread = threading.Thread(target=self._live, daemon=True)
        self.thread.start()

    def _live(self) -> None:
        self.writers.local.turn, self.writers.local.pid = self, self.pid
        self.mine.acquire()
        try:
            self.work()
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.done = True
            self.writers.dead.add(self.pid)
            self.theirs.release()

    def over(self) -> None:
        """At a call: wait for the next turn, or die."""
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.writers.local.turn = None  # nothing that cleans up is a step
                raise Killed
        self.theirs.release()
        self.mine.acquire()

    def go_on(self) -> None:
        self.mine.release()
        self.theirs.acquire()


def rows(layer: int) -> dict[str, Any]:
    """Columns of `runs` at one layer."""
    at = np.arange(TOKENS, dtype=np.int32)
    numbers = {
        c: np.float32(layer) + at / np.float32(7) for c in ("norm", "norm_delta", "cosine_distance_prev", "entropy")
    }
    one = np.zeros(TOKENS, np.int32)
    return numbers | {
        "pair": category(one, [PAIR]), "capture": category(one, [CAPTURE]), "prompt_idx": one, "variant": category(one, ["identity"]),
        "run": category(one, ["BB"]), "layer": np.full(TOKENS, layer, np.int16), "position": at,
        "next_token_logprob": at.astype(np.float32), "tracked_logits": np.zeros((TOKENS, 1), np.float32),
    }  # fmt: skip


def an_attempt(out: Path) -> None:
    """What a capture does with its store: spans as the walk comes by, then tables from spans, then the marker.

    Like a process that is killed, it cleans nothing up when it dies.
    """
    run = RunDir(str(out))
    run.remove_leftovers()
    if run.is_complete(PAIR, CAPTURE):
        return
    path = run.capture_path(PAIR, CAPTURE)
    committed = SpanStore(run, path)
    done = committed.committed()
    start = done[-1].last + 1 if done else 0
    state = committed.states(done[-1], torch.device("cpu"))[0][0] if done else torch.zeros(1, 1, 1)
    writer = CaptureWriter(run, PAIR, CAPTURE)
    kept = {s.last: s.columns() for s in done}
    for layer in range(start, LAYERS):
        state = state + layer + 1
        kept[layer] = {"norm": rows(layer)["norm"] + state.numpy().reshape(-1)}
        committed.commit(layer if layer else -1, layer, kept[layer], {"layer": layer}, [[state]])
    writer.table("runs", (rows(layer) | {"norm": kept[layer]["norm"].astype(np.float32)} for layer in range(LAYERS)))
    writer.finish({"a": "document"})
    committed.clear()


def survives(out: Path) -> None:
    """A writer whose files another cleared away finds the capture complete (capture/run.py)."""
    try:
        an_attempt(out)
    except Exception:
        if not RunDir(str(out)).is_complete(PAIR, CAPTURE):
            raise


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    an_attempt(out)
    return Path(RunDir(str(out)).capture_path(PAIR, CAPTURE))


seen: list[int] = []
STEPS = 32  # an attempt makes fewer calls


@pytest.mark.parametrize("beside", [False, True])
def test_killed_at_any_one_call_alone_or_beside_another(
    beside: bool, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    complete_after = set()
    for death in range(STEPS):
        out = tmp_path_factory.mktemp("out")
        with pytest.MonkeyPatch.context() as patch:
            writers = Writers(patch)
            writers.run(lambda out=out: survives(out), _endless([]), [death, None] if beside else [death])  # type: ignore[misc]
            reported = invariants.complete(out)
            complete_after.add(bool(reported))
            assert invariants.wrong(out, settled=False) == [], death
            for _ in range(2):
                writers.run(lambda out=out: survives(out), _endless([]), [None])  # type: ignore[misc]
        assert invariants.wrong(out, as_undisturbed={PAIR: whole}, reported=reported) == [], death
    assert complete_after == ({True} if beside else {False, True})


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    order=st.lists(st.integers(0, 1), min_size=20, max_size=80),
    deaths=st.lists(st.tuples(st.none() | st.integers(0, 40), st.none() | st.integers(0, 40)), min_size=1, max_size=4),
)
def test_any_interleaving_of_writers_crashes_and_reruns_gives_the_same_tables(
    order: list[int], deaths: list[tuple[int | None, int | None]], whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        writers = Writers(patch)
        moves = _endless(order)
        reported: invariants.Files = {}
        for both in deaths:
            writers.run(lambda: survives(out), moves, list(both))
            assert invariants.wrong(out, reported=reported, settled=False) == []
            reported = invariants.complete(out)
        writers.run(lambda: survives(out), moves, [None])
        writers.run(lambda: survives(out), moves, [None])  # what is complete is cleared up behind
    assert invariants.wrong(out, as_undisturbed={PAIR: whole}, reported=reported) == []
    seen.append(1)


def test_the_interleavings_were_tried(told: Any) -> None:
    assert len(seen) >= 60
    told("interleaved", sees="nothing", again="what was not committed")


def cut_elsewhere(out: Path, parts: list[list[int]]) -> None:
    """An attempt whose lists were committed behind other layers, as the clock has it: other files, the same rows."""
    run = RunDir(str(out))
    run.remove_leftovers()
    if run.is_complete(PAIR, CAPTURE):
        return
    writer = CaptureWriter(run, PAIR, CAPTURE)
    try:
        for number, layers in enumerate(parts):
            writer.table("runs", (rows(layer) for layer in layers), number)
        writer.finish({"a": "document"}, keep=True)
    finally:
        writer.discard()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    order=st.lists(st.integers(0, 1), min_size=20, max_size=60),
    deaths=st.lists(st.tuples(st.none() | st.integers(0, 20), st.none() | st.integers(0, 20)), min_size=1, max_size=3),
)
def test_two_whose_spans_are_cut_elsewhere_do_not_mix_their_files(
    order: list[int], deaths: list[tuple[int | None, int | None]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    out, one = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("one")
    cut_elsewhere(one, [[0, 1, 2]])
    with pytest.MonkeyPatch.context() as patch:
        writers, moves = Writers(patch), _endless(order)
        cuts = itertools.cycle([[[0, 1, 2]], [[0], [1], [2]]])
        for both in deaths:
            writers.run(lambda: cut_elsewhere(out, next(cuts)), moves, list(both))
            assert invariants.wrong(out, settled=False) == []
            assert None not in both or RunDir(str(out)).is_complete(PAIR, CAPTURE)
        for _ in range(2):
            writers.run(lambda: cut_elsewhere(out, next(cuts)), moves, [None])
    whole = Path(RunDir(str(one)).capture_path(PAIR, CAPTURE))
    assert invariants.wrong(out, as_undisturbed={PAIR: whole}) == []


def _endless(order: list[int]) -> Iterator[int]:
    while True:
        yield from order
        yield from (0, 1)


def test_a_file_of_spans_says_when_it_is_not_what_was_written(tmp_path: Path) -> None:
    committed = SpanStore(RunDir(str(tmp_path)), str(tmp_path))
    committed.commit(-1, 0, {"norm": np.ones(3, np.float32)}, {"x": 1}, [[torch.ones(1, 2, 3)]])
    (span,) = committed.committed()
    assert span.meta == {"x": 1}
    file = Path(committed.span_path(-1, 0))
    for at in range(0, file.stat().st_size, 7):
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(bytes(data))
        assert committed.committed() == [], at
        data[at] ^= 1
        file.write_bytes(bytes(data))
    assert len(committed.committed()) == 1
    assert spans.SPANS in committed.path
