"""Attempts in processes of their own, forked from one that has imported the engine: a second each instead of seven."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import inject

HERE = Path(__file__).parent
STARTING = threading.Lock()


@dataclass(frozen=True)
class Ended:
    """code: what a shell would get, -9 for a killed process. said: what a terminal would show. seconds: wall clock."""

    code: int
    said: str
    seconds: float


def context() -> Any:
    """A fork server that has the engine loaded; started with the first process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["preload", "inject", "runner"])
    path = os.environ.get("PYTHONPATH")
    # the server is not told sys.path by Python 3.11 and some of 3.12, and passes over in silence what it cannot import
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *([path] if path else [])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path
    return found


def start(entry: Any, out: Path | str, *faults: inject.Fault, force: bool = False, said: Path) -> Any:
    """Begin an attempt, as `pairscope capture` makes it, in a process of its own."""
    process = context().Process(target=_capture, args=(entry.model_dump_json(), str(out), faults, force, str(said)))
    with STARTING:  # a child would import this process's main module again, which may be pytest or the soak
        main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
        try:
            process.start()
        finally:
            sys.modules["__main__"] = main
    return process


def ended(process: Any, within: float) -> int | None:
    """The exit code of a process once it has ended; None where it has not within so many seconds.

    Whoever starts a process reads the codes of all that have ended, and of two threads that read one at once the later finds
    nothing and takes it for 255: so one thread at a time.
    """
    connection.wait([process.sentinel], within)
    with STARTING:
        return process.exitcode


def run(
    entry: Any, out: Path | str, *faults: inject.Fault, force: bool = False, said: Path, within: float = 300
) -> Ended:
    """An attempt from its start to its end; it is killed, and an error here, where it does not end."""
    began = time.monotonic()
    process = start(entry, out, *faults, force=force, said=said)
    code = ended(process, within)
    if code is None:
        process.kill()
        raise AssertionError(f"an attempt hung for {within} s: {[str(f) for f in faults]}\n{said.read_text()}")
    return Ended(code, said.read_text() if said.exists() else "", time.monotonic() - began)


def _capture(entry: str, out: str, faults: Sequence[inject.Fault], force: bool, said: str) -> None:
    """What capture/cli.py does, in a forked process, with its output in a file."""
    assert "preload" in sys.modules, "the fork server has not imported the engine"
    os.setsid()
    stream = open(said, "w", buffering=1)  # noqa: SIM115  for the life of the process
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from capture.attempt import check_output, complete_line, run_entry
    from capture.config import Entry
    from capture.errors import PairscopeError
    from capture.layout import RunDir
    from capture.show import Show
    from capture.stop import Stop

    torch.set_num_threads(1)
    inject.install(*faults)
    one = Entry.model_validate_json(entry)
    try:
        run_dir = RunDir(out)
        check_output(run_dir)
        with Show(stream=stream, live=False) as show, Stop(show.note) as stop:
            row, outcome = run_entry(
                one, run_dir, force=force, progress=show.progress, say=show.event, stop=stop.requested
            )
    except PairscopeError as error:
        print(f"pairscope: {type(error).__name__}: {error}")
        os._exit(error.exit_code)
    if outcome.state == "complete":
        print(f"{one.name}: {complete_line(row)}")
    else:
        print(f"pairscope: {one.name} {outcome.state}: {outcome.error}{' (a bug)' if outcome.bug else ''}")
    stream.flush()
    os._exit({"complete": 0, "interrupted": 130}.get(outcome.state, 1))
