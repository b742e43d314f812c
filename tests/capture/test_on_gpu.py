"""On an NVIDIA GPU: the same tolerances against float64, the same states in every mode, and no more memory than was planned."""

import json

import agree
import pytest
import tiny
import torch
from test_capture import entry_of, expected
from test_lens import PAIRS, TRACKED, logits

from capture.footprint import MODES
from capture.lens import lens_tile
from capture.lens_kernel import load_fused
from capture.logits import separate
from capture.run import capture_pair
from capture.topk import Vocabulary
from capture.unembed import NARROW, _product, narrow_works
from capture.upload import SideStream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def fused():
    found = load_fused(CUDA)
    assert not isinstance(found, str), found
    return found


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 0.1, 1, 10, 60, 300])
@pytest.mark.parametrize("vocab", [40, 307, 20011, 152064])
def test_the_kernels_agree_with_float64_and_with_plain_operations(vocab, scale, fused):
    x = [one.to(CUDA) for one in logits(vocab, scale)]
    following = torch.tensor([3, 0, -1, 7, 1], device=CUDA)
    given = separate(x), PAIRS, following, TRACKED.to(CUDA), Vocabulary(vocab - 3, 10)
    ways = [lens_tile(*given, rows=2), lens_tile(*given, rows=2, fused=fused)]
    exact = [one.double().log_softmax(1) for one in x]
    for slots, pairs in ways:
        for log_p, stats in zip(exact, slots, strict=True):
            assert (-(log_p.exp() * log_p).sum(1) - stats.entropy).abs().max() < 1e-5
        for (a, b), stats in pairs.items():
            p, q = exact[a], exact[b]
            for want, got in (((q.exp() * (q - p)).sum(1), stats.kl_ba), ((p.exp() * (p - q)).sum(1), stats.kl_ab)):
                assert ((got - want).abs() <= 1e-3 * want)[want > 1e-6].all()
    for one, other in zip(ways[0][0], ways[1][0], strict=True):
        assert torch.equal(one.top.ids, other.top.ids)
        assert torch.equal(one.top.values, other.top.values)
    for pair in PAIRS:
        for name in ("increased", "decreased"):
            one, other = (getattr(way[1][pair], name) for way in ways)
            assert torch.equal(one.ids, other.ids)
            assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("dtype", NARROW)
def test_products_of_16_bits_are_made_without_upcasting_and_are_as_good(dtype):
    assert narrow_works(CUDA, dtype)
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 1000, generator=generator).to(CUDA, dtype) for n in (70, 40_000))
    got = _product(rows, weight, None)
    want = rows.double() @ weight.double().T
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 1e-7 * rows.double().norm(dim=1).max() * weight.double().norm(dim=1).max() * 10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", ["llama", "mixtral", "gemma2"])
def test_every_statistic_agrees_with_float64(arch, mode, pairs, loaded, tmp_path):
    torch.backends.cuda.matmul.allow_tf32 = False
    result = capture_pair(entry_of(pairs(arch), device="cuda", mode=mode), str(tmp_path))
    want = expected(loaded(arch), tiny.encode(tiny.PROMPTS))
    assert agree.disagreements(want, agree.read_tables(result.path)) == []
    assert result.peak_memory_bytes <= result.planned_memory_bytes + (1 << 20)  # the allocator rounds small tensors up


def test_all_modes_write_the_same_bytes(pairs, tmp_path):
    found = set()
    for mode in MODES:
        result = capture_pair(entry_of(pairs("llama"), device="cuda", mode=mode), str(tmp_path / mode))
        tables = agree.read_tables(result.path)
        found.add(json.dumps({name: table.to_pylist() for name, table in tables.items()}, default=str, sort_keys=True))
    assert len(found) == 1


def test_weights_arrive_whole_through_pinned_memory(monkeypatch):
    lane = SideStream(CUDA)
    sources = [torch.randn(n, 4096, dtype=torch.bfloat16) for n in (1, 5000, 20_000, 3)]
    for turn in range(3):
        with lane.on_stream():
            made = [lane.put(s, torch.bfloat16, CUDA) for s in sources]
        lane.arriving(turn)
        lane.wait(turn)
        assert all(torch.equal(m.cpu(), s) for m, s in zip(made, sources, strict=True))
        lane.leaving(turn, made)
        del made
        lane.left()
