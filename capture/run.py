"""Capture one pair: files -> prompts -> both models -> the walk -> tables.

`resolve` is light (no torch): it finds the files and the capture's id. `capture_pair` does the work; everything heavy is
imported with capture/work.py, inside it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capture.config import Entry
from capture.device import DeviceChoice, choose_device
from capture.errors import StoreError
from capture.files import ModelFiles, resolve_model, resolve_tokenizer
from capture.identity import capture_id, tokenizer_hash
from capture.layout import RunDir
from capture.progress import Progress
from capture.prompts import Prompts, load_tokenizer, other_ids, tokenize
from capture.quantize import asked_for
from capture.ranks import Ranks
from capture.relay import Handover, Relay

if TYPE_CHECKING:
    from capture.remote import Source
    from capture.settings import Weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resolved:
    """An entry's files and its capture id. weight_bytes: of both checkpoints. source: where missing weights are read from,
    which whoever resolved the entry closes."""

    capture: str
    base: ModelFiles
    sft: ModelFiles
    tokenizer_dir: str
    tokenizer_hash: str
    source: Source | None = None

    @property
    def weight_bytes(self) -> int:
        return self.base.weight_bytes + self.sft.weight_bytes


@dataclass(frozen=True)
class CaptureResult:
    """What a capture came to. state: complete, or skipped where it was there already."""

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
    handover: Handover | None = None  # where other workers walk the layers behind this one's
    peak_bytes: dict[str, int] = field(default_factory=dict)  # by stage


def resolve(entry: Entry, *, download: bool = True) -> Resolved:
    """Find the files of an entry, check them, and work out the capture's id.

    download: fetch what is missing from the hub; without it only directories and the hub's cache are looked at, which is enough for
    the id.
    """
    source = _source(entry) if download else None
    try:
        return _resolve(entry, download, source)
    except BaseException:
        if source is not None:
            source.close()
        raise


def way_of_weights(entry: Entry) -> Weights:
    """How an entry's weights come from the hub: as asked for, but that cache is download where they are not read in parts."""
    ranks = entry.tensor_parallel != 1  # on one node: they share files, and would each fetch what they do not share
    quantized = asked_for(entry.model_kwargs) is not None
    return "download" if entry.weights == "cache" and (ranks or quantized) else entry.weights


def _source(entry: Entry) -> Source | None:
    """Where weights come from that are not on this machine; None where they are to be downloaded first."""
    from capture.remote import Source

    way = way_of_weights(entry)
    return None if way == "download" else Source(keep=way == "cache", token=entry.model_kwargs.get("token"))


def _resolve(entry: Entry, download: bool, source: Source | None) -> Resolved:
    remote = bool(entry.model_kwargs.get("trust_remote_code"))
    token = entry.model_kwargs.get("token")

    def model(name: str, revision: str | None) -> ModelFiles:
        return resolve_model(
            name, revision, allow_pickle=entry.allow_pickle, download=download, trust_remote_code=remote, token=token,
            source=source,
        )  # fmt: skip

    names = [(entry.base_model, entry.base_revision), (entry.sft_model, entry.sft_revision)]
    each = list(dict.fromkeys(names))
    if all(Path(name).expanduser().is_dir() for name, _ in each):
        with ThreadPoolExecutor(len(each)) as pool:  # they are hashed, where they were not before
            found = dict(zip(each, pool.map(lambda one: model(*one), each), strict=True))
    else:
        found = {one: model(*one) for one in each}
    base, sft = (found[one] for one in names)
    token = entry.tokenizer_kwargs.get("token", token)
    directory = resolve_tokenizer(entry.tokenizer, entry.tokenizer_revision, download=download, token=token)
    digest = tokenizer_hash(directory, code=bool(entry.tokenizer_kwargs.get("trust_remote_code")))
    return Resolved(capture_id(entry, base, sft, digest), base, sft, directory, digest, source)


