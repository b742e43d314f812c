"""One attempt at one entry, from its manifest row and log file to how it ended, and what to try next.

No Ray here. `pairscope capture` runs attempts in its own process, the sweep runs `work_on` inside actors.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from capture.attemptlog import append_log, attempt_log, header
from capture.config import Entry
from capture.errors import (
    DeviceError,
    DeviceMemoryError,
    DoesNotFitError,
    HubUnreachableError,
    PairscopeError,
    StoreError,
    cannot_write,
    disk_is_full,
    why_not_written,
)
from capture.layout import RunDir
from capture.manifest import Attempt, settle_lost
from capture.printable import without_logins
from capture.process import temporary
from capture.progress import Progress
from capture.ranks import Ranks
from capture.relay import Handover, LostError, Relay

logger = logging.getLogger(__name__)

WORK = "capture.run:capture_pair"  # module:function with the signature of capture_pair
SMALLER_TILES = 4
MOST_NODES = 5
SMALLER_MODES = ("streamed", "streamed-2", "sub-layer")  # each takes less memory than the one before
PROBE_BYTES = 16384  # an empty file can be made on a full disk
_MANIFEST_FROM_RESULT = ("capture", "gpu", "mode", "n_prompts", "n_tokens", "peak_memory_bytes", "planned_memory_bytes")


@dataclass(frozen=True)
class Try:
    """How an entry is tried: nothing here changes a number, only the memory that it takes and what happened before."""

    tile_divisor: int = 1
    mode: str | None = None
    deaths: int = 0
    losses: int = 0
    nodes: int = 0  # that were taken away under it; like the two before it, since its last step forward
    cut_off: int = 0  # nodes from which the hub was out of reach

    def apply(self, entry: Entry) -> Entry:
        return entry.model_copy(update={"mode": self.mode}) if self.mode else entry

    @property
    def note(self) -> str:
        """What differs from a first try, for logs; empty for a first try."""
        parts = [f"tiles divided by {self.tile_divisor}"] if self.tile_divisor > 1 else []
        parts += [f"mode {self.mode}"] if self.mode else []
        parts += ["again, after its worker died"] if self.deaths else []
        parts += [f"again, after {self.nodes} node{'s' * (self.nodes != 1)} went"] if self.nodes else []
        parts += ["again, on another node"] if self.cut_off else []
        parts += ["again, layers first that were lost with their node"] if self.losses else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended; plain values only, so that it always survives the way from a worker to the driver.

    state: complete, failed or interrupted. fields: values for the manifest row. bug: not an error meant for a user, its
    traceback is in the log. out_of_memory, died (with it its use of the GPU), lost_span: the causes worth another try.
    """

    state: str
    fields: dict[str, Any] = field(default_factory=dict)
    bug: bool = False
    out_of_memory: bool = False
    died: bool = False
    node_gone: bool = False  # it died with its whole machine
    cut_off: bool = False  # the hub is out of reach of its machine
    handover: Handover | None = None  # of a worker whose layers others go on behind
    lost_span: int | None = None  # whose handover was gone when it was needed
    tidy: bool = False  # the worker's process holds no more than a new one, and can go on with another entry

    @property
    def error(self) -> str:
        """`Class: message` in one line, or nothing."""
        return f"{self.fields['error_class']}: {self.fields['error']}" if self.fields.get("error_class") else ""


INTERRUPTED = Outcome("interrupted", {"error_class": "Interrupted", "error": "stopped before it was complete"})


def next_try(tried: Try, entry: Entry, outcome: Outcome) -> Try | None:
    """What to try after a failure: out of memory goes to smaller tiles, then to modes that take less; a dead worker gets
    one more, and so does what was lost; where the whole machine went, as interruptible ones do, the entry is not to blame, and gets
    MOST_NODES in all."""
    if outcome.state != "failed":
        return None
    if outcome.out_of_memory:
        if tried.tile_divisor == 1:
            return replace(tried, tile_divisor=SMALLER_TILES)
        mode = _smaller_mode(tried.apply(entry))
        return replace(tried, mode=mode) if mode else None
    if outcome.lost_span is not None:  # a node that goes takes its worker and what it had handed over: two failures
        return replace(tried, losses=tried.losses + 1) if tried.losses <= tried.nodes else None
    if outcome.node_gone:
        return replace(tried, nodes=tried.nodes + 1) if tried.nodes + 1 < MOST_NODES else None
    return replace(tried, deaths=1) if outcome.died and tried.deaths == 0 else None


