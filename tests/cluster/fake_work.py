"""Stand-ins for capture_pair, found by their dotted names inside real workers. Each call leaves a note in the output."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capture.config import Entry
from capture.errors import CheckpointError, DeviceMemoryError, DoesNotFitError, HubUnreachableError
from capture.progress import Progress
from capture.show import Show
from cluster.resources import WORKER_BYTES


@dataclass(frozen=True)
class Result:
    """What capture_pair returns."""

    pair: str
    capture: str
    path: str
    state: str
    seconds: float
    n_prompts: int
    n_tokens: int
    mode: str
    device: str
    gpu: str
    peak_memory_bytes: int
    planned_memory_bytes: int
    peak_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolved:
    capture: str
    weight_bytes: int | None = None


def resolve(entry: Entry, *, download: bool) -> Resolved:
    assert not download  # a driver only looks
    if entry.name.startswith("unresolvable"):
        raise CheckpointError(f"{entry.base_model}: shard 2 of 3 is missing")
    return Resolved(f"id-{entry.name}")


def _calls(out: str | Path) -> Path:
    """Where notes lie; an output at the head (head://desk/path) is a path of this machine here."""
    text = str(out)
    return Path("/" + text.split("/", 3)[3] if text.startswith("head:") else text) / "calls"


def calls(out: str | Path, entry: str | None = None) -> list[dict[str, Any]]:
    """The notes of all calls, oldest first."""
    notes = [json.loads(p.read_text()) for p in _calls(out).glob("*.json")]
    return sorted((n for n in notes if entry in (None, n["entry"])), key=lambda n: n["began"])


def _note(entry: Entry, out: str, tile_divisor: int) -> int:
    """Leave a note of this call; how many calls for this entry there were before."""
    before = len(calls(out, entry.name))
    folder = _calls(out)
    folder.mkdir(parents=True, exist_ok=True)
    note = {
        "entry": entry.name, "tile_divisor": tile_divisor, "mode": entry.mode, "pid": os.getpid(), "began": time.time(),
        "threads": os.environ.get("OMP_NUM_THREADS"), "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "torch": "torch" in sys.modules,
    }  # fmt: skip
    temporary = folder / f"{uuid.uuid4().hex}.tmp"
    temporary.write_text(json.dumps(note))
    temporary.rename(temporary.with_suffix(".json"))
    return before


def _done(entry: Entry, out: str) -> Result:
    mode = "streamed" if entry.mode == "streamed" else "resident"
    capture = f"id-{entry.name}"
    return Result(entry.name, capture, f"{out}/captures", "complete", 0.1, 2, 34, mode, "cpu", "cpu", 1000, 900)


def make_entry(name: str = "complete", **fields: Any) -> Entry:
    here = str(Path(__file__).parent)
    return Entry(
        **{"name": name, "base_model": here, "sft_model": here, "tokenizer": here, "prompts": ("one", "two"),
           "device": "cpu"} | fields
    )  # fmt: skip


def quiet() -> tuple[Show, io.StringIO]:
    stream = io.StringIO()
    return Show(stream=stream, live=False), stream


Said = Callable[[Progress], None] | None
Asked = Callable[[], bool] | None


def complete(entry: Entry, out: str, *, force: bool, progress: Said, tile_divisor: int, stop: Asked) -> Result:
    _note(entry, out, tile_divisor)
    assert progress is not None
    progress(Progress(entry.name, "open"))
    logging.getLogger("capture.fake").info("an info line of ours")
    logging.getLogger("elsewhere").info("an info line of a library")
    logging.getLogger("transformers.fake").warning("a warning of transformers")
    warnings.warn("a Python warning", stacklevel=1)
    print("a printed line")
    progress(Progress(entry.name, "layers", 1, 2, 340.0, 1.5))
    return _done(entry, out)


def nothing(entry: Entry, out: str, **kwargs: Any) -> Result:
    return _done(entry, out)


def hoarding(entry: Entry, out: str, **kwargs: Any) -> Result:
    """Leaves more memory behind than a new process has."""
    _note(entry, out, kwargs["tile_divisor"])
    globals()["kept"] = b"x" * (WORKER_BYTES + 1)
    return _done(entry, out)


def sleeping(entry: Entry, out: str, *, force: bool, progress: Said, tile_divisor: int, stop: Asked) -> Result:
    _note(entry, out, tile_divisor)
    time.sleep(0.4)
    return _done(entry, out)


def dozing(entry: Entry, out: str, **kwargs: Any) -> Result:
    """Sleeps as long as the bench says."""
    time.sleep(float(os.environ["FAKE_SLEEP_S"]))
    return _done(entry, out)


def meeting(entry: Entry, out: str, **kwargs: Any) -> Result:
    """Done once another entry is at work at the same time."""
    _note(entry, out, kwargs["tile_divisor"])
    end = time.monotonic() + 30
    while len(calls(out)) < 2:
        assert time.monotonic() < end, "alone"
        time.sleep(0.05)
    return _done(entry, out)


def out_of_memory_once(entry: Entry, out: str, **kwargs: Any) -> Result:
    if _note(entry, out, kwargs["tile_divisor"]) == 0:
        raise DeviceMemoryError("the device is full")
    return _done(entry, out)


def out_of_memory_unless_streamed(entry: Entry, out: str, **kwargs: Any) -> Result:
    _note(entry, out, kwargs["tile_divisor"])
    if entry.mode != "streamed":
        raise DeviceMemoryError("the device is full")
    return _done(entry, out)


def out_of_memory_always(entry: Entry, out: str, **kwargs: Any) -> Result:
    _note(entry, out, kwargs["tile_divisor"])
    raise MemoryError("no more")


def too_large(entry: Entry, out: str, **kwargs: Any) -> Result:
    _note(entry, out, kwargs["tile_divisor"])
    raise DoesNotFitError("mode streamed needs 3 GiB; 2 GiB are free")


def gated(entry: Entry, out: str, **kwargs: Any) -> Result:
    _note(entry, out, kwargs["tile_divisor"])
    raise CheckpointError("'owner/model' is gated:\n accept its terms, then `hf auth login`")


class Unpicklable(Exception):
    """As some libraries' exceptions: its state does not survive a way through pickle."""

    def __init__(self, a: str, b: str) -> None:
        super().__init__(f"{a} and {b}")
        self.held = lambda: None


def bug(entry: Entry, out: str, **kwargs: Any) -> Result:
    _note(entry, out, kwargs["tile_divisor"])
    raise Unpicklable("one", "two")


def exits(entry: Entry, out: str, **kwargs: Any) -> Result:
    _note(entry, out, kwargs["tile_divisor"])
    sys.exit(3)


def interrupted(entry: Entry, out: str, **kwargs: Any) -> Result:
    """As a library would that takes a signal to its process for a Ctrl-C; nobody asked the sweep to stop."""
    _note(entry, out, kwargs["tile_divisor"])
    raise KeyboardInterrupt


def killed_once(entry: Entry, out: str, **kwargs: Any) -> Result:
    if _note(entry, out, kwargs["tile_divisor"]) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return _done(entry, out)


def stopped_once(entry: Entry, out: str, **kwargs: Any) -> Result:
    if _note(entry, out, kwargs["tile_divisor"]) == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    return _done(entry, out)


def killed_always(entry: Entry, out: str, **kwargs: Any) -> Result:
    _note(entry, out, kwargs["tile_divisor"])
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def by_name(entry: Entry, out: str, **kwargs: Any) -> Result:
    """The work that the first part of the entry's name asks for."""
    work: Callable[..., Result] = globals()[entry.name.split("-")[0]]
    return work(entry, out, **kwargs)


def obliging(entry: Entry, out: str, *, force: bool, progress: Said, tile_divisor: int, stop: Asked) -> Result:
    """Works until it is asked to stop, as the engine does: between layers."""
    _note(entry, out, tile_divisor)
    assert stop is not None
    while not stop():
        time.sleep(0.05)
    raise KeyboardInterrupt


def stubborn(entry: Entry, out: str, **kwargs: Any) -> Result:
    """Works and hears nothing, like a long product inside a library."""
    _note(entry, out, kwargs["tile_divisor"])
    time.sleep(600)
    raise AssertionError


def cut_off_where_it_began(entry: Entry, out: str, **_: Any) -> Result:
    """The hub is out of reach of the node on which the first attempt runs."""
    import ray

    node, first = str(ray.get_runtime_context().get_node_id()), Path(out) / "first-node"
    if not first.exists():
        first.write_text(node)
    _note(entry, out, 1)
    if first.read_text() == node:
        raise HubUnreachableError("the hub cannot be reached")
    return _done(entry, out)


def cut_off_everywhere(entry: Entry, out: str, **_: Any) -> Result:
    raise HubUnreachableError("the hub cannot be reached")
