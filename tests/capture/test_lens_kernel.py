"""The compiled lens: built once, refused clearly, and what it does not take goes the plain way."""

import os
import stat
from pathlib import Path

import pytest
import torch
from test_capture import entry_of

from capture import lens_kernel, machine
from capture.config import Lens
from capture.errors import ConfigError
from capture.lens import lens_tile
from capture.lens_kernel import Kernel, load_kernel
from capture.logits import Logits, separate
from capture.run import capture_pair
from capture.statistics import residuals
from capture.topk import Vocabulary


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of its own, and nothing compiled in this process yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    load_kernel.cache_clear()
    yield tmp_path / "cache" / "pairscope"
    load_kernel.cache_clear()


def kernel():
    found = load_kernel()
    if not isinstance(found, Kernel):
        pytest.skip(found)
    return found


def test_it_is_compiled_once(home, monkeypatch):
    kernel()
    (library,) = home.iterdir()
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    before = library.stat().st_mtime_ns
    load_kernel.cache_clear()
    kernel()
    assert [p.stat().st_mtime_ns for p in home.iterdir()] == [before]


def test_code_is_not_loaded_from_a_directory_of_somebody_else(home, monkeypatch):
    kernel()
    load_kernel.cache_clear()
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    seen = []
    monkeypatch.setattr(lens_kernel, "Kernel", lambda library: seen.append(library) or "loaded")
    assert load_kernel() == "loaded"
    assert home not in seen[0].parents