def _smaller_mode(entry: Entry) -> str | None:
    """The next mode that takes less memory; None where there is none, or where the weights must be whole."""
    if "quantization_config" in entry.model_kwargs:
        return None
    rest = SMALLER_MODES[SMALLER_MODES.index(entry.mode) + 1 :] if entry.mode in SMALLER_MODES else SMALLER_MODES
    shared = entry.tensor_parallel != 1
    return next((m for m in rest if not (shared and m == "sub-layer")), None)


def is_out_of_memory(error: BaseException) -> bool:
    """True for our own DeviceMemoryError and for what torch and Python raise when an allocation fails."""
    if isinstance(error, DoesNotFitError):
        return False
    return (
        isinstance(error, DeviceMemoryError | MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)  # torch's CPU allocator raises a plain RuntimeError
    )


def is_poison(error: BaseException) -> bool:
    """True for an error of the GPU after which its process can do nothing more there: an illegal access, a failed assert, an
    ECC error, a card that fell off the bus. A fresh process may."""
    if is_out_of_memory(error):
        return False
    return type(error).__name__ == "AcceleratorError" or "CUDA error:" in str(error)


def error_fields(error: BaseException) -> dict[str, str]:
    """The manifest's two columns for an error, in one line."""
    return {"error_class": type(error).__name__, "error": without_logins(" ".join(str(error).split()))[:2000]}


def failure(error: BaseException, **fields: Any) -> Outcome:
    poisoned = is_poison(error)
    if poisoned:
        error = DeviceError(f"the GPU failed, and this process cannot use it any more: {str(error).splitlines()[0]}")
    return Outcome(
        "failed",
        fields=fields | error_fields(error),
        bug=not isinstance(error, PairscopeError | LostError) and not is_out_of_memory(error),
        out_of_memory=is_out_of_memory(error),
        died=poisoned,
        cut_off=isinstance(error, HubUnreachableError),
        lost_span=error.span if isinstance(error, LostError) else None,
    )


def finish(attempt: Attempt, outcome: Outcome) -> None:
    """Write how an attempt ended into its manifest row."""
    attempt.row |= outcome.fields
    attempt.finish(outcome.state)


def find(dotted: str) -> Callable[..., Any]:
    """The function behind `module:function`."""
    module, name = dotted.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def work_on(
    entry: Entry,
    out: str,
    log: str,
    *,
    tried: Try,
    force: bool,
    work: str = WORK,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    own_process: bool = False,
    ranks: Ranks | None = None,
    relay: Relay | None = None,
) -> Outcome:
    """Do the work of one attempt with its log file open, and turn whatever happens into an Outcome.

    Everything is caught: SystemExit too, since a library that calls sys.exit must not take a sweep with it. Whatever is
    raised after `stop` was asked for is an interruption, and so is KeyboardInterrupt.
    """

    def asked(error: BaseException) -> bool:
        return isinstance(error, KeyboardInterrupt) or (stop is not None and stop())

    stage = _StageLines(progress)
    try:
        run = RunDir(out)
        with attempt_log(run, log, header(entry, tried.note), own_process=own_process):
            try:
                shared: dict[str, Any] = {} if ranks is None else {"ranks": ranks}
                shared |= {} if relay is None else {"relay": relay}
                result = find(work)(
                    tried.apply(entry),
                    out,
                    force=force,
                    progress=stage,
                    tile_divisor=tried.tile_divisor,
                    stop=stop,
                    **shared,
                )
            except BaseException as error:
                if asked(error):
                    logger.warning("interrupted")
                else:
                    logger.error("".join(traceback.format_exception(error)))
                raise
            known = _MANIFEST_FROM_RESULT if result.state == "complete" else ("capture",)  # skipped: nothing was run
            fields = {name: getattr(result, name) for name in known}
            if result.state == "complete":
                fields |= {f"peak_{stage}_bytes": size for stage, size in result.peak_bytes.items()}
            logger.info("%s in %.1f s: %s", result.state, result.seconds, result.path)
        return Outcome("complete", fields, handover=getattr(result, "handover", None))
    except BaseException as error:
        if asked(error):
            return INTERRUPTED
        if isinstance(error, OSError) and disk_is_full(error):
            where = f"'{error.filename}'" if error.filename else f"to '{out}' or a directory for temporary files"
            error = cannot_write(where, error)
        return failure(error)


