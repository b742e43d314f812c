"""The Triton kernels, interpreted: what they are tried on tells right from wrong, and ranks that share a vocabulary find the same."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from interpreted import interpreted
from test_lens import PAIRS, logits

from capture import measure_lens as measure
from capture.divergence import divergences
from capture.group import ALONE, Group
from capture.lens import lens_tile
from capture.lens_kernel import load_fused
from capture.lens_sums import Space, compared, one_pass
from capture.logits import Logits, separate
from capture.topk import Vocabulary

CPU = torch.device("cpu")


@pytest.fixture
def kernels():
    return interpreted()


def test_what_they_find_is_what_plain_operations_find(kernels):
    assert kernels.differs(CPU) is None


def test_more_slots_than_they_take_go_the_plain_way(kernels):
    x = logits(40, 1.0)
    assert kernels.Fused().takes(separate(x))
    assert not kernels.Fused().takes(separate([*x, *x[:2]]))
    assert not kernels.Fused().takes(Logits(x, [(1,), (2,), (1, 3), (2, 4)])), "sums"
    six = [*x, x[1] + x[2], x[2] - x[0]]
    of = [(a, b) for a in range(6) for b in range(a + 1, 6)]
    given = separate(six), of, torch.zeros(5, dtype=torch.long), torch.tensor([1]), Vocabulary(40, 5)
    plain, asked = (lens_tile(*given, rows=5, fused=fused)[1] for fused in (None, kernels.Fused()))
    assert all(torch.equal(plain[pair].kl_ba, asked[pair].kl_ba) for pair in of)


def test_the_interpreter_is_never_taken_for_a_gpu(kernels):
    assert "interpreter is on" in load_fused(CPU)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda p: p.maxima_NRB[3, 0, 5:6].add_(1), "largest logits"),
        (lambda p: p.largest_SR[1].add_(1e-3), "largest logits"),
        (lambda p: p.sums.sums[0, 1].mul_(1.001), "entropies or divergences"),
        (lambda p: p.sums.sums[2, 3].mul_(1.01), "entropies or divergences"),
        (lambda p: p.sums.offsets[2].add_(1e-4), "entropies or divergences"),
    ],
)
def test_kernels_that_find_something_else_are_not_taken(wrong, why, kernels, monkeypatch):
    right = kernels.fused_pass

    def spoiled(*given):
        found = right(*given)
        wrong(found)
        return found

    monkeypatch.setattr(kernels, "fused_pass", spoiled)
    assert why in kernels.differs(CPU)


def test_kernels_that_cannot_be_built_are_not_taken(kernels, monkeypatch):
    def refused(*_):
        raise RuntimeError("no ptxas\nanywhere")

    monkeypatch.setattr(kernels, "fused_pass", refused)
    assert kernels.differs(CPU) == "Triton failed: RuntimeError: no ptxas anywhere"


@pytest.mark.parametrize("vocab", [5, 16, 40, 2048, 5003])
@pytest.mark.parametrize("n_slots", [1, 2, 3, 4])
def test_any_number_of_slots_and_entries(n_slots, vocab, kernels):
    x = [
        torch.cat([one, one], 1)[:, :vocab] for one in logits(vocab, 1.0)[:n_slots]
    ]  # rows that are not one behind the other
    pairs = [(a, b) for a, b in [*PAIRS, (3, 1)] if max(a, b) < n_slots]
    shifts = compared(n_slots, pairs)
    for listed in {vocab, vocab - 3, vocab // 2}:
        plain = one_pass(separate(x), shifts, listed, ALONE, at_once=5, space=Space())
        found = kernels.fused_pass(x, shifts, listed, ALONE)
        assert torch.equal(found.maxima_NRB, plain.maxima_NRB)
        assert torch.equal(found.largest_SR, plain.largest_SR)
        assert torch.equal(found.sums.far, plain.sums.far)
        a, b = (divergences(separate(x), p.largest_SR, pairs, ALONE, p.sums, 5) for p in (found, plain))
        assert torch.allclose(a.entropy, b.entropy, rtol=0, atol=1e-6)
        assert torch.allclose(a.logsumexp, b.logsumexp, rtol=0, atol=1e-6)
        assert torch.allclose(a.ba, b.ba, rtol=2e-4, atol=1e-9)
        assert torch.allclose(a.ab, b.ab, rtol=2e-4, atol=1e-9)


def test_a_row_is_the_same_whatever_its_neighbours_are(kernels):
    x = logits(5003, 1.0)
    x[2][1, 7] = float("inf")
    shifts = compared(4, PAIRS)
    whole = kernels.fused_pass(x, shifts, 5000, ALONE)
    for row in range(5):
        alone = kernels.fused_pass([one[row : row + 1] for one in x], shifts, 5000, ALONE)
        assert torch.equal(alone.maxima_NRB.nan_to_num()[:, 0], whole.maxima_NRB.nan_to_num()[:, row])
        assert torch.equal(alone.sums.sums.nan_to_num()[..., 0], whole.sums.sums.nan_to_num()[..., row])
        assert bool(alone.sums.far[0]) == bool(whole.sums.far[row]) == (row == 1)


def test_the_plan_of_their_memory_is_what_they_take(kernels, monkeypatch):
    of = 16, 4, 6, 5003, 5000, 10, None, False, True
    planned = measure._of_statistics.__wrapped__(*of)
    monkeypatch.setattr(measure, "_AsFused", kernels.Fused)
    for took, plan in zip(measure._of_statistics.__wrapped__(*of), planned, strict=True):
        assert plan == pytest.approx(took, rel=0.02)  # the interpreter holds what it was last given


@dataclass(frozen=True)
class Together(Group):
    """Ranks that are threads."""

    barrier: threading.Barrier = field(default=None)
    given: list = field(default=None)

    def _all(self, x, of):
        assert x.is_contiguous()  # as NCCL wants it
        self.given[self.rank] = x.clone()
        self.barrier.wait()
        x.copy_(of(torch.stack(self.given)))
        self.barrier.wait()
        return x

    def max(self, x):
        return self._all(x, lambda all_of: all_of.amax(0))

    def sum(self, x):
        return self._all(x, lambda all_of: all_of.sum(0))


class InTurns:
    """A kernel whose launches come one after the other: the interpreter keeps the program that it runs in one place for all threads."""

    lock = threading.Lock()

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*given, **fixed):
            with self.lock:
                self.kernel[grid](*given, **fixed)

        return launch


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_ranks_that_share_a_vocabulary_find_what_one_finds(kind, kernels, monkeypatch):
    for name in ("_largest", "_products"):
        monkeypatch.setattr(kernels, name, InTurns(getattr(kernels, name)))
    x, shifts, cut = logits(5003, 1.0), compared(4, PAIRS), 2600
    x[1][3] *= 40  # a row that goes the plain way behind it
    x[2][4, 4000] = float("nan")
    barrier, given, found = threading.Barrier(2, timeout=60), [None, None], [None, None]

    def rank(i):
        group = Together(i, 2, barrier=barrier, given=given)
        mine = [one[:, :cut] if i == 0 else one[:, cut:] for one in x]
        listed = cut if i == 0 else 5000 - cut
        if kind == "plain":
            made = one_pass(separate(mine), shifts, listed, group, at_once=5, space=Space())
        else:
            made = kernels.fused_pass(mine, shifts, listed, group)
        found[i] = made, divergences(separate(mine), made.largest_SR, PAIRS, group, made.sums, 5)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(rank, range(2)))
    whole = one_pass(separate(x), shifts, 5000, ALONE, at_once=5, space=Space())
    want = divergences(separate(x), whole.largest_SR, PAIRS, ALONE, whole.sums, 5)
    for made, got in found:
        assert torch.equal(made.sums.far, whole.sums.far)
        assert torch.allclose(got.entropy, want.entropy, rtol=0, atol=1e-6, equal_nan=True)
        assert torch.allclose(got.ba, want.ba, rtol=2e-4, atol=1e-9, equal_nan=True)
        assert torch.allclose(got.ab, want.ab, rtol=2e-4, atol=1e-9, equal_nan=True)