def capture_pair(
    entry: Entry,
    out: str,
    *,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
    tile_divisor: int = 1,
    stop: Callable[[], bool] | None = None,
    ranks: Ranks | None = None,
    relay: Relay | None = None,
) -> CaptureResult:
    """Capture one entry into the run directory `out`; skips what is complete unless `force`.

    tile_divisor: divides the lens tiles (after an out-of-memory error). stop: asked between batches; when it says True
    the capture ends with KeyboardInterrupt and leaves nothing behind. ranks: this process's place in a tensor-parallel group;
    all ranks call this with the same arguments, and rank 0 writes. relay: this worker's place among those that walk the layers
    in turn; only the last writes, the others' results hold what they hand over. Raises errors of capture.errors.
    """
    began = time.monotonic()
    report = progress or (lambda _: None)
    guarded = choose_device(entry) if entry.local_run.enabled else None  # before anything is downloaded or read
    report(Progress(entry.name, "open", message="resolving files"))
    resolved = resolve(entry)
    try:
        return _capture(entry, resolved, out, began, guarded, report, force=force, tile_divisor=tile_divisor, stop=stop,
                        ranks=ranks, relay=relay)  # fmt: skip
    finally:
        if resolved.source is not None:
            resolved.source.close()


def _capture(
    entry: Entry,
    resolved: Resolved,
    out: str,
    began: float,
    guarded: DeviceChoice | None,
    report: Callable[[Progress], None],
    *,
    force: bool,
    **more: Any,
) -> CaptureResult:
    run = RunDir(out)
    path = run.capture_path(entry.name, resolved.capture)
    before = run.marker(path)
    if not force and before is not None:
        broken = run.damage(entry.name, resolved.capture)
        if broken is None:
            log.info("complete already: %s", path)
            return _skipped(entry, resolved, path, began)
        log.warning("%s; capturing it anew", broken)
    choice = guarded or choose_device(entry)
    prompts = tokenize(entry, load_tokenizer(entry, resolved.tokenizer_dir))
    for owner, model in (("base", resolved.base), ("sft", resolved.sft)):
        if warning := other_ids(entry, prompts, owner, model.path, resolved.tokenizer_hash):
            log.warning(warning)
    from capture.ledger import own_garbage  # torch and transformers, from here on

    with own_garbage():  # around all that holds the models
        return _work(entry, resolved, run, choice, prompts, began, before, report, force=force, **more)


def _work(
    entry: Entry,
    resolved: Resolved,
    run: RunDir,
    choice: DeviceChoice,
    prompts: Prompts,
    began: float,
    before: dict[str, Any] | None,
    report: Callable[[Progress], None],
    *,
    force: bool,
    **more: Any,
) -> CaptureResult:
    """before: the marker of a capture that was there, or None."""
    from capture.work import Work

    path = run.capture_path(entry.name, resolved.capture)
    work = Work(
        entry,
        resolved,
        run,
        choice,
        prompts,
        report=report,
        force=force,
        **more,
    )
    work.seconds["resolve"] = time.monotonic() - began
    try:
        work.capture()
    except (OSError, StoreError):
        # another writer of the same capture may have been faster, and have cleared away what both had committed
        if not run.is_complete(entry.name, resolved.capture) or run.marker(path) == before:
            raise
        work.store.clear()  # of what this one committed since
        log.info("completed by another process meanwhile: %s", path)
        return _skipped(entry, resolved, path, began)
    return CaptureResult(
        pair=entry.name,
        capture=resolved.capture,
        path=path,
        state="complete",
        seconds=time.monotonic() - began,
        n_prompts=len(prompts.items),
        n_tokens=prompts.n_tokens,
        mode=", ".join(filter(None, (work.mode.mode, work.pair.models["base"].quantization.label))),
        device=choice.device,
        gpu=choice.name,
        peak_memory_bytes=work.peak_memory(),
        planned_memory_bytes=work.mode.need.peak,
        peak_bytes=dict(work.peaks.bytes),
        handover=work.handover,
    )


def _skipped(entry: Entry, resolved: Resolved, path: str, began: float) -> CaptureResult:
    seconds = time.monotonic() - began
    return CaptureResult(entry.name, resolved.capture, path, "skipped", seconds, 0, 0, "", "", "", 0, 0)
