"""The work of one capture, in order: open both models, check them, walk them in lockstep, write the tables."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from capture.batches import make_batches
from capture.checkpoint import StreamedModel
from capture.collector import Collector
from capture.comparable import check_comparable, check_lengths
from capture.config import Entry
from capture.device import DeviceChoice
from capture.document import document
from capture.errors import CheckpointError, ConfigError, DeviceMemoryError, SelfCheckError, UnsupportedModelError
from capture.files import ModelFiles
from capture.group import ALONE, join_group, leave_group
from capture.layout import RunDir
from capture.ledger import Ledger
from capture.lens_kernel import Kernel, load_fused, load_kernel
from capture.lens_plan import TILE_BYTES, LensPlan, layers_at_once, plan_layers, statistics_rows
from capture.lens_sums import FUSED_SLOTS, Fused
from capture.loader import AHEAD_LAYERS
from capture.lockstep import Pair
from capture.measure import Measure
from capture.memory import ModeChoice, Promise
from capture.parts import Split
from capture.peaks import Peaks
from capture.progress import Progress
from capture.prompts import Prompts, check_ids, count_ids, load_tokenizer, token_texts, tracked_tokens
from capture.ranks import Ranks
from capture.relay import Handover, Relay
from capture.replay import calls_hold_states, run_tail
from capture.run import Resolved
from capture.selfcheck import replay_check
from capture.spans import SpanStore
from capture.spanwalk import ALONE as ALONE_RELAY
from capture.spanwalk import SpanWalk, layers_of
from capture.spectrum import Spectra
from capture.store import CaptureWriter
from capture.tables import Rows
from capture.topk import Vocabulary
from capture.unembed import check_against_model
from capture.upload import upload_to

log = logging.getLogger(__name__)

LIKELY_RESIDENT = (
    5  # layers of one model that are less than this part of what is free stay in memory: both are less than a half
)


class Work:
    """One capture from its resolved files to its tables; what it found stays readable for the record of it."""

    def __init__(
        self,
        entry: Entry,
        resolved: Resolved,
        run: RunDir,
        device: DeviceChoice,
        prompts: Prompts,
        *,
        report: Callable[[Progress], None],
        tile_divisor: int = 1,
        stop: Callable[[], bool] | None = None,
        ranks: Ranks | None = None,
        relay: Relay | None = None,
        force: bool = False,
    ) -> None:
        self.force, self.ranks, self.relay = force, ranks or Ranks(), relay or ALONE_RELAY
        self.group = ALONE
        self.entry, self.resolved, self.run, self.choice, self.prompts = entry, resolved, run, device, prompts
        self.report, self.tile_divisor, self.stop = report, tile_divisor, stop
        self.device = torch.device(device.device)
        self.source = resolved.source if resolved.base.remote or resolved.sft.remote else None
        self.ledger = Ledger()
        self.upload = upload_to(self.device)
        self.peaks = Peaks(self.device, self.ledger)
        self.seconds: dict[str, float] = {}
        self.mode: ModeChoice
        self.mapping: list[threading.Thread] = []
        self.handover: Handover | None = None  # where others walk the layers behind this worker's
        self.store = SpanStore(run, run.capture_path(entry.name, resolved.capture))

    def capture(self) -> None:
        """Do it. Raises errors of capture.errors; KeyboardInterrupt where `stop` said so. Leaves no partial tables."""
        try:
            self.group = join_group(self.ranks, self.device, whole_attention=self.entry.replicate_attention)
            self._capture()
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(f"{self.choice.name} ran out of memory: {str(error).splitlines()[0]}") from error
        finally:
            for thread in self.mapping:
                thread.join()
            leave_group(self.group)

    def _capture(self) -> None:
        started = time.monotonic()
        self._open()
        entry = self.entry
        self.seconds["open"] = time.monotonic() - started
        writer = None
        if self.group.rank == 0 and self.relay.is_last:  # every rank has the same numbers; one writes them
            level = entry.output.compression_level
            writer = CaptureWriter(self.run, entry.name, self.resolved.capture, compression_level=level)
        try:
            self._walk()
            self._check_zeros()
            if self.source is not None:
                try:
                    self.source.finish()
                except CheckpointError:  # what was committed was computed from other bytes than the hub's
                    self.store.clear()
                    raise
            if self.group.rank == 0 and not self.relay.is_last:
                self.handover = self.course.hand_over(self.mode.mode)
            self.peaks.begin("write")
            if writer is not None:
                started = time.monotonic()
                self.report(Progress(entry.name, "write", self.pair.n_layers, self.pair.n_layers, here=True))
                self._write(writer)
                self.seconds["write"] += time.monotonic() - started
                self.peaks.begin("write")
                writer.finish(document(self, writer.files), keep=not self.force)
                self.store.clear()
        finally:
            if writer is not None:
                writer.discard()
            self.pair.close()

    def peak_memory(self) -> int:
        """Bytes: peak of the allocator on CUDA, peak of live weights on the CPU (where activations are not counted)."""
        return self.peaks.all()

    # -- opening -------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        entry = self.entry
        self.report(Progress(entry.name, "open", message="opening both models", here=self.source is None))
        self.tokenizer = load_tokenizer(entry, self.resolved.tokenizer_dir)
        n_ids = count_ids(self.tokenizer)
        self.tracked = tracked_tokens(entry, self.tokenizer, n_ids)
        self._open_source()
        base = self._model("base", self.resolved.base)
        same = self.resolved.base.revision == self.resolved.sft.revision
        sft = base if same else self._model("sft", self.resolved.sft)
        check_comparable(base, sft)
        sizes = {"base": base.n_embeddings, "sft": sft.n_embeddings}
        check_ids(self.prompts, sizes, self.tracked)
        for model in (base, sft):
            check_lengths(model, self.prompts.longest)
        self.pair = Pair(base, sft, entry.passes)
        self.ids = [item.ids for item in self.prompts.items]
        self.batches = make_batches(self.ids, entry.batching, self.device, probe=entry.noise_floor)
        self.layers = plan_layers(entry.layers, base.n_layers, "layers")
        self.lens = self._lens_plan(base, sft, n_ids)
        self.mode = self._choose_mode()
        self.lens.tile_bytes = self.mode.tile_bytes
        self.pair.begin(self.batches, mode=self.mode.mode, spill=self.mode.spill)
        for b, batch in enumerate(self.batches):
            if self.mode.parts > 1 and len(batch.items) > 1:
                self.pair.parts.split(Split(0, b, min(self.mode.parts, len(batch.items))))
        self.checks = self._self_checks()

    def _choose_mode(self) -> ModeChoice:
        """Compare what each mode needs with what is free, before anything large is loaded."""
        entry, pair = self.entry, self.pair
        first, last = layers_of(pair, self.relay, self.lens.layers_at_once)
        promise = Promise(entry, pair.unique(), self.choice, range(max(first, 0), last + 1))
        spectra = len(entry.comparisons) if entry.spectrum else 0
        measure = Measure(pair, self.batches, self.lens, entry.passes, len(entry.comparisons), spectra)
        whole = self.group.size > 1 or any(calls_hold_states(pair.models[o]) for o in pair.owners)
        most = 1 if whole else max(len(b.items) for b in self.batches)
        choice = promise.choose(measure.activations, self.lens.tile_bytes, most)
        log.info("mode %s: %s", choice.mode, choice.why)
        return choice

    def _open_source(self) -> None:
        """Weights that come from the hub wait in memory until they are used; where that is the device's, so much less is free."""
        if self.source is None:
            return
        on_host = self.device.type == "cpu"
        window = self.source.open(self.choice.free_bytes // 8 if on_host else None, pin=not on_host)
        if on_host:
            self.choice = replace(self.choice, free_bytes=self.choice.free_bytes - window)

    def _model(self, label: str, files: ModelFiles) -> StreamedModel:
        kwargs = {k: v for k, v in self.entry.model_kwargs.items() if k not in ("token", "revision")}
        model = StreamedModel(
            files.path,
            label=label,
            dtype=self.entry.dtype,
            device=self.device,
            model_kwargs=kwargs,
            ledger=self.ledger,
            whole=files.format == "pickle",
            group=self.group,
            source=self.resolved.source if files.remote else None,
            upload=self.upload,
        )
        if self.entry.mode != "sub-layer":  # else the ends are read by rows, and layers matrix by matrix
            model.announce_first(layer=self.relay.index == 0)
        self._map_ahead(model)
        return model

    def _map_ahead(self, model: StreamedModel) -> None:
        """Layers that are in the system's memory, while all else is opened: that takes one core, and their mapping another. Layers
        that come leaf by leaf are no views."""
        likely = sum(model.layer_bytes()) <= self.choice.free_bytes // LIKELY_RESIDENT
        alone = self.relay.is_last and self.relay.index == 0
        if self.entry.mode == "sub-layer" or not alone:
            return
        stay = likely and self.entry.mode in ("auto", "resident")
        if (thread := model.map_ahead(stay=stay)) is not None:
            self.mapping.append(thread)

    def _lens_plan(self, base: StreamedModel, sft: StreamedModel, n_tokens: int) -> LensPlan:
        lens = self.entry.lens
        sizes = [m.head_weight.shape[0] for m in (base, sft)]
        n_vocab, n_tokens = min(sizes), min(*sizes, n_tokens)
        first, shard, _ = base.head_shard()
        if sizes[0] != sizes[1] and self.group.size > 1:
            raise UnsupportedModelError(
                f"the vocabularies have {sizes[0]} and {sizes[1]} rows; ranks of a tensor-parallel group would hold different "
                "shards of them: set tensor_parallel: 1"
            )
        mine = max(0, min(n_tokens - first, shard.shape[0]))
        cuda = self.device.type == "cuda"
        share = -(-sizes[0] // self.group.size)  # ranks, whose shares may differ by a row, take the same rows together
        rows, at_once = statistics_rows(share, on_cpu=not cuda, alone=self.group.size == 1)
        layers = self.layers & plan_layers(lens.layers, base.n_layers, "lens.layers")
        # two lists were compared when the config was read; n for every n-th could not be
        if lens.enabled and not layers:
            raise ConfigError(
                f"residual_compare.lens.layers, {lens.layers}, and layers, {self.entry.layers}, have none of this model's layers, -1 to "
                f"{base.n_layers}, in common; name layers that are in both, or set lens.enabled to false"
            )
        return LensPlan(
            layers=layers if lens.enabled else frozenset(),
            final_norm=lens.norm == "final",
            n_vocab=n_vocab,
            n_tokens=n_tokens,
            top_k=self.entry.top_k,
            vocabulary=Vocabulary(mine, min(self.entry.top_k, n_tokens), first, self.group),
            keep_topk=self.entry.output.topk,
            tracked=tuple(t[0] for t in self.tracked),
            tile_bytes=TILE_BYTES["cuda" if cuda else "cpu"] // self.tile_divisor,
            rows=rows,
            at_once=at_once,
            compiled=self._compiled(),
            layers_at_once=layers_at_once(
                sum(map(len, self.ids)),
                base.n_layers,
                max(base.layer_bytes()),
                4 * n_vocab * base.config.hidden_size,
                alone=self.group.size == 1,
            ),
        )

    def _compiled(self) -> Kernel | Fused | str:
        """The compiled way of the lens, or why it is not taken. Raises ConfigError where it is asked for and cannot be had."""
        asked = self.entry.lens.compile
        if asked is False:
            return "lens.compile is false"
        found: Kernel | Fused | str
        if self.device.type != "cpu":
            found = load_fused(self.device) if self.entry.lens.enabled else "lens.enabled is false"
            if len(self.entry.passes) > FUSED_SLOTS and not isinstance(found, str):
                found = f"the kernels take {FUSED_SLOTS} passes at most"
            if not self.group.all(not isinstance(found, str), self.device) and not isinstance(found, str):
                found = "another rank cannot"  # they reduce over the vocabulary together
        elif self.group.size > 1:
            found = "the vocabulary is shared by ranks"
        else:
            found = load_kernel()
        if isinstance(found, str) and self.entry.lens.enabled:
            if asked is True:
                raise ConfigError(f"lens.compile is true, but {found}; lens.compile: auto does without")
            log.info("the lens is not compiled: %s", found)
        return found

    def _self_checks(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for owner, model in self.pair.models.items():
            if owner == "sft" and model is self.pair.models["base"]:
                continue
            found[f"{owner}_replay"] = replay_check(model)
            if owner in self.pair.tails:
                state = self.pair.home.get(self.pair.states[0][:1])[0]
                rows = self.batches[0].rows(state)[:8]
                error = check_against_model(model, run_tail(self.pair.tails[owner], rows))
                found[f"{owner}_logits_relative_error"] = error
        return found

    # -- the walk ------------------------------------------------------------------------------------------------------

    def _walk(self) -> None:
        entry, pair = self.entry, self.pair
        lengths = [len(i) for i in self.ids]
        self.collector = Collector(
            pair, self.batches, lengths, self.ids, entry.passes, entry.comparisons, self.lens, self._spectra(),
            self.layers, self.peaks.begin,
        )  # fmt: skip
        self.peaks.begin("layers")
        self.rows = Rows(
            entry.name, self.resolved.capture, self.prompts.items, self.collector,
            rounded=entry.output.topk_values == "float16",
        )  # fmt: skip
        self.course = SpanWalk(
            entry,
            pair,
            self.collector,
            self.store,
            relay=self.relay,
            group=self.group,
            ledger=self.ledger,
            force=self.force,
        )
        start = self.course.begin(self.mode.mode, self.device, self.stop)
        started = time.monotonic()
        if start <= self.course.last:
            for state in pair.walk(stop=self.stop, start=start, last=self.course.last):
                self.collector.take(state)
                if state.batch == len(self.batches) - 1:
                    if self.course.due(state.layer):
                        self.course.commit(state)
                    self._tell(state.layer, start, started)
            self.collector.finish()
        self.seconds["write"] = self.course.write_seconds
        self.seconds["walk"] = time.monotonic() - started - self.seconds["write"]
        if self.collector.nonfinite:
            log.warning(
                "%d rows of logits are not finite, and have no entropy and no KL: an overflow in %s, or a head that masks ids?",
                self.collector.nonfinite,
                pair.models["base"].model.dtype,
            )

    def _spectra(self) -> Spectra | None:
        if not self.entry.spectrum:
            return None
        items = self.prompts.items
        variants = list(dict.fromkeys(i.variant for i in items))
        variant_of = np.repeat([variants.index(i.variant) for i in items], [len(i.ids) for i in items])
        hidden = self.pair.models["base"].config.hidden_size
        return Spectra(self.entry.comparisons, self.pair.n_layers, hidden, variant_of, len(variants))

    def _tell(self, layer: int, start: int, started: float) -> None:
        n_layers = self.pair.n_layers
        done = min(layer + 1, n_layers)
        here = done - start
        elapsed = time.monotonic() - started
        speed = self.prompts.n_tokens * here / n_layers / elapsed if here and elapsed else None
        left = elapsed / here * (n_layers - done) if here else None
        self.report(Progress(self.entry.name, "layers", done, n_layers, speed, left, here=self._all_here(layer)))

    def _all_here(self, layer: int) -> bool:
        """Whether no more weights are to come: those of the last layer were announced, and nothing announced is under way.
        Where matrices come and go inside a layer nobody knows before the walk has ended."""
        if self.source is None:
            return True
        return self.mode.mode != "sub-layer" and layer + AHEAD_LAYERS >= self.course.last and self.source.idle

    def _check_zeros(self) -> None:
        """A checkpoint compared with itself must differ by exactly nothing."""
        if self.resolved.base.revision != self.resolved.sft.revision:
            return
        for metric in ("norm_diff", "cosine_distance", "kl_divergence", "kl_reverse"):
            worst = float(np.nan_to_num(self.collector.pairwise[metric], nan=0.0).max(initial=0.0))
            if worst != 0.0:
                raise SelfCheckError(f"base and sft are the same checkpoint, yet {metric} reaches {worst:.3g}")

    # -- writing -------------------------------------------------------------------------------------------------------

    def _write_lists(self, writer: CaptureWriter, part: int) -> None:
        layers = sorted(self.collector.topk)
        if layers:
            for table in ("runs_topk", "pairwise_topk"):
                writer.table(table, self.rows.lists(table, layers), part)
            self.collector.topk.clear()

    def _write(self, writer: CaptureWriter) -> None:
        self._write_lists(writer, len(self.course.spans))
        for part, span in enumerate(self.course.spans):
            self.collector.restore_lists(span.columns())
            self._write_lists(writer, part)
        for table in ("runs", "pairwise"):
            writer.table(table, self.rows.scalars(table))
        if self.collector.spectra is not None:
            writer.table("spectrum", self.rows.spectrum(self.collector.spectra))
        writer.table("prompts", self.rows.prompts())
        writer.table("tokens", self.rows.tokens(dict(self.prompts.tokens), set(self.prompts.special_ids)))
        listed = self.rows.listed | {t[0] for t in self.tracked}
        texts = dict(self.prompts.tokens) | token_texts(self.tokenizer, listed)
        writer.table("vocabulary", self.rows.vocabulary(texts))
        if self.tracked:
            writer.table("tracked_tokens", self.rows.tracked_tokens(self.tracked))
