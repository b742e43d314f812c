"""The ranks that share one pair: tensor parallelism inside one node, and the reductions that the lens needs of it.

Every rank holds a shard of most weights and the whole of the residual; only the unembedding's rows, and so the vocabulary,
are divided among ranks when statistics are computed. `Group()` is a group of one, for which every reduction is the identity.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from capture.ranks import Ranks


@dataclass(frozen=True)
class Group:
    """rank of size; all ranks call every method, in the same order. whole_attention: each holds the whole attention."""

    rank: int = 0
    size: int = 1
    whole_attention: bool = False

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.SUM)
        return x

    def all(self, value: bool, device: torch.device) -> bool:
        """True if it is true on every rank."""
        if self.size == 1:
            return value
        return bool(-self.max(torch.tensor([-int(value)], device=device)).item())

    def gather(self, x: Tensor) -> Tensor:
        """[R, K] of each rank -> [R, size * K], ranks in order."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=1)


ALONE = Group()


def join_group(ranks: Ranks, device: torch.device, *, minutes: float = 30, whole_attention: bool = False) -> Group:
    """Meet the other ranks (NCCL on CUDA, gloo on the CPU). All collectives give up after `minutes`.

    Each process sees one GPU, its own, so that the local rank is 0 everywhere.
    """
    if ranks.size == 1:
        return ALONE
    os.environ |= {
        "RANK": str(ranks.rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(ranks.size),
        "MASTER_ADDR": ranks.address,
        "MASTER_PORT": str(ranks.port),
    }
    if not dist.is_initialized():
        wait = datetime.timedelta(minutes=minutes)
        store = dist.TCPStore(
            ranks.address, ranks.port, ranks.size, ranks.rank == 0, timeout=wait,
            master_listen_fd=None if ranks.listener is None else os.dup(ranks.listener),
        )  # fmt: skip
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=store, rank=ranks.rank, world_size=ranks.size, timeout=wait,
            device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
    return Group(ranks.rank, ranks.size, whole_attention)


def leave_group(group: Group) -> None:
    """Part from the other ranks."""
    if group.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def local(x: Tensor) -> Tensor:
    """This rank's shard of a distributed tensor; any other tensor itself."""
    if is_plain(x):
        return x
    from torch.distributed.tensor import DTensor

    return x.to_local() if isinstance(x, DTensor) else x


def vocabulary_shard(weight: Tensor) -> tuple[int, Tensor]:
    """(id of its first row, rows) of this rank's shard of an unembedding; all rows where it is not divided."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(weight, DTensor) or not any(isinstance(p, Shard) for p in weight.placements):
        return 0, local(weight)
    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return offset[0], weight.to_local()


def is_distributed(x: Tensor) -> bool:
    """True for a tensor of which this rank holds a share."""
    if is_plain(x):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def is_plain(x: object) -> bool:
    """True for a tensor of numbers, false for what a quantization backend stores."""
    return type(x) in (Tensor, torch.nn.Parameter)


def nbytes_of(x: Tensor) -> int:
    """Bytes of this rank's share of a tensor, or of the tensors that a quantized one is made of."""
    if type(x) is Tensor or (type(x) is torch.nn.Parameter and not x.__dict__):
        return x.nbytes
    x = local(x)
    if hasattr(x, "__tensor_flatten__"):
        names, _ = x.__tensor_flatten__()
        return sum(nbytes_of(getattr(x, name)) for name in names)
    scales = (
        getattr(getattr(x, "quant_state", None), "absmax", None),
        getattr(x, "SCB", None),
    )  # bitsandbytes, 4 and 8 bits
    return x.nbytes + sum(s.nbytes for s in scales if isinstance(s, Tensor))
