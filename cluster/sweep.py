"""A sweep, from a config's entries to a summary: skips what is complete, refuses what cannot run, sends the rest through Ray."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from capture.attempt import WORK, check_output, find, record_failure
from capture.config import Config, Entry
from capture.degrees import check_degree, check_spans
from capture.device import choose_device
from capture.errors import CheckpointError, ConfigError, DeviceError, PairscopeError, StoreError
from capture.fields import near
from capture.layout import RunDir
from capture.manifest import settle_lost
from capture.show import Show
from capture.stop import Stop
from cluster.connect import Cluster, connected, running_elsewhere
from cluster.resources import cpu_memory, gpus_wanted, refusal, request, sizing

RESOLVE = "capture.run:resolve"  # module:function; finds the capture id and the bytes of weights, without torch
DONE = ("complete", "skipped")


@dataclass
class Item:
    """One entry of a sweep and where it stands.

    state: planned, skipped (was complete before), complete, failed, interrupted, or not started (after a stop).
    """

    name: str
    entry: Entry | None = None
    capture: str | None = None
    weight_bytes: int | None = None
    state: str = "planned"
    row: dict[str, Any] = field(default_factory=dict)
    bug: bool = False
    broken: str | None = None  # what is wrong with the capture that is there

    def as_dict(self) -> dict[str, Any]:
        """One row of the summary, of `--json` and of `--dry-run`."""
        keys = (
            "seconds",
            "n_prompts",
            "n_tokens",
            "mode",
            "gpu",
            "node",
            "peak_memory_bytes",
            "dollars",
            "error_class",
            "error",
            "log",
        )
        return {"entry": self.name, "state": self.state, "capture": self.capture} | {k: self.row.get(k) for k in keys}


@dataclass(frozen=True)
class Summary:
    """What a sweep did. exit_code: 0 all complete, 1 some not, 128 + signal after a stop."""

    out: str
    items: tuple[Item, ...]
    exit_code: int
    ray_used: bool = False

    @property
    def complete(self) -> int:
        return sum(i.state in DONE for i in self.items)

    @property
    def failed(self) -> list[Item]:
        return [i for i in self.items if i.state == "failed"]


def choose(config: Config, names: Sequence[str]) -> list[tuple[str, Entry | ConfigError]]:
    """The entries asked for, in the config's order; all of them where none is named. Raises ConfigError for a wrong name."""
    checked = config.checked_entries()
    known = [name for name, _ in checked]
    for name in names:
        if name not in known:
            raise ConfigError(f"--entries: no entry '{name}'{near(name, known)}; {config.path} has {', '.join(known)}")
    return [(name, entry) for name, entry in checked if not names or name in names]