@pytest.mark.parametrize(
    ("compiler", "why"),
    [("no-such-compiler", "CXX=no-such-compiler: .*No such file"), ("false", "false failed"), ("true", "CXX=true: .*")],
)
def test_why_there_is_none_is_told(compiler, why, home, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    found = load_kernel()
    assert isinstance(found, str)
    assert __import__("re").match(why, found), found


def test_without_a_compiler_a_capture_goes_the_plain_way_and_says_so(home, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    entry = entry_of(pairs("llama"), prompts=("a bc",))
    result = capture_pair(entry, str(tmp_path / "out"))
    assert "no: no C++ compiler is installed" in (Path(result.path) / "capture.json").read_text()
    with pytest.raises(ConfigError, match=r"lens.compile is true, but no C\+\+ compiler is installed"):
        capture_pair(entry.model_copy(update={"lens": Lens(compile=True)}), str(tmp_path / "other"))


def test_neither_threads_nor_rows_change_a_bit():
    one = kernel()
    generator = torch.Generator().manual_seed(3)
    x = [torch.randn(7, 1203, generator=generator) for _ in range(3)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(one.tile(separate(x), pairs, 1200, 5))
    finally:
        torch.set_num_threads(before)
    few = one.tile(separate([t[2:4] for t in x]), pairs, 1200, 5)
    for name in ("entropy", "logsumexp", "ba", "ab"):
        a, b, c = (getattr(f.divergences, name) for f in (*found, few))
        assert torch.equal(a, b)
        assert torch.equal(a[:, 2:4], c)
    for a, b, c in zip(found[0].decreased, found[1].decreased, few.decreased, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.values[2:4], c.values)


def test_slots_that_are_sums_of_tensors():
    one = kernel()
    generator = torch.Generator().manual_seed(4)
    root, shift, common, more = (torch.randn(3, 700, generator=generator) for _ in range(4))
    logits = Logits([root, shift * 1e-3, common * 1e-3, more * 1e-3], [(1,), (1, 2), (1, 3), (1, 3, 4)])
    pairs = [(0, 1), (1, 3), (2, 3)]
    found = one.tile(logits, pairs, 700, 4)
    for i, (a, b) in enumerate(pairs):
        exact = [sum(logits.tensors[t - 1].double() for t in logits.slots[s]).log_softmax(1) for s in (a, b)]
        want = (exact[1].exp() * (exact[1] - exact[0])).sum(1)
        assert ((found.divergences.ba[i] - want).abs() / want).max() < 1e-4
        d = sum((1 if t > 0 else -1) * logits.tensors[abs(t) - 1].double() for t in logits.shift_terms(a, b))
        assert torch.equal(found.increased[i].ids, d.topk(4).indices)
        assert torch.equal(found.decreased[i].ids, d.topk(4, largest=False).indices)


@pytest.mark.parametrize("where", [0.0, 200.0, 800.0])  # logits, whose sums are rounded as they are large
@pytest.mark.parametrize("way", ["compiled", "plain", "exact"])
def test_small_divergences_do_not_know_how_sums_are_rounded(way, where):
    """Slots that are told from each other by shifts of 1e-3: divergences of some 1e-7, of every ordered pair, and their lists."""
    generator = torch.Generator().manual_seed(0)
    vocab, listed = 1900, 1880
    first, *moved = (torch.randn(20, vocab, generator=generator) for _ in range(4))
    first = 3 * first + where
    first[:, 5:7] += 12
    logits = Logits([first, *(1e-3 * m for m in moved)], [(1,), (1, 2), (1, 3), (1, 2, 4)])
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    how = {"compiled": {"kernel": kernel()}, "plain": {}, "exact": {"exact": True}}[way]
    nothing = torch.zeros(20, dtype=torch.long)
    slots, found = lens_tile(logits, pairs, nothing, nothing[:1], Vocabulary(listed, 4), rows=7, at_once=3, **how)
    log_p = [sum(logits.tensors[t - 1].double() for t in terms).log_softmax(1) for terms in logits.slots]
    for s, p in enumerate(log_p):
        assert torch.equal(slots[s].top.ids[:, 0], p[:, :listed].argmax(1)) or where > 0
        assert (slots[s].entropy + (p.exp() * p).sum(1)).abs().max() < 1e-5 * max(1.0, where)
    for a, b in pairs:
        want = (log_p[b].exp() * (log_p[b] - log_p[a])).sum(1)
        floor = 4e-10 if way == "plain" else 0.0  # as divergence.KL_FLOOR says of sums
        assert ((found[a, b].kl_ba - want).abs() <= 5e-4 * want + floor).all(), (a, b)
        assert not found[a, b].lossy.any()
        shift = sum((1 if t > 0 else -1) * logits.tensors[abs(t) - 1].double() for t in logits.shift_terms(a, b))
        assert torch.equal(found[a, b].increased.ids[:, 0], shift[:, :listed].argmax(1))
        assert torch.equal(found[a, b].decreased.ids[:, 0], shift[:, :listed].argmin(1))


@pytest.mark.parametrize("way", ["compiled", "plain", "exact"])
def test_the_shift_between_sums_that_share_nothing_is_that_of_their_logits(way):
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(9, 1300, generator=generator) for _ in range(4)]
    led = Logits(x, [(1,), (2,), (1, 3), (2, 4)])
    plain = separate([x[0], x[1], x[0] + x[2], x[1] + x[3]])
    pairs = [(0, 1), (2, 3), (3, 2), (0, 3)]
    how = {"compiled": {"kernel": kernel()}, "plain": {}, "exact": {"exact": True}}[way]
    nothing = torch.zeros(9, dtype=torch.long)
    given = pairs, nothing, nothing[:1], Vocabulary(1290, 5)
    (ours, found), (theirs, want) = (lens_tile(one, *given, rows=4, at_once=2, **how) for one in (led, plain))
    for pair in pairs:
        assert torch.equal(found[pair].increased.ids, want[pair].increased.ids)
        assert torch.equal(found[pair].decreased.values, want[pair].decreased.values)
        assert torch.allclose(found[pair].kl_ab, want[pair].kl_ab, rtol=1e-5, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.top.values, b.top.values)
        assert torch.allclose(a.entropy, b.entropy, rtol=0, atol=1e-6)


@pytest.mark.parametrize("top", [0.0, 8.0, 16.0])  # how sure all slots are of one token
@pytest.mark.parametrize("spread", [1e-2, 0.05, 0.08, 0.15, 0.5, 3.0, 30.0])
def test_divergences_hold_from_where_slots_hardly_differ_to_where_they_differ_altogether(top, spread):
    """Logits that are one shift of 40 apart, as those of two models may be: what rounding costs must not grow with it."""
    one = kernel()
    generator = torch.Generator().manual_seed(5)
    first = torch.randn(40, 5000, generator=generator)
    first[:, 17] += top
    second = first + spread * torch.randn(40, 5000, generator=generator) + 40
    found = one.tile(separate([first, second]), [(0, 1)], 5000, 3)
    a, b = first.double().log_softmax(1), second.double().log_softmax(1)
    for got, want in ((found.divergences.ba[0], (b.exp() * (b - a)).sum(1)), (found.divergences.ab[0], (a.exp() * (a - b)).sum(1))):  # fmt: skip
        assert ((got - want).abs() / (want + 1e-7)).max() < 3e-4
    most = (torch.maximum(a, b).exp() * (a - b).abs()).sum(1)
    assert (found.apart[0] >= most * 0.999 - 5e-6).all()  # 40 is rounded to 4e-6
    assert (found.apart[0] <= most * 2.001 + 5e-6).all()


@pytest.mark.parametrize(("vocab", "listed", "k"), [(40, 40, 40), (700, 650, 20), (20_000, 19_999, 20), (20_000, 700, 3), (140_000, 140_000, 300)])  # fmt: skip
def test_lists_are_those_of_a_sort(vocab, listed, k):
    one = kernel()
    generator = torch.Generator().manual_seed(6)
    x = [torch.randn(3, vocab, generator=generator).mul(4).round() / 4 for _ in range(2)]  # with ties
    x[0][0] = x[0][0].sort().values  # rising: every entry is the best so far
    x[1][1] = 0
    found = one.tile(separate(x), [(0, 1)], listed, k)
    for got, values in ((found.slots[0], x[0]), (found.slots[1], x[1]), (found.increased[0], x[1] - x[0])):
        order = values[:, :listed].sort(descending=True, stable=True)
        assert torch.equal(got.ids, order.indices[:, :k])
        assert torch.equal(got.values, order.values[:, :k])
    order = (x[1] - x[0])[:, :listed].sort(stable=True)
    assert torch.equal(found.decreased[0].ids, order.indices[:, :k])
    assert torch.equal(found.decreased[0].values, order.values[:, :k])


@pytest.mark.parametrize("size", [3, 64, 577])
def test_residual_statistics_are_those_of_the_plain_way(size):
    one = kernel()
    generator = torch.Generator().manual_seed(7)
    states = [torch.randn(90, size, generator=generator) * 10.0**e for e in (0, 2, -3)]
    states.append(states[0] + 1e-6 * states[2])
    states[1][3] = states[2][3] = 0
    before = [states[1] * 2, states[0]]
    turns, pairs = [(0, 1), (0, 2), (1, 0), (1, 3)], [(0, 1), (0, 3), (1, 2), (2, 2)]
    blocks = [
        ([x[some] for x in states], [x[some] for x in before]) for some in (slice(1), slice(1, 50), slice(50, 90))
    ]
    plain, compiled = residuals(blocks, turns, pairs), residuals(blocks, turns, pairs, one)
    for name, want in vars(plain).items():
        got = getattr(compiled, name)
        assert got.dtype == want.dtype == torch.float64
        assert ((got - want).abs() <= 1e-11 * want.abs() + 1e-25).all() or name == "norm_delta", name
    assert torch.allclose(compiled.norm_delta, plain.norm_delta, rtol=0, atol=1e-11)
    assert (compiled.turned[2] == 0).all()  # a state from itself
    assert not one.takes_states([states[0].double()])
    assert residuals([(states[:1], [])], [], [], one).turned.shape == (0, 90)


def test_what_it_does_not_take():
    one = kernel()
    x = torch.zeros(2, 40)
    assert one.takes(separate([x, x]), 5)
    assert not one.takes(separate([x.double(), x.double()]), 5)
    assert not one.takes(separate([x.T.contiguous().T, x]), 5)
    assert not one.takes(separate([x] * 17), 5)
    assert not one.takes(separate([x]), 0)
