"""The statistics of a lens tile, and of residual states, compiled, for what is in main memory; capture/lens.py and
capture/statistics.py have the plain ways.

capture/lens_kernel.cpp is compiled once on each machine, by the C++ compiler that is there, for the processor that is there
(about a second), and kept in the user's cache. Rows are computed alone, each by one thread, so neither the number of threads
nor that of rows changes a bit. Top-k lists are those of the plain way exactly; entropies, log-sum-exp and divergences hold the
same tolerances against float64.

Shapes: S slots, C pairs of slots, R rows, V vocabulary, K top-k.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capture.divergence import Divergences, Pairs
from capture.lens_sums import Fused
from capture.logits import Logits
from capture.machine import COMPILERS, cxx
from capture.threads import in_threads
from capture.topk import TopK

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("lens_kernel.cpp")
FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-shared",
    "-fPIC",
    "-std=c++14",
)
BLOCK = 512  # as in the source
MOST_SLOTS, MOST_TERMS = 16, 4
# Numbers of a state that a thread is woken for: some milliseconds of work. torch's own threads go on spinning for as long after
# each of its operations, and another one only takes their processors away.
CELLS_OF_A_THREAD = 1 << 19
COMPILE_S = 120.0


class _Tile(ctypes.Structure):
    """`Tile` of the source, field by field."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("tensors", "strides")],
        *[(name, ctypes.c_int64) for name in ("vocab", "listed")],
        *[(name, ctypes.c_int32) for name in ("n_tensors", "n_slots", "n_pairs", "k")],
        *[(name, ctypes.c_void_p) for name in ("slot_terms", "pair_terms", "pairs")],
        ("rows", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("entropy", "logsumexp", "ba", "ab", "apart", "ids", "values", "finite")],
    ]


