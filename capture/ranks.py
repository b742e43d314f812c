"""Which rank of a tensor-parallel group a process is, and where the group meets; light, for schedulers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """rank of size; address and port of the place where all ranks meet (rank 0's). listener: of rank 0, the descriptor of a socket
    that is bound to the port, so that nobody else takes it meanwhile; it stays the caller's."""

    rank: int = 0
    size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    listener: int | None = None
