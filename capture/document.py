"""capture.json: what was asked and what was found, in one document for people and for the `captures` view."""

from __future__ import annotations

import math
import platform
from typing import TYPE_CHECKING, Any

import torch
import transformers

from capture import __version__
from capture.identity import NUMERICS_VERSION
from capture.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from capture.lockstep import Pair
    from capture.work import Work


def document(work: Work, files: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of capture.json. files: the marker's list of what was written. Seconds, bytes; secrets are masked."""
    entry, pair, lens, collector = work.entry, work.pair, work.lens, work.collector
    base, need = pair.models["base"], work.mode.need
    return {
        "schema_version": SCHEMA_VERSION,
        "numerics_version": NUMERICS_VERSION,
        "pair": entry.name,
        "capture": work.resolved.capture,
        "config": entry.as_json(),
        "models": _models(work),
        "tokenizer": {"name": entry.tokenizer, "hash": work.resolved.tokenizer_hash},
        "n_layers": pair.n_layers,
        "hidden_size": base.config.hidden_size,
        "n_prompts": len(work.prompts.items),
        "n_tokens": work.prompts.n_tokens,
        "trimmed_to": work.prompts.trimmed_to,
        "layers": sorted(work.layers),
        "passes": [p.name for p in entry.passes],
        "comparisons": [c.name for c in entry.comparisons],
        "embedding_variants": entry.embedding_variants,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "attention": base.model.config._attn_implementation,
        "quantization": _quantization(pair),
        "lens": {
            "layers": sorted(lens.layers),
            "norm": entry.lens.norm,
            "n_vocab": lens.n_vocab,
            "n_tokens": lens.n_tokens,
            "top_k": lens.top_k,
            "left_out_mass": collector.queue.left_out_mass,
        },
        "numerics": {
            "residual_statistics": "float64",
            "logits": "float32, from upcast operands",
            "lens_statistics": "float32 terms, float64 from each row's sums on",
            "lens_compiled": not isinstance(lens.compiled, str) or f"no: {lens.compiled}",
            "nonfinite_lens_rows": collector.nonfinite,
        },
        "halvings": {
            "same_embeddings": pair.same_embeddings,
            "same_first_layers": pair.shared_layers,
            "same_final_norm": pair.same_tail,
            "same_unembedding": pair.same_head,
        },
        "spans": [
            {"first": s.first, "last": s.last, "host": s.meta["host"], "process": s.meta["process"]}
            for s in work.course.spans
        ],
        "workers": work.course.workers(work.mode.mode),
        "passes_share_a_batch": pair.stacked,
        "batches": [
            {"tokens": int(b.ids_BT.shape[1]), "items": list(b.items), "padded": b.mask_BT is not None}
            | ({"split": split} if (split := _split(pair, number)) else {})
            for number, b in enumerate(work.batches)
            if not b.probe
        ],
        "noise_floor": _noise_floor(work),
        "self_checks": work.checks | ({"lens_error": collector.queue.check} if collector.queue.check else {}),
        "tensor_parallel": work.group.size,
        "replicate_attention": work.group.whole_attention,
        "mode": work.mode.mode,
        "mode_reason": work.mode.why,
        "device": work.choice.device,
        "gpu": work.choice.name,
        "seconds": {stage: round(seconds, 3) for stage, seconds in work.seconds.items()},
        "bytes": {
            "checkpoints_read": sum(w["bytes_read"] for w in work.course.workers(work.mode.mode)),
            "weights_peak": work.ledger.peak,
            "tables": sum(f["bytes"] for f in files),
        },
        "from_the_hub": None if work.source is None else {"weights": entry.weights, **work.source.record},
        "peak_memory_bytes": work.peak_memory(),
        "planned_memory_bytes": work.mode.need.peak,
        "memory": {
            "free_bytes": work.choice.free_bytes,
            "planned": {"open": need.open, "layers": need.layers, "lens": need.lens, "weights": need.weights},
            "peak": work.peaks.bytes,
            "peak_of": work.peaks.measured,
            "lens_tile_bytes": lens.tile_bytes,
            "waiting_states_on_host": pair.home.away,
        },
        "versions": {
            "pairscope": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _split(pair: Pair, batch: int) -> list[dict[str, int]]:
    """From which layer on a batch went through layers in how many parts: part of its numbers, as its composition is."""
    return [{"from_layer": s.layer, "parts": s.parts} for s in pair.parts.splits if s.batch == batch]


def _quantization(pair: Pair) -> dict[str, Any] | None:
    """By what each model's weights are quantized, in memory or as stored; None where neither is."""
    found: dict[str, Any] = {owner: model.quantization.record for owner, model in pair.models.items()}
    return found if any(found.values()) else None


def _models(work: Work) -> dict[str, Any]:
    names = {"base": work.entry.base_model, "sft": work.entry.sft_model}
    files = {"base": work.resolved.base, "sft": work.resolved.sft}
    return {
        owner: {
            "model": names[owner],
            "revision": files[owner].revision,
            "class": type(model.model).__name__,
            "weight_bytes": files[owner].weight_bytes,
            "unused_keys": len(model.ignored_keys),
        }
        for owner, model in work.pair.models.items()
    }


def _noise_floor(work: Work) -> dict[str, Any]:
    """What running one prompt alone, instead of in its batch, changes: below it a difference means nothing. None, null in the
    file, where a state overflowed; JSON has no NaN."""
    if not work.batches[-1].probe:
        return {"measured": False, "why": "every batch holds one prompt, or noise_floor is off"}
    found = {
        run: {name: [v if math.isfinite(v) else None for v in values] for name, values in metrics.items()}
        for run, metrics in work.collector.noise.items()
    }
    worst: dict[str, float | None] = {}
    for name in next(iter(found.values())):
        every = [v for metrics in found.values() for v in metrics[name]]
        worst[name] = None if None in every else max(v for v in every if v is not None)
    return {
        "measured": True,
        "item": work.batches[-1].items[0],
        "largest": worst,
        "by_run_and_layer": found,
    }
