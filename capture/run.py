"""Capture one pair: files -> prompts -> both models -> the walk -> tables.

`resolve` is light (no torch): it finds the files and the capture's id. `capture_pair` does the work; everything heavy is
imported inside it.
"""

from __future__ import annotations

import itertools
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capture import __version__
from capture.config import Entry
from capture.device import DeviceChoice, choose_device
from capture.errors import DeviceMemoryError, SelfCheckError, UnsupportedModelError
from capture.files import ModelFiles, resolve_model, resolve_tokenizer
from capture.identity import NUMERICS_VERSION, capture_id, tokenizer_hash
from capture.layout import RunDir
from capture.progress import Progress
from capture.prompts import Prompts, check_ids, load_tokenizer, tokenize, tracked_tokens
from capture.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from capture.batches import Batch
    from capture.checkpoint import Ledger, StreamedModel
    from capture.collector import Collector, LensPlan
    from capture.lockstep import Pair

log = logging.getLogger(__name__)

TOPK_BUDGET = 512 << 20  # bytes of top-k lists kept before they are written as a part of their own
RESIDENT_SHARE = 0.5  # mode auto keeps both models where they take less than this share of the free memory


@dataclass(frozen=True)
class Resolved:
    """An entry's files and its capture id. weight_bytes: of both checkpoints."""

    capture: str
    base: ModelFiles
    sft: ModelFiles
    tokenizer_dir: str
    tokenizer_hash: str

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


def resolve(entry: Entry, *, download: bool = True) -> Resolved:
    """Find the files of an entry, check them, and work out the capture's id.

    download: fetch what is missing from the hub; without it only directories and the hub's cache are looked at.
    """
    remote = bool(entry.model_kwargs.get("trust_remote_code"))
    token = entry.model_kwargs.get("token")

    def model(name: str, revision: str | None) -> ModelFiles:
        return resolve_model(
            name, revision, allow_pickle=entry.allow_pickle, download=download, trust_remote_code=remote, token=token
        )

    base = model(entry.base_model, entry.base_revision)
    same = (entry.base_model, entry.base_revision) == (entry.sft_model, entry.sft_revision)
    sft = base if same else model(entry.sft_model, entry.sft_revision)
    by_model = {entry.sft_model: entry.sft_revision, entry.base_model: entry.base_revision}
    revision = entry.tokenizer_kwargs.get("revision", by_model.get(entry.tokenizer))
    token = entry.tokenizer_kwargs.get("token", token)
    directory = resolve_tokenizer(entry.tokenizer, revision, download=download, token=token)
    digest = tokenizer_hash(directory)
    return Resolved(capture_id(entry, base, sft, digest), base, sft, directory, digest)


def capture_pair(
    entry: Entry,
    out: str,
    *,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
    tile_divisor: int = 1,
    stop: Callable[[], bool] | None = None,
) -> CaptureResult:
    """Capture one entry into the run directory `out`; skips what is complete unless `force`.

    tile_divisor: divides the lens tiles (after an out-of-memory error). stop: asked between batches; when it says True
    the capture ends with KeyboardInterrupt and leaves nothing behind. Raises errors of capture.errors.
    """
    began = time.monotonic()
    report = progress or (lambda _: None)
    report(Progress(entry.name, "open", message="resolving files"))
    resolved = resolve(entry)
    run = RunDir(out)
    path = run.capture_path(entry.name, resolved.capture)
    if not force and run.is_complete(entry.name, resolved.capture):
        log.info("complete already: %s", path)
        return CaptureResult(entry.name, resolved.capture, path, "skipped", time.monotonic() - began, 0, 0, "", "", "", 0, 0)
    choice = choose_device(entry)  # before anything heavy is loaded
    prompts = tokenize(entry, load_tokenizer(entry, resolved.tokenizer_dir))
    from torch import OutOfMemoryError

    try:
        return _Capture(entry, resolved, run, choice, prompts, report, tile_divisor, stop, began).work()
    except OutOfMemoryError as error:
        raise DeviceMemoryError(f"{choice.name} ran out of memory: {str(error).splitlines()[0]}") from error