class _StageLines:
    """Passes progress on, and logs each stage once and the walk every ten seconds."""

    def __init__(self, onward: Callable[[Progress], None] | None) -> None:
        self.onward = onward
        self.stage = ""
        self.said = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.stage != self.stage or now - self.said > 10 or progress.message:
            self.stage, self.said = progress.stage, now
            logger.info("%s", progress_line(progress))
        if self.onward is not None:
            self.onward(progress)


def progress_line(progress: Progress) -> str:
    """One line without the entry's name: stage, layer, speed, time left, message; what is unknown is left out."""
    parts = [progress.stage]
    if progress.n_layers:
        parts.append(f"layer {progress.layer}/{progress.n_layers}")
    if progress.tokens_per_second is not None:
        parts.append(speed(progress.tokens_per_second))
    if progress.seconds_left is not None:
        parts.append(f"{duration(progress.seconds_left)} left")
    if progress.message:
        parts.append(progress.message)
    return ", ".join(parts)


def speed(tokens_per_second: float) -> str:
    """1,234 tokens/s; one decimal below 10."""
    return f"{tokens_per_second:,.{1 if tokens_per_second < 9.95 else 0}f} tokens/s"


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def complete_line(row: dict[str, Any], n_variants: int = 1) -> str:
    """What a complete attempt came to, from its manifest row, in which every variant of a prompt is counted."""
    if row["n_tokens"] is None:
        return "was complete already"
    n = row["n_prompts"] // n_variants
    prompts = f"{n} prompt{'s' * (n != 1)}" + (f" in {n_variants} variants" if n_variants > 1 else "")
    return (
        f"complete in {duration(row['seconds'])}: {prompts}, {row['n_tokens']:,} tokens, {row['mode']} on {row['gpu']}"
    )


def check_output(run: RunDir, *, write: bool = True) -> None:
    """Raise StoreError if the output holds captures of another schema version or, with `write`, cannot be written."""
    try:
        for _ in run.captures():
            pass
    except StoreError as error:
        if not isinstance(error.__cause__, OSError):  # such as one of another schema version
            raise
        raise StoreError(f"cannot read the output '{run.out}': {' '.join(str(error.__cause__).split())}") from error
    if not write:
        return
    run.remove_leftovers()
    settle_lost(run)
    probe = temporary(f"{run.root}/manifest/.writable")
    try:
        run.write_bytes(probe, os.urandom(PROBE_BYTES))  # random: nothing can store it in less
        run.fs.delete_file(probe)
    except (OSError, StoreError) as error:
        why = why_not_written(error)
        raise StoreError(
            f"cannot write to the output '{run.out}': {why}; choose another --out, or make room and run again"
        ) from error


def record_failure(run: RunDir, entry: str, error: PairscopeError) -> dict[str, Any]:
    """A manifest row and a log for an entry that failed before any work could start; returns the row."""
    attempt = Attempt(run, entry)
    append_log(run, attempt.log_path, f"entry {entry}\n{type(error).__name__}: {error}\n")
    attempt.finish("failed", error)
    return attempt.row


def run_entry(
    entry: Entry,
    run: RunDir,
    *,
    force: bool = False,
    work: str = WORK,
    progress: Callable[[Progress], None] | None = None,
    say: Callable[[str, str], None] = lambda entry, text: None,
    stop: Callable[[], bool] | None = None,
) -> tuple[dict[str, Any], Outcome]:
    """Try one entry in this process until it is complete or nothing is left to try.

    Returns the last attempt's manifest row and outcome.
    """
    tried: Try | None = Try()
    while tried is not None:
        attempt = Attempt(run, entry.name)
        attempt.start()
        outcome = work_on(
            entry, run.out, attempt.log_path, tried=tried, force=force, work=work, progress=progress, stop=stop
        )
        try:
            finish(attempt, outcome)
        except StoreError as error:  # it must not hide how the attempt ended
            say(entry.name, f"the manifest cannot be written: {error}")
        tried = None if outcome.died else next_try(tried, entry, outcome)  # this process is what died
        if tried is not None:
            say(entry.name, f"{outcome.error}; trying again, {tried.note}")
    return attempt.row, outcome
