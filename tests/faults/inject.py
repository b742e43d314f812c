"""Faults, put into a process from outside: functions of the product are wrapped, and what a plan names happens at their calls.

The product has no hooks for this. A process that is to be harmed calls `install` with its plan before it works; the plan says
at which point, at which call of it, and what happens.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import importlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# point -> module, attribute: where a process can be hit, in the order in which a capture passes them
POINTS = {
    "resolve": ("capture.run", "resolve"),
    "open": ("capture.work", "Work._open"),
    "load": ("capture.checkpoint", "StreamedModel.load"),
    "prefetch": ("capture.loader", "Loader._prepare"),
    "layer": ("capture.lockstep", "Pair._run"),
    "lens": ("capture.collector", "Collector._lens"),
    "commit": ("capture.spans", "SpanStore.commit"),
    "span file": ("capture.spans", "SpanStore._write"),
    "table": ("capture.store", "CaptureWriter.table"),
    "row group": ("pyarrow.parquet", "ParquetWriter.write_table"),
    "finish": ("capture.store", "CaptureWriter.finish"),
    "rename": ("capture.store", "CaptureWriter._move"),
    "marker": ("capture.store", "CaptureWriter._json"),  # capture.json is its first call, the marker its second
    "clear": ("capture.spans", "SpanStore.clear"),
    "row": ("capture.layout", "RunDir.write_manifest_row"),
    "replace": ("os", "replace"),
    "fsync": ("os", "fsync"),
    "remote write": ("capture.layout", "RunDir.write_bytes"),
}
ERRNOS = {"ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT}
FOREVER = 10**9


@dataclass(frozen=True)
class Fault:
    """do: kill, stop, slow, nan, inf, oom, host oom, cuda, error, clock (at any point), or one of ERRNOS. nth: at which call of the point, counted
    in the process; `times` calls from there on. after: when the call is done instead of before it. seconds: of stop and slow.
    once: a file; where it is there already nothing happens, so that a plan that outlives its process strikes once."""

    at: str
    do: str
    nth: int = 1
    times: int = 1
    after: bool = False
    seconds: float = 0.5
    once: str | None = None

    def __str__(self) -> str:
        return f"{self.do} {'after' if self.after else 'before'} {self.at} {self.nth}"

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Fault:
        return Fault(**json.loads(text))


class Poisoned:
    """A CUDA context after a sticky error: every later call fails as the first did."""

    def __init__(self) -> None:
        self.error: Exception | None = None


def install(*faults: Fault) -> None:
    """Wrap the points that the faults name, in this process, for good."""
    poison = Poisoned()
    for fault in faults:
        if fault.do == "clock":
            _set_clock(fault.seconds)
    faults = tuple(f for f in faults if f.do != "clock")
    if any(f.do == "cuda" for f in faults):
        for point in ("load", "layer", "lens"):
            _wrap(point, functools.partial(_fail_if, poison))
    for point in dict.fromkeys(f.at for f in faults):
        mine = [f for f in faults if f.at == point]
        _wrap(point, functools.partial(_strike, mine, poison, [0]))


def _set_clock(ahead: float) -> None:
    """What this process reads off the wall: everything but the steady clock is off by so many seconds."""
    import datetime

    manifest = importlib.import_module("capture.manifest")
    inner, real = manifest.now, time.time

    def now() -> str:
        moment = datetime.datetime.fromisoformat(inner()) + datetime.timedelta(seconds=ahead)
        return moment.isoformat(timespec="milliseconds")

    for name in ("capture.manifest", "capture.store", "capture.spanwalk"):
        importlib.import_module(name).now = now
    time.time = lambda: real() + ahead


def _wrap(point: str, strike: Callable[[Callable[[], Any], tuple[Any, ...]], Any]) -> None:
    module, name = POINTS[point]
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    inner = getattr(owner, last)

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return strike(lambda: inner(*args, **kwargs), args)

    setattr(owner, last, wrapped)


def _fail_if(poison: Poisoned, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
    if poison.error is not None:
        raise type(poison.error)(str(poison.error))
    return call()


def _strike(
    faults: list[Fault], poison: Poisoned, count: list[int], call: Callable[[], Any], args: tuple[Any, ...]
) -> Any:
    count[0] += 1
    due = [f for f in faults if f.nth <= count[0] < f.nth + f.times and _first(f)]
    for fault in due:
        if not fault.after:
            act(fault, args, poison)
    result = call()
    for fault in due:
        if fault.after:
            act(fault, (*args, result), poison)
    return result


def _first(fault: Fault) -> bool:
    if fault.once is None:
        return True
    try:
        os.close(os.open(fault.once, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def act(fault: Fault, args: tuple[Any, ...], poison: Poisoned) -> None:
    if fault.do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.do == "stop":
        stop_for(os.getpid(), fault.seconds)
    elif fault.do == "slow":
        time.sleep(fault.seconds)
    elif fault.do in ("nan", "inf"):
        spoil(args, float(fault.do))
    elif fault.do == "oom":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")
    elif fault.do == "host oom":
        raise MemoryError("injected")
    elif fault.do == "cuda":
        import torch

        poison.error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered (injected)")
        raise poison.error
    elif fault.do in ERRNOS:
        raise OSError(ERRNOS[fault.do], os.strerror(ERRNOS[fault.do]))
    else:
        raise RuntimeError("injected")


def stop_for(pid: int, seconds: float) -> None:
    """SIGSTOP, and SIGCONT from a process beside it."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {pid}"])
    os.kill(pid, signal.SIGSTOP)


def spoil(args: tuple[Any, ...], value: float) -> None:
    """Put a value that is no number into what a call has to do with: one weight of a model's group, one state of a batch."""
    import torch

    with torch.no_grad():
        if hasattr(args[0], "weights"):  # StreamedModel.load(group), after it
            model, group = args[0], args[1]
            weight = model.weights.get(model.names(group)[0])
            spoiled = weight.detach().clone()
            spoiled.reshape(-1)[0] = value
            model.weights.set(model.names(group)[0], torch.nn.Parameter(spoiled, requires_grad=False))
        else:  # Pair._run(owner, states, layer, batch), after it: what it returned
            args[-1][0].reshape(-1)[0] = value


def damage(path: Path, how: str, where: float = 0.5) -> None:
    """Truncate a file, or flip one bit of it, at a share of its length."""
    data = bytearray(path.read_bytes())
    at = min(len(data) - 1, int(len(data) * where))
    if how == "truncated":
        data = data[:at]
    else:
        data[at] ^= 0x10
    path.write_bytes(bytes(data))
