"""Work on ranges of rows, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache

import torch


def in_threads(part: Callable[[int, int, int], None], rows: int, n: int) -> None:
    """part(thread, first row, last row) over all rows in n threads, for work that lets the interpreter go while it runs. All
    have ended when it returns or raises."""
    cuts = [i * rows // n for i in range(n + 1)]
    others = [_threads(n).submit(part, i, cuts[i], cuts[i + 1]) for i in range(1, n)]
    try:
        part(0, 0, cuts[1])
    finally:
        wait(others)
    for other in others:
        other.result()


@contextmanager
def alone() -> Iterator[None]:
    """Within the block an operation of torch runs in the thread that calls it.

    torch has the number for each thread, and one that a thread takes over at its first operation: so threads that first work
    within such a block keep to themselves ever after, and the one that entered it gets its own number back.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _threads(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, thread_name_prefix="lens")