class _Residual(ctypes.Structure):
    """`Residual` of the source, field by field."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("states", "previous", "strides", "previous_strides", "starts")],
        *[(name, ctypes.c_int64) for name in ("size", "rows")],
        *[(name, ctypes.c_int32) for name in ("n_states", "n_previous", "n_turns", "n_pairs")],
        *[(name, ctypes.c_void_p) for name in ("turns", "pairs", "norm", "delta", "turned", "distance", "difference")],
    ]


@dataclass
class Found:
    """apart [C, R] float64: for each pair the mean of |d|, d = log p_b - log p_a, under the larger of both. slots, increased, decreased: a TopK for each slot, and two for each pair. finite [R]: False where a logit is not finite,
    and nothing else about the row means anything."""

    divergences: Divergences
    apart: Tensor
    slots: list[TopK]
    increased: list[TopK]
    decreased: list[TopK]
    finite: Tensor


class Kernel:
    """The compiled code. `takes` says what it can do; `tile` does it."""

    def __init__(self, library: Path) -> None:
        code = ctypes.CDLL(str(library))
        self.lens_rows, self.residual_rows = code.lens_rows, code.residual_rows
        self.lens_rows.argtypes = [ctypes.POINTER(_Tile), ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
        self.residual_rows.argtypes = [ctypes.POINTER(_Residual), ctypes.c_int64, ctypes.c_int64]
        self.lens_rows.restype = self.residual_rows.restype = None

    def takes(self, logits: Logits, k: int) -> bool:
        """Whether these logits can be given to `tile`."""
        one = logits.tensors[0]
        return (
            k > 0
            and len(logits.tensors) <= MOST_SLOTS
            and logits.n_slots <= MOST_SLOTS
            and max(map(len, logits.slots)) < MOST_TERMS
            and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in logits.tensors)
            and all(x.shape == one.shape and x.stride(1) == 1 for x in logits.tensors)
        )

    def space_bytes(self, n_slots: int, n_pairs: int, vocab: int) -> int:
        """Memory that one thread works in."""
        blocks = -(-vocab // BLOCK)
        return 4 * ((n_slots * BLOCK + n_slots + 2 * n_pairs) * blocks + 2 * BLOCK)

    def tile(self, logits: Logits, pairs: Pairs, listed: int, k: int) -> Found:
        """All statistics of R rows. listed: of V, the entries that may be in top-k lists; k: length of the lists."""
        n_slots, n_pairs = logits.n_slots, len(pairs)
        rows, vocab = logits.tensors[0].shape
        k = min(k, listed)
        sums = torch.empty(2, n_slots, rows, dtype=torch.float64)
        kl = torch.empty(3, n_pairs, rows, dtype=torch.float64)
        ids = torch.empty(n_slots + 2 * n_pairs, rows, k, dtype=torch.int64)
        values = torch.empty(n_slots + 2 * n_pairs, rows, k)
        finite = torch.empty(rows, dtype=torch.bool)
        tensors = torch.tensor([x.data_ptr() for x in logits.tensors])
        strides = torch.tensor([x.stride(0) for x in logits.tensors])
        slot_terms = _terms(logits.slots)
        pair_terms = _terms([logits.shift_terms(a, b) for a, b in pairs])
        numbers = torch.tensor(list(pairs), dtype=torch.int32).reshape(-1, 2)
        tile = _Tile(
            tensors.data_ptr(), strides.data_ptr(), vocab, listed, len(logits.tensors), n_slots, n_pairs, k,
            slot_terms.data_ptr(), pair_terms.data_ptr(), numbers.data_ptr(), rows,
            sums[0].data_ptr(), sums[1].data_ptr(), kl[0].data_ptr(), kl[1].data_ptr(), kl[2].data_ptr(),
            ids.data_ptr(), values.data_ptr(), finite.data_ptr(),
        )  # fmt: skip
        n = max(1, min(torch.get_num_threads(), rows))
        space = torch.empty(n, self.space_bytes(n_slots, n_pairs, vocab) // 4)
        in_threads(lambda i, first, last: self.lens_rows(ctypes.byref(tile), first, last, space[i].data_ptr()), rows, n)
        lists = [TopK(i, v) for i, v in zip(ids, values, strict=True)]
        return Found(
            Divergences(sums[0], sums[1], kl[0], kl[1]), kl[2],
            lists[:n_slots], lists[n_slots::2], lists[n_slots + 1 :: 2], finite,
        )  # fmt: skip

    def takes_states(self, states: Sequence[Tensor]) -> bool:
        """Whether these states can be given to `residuals`."""
        return len(states) <= MOST_SLOTS and all(
            x.dtype == torch.float32 and x.is_cpu and x.stride(1) == 1 for x in states
        )

    def residuals(
        self, blocks: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]], turns: Pairs, pairs: Pairs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The fields of capture/statistics.py's Residuals, [n, R] float64 each, of its blocks."""
        states = [x for block, _ in blocks for x in block]
        previous = [x for _, block in blocks for x in block]
        n_states, n_previous, size = len(blocks[0][0]), len(blocks[0][1]), states[0].shape[1]
        starts = [0, *accumulate(len(block[0]) for block, _ in blocks)]
        rows = starts[-1]
        of = [torch.empty(n, rows, dtype=torch.float64) for n in (n_states, *2 * [len(turns)], *2 * [len(pairs)])]
        numbers = [_numbers(ctypes.c_int64, [x.data_ptr() for x in s]) for s in (states, previous)]
        numbers += [_numbers(ctypes.c_int64, [x.stride(0) for x in s]) for s in (states, previous)]
        numbers.append(_numbers(ctypes.c_int64, starts))
        which = [_numbers(ctypes.c_int32, [i for pair in p for i in pair]) for p in (turns, pairs)]
        call = _Residual(
            *map(ctypes.addressof, numbers), size, rows, n_states, n_previous, len(turns), len(pairs),
            *map(ctypes.addressof, which), *[x.data_ptr() for x in of],
        )  # fmt: skip
        n = max(1, min(torch.get_num_threads(), rows, rows * size // CELLS_OF_A_THREAD))
        in_threads(lambda _, first, last: self.residual_rows(ctypes.byref(call), first, last), rows, n)
        norm, delta, turned, distance, difference = of
        return norm, delta, turned, distance, difference


def _numbers(kind: Any, numbers: Sequence[int]) -> Any:
    """An array for the library; it must be held as long as the library may look at it."""
    return (kind * len(numbers))(*numbers)


def _terms(of: Sequence[Sequence[int]]) -> Tensor:
    """Numbers of tensors, from 1, negative where they are taken off; zeros behind the last: [n, MOST_TERMS] int32."""
    return torch.tensor([[*terms, *[0] * (MOST_TERMS - len(terms))] for terms in of], dtype=torch.int32)


@cache
def load_fused(device: torch.device) -> Fused | str:
    """The compiled way on a GPU, built and tried on it (some seconds, once a process); or why there is none, in words."""
    try:
        from capture.lens_triton import tried
    except ImportError as error:
        return f"the package triton is not there ({error})"
    return tried(device)


@cache
def load_kernel() -> Kernel | str:
    """The kernel, compiled if it was not yet; or why there is none, in words."""
    compiler = cxx()
    if compiler is None:
        return f"no C++ compiler is installed ({', '.join(COMPILERS)})"
    try:
        return Kernel(_compiled(compiler))
    except subprocess.TimeoutExpired:
        return f"{compiler} took more than {COMPILE_S:.0f} s"
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {' '.join((error.stderr or '').split())[-300:]}"
    except OSError as error:
        return f"{'CXX=' if os.environ.get('CXX') else ''}{compiler}: {error}"


def _compiled(compiler: str) -> Path:
    """The library for this source, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=COMPILE_S)
    key = (SOURCE.read_text(), compiler, version.stdout, _processor(), *FLAGS)
    name = f"lens-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pairscope"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        mine = directory.stat().st_uid == os.getuid() and os.access(directory, os.W_OK)
    except (OSError, RuntimeError):
        mine = False
    if not mine:  # never load code from a directory that is somebody else's
        directory = Path(tempfile.mkdtemp(prefix="pairscope-"))
    library = directory / name
    if not library.exists():
        descriptor, unfinished = tempfile.mkstemp(dir=directory, suffix=".so")
        os.close(descriptor)
        try:
            subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", unfinished],
                capture_output=True, text=True, check=True, timeout=COMPILE_S,
            )  # fmt: skip
            os.replace(unfinished, library)
        finally:
            Path(unfinished).unlink(missing_ok=True)
        log.info("compiled the lens kernel with %s", compiler)
    return library


def _processor() -> str:
    """What `-march=native` looks at: a home directory may be shared by machines that differ."""
    try:
        with open("/proc/cpuinfo") as info:
            lines = [line for line in info if line.startswith(("model name", "flags", "Features", "CPU part"))]
        return "".join(sorted(set(lines)))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
