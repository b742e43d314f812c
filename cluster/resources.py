"""What an entry asks of Ray, and whether this Ray can give it. Plain arithmetic over plain values; no Ray here."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from capture.config import Entry

GIB = 1024**3
MEMORY_STEP = GIB // 4  # so that small pairs ask for the same, and can follow each other in one process
WORKER_BYTES = GIB  # what a process with torch and transformers holds before it loads a model


@dataclass(frozen=True)
class Request:
    """What one entry's actor asks for.

    env: environment that the worker sets before torch is imported; None removes a variable. exclusive: a device that Ray
    does not hand out itself and that one entry at a time may use.
    """

    gpus: float
    cpus: float
    memory_bytes: int = 0
    accelerator_type: str | None = None
    env: dict[str, str | None] = field(default_factory=dict)
    exclusive: str | None = None
    ranks: int = 1  # processes of a tensor-parallel group; each asks for all of the above, and all for one node

    def options(self) -> dict[str, object]:
        """Keyword arguments for an actor class's `.options()`."""
        options: dict[str, object] = {"num_gpus": self.gpus, "num_cpus": self.cpus, "max_restarts": 0}
        if self.memory_bytes:
            options["memory"] = self.memory_bytes
        if self.accelerator_type:
            options["accelerator_type"] = self.accelerator_type
        return options

    def is_asked_by(self, resources: dict[str, float]) -> bool:
        """True if this request is what Ray lists as `resources` among what waits."""
        asked = {"GPU": self.gpus, "CPU": self.cpus, "memory": float(self.memory_bytes)}
        return all(resources.get(name, 0.0) == need for name, need in asked.items()) and (
            self.accelerator_type is None or f"accelerator_type:{self.accelerator_type}" in resources
        )

    def bundle(self) -> dict[str, float]:
        """What one rank needs of a placement group."""
        bundle = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        if self.accelerator_type:
            bundle[f"accelerator_type:{self.accelerator_type}"] = 0.001
        return bundle

    @property
    def whole(self) -> Request:
        """What all ranks together ask of one node."""
        return replace(self, gpus=self.gpus * self.ranks, cpus=self.cpus * self.ranks, ranks=1)

    @property
    def text(self) -> str:
        if self.ranks > 1:
            return f"{self.whole.text} for {self.ranks} ranks"
        parts = [f"{self.gpus:g} GPU{'s' if self.gpus != 1 else ''}"] if self.gpus else []
        parts += [f"of type {self.accelerator_type}"] if self.accelerator_type else []
        parts += [f"{self.cpus:g} CPU{'s' if self.cpus != 1 else ''}"]
        parts += [f"{self.memory_bytes / GIB:.1f} GiB of memory"] if self.memory_bytes else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Sizing:
    """Threads and Ray's CPUs of an entry on the CPU, and threads of an entry with a GPU."""

    threads: int
    cpus: float
    gpu_threads: int


def gpus_wanted(entry: Entry, cluster_has_gpus: bool) -> float:
    """The entry's own `gpus`, else 1 where its device is CUDA or is left open on a Ray that has GPUs, else 0."""
    if entry.gpus is not None:
        return entry.gpus
    device = entry.device or ("cuda" if cluster_has_gpus or entry.local_run.enabled else "cpu")
    return 1.0 if device.startswith("cuda") else 0.0


