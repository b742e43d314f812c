"""`tensor_parallel: auto`: over as few GPUs as the plan's arithmetic says that the entry's mode needs."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace

from capture.config import Entry
from capture.errors import DeviceError, DeviceMemoryError
from cluster.connect import Cluster
from cluster.offers import COUNTS, Offer, assumed_offers, prices, this_machine
from cluster.plan_asked import as_asked, fits_heads
from cluster.plan_models import Models
from cluster.plan_options import options
from cluster.plan_work import token_counts, work_of
from cluster.resources import gpus_wanted

GIB = 1024**3
KIND = "accelerator_type:"


def with_degree(entry: Entry, cluster: Cluster, models: Models) -> tuple[Entry, str]:
    """The entry with a number for its degree, and why that one. models: where sizes come from.

    Raises DeviceError where nothing is known of the GPUs' memory, DeviceMemoryError where no degree is enough, and what the
    sizes of a model raise.
    """
    same = (entry.base_model, entry.base_revision) == (entry.sft_model, entry.sft_revision)
    token = entry.model_kwargs.get("token")
    base = models.sizes(entry.base_model, entry.base_revision, entry.dtype, token)
    pair = [base] if same else [base, models.sizes(entry.sft_model, entry.sft_revision, entry.dtype, token)]
    card = card_of(entry, cluster)
    most = most_on_a_node(entry, cluster)
    asked = as_asked(entry, pair)
    counts = COUNTS if asked.degree is None else (asked.degree,)  # quantized weights stay on one GPU
    valid = [n for n in counts if n <= most and all(fits_heads(m, n, entry.replicate_attention) for m in pair)]
    work = work_of(entry, pair, token_counts(entry))
    cap = None if entry.device_memory_gib is None else entry.device_memory_gib * GIB
    mode = asked.mode(entry)
    # more GPUs come before sub-layer mode, which reads every matrix again for every batch
    for last_resort, degree in itertools.product((False, True), valid):
        machine = replace(card, gpus=degree, disk_gb=float("inf"))
        for option in options([machine], asked.pair, work, mode=mode, cap_bytes=cap, degree=degree):
            if option.runs and (last_resort or option.mode != "sub-layer"):
                text = (
                    f"tensor_parallel: {degree}: mode {option.mode} takes {option.need_bytes / GIB:.2f} GiB of a GPU's "
                    f"{min(card.room_bytes, cap or card.room_bytes) / GIB:.2f}"
                )
                return entry.model_copy(update={"tensor_parallel": degree}), text
    raise DeviceMemoryError(
        f"entry '{entry.name}': tensor_parallel: auto found no degree: mode {mode} does not fit "
        f"{min(card.room_bytes, cap or card.room_bytes) / GIB:.2f} GiB with {' or '.join(map(str, valid))} GPUs; `pairscope plan` "
        "shows what would"
    )


def most_on_a_node(entry: Entry, cluster: Cluster) -> int:
    """The most processes of a group that one node of this Ray has room for."""
    resource = "GPU" if gpus_wanted(entry, cluster.has_gpus) else "CPU"
    return int(max((n.get(resource, 0.0) for n in (*cluster.nodes, *cluster.types)), default=1.0)) or 1


def card_of(entry: Entry, cluster: Cluster) -> Offer:
    """The GPU that the entry will get, as a plan sees it: of several kinds that it may be, the smallest."""
    data = prices()
    if gpus_wanted(entry, cluster.has_gpus) == 0:
        from capture.device import _host_memory

        return this_machine(data, 1.0, os.cpu_count() or 1, _host_memory()[1])
    having = [n for n in (*cluster.nodes, *cluster.types) if n.get("GPU")]
    kinds = {entry.accelerator_type} if entry.accelerator_type else {k for n in having for k in n if k.startswith(KIND)}
    known = [o for o in assumed_offers(data) if o.gpus == 1]
    cards = [o for kind in kinds for o in known if _spelling(o.gpu).startswith(_spelling(kind.removeprefix(KIND)))]
    if cards:
        return min(cards, key=lambda o: o.memory_mib)
    mib = entry.device_memory_gib * 1024 if entry.device_memory_gib else _installed_mib() if cluster.local else None
    if mib is None:
        raise DeviceError(
            f"entry '{entry.name}': tensor_parallel: auto must know the memory of a GPU; set accelerator_type (H100, A100, "
            "RTX4090, ...), device_memory_gib, or a number of GPUs"
        )
    return replace(known[0], gpu="GPU", memory_mib=mib, compute_cap=0)


def _spelling(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _installed_mib() -> float | None:
    """Memory of the smallest GPU of this machine; None where the driver does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        lines: Sequence[str] = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.split()
        return min(float(line) for line in lines)
    return None
