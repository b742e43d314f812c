"""A plan as plain rows, for `--json`."""

from __future__ import annotations

from typing import Any

from cluster.plan import EntryPlan, Plan
from cluster.plan_options import Option, download_gb
from cluster.schedule import Schedule


def rows(plan: Plan) -> list[dict[str, Any]]:
    """Each entry, then each number of machines, then the assumptions. Sizes in bytes, times in seconds and hours, dollars."""
    return [
        *(_entry(e) for e in plan.entries),
        *(_sweep(s) for s in plan.sweeps),
        {"row": "assumptions", "lines": list(plan.assumptions)},
    ]


def _entry(entry: EntryPlan) -> dict[str, Any]:
    row: dict[str, Any] = {"row": "entry", "entry": entry.name, "error": entry.error, "notes": list(entry.notes)}
    if entry.work is None:
        return row
    base = entry.models[0]
    return row | {
        "models": [
            {
                "model": m.model,
                "source": m.source,
                "model_type": m.model_type,
                "parameters": m.parameters,
                "stored": m.stored,
                "dtype": m.dtype,
                "quantized": m.quantized or None,
                "download_bytes": m.download_bytes,
                "weight_bytes": m.weights.total,
                "layer_bytes": max(m.weights.layers),
                "embedding_bytes": m.weights.embedding,
                "unembedding_bytes": m.weights.head,
                "gated": m.gated,
            }
            for m in entry.models
        ],
        "download_gb": download_gb(entry.models),
        "layers": base.n_layers,
        "prompts": entry.work.prompts,
        "tokens": entry.work.walk.tokens,
        "passes": entry.work.walk.passes,
        "needs": entry.needs,
        "recommended": _option(entry.choice),
        "cheapest": _option(entry.cheapest),
        "fastest": _option(entry.fastest),
        "options": [_option(o) for o in entry.options],
    }


def _option(option: Option | None) -> dict[str, Any] | None:
    if option is None:
        return None
    return {
        "mode": option.mode,
        "gpu": option.offer.gpu,
        "gpu_memory_mib": option.offer.memory_mib,
        "gpus": option.offer.gpus,
        "tensor_parallel": option.degree,
        "offer": option.offer.offer_id,
        "need_bytes": option.need_bytes,
        "weight_bytes": option.weight_bytes,
        "room_bytes": int(option.offer.room_bytes),
        "seconds": {stage: getattr(option.stages, stage) for stage in ("download", "disk", "pcie", "compute")},
        "bottleneck": option.stages.bottleneck,
        "hours": option.hours,
        "usd": option.usd,
        "disk_gb": option.disk_gb,
        "runs": option.runs,
    }


def _sweep(one: Schedule) -> dict[str, Any]:
    return {
        "row": "sweep",
        "nodes": one.nodes,
        "makespan_hours": one.makespan,
        "usd": one.usd,
        "machines": [
            {"kind": m.kind, "start_hour": m.start, "end_hour": m.end, "usd": m.usd, "disk_gb": m.disk_gb,
             "entries": [j.name for j in m.jobs]}
            for m in one.machines
        ],
    }  # fmt: skip