def plan(
    checked: Sequence[tuple[str, Entry | ConfigError]],
    run: RunDir,
    *,
    force: bool,
    resolve: str = RESOLVE,
    record: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> list[Item]:
    """Find out what each entry's capture is called and whether it is complete. No Ray, no download, no model is loaded.

    A hub model counts as the revision that is in this machine's cache; where there is none, the id stays unknown. An entry that cannot be resolved is failed, with a manifest row and a log where `record`.
    """
    resolver = find(resolve)

    def one(name: str, entry: Entry | ConfigError) -> Item | PairscopeError:
        if isinstance(entry, ConfigError):
            return entry
        if stop():
            return Item(name, entry)
        try:
            if entry.local_run.enabled:  # it names this machine's own GPU: told now, with its own reason
                choose_device(entry)
            resolved = resolver(entry, download=False)
            if entry.tensor_parallel not in (1, "auto"):  # told now, before a place with so many GPUs is asked for
                for label, files in (("base", resolved.base), ("sft", resolved.sft)):
                    degree = int(entry.tensor_parallel)
                    check_degree(files.path, degree, label, whole_attention=entry.replicate_attention)
            if entry.spans.workers > 1:
                check_spans(resolved.base.path, entry.spans.workers)
        except PairscopeError as error:
            on_hub = not all(os.path.isdir(m) for m in (entry.base_model, entry.sft_model, entry.tokenizer))
            # what is not in this machine's cache is downloaded, and judged, by the worker
            return Item(name, entry) if on_hub and isinstance(error, CheckpointError) else error
        except Exception:
            # a bug, and no reason to end the others: the worker meets it as well, with a log to write it in
            return Item(name, entry)
        item = Item(name, entry, resolved.capture, resolved.weight_bytes)
        if not force and run.marker(run.capture_path(name, resolved.capture)) is not None:
            item.broken = run.damage(name, resolved.capture)
            item.state = "planned" if item.broken else "skipped"
        return item

    with ThreadPoolExecutor(
        max_workers=8
    ) as pool:  # a hub answers each entry in its own time; files are hashed without the GIL
        found = list(pool.map(lambda pair: one(*pair), checked))
    items = []
    for (name, entry), item in zip(checked, found, strict=True):
        if isinstance(item, PairscopeError):
            known = entry if isinstance(entry, Entry) else None
            items.append(_failed(run, Item(name, known), item, record))
        else:
            items.append(item)
    return items


def _failed(run: RunDir, item: Item, error: PairscopeError, record: bool = True) -> Item:
    item.state = "failed"
    if record:
        item.row = record_failure(run, item.name, error)
    else:
        item.row = {"error_class": type(error).__name__, "error": str(error)}
    return item


def run_sweep(
    checked: Sequence[tuple[str, Entry | ConfigError]],
    out: str,
    *,
    force: bool = False,
    jobs: int | None = None,
    show: Show | None = None,
    work: str = WORK,
    resolve: str = RESOLVE,
    cpus: int | None = None,
    place_within: float | None = None,
) -> Summary:
    """Capture all entries into the run directory `out`; one entry's failure never ends the others.

    checked: as Config.checked_entries() gives it. jobs: entries at a time. cpus: cores of a Ray of our own (tests).
    place_within: seconds that an entry waits for a place while nothing else of the sweep is at work (cluster/placing.py).
    Raises StoreError where the output cannot be used and ClusterError where no Ray can be had; both before any work.
    """
    run = RunDir(out)
    check_output(run)
    show = show or Show()
    with show, Stop(show.note) as stop:
        try:
            items = plan(checked, run, force=force, resolve=resolve, stop=stop.requested)
        except KeyboardInterrupt:  # the second Ctrl-C, while files were being hashed
            items = [Item(name, state="not started") for name, _ in checked]
        for item in items:
            if item.state == "failed":
                show.event(item.name, f"failed: {item.row['error_class']}: {item.row['error']}")
            elif item.broken:
                show.event(item.name, f"{item.broken}; it is captured anew")
        todo = _with_packages([i for i in items if i.state == "planned"], run, show)
        if todo and not stop.requested():
            skipped = sum(i.state == "skipped" for i in items)
            if skipped:
                show.note(f"{skipped} of {len(items)} complete already, {len(todo)} to do")
            _through_ray(
                todo, run, force=force, jobs=jobs, show=show, work=work, stop=stop, cpus=cpus, place_within=place_within
            )
        for item in todo:
            if item.state == "planned":
                item.state = "not started"
        with contextlib.suppress(StoreError):  # a record of the work; it must not end it
            settle_lost(run)
    if stop.requested() and any(i.state in ("interrupted", "not started") for i in items):
        code = stop.exit_code
    else:
        code = 0 if all(i.state in DONE for i in items) else 1
    return Summary(run.out, tuple(items), code, ray_used=bool(todo))


def _through_ray(
    todo: list[Item], run: RunDir, *, force: bool, jobs: int | None, show: Show, work: str, stop: Stop, cpus: int | None,
    place_within: float | None,
) -> None:  # fmt: skip
    elsewhere = running_elsewhere()
    if elsewhere:
        show.note(f"starting a Ray of our own; to use the one that runs at {elsewhere}, set RAY_ADDRESS=auto")
    try:
        with connected(cpus) as cluster:
            from cluster.deliver import at_head
            from cluster.job import Job
            from cluster.loop import Loop
            from cluster.prepare import hub_models

            stop.install()  # Ray puts a handler of its own on SIGTERM

            todo = _with_degrees(todo, cluster, run, show)
            ready: list[tuple[Item, Job]] = []
            for item, wanted in zip(todo, _requests(todo, cluster, jobs, show), strict=True):
                assert item.entry is not None
                reason = refusal(wanted, cluster.nodes, growing=cluster.growing, types=cluster.types)
                if reason is None:
                    ready.append((item, Job(item.entry, wanted, item.capture)))
                else:
                    _failed(
                        run, item, DeviceError(f"entry '{item.name}' {reason}; change gpus, accelerator_type or device")
                    )
                    show.event(item.name, f"failed: {item.row['error']}")
            on_hub = work == WORK and any(hub_models(job.entry) for _, job in ready)
            with at_head(run, cluster, hub=on_hub) as out:
                loop = Loop(
                    run, out, force=force, work=work, jobs=jobs, show=show, stop=stop, growing=cluster.growing,
                    place_within=place_within,
                )  # fmt: skip
                loop.run([job for _, job in ready])
            for item, job in ready:
                if job.outcome is not None and job.row is not None:
                    item.state, item.row, item.bug = job.outcome.state, job.row, job.outcome.bug
                    item.capture = item.row["capture"] or item.capture
    except KeyboardInterrupt:
        stop.signal = stop.signal or signal.SIGINT  # pressed while Ray was starting, or a second time
    except SystemExit:  # of Ray's own handlers of SIGTERM, which it has from the start of its start until ours is back
        stop.signal = stop.signal or signal.SIGTERM


def _with_packages(todo: list[Item], run: RunDir, show: Show) -> list[Item]:
    """Leave out entries whose quantization needs a package that is not here, nor on nodes, which were set up alike: a worker finds
    out once it has downloaded the weights."""
    from capture.quantize import check_installed

    found = []
    for item in todo:
        try:
            check_installed(item.entry.model_kwargs if item.entry is not None else {})
        except PairscopeError as error:
            _failed(run, item, error)
            show.event(item.name, f"failed: {item.row['error_class']}: {item.row['error']}")
        else:
            found.append(item)
    return found


def _with_degrees(todo: list[Item], cluster: Cluster, run: RunDir, show: Show) -> list[Item]:
    """Find a number for `tensor_parallel: auto`; an entry for which there is none is failed and left out."""
    found, models = [], None
    for item in todo:
        if item.entry is None or item.entry.tensor_parallel != "auto":
            found.append(item)
            continue
        from cluster.degree import with_degree
        from cluster.plan_models import Models

        models = models or Models()
        try:
            item.entry, why = with_degree(item.entry, cluster, models)
        except PairscopeError as error:
            _failed(run, item, error)
            show.event(item.name, f"failed: {item.row['error_class']}: {item.row['error']}")
            continue
        show.event(item.name, why)
        found.append(item)
    return found


def _requests(todo: list[Item], cluster: Cluster, jobs: int | None, show: Show) -> list[Any]:
    entries = [i.entry for i in todo if i.entry is not None]
    on_cpu = [e for e in entries if gpus_wanted(e, cluster.has_gpus) == 0]
    at_a_time = len(on_cpu) + sum(e.spans.workers > 1 for e in on_cpu)  # the next span's worker gets ready meanwhile
    sized = sizing(max(1, at_a_time), jobs, cluster.nodes)
    requests = [
        request(
            item.entry,
            cluster_has_gpus=cluster.has_gpus,
            sized=sized,
            memory_bytes=cpu_memory((item.weight_bytes or 0) // item.entry.spans.workers, cluster.nodes, jobs),
            visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES") if cluster.local else None,
        )
        for item in todo
        if item.entry is not None
    ]
    total = {name: sum(n.get(name, 0.0) for n in cluster.nodes) for name in ("CPU", "GPU", "memory")}
    kind = "a local Ray" if cluster.local else f"a Ray cluster of {_count(len(cluster.nodes), 'node')}"
    each = sorted({r.text for r in requests})
    show.note(
        f"{_count(len(todo), 'entry', 'entries')} on {kind} with {_count(int(total['CPU']), 'core')}, "
        f"{_count(int(total['GPU']), 'GPU')}, {total['memory'] / 1024**3:.1f} GiB; each asks for {' or '.join(each)}"
    )
    return requests


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"