class _Capture:
    """The steps of one capture, in order."""

    def __init__(
        self, entry: Entry, resolved: Resolved, run: RunDir, choice: DeviceChoice, prompts: Prompts,
        report: Callable[[Progress], None], tile_divisor: int, stop: Callable[[], bool] | None, began: float,
    ) -> None:  # fmt: skip
        import torch

        from capture.checkpoint import Ledger

        self.entry, self.resolved, self.run, self.choice, self.prompts = entry, resolved, run, choice, prompts
        self.report, self.tile_divisor, self.stop, self.began = report, tile_divisor, stop, began
        self.device = torch.device(choice.device)
        self.ledger: Ledger = Ledger()
        self.seconds: dict[str, float] = {}

    def work(self) -> CaptureResult:
        import torch

        from capture.batches import make_batches
        from capture.checkpoint import free_memory
        from capture.lockstep import Pair
        from capture.store import CaptureWriter

        entry = self.entry
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.tracked = tracked_tokens(entry, self._tokenizer())
        self.report(Progress(entry.name, "open", message="opening both models"))
        base, sft = self._open()
        sizes = {"base": base.embedding.weight.shape[0], "sft": sft.embedding.weight.shape[0]}
        check_ids(self.prompts, sizes, self.tracked)
        self.pair = pair = Pair(base, sft, entry.passes)
        self.mode, self.planned, why = _choose_mode(entry, base, sft, self.choice)
        log.info("mode %s: %s", self.mode, why)
        ids = [item.ids for item in self.prompts.items]
        self.batches = make_batches(ids, entry.batching, self.device, probe=entry.noise_floor)
        pair.begin(self.batches)
        self.checks = self._self_checks(pair)
        self.lens = self._lens_plan(base, sft)
        self.seconds["open"] = time.monotonic() - self.began
        writer = CaptureWriter(
            self.run, entry.name, self.resolved.capture, compression_level=entry.output.compression_level
        )
        try:
            collector = self._walk(pair, self.lens, writer)
            started = time.monotonic()
            self.report(Progress(entry.name, "write", pair.n_layers, pair.n_layers))
            self._write(writer, collector)
            self.seconds["write"] += time.monotonic() - started
            writer.finish(self._document(pair, collector, writer))
        finally:
            writer.discard()
            for model in (base, sft):
                for group in model.groups():
                    model.free(group)
            free_memory()
        return CaptureResult(
            pair=entry.name, capture=self.resolved.capture, path=writer.path, state="complete",
            seconds=time.monotonic() - self.began, n_prompts=len(self.prompts.items), n_tokens=self.prompts.n_tokens,
            mode=self.mode, device=self.choice.device, gpu=self.choice.name, peak_memory_bytes=self._peak(),
            planned_memory_bytes=self.planned,
        )  # fmt: skip

    # -- opening -------------------------------------------------------------------------------------------------------

    def _tokenizer(self) -> Any:
        return load_tokenizer(self.entry, self.resolved.tokenizer_dir)

    def _open(self) -> tuple[StreamedModel, StreamedModel]:
        from capture.checkpoint import StreamedModel

        def opened(label: str, files: ModelFiles) -> StreamedModel:
            kwargs = {k: v for k, v in self.entry.model_kwargs.items() if k not in ("token", "revision")}
            return StreamedModel(
                files.path, label=label, dtype=self.entry.dtype, device=self.device, model_kwargs=kwargs, ledger=self.ledger
            )

        base = opened("base", self.resolved.base)
        same = self.resolved.base.revision == self.resolved.sft.revision
        sft = base if same else opened("sft", self.resolved.sft)
        check_comparable(base, sft)
        return base, sft

    def _lens_plan(self, base: StreamedModel, sft: StreamedModel) -> LensPlan:
        from capture.collector import CELLS_IN_CACHE, TILE_BYTES, LensPlan, plan_lens_layers

        entry = self.entry
        n_vocab = min(base.head.weight.shape[0], sft.head.weight.shape[0])
        cuda = self.device.type == "cuda"
        return LensPlan(
            layers=plan_lens_layers(entry.lens.layers, entry.lens.enabled, base.n_layers),
            final_norm=entry.lens.norm == "final",
            n_vocab=n_vocab,
            n_tokens=min(n_vocab, len(self._tokenizer())),
            top_k=entry.top_k,
            keep_topk=entry.output.topk,
            tracked=tuple(t[0] for t in self.tracked),
            tile_bytes=TILE_BYTES["cuda" if cuda else "cpu"] // self.tile_divisor,
            rows=max(1, CELLS_IN_CACHE * (64 if cuda else 1) // n_vocab),
        )

    def _self_checks(self, pair: Pair) -> dict[str, Any]:
        from capture.replay import run_tail
        from capture.selfcheck import replay_check
        from capture.unembed import check_against_model

        found: dict[str, Any] = {}
        for owner, model in pair.models.items():
            if owner == "sft" and model is pair.models["base"]:
                continue
            found[f"{owner}_replay"] = replay_check(model)
            if owner in pair.tails:
                rows = self.batches[0].rows(pair.states[0][0])[:8]
                found[f"{owner}_logits_relative_error"] = check_against_model(model, run_tail(pair.tails[owner], rows))
        return found

    # -- the walk ------------------------------------------------------------------------------------------------------

    def _walk(self, pair: Pair, lens: LensPlan, writer: Any) -> Collector:
        from capture.collector import Collector
        from capture.tables import Rows

        ids = [item.ids for item in self.prompts.items]
        collector = Collector(
            pair, self.batches, [len(i) for i in ids], ids, self.entry.passes, self.entry.comparisons, lens
        )
        self.rows = Rows(self.entry.name, self.resolved.capture, self.prompts.items, collector)
        self.parts = 0
        self.seconds["write"] = 0.0
        started = time.monotonic()
        last = len(self.batches) - 1
        for state in pair.walk(streamed=self.mode == "streamed", stop=self.stop):
            collector.take(state)
            if state.batch == last:
                written = time.monotonic()
                if collector.topk_bytes() > TOPK_BUDGET:
                    self._write_lists(writer, collector)
                self.seconds["write"] += time.monotonic() - written
                self._tell(state.layer, pair.n_layers, started)
        self.seconds["walk"] = time.monotonic() - started - self.seconds["write"]
        return collector

    def _tell(self, layer: int, n_layers: int, started: float) -> None:
        done = min(layer + 1, n_layers)
        elapsed = time.monotonic() - started
        speed = self.prompts.n_tokens * done / n_layers / elapsed if done and elapsed else None
        left = elapsed / done * (n_layers - done) if done else None
        self.report(Progress(self.entry.name, "layers", done, n_layers, speed, left))

    # -- writing -------------------------------------------------------------------------------------------------------

    def _write_lists(self, writer: Any, collector: Collector) -> None:
        layers = sorted(collector.topk)
        if layers:
            for table in ("runs_topk", "pairwise_topk"):
                writer.table(table, self.rows.lists(table, layers), self.parts)
            self.parts += 1
            collector.topk.clear()

    def _write(self, writer: Any, collector: Collector) -> None:
        _check_zeros(self.resolved, collector)
        self._write_lists(writer, collector)
        for table in ("runs", "pairwise"):
            writer.table(table, self.rows.scalars(table))
        writer.table("prompts", self.rows.prompts())
        writer.table("tokens", self.rows.tokens(dict(self.prompts.tokens), set(self.prompts.special_ids)))
        if self.tracked:
            writer.table("tracked_tokens", self.rows.tracked_tokens(self.tracked))

    def _peak(self) -> int:
        import torch

        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return self.ledger.peak

    def _document(self, pair: Pair, collector: Collector, writer: Any) -> dict[str, Any]:
        import torch
        import transformers

        base, sft = pair.models["base"], pair.models["sft"]
        if collector.nonfinite:
            log.warning("%d lens rows are not finite (overflow in %s?)", collector.nonfinite, base.model.dtype)
        return {
            "schema_version": SCHEMA_VERSION,
            "numerics_version": NUMERICS_VERSION,
            "pair": self.entry.name,
            "capture": self.resolved.capture,
            "config": self.entry.as_json(),
            "models": {
                owner: {"model": name, "revision": files.revision, "class": type(model.model).__name__,
                        "weight_bytes": files.weight_bytes, "ignored_keys": len(model.ignored_keys)}
                for owner, name, files, model in (
                    ("base", self.entry.base_model, self.resolved.base, base),
                    ("sft", self.entry.sft_model, self.resolved.sft, sft))
            },
            "tokenizer": {"name": self.entry.tokenizer, "hash": self.resolved.tokenizer_hash},
            "n_layers": pair.n_layers,
            "hidden_size": base.config.hidden_size,
            "n_prompts": len(self.prompts.items),
            "n_tokens": self.prompts.n_tokens,
            "trimmed_to": self.prompts.trimmed_to,
            "passes": [p.name for p in self.entry.passes],
            "comparisons": [c.name for c in self.entry.comparisons],
            "embedding_variants": self.entry.embedding_variants,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "attention": base.model.config._attn_implementation,
            "lens": {"layers": sorted(self.lens.layers), "norm": self.entry.lens.norm, "n_vocab": self.lens.n_vocab,
                     "n_tokens": self.lens.n_tokens, "top_k": self.lens.top_k,
                     "left_out_mass": collector.left_out_mass},
            "numerics": {"residual_statistics": "float64", "logits": "float32 from upcast operands",
                         "lens_statistics": "float32 terms, float64 from row sums on",
                         "nonfinite_lens_rows": collector.nonfinite},
            "halvings": {"same_embeddings": pair.same_embeddings, "same_first_layers": pair.shared_layers,
                         "same_final_norm": pair.same_tail, "same_unembedding": pair.same_head},
            "batches": [{"prompts": len(b.items), "tokens": int(b.ids_BT.shape[1]), "items": list(b.items)}
                        for b in self.batches if not b.probe],
            "passes_share_a_batch": pair.stacked,
            "noise_floor": _noise(self.batches, collector),
            "self_checks": self.checks,
            "mode": self.mode,
            "device": self.choice.device,
            "gpu": self.choice.name,
            "seconds": {k: round(v, 3) for k, v in self.seconds.items()},
            "bytes": {"checkpoints_read": self.ledger.read_bytes, "weights_peak": self.ledger.peak,
                      "tables": sum(f["bytes"] for f in writer.files)},
            "peak_memory_bytes": self._peak(),
            "planned_memory_bytes": self.planned,
            "versions": {"pairscope": __version__, "python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__},
        }  # fmt: skip


def check_comparable(base: StreamedModel, sft: StreamedModel) -> None:
    """Raise UnsupportedModelError unless two models can be compared layer by layer."""
    facts = (
        ("architecture", type(base.model).__name__, type(sft.model).__name__),
        ("number of layers", base.n_layers, sft.n_layers),
        ("hidden size", base.config.hidden_size, sft.config.hidden_size),
        ("dtype", base.model.dtype, sft.model.dtype),
    )
    for what, a, b in facts:
        if a != b:
            hint = "; set dtype in the config" if what == "dtype" else ""
            raise UnsupportedModelError(f"base and sft differ in {what}: {a} against {b}{hint}")


def _choose_mode(entry: Entry, base: StreamedModel, sft: StreamedModel, choice: DeviceChoice) -> tuple[str, int, str]:
    """Mode, the bytes of weights that it keeps at most, and why. Both modes give the same numbers."""
    from capture.checkpoint import EMBEDDING, HEAD, REST

    models = [base] if base is sft else [base, sft]
    ends = sum(m.group_bytes(g) for m in models for g in (EMBEDDING, HEAD, REST))
    layers = [sum(sizes) for sizes in zip(*(m.layer_bytes() for m in models), strict=True)]
    two = max((a + b for a, b in itertools.pairwise(layers)), default=layers[0])
    need = {"resident": ends + sum(layers), "streamed": ends + two}
    gib = {k: f"{v / 2**30:.2f} GiB" for k, v in need.items()}
    if entry.mode != "auto":
        mode, why = entry.mode, f"asked for; {gib[entry.mode]} of weights"
    elif need["resident"] <= RESIDENT_SHARE * choice.free_bytes:
        mode, why = "resident", f"both models take {gib['resident']} of {choice.free_bytes / 2**30:.1f} GiB free"
    else:
        mode, why = "streamed", (
            f"both models would take {gib['resident']}, {choice.free_bytes / 2**30:.1f} GiB are free; two layers of each "
            f"and the ends take {gib['streamed']}"
        )
    if need[mode] > choice.free_bytes:
        raise DeviceMemoryError(
            f"mode {mode} needs {gib[mode]} for weights alone, {choice.free_bytes / 2**30:.2f} GiB are free on {choice.name}"
            + ("; set mode: streamed" if mode == "resident" and need["streamed"] <= choice.free_bytes else "")
        )
    return mode, need[mode], why


def _check_zeros(resolved: Resolved, collector: Collector) -> None:
    """A checkpoint compared with itself must differ by exactly nothing."""
    import numpy as np

    if resolved.base.revision != resolved.sft.revision:
        return
    for metric in ("norm_diff", "cosine_distance", "kl_divergence", "kl_reverse"):
        worst = float(np.nanmax(np.nan_to_num(collector.pairwise[metric], nan=0.0), initial=0.0))
        if worst != 0.0:
            raise SelfCheckError(f"base and sft are the same checkpoint, yet {metric} reaches {worst:.3g}")


def _noise(batches: list[Batch], collector: Collector) -> dict[str, Any]:
    """What running one prompt alone, instead of in its batch, changes: the floor below which a difference means nothing."""
    if not batches[-1].probe:
        return {"measured": False, "why": "every batch holds one prompt, or noise_floor is off"}
    worst: dict[str, float] = {}
    for metrics in collector.noise.values():
        for name, values in metrics.items():
            worst[name] = max(worst.get(name, 0.0), max(values))
    return {"measured": True, "item": batches[-1].items[0], "largest": worst, "by_run_and_layer": collector.noise}