def request(
    entry: Entry,
    *,
    cluster_has_gpus: bool,
    sized: Sizing,
    memory_bytes: int = 0,
    visible_devices: str | None = None,
) -> Request:
    """The request of one entry.

    memory_bytes: main memory that an entry on the CPU is expected to need. visible_devices: the driver's own CUDA_VISIBLE_DEVICES, for entries that number devices themselves.
    """
    if entry.tensor_parallel != "auto" and entry.tensor_parallel > 1:
        one = entry.model_copy(update={"tensor_parallel": 1, "gpus": min(1.0, gpus_wanted(entry, cluster_has_gpus))})
        each = replace(sized, threads=max(1, sized.threads // entry.tensor_parallel), cpus=1)
        rank = request(one, cluster_has_gpus=cluster_has_gpus, sized=each, visible_devices=visible_devices)
        return replace(rank, ranks=entry.tensor_parallel)
    gpus = gpus_wanted(entry, cluster_has_gpus)
    accelerator = entry.accelerator_type
    if gpus == 0:
        # Ray leaves all GPUs visible to an actor that asked for none; an entry for the CPU must not take one
        env: dict[str, str | None] = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(sized.threads)}
        return Request(0, sized.cpus, memory_bytes, accelerator, env)
    env = {"OMP_NUM_THREADS": str(sized.gpu_threads)}
    own = re.fullmatch(r"cuda:(\d+)", entry.device or "")
    index = int(own.group(1)) if own else entry.local_run.cuda_device_index
    if entry.local_run.enabled or index > 0:
        # Ray would show the worker one card under the number 0; here the number means the machine's own
        env["CUDA_VISIBLE_DEVICES"] = visible_devices
        return Request(gpus, 1, 0, accelerator, env, exclusive=f"cuda:{index}")
    return Request(gpus, 1, 0, accelerator, env)


def refusal(
    wanted: Request,
    nodes: Sequence[dict[str, float]],
    *,
    growing: bool = False,
    types: Sequence[dict[str, float]] = (),
) -> str | None:
    """Why no node could ever hold this request, comparing need with have; None where one could.

    nodes: total resources of each node, as Ray names them (CPU, GPU, memory, accelerator_type:H100). growing: an autoscaler may
    add others, of these types; where none are known, what the nodes lack says nothing. Types do not tell their memory.
    """
    if wanted.gpus > 1 and wanted.gpus != int(wanted.gpus):
        return f"asks for {wanted.gpus:g} GPUs; more than one must be a whole number"
    if growing:
        if not types or refusal(wanted, nodes) is None:
            return None
        reason = refusal(replace(wanted, memory_bytes=0), [*nodes, *types])
        return reason and reason.replace("of this Ray", "that this cluster can have").replace(
            "; this Ray has", "; this cluster can have"
        )
    if wanted.ranks > 1:
        return refusal(wanted.whole, nodes)
    if wanted.accelerator_type:
        kind = f"accelerator_type:{wanted.accelerator_type}"
        having = [n for n in nodes if kind in n]
        if not having:
            kinds = sorted(
                {k.removeprefix("accelerator_type:") for n in nodes for k in n if k.startswith("accelerator_type:")}
            )
            return f"asks for accelerator type {wanted.accelerator_type}; this Ray has {', '.join(kinds) or 'none'}"
        nodes = having
    for name, need in (("GPU", wanted.gpus), ("CPU", wanted.cpus), ("memory", float(wanted.memory_bytes))):
        most = max((n.get(name, 0.0) for n in nodes), default=0.0)
        if need > most:
            return f"asks for {need:g} {name} on one node; the largest node of this Ray has {most:g}"
    if not any(
        n.get("GPU", 0) >= wanted.gpus and n.get("CPU", 0) >= wanted.cpus and n.get("memory", 0) >= wanted.memory_bytes
        for n in nodes
    ):
        return f"asks for {wanted.text} on one node; no node of this Ray has all of that"
    return None


def sizing(n_entries: int, jobs: int | None, nodes: Sequence[dict[str, float]]) -> Sizing:
    """Share the cores out so that all threads together do not outnumber them.

    n_entries: those on the CPU. Without `jobs`, each gets one core while there are at least as many entries as cores: a few
    threads on one small model are slower than one thread on each of a few; where entries are few, each gets more. With more
    `jobs` than cores each entry counts as a part of a core, so that Ray places as many as were asked for.
    """
    cores = [max(1, int(n.get("CPU", 1))) for n in nodes] or [1]
    at_a_time = max(1, min(n_entries, jobs or sum(cores)))
    threads = max(1, min(max(cores), sum(cores) // at_a_time))
    cpus = min(float(threads), sum(cores) / at_a_time)
    gpu_nodes = [n for n in nodes if n.get("GPU", 0) > 0]
    gpu_threads = min((max(1, int(n.get("CPU", 1) // max(1.0, n["GPU"]))) for n in gpu_nodes), default=max(cores))
    return Sizing(threads, math.floor(cpus * 100) / 100, gpu_threads)


def cpu_memory(weight_bytes: int | None, nodes: Sequence[dict[str, float]], jobs: int | None) -> int:
    """Main memory to reserve for an entry on the CPU, in bytes; 0 reserves none.

    weight_bytes: both checkpoints together; None where that is not known yet. With an explicit `jobs` the user has done the sizing. What is
    asked for never exceeds the largest node: an entry that is too large for it is streamed there, alone.
    """
    if jobs is not None:
        return 0
    largest = max((n.get("memory", 0.0) for n in nodes), default=0.0)
    wanted = WORKER_BYTES + math.ceil(1.2 * (weight_bytes or 0) / MEMORY_STEP) * MEMORY_STEP
    return int(min(wanted, 0.95 * largest))
