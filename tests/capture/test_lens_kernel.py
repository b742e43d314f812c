"""The compiled lens: built once, refused clearly, and what it does not take goes the plain way."""

import os
import stat
from pathlib import Path

import pytest
import torch
from test_capture import entry_of

from capture import lens_kernel
from capture.config import Lens
from capture.errors import ConfigError
from capture.lens_kernel import Kernel, load_kernel
from capture.logits import Logits, separate
from capture.run import capture_pair


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
    [("no-such-compiler", "no-such-compiler: .*No such file"), ("false", "false failed"), ("true", "true: .*")],
)
def test_why_there_is_none_is_told(compiler, why, home, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    found = load_kernel()
    assert isinstance(found, str)
    assert __import__("re").match(why, found), found


def test_without_a_compiler_a_capture_goes_the_plain_way_and_says_so(home, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(lens_kernel.shutil, "which", lambda name: None)
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


def test_what_it_does_not_take():
    one = kernel()
    x = torch.zeros(2, 40)
    assert one.takes(separate([x, x]), 5)
    assert not one.takes(separate([x.double(), x.double()]), 5)
    assert not one.takes(separate([x.T.contiguous().T, x]), 5)
    assert not one.takes(separate([x] * 17), 5)
    assert not one.takes(separate([x]), 0)
