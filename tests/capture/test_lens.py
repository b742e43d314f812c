"""The lens statistics against float64, over five orders of magnitude of shift, and ties by smaller id."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpreted

from capture.group import Group
from capture.lens import lens_tile
from capture.lens_kernel import Kernel, load_kernel
from capture.lens_sums import Space
from capture.live import Live
from capture.logits import separate
from capture.threads import alone, in_threads
from capture.topk import Search, Vocabulary, best_of, block_maxima, merged, settled

PAIRS = [(a, b) for a in range(4) for b in range(a + 1, 4)]
NEXT = torch.tensor([3, 0, -1, 7, 1])
TRACKED = torch.tensor([5, 1])


@pytest.fixture(params=["eager", "compiled", "triton"])
def way(request):
    """What lens_tile is told of the compiled ways, which must do all that the plain one does."""
    if request.param == "eager":
        return {}
    if request.param == "triton":
        return {"fused": interpreted().Fused()}
    found = load_kernel()
    if not isinstance(found, Kernel):
        pytest.skip(found)
    return {"kernel": found}


def logits(vocab, scale):
    """Three shifted copies of random logits, and an equal one."""
    generator = torch.Generator().manual_seed(vocab)
    first = torch.randn(5, vocab, generator=generator) * 4
    return [first, *(first + scale * torch.randn(5, vocab, generator=generator) for _ in range(2)), first.clone()]


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 0.1, 1, 10, 60, 300])
@pytest.mark.parametrize("vocab", [40, 64, 307, 20011])
def test_statistics_agree_with_float64(vocab, scale, way):
    if "fused" in way:  # interpreted, some hundred times slower: three tiles of a program tell what ten do
        vocab = min(vocab, 5003)
    x = logits(vocab, scale)
    n = vocab - 3
    slots, pairs = lens_tile(separate(x), PAIRS, NEXT, TRACKED, Vocabulary(n, 10), rows=2, **way)
    exact = [one.double().log_softmax(1) for one in x]
    for one, log_p, stats in zip(x, exact, slots, strict=True):
        entropy = -(log_p.exp() * log_p).sum(1)
        assert (entropy - stats.entropy).abs().max() < 1e-5
        want = log_p.gather(1, NEXT.clamp(min=0)[:, None])[:, 0]
        assert torch.allclose(stats.next_logprob[[0, 1, 3, 4]], want[[0, 1, 3, 4]], atol=1e-5)
        assert stats.next_logprob[2].isnan()
        assert torch.equal(stats.tracked, one[:, TRACKED])
        ranked = one[:, :n].sort(dim=1, descending=True, stable=True)
        assert torch.equal(stats.top.ids, ranked.indices[:, :10])
        assert torch.equal(stats.top.values, ranked.values[:, :10])
    for (a, b), stats in pairs.items():
        p, q = exact[a], exact[b]
        for want, got in (((q.exp() * (q - p)).sum(1), stats.kl_ba), ((p.exp() * (p - q)).sum(1), stats.kl_ab)):
            seen = want > 1e-6
            assert (((got - want).abs() / want)[seen] < 1e-3).all()
            assert (got >= 0).all()
        shift = x[b] - x[a]
        up = shift[:, :n].sort(dim=1, descending=True, stable=True)
        down = shift[:, :n].sort(dim=1, stable=True)
        assert torch.equal(stats.increased.ids, up.indices[:, :10])
        assert torch.equal(stats.increased.values, up.values[:, :10])
        assert torch.equal(stats.decreased.ids, down.indices[:, :10])
        assert torch.equal(stats.decreased.values, down.values[:, :10])


@pytest.mark.parametrize("vocab", [307, 320])  # a last block that is not whole, and none behind the whole ones
def test_equal_slots_differ_by_exactly_nothing(way, vocab):
    x = separate(logits(vocab, 1.0))
    _, pairs = lens_tile(x, PAIRS, NEXT, TRACKED, Vocabulary(vocab, 3), rows=5, **way)
    assert (pairs[(0, 3)].kl_ba == 0).all()
    assert (pairs[(0, 3)].kl_ab == 0).all()
    assert torch.equal(pairs[(0, 3)].increased.ids[0], torch.arange(3))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("vocab", [307, 20011])
def test_how_many_rows_are_worked_on_at_a_time_and_in_how_many_threads_changes_no_bit(vocab, exact):
    x = logits(vocab, 1.0)
    x[1][3] *= 40  # one row whose slots are far apart goes another way, and its neighbours do not
    few = Vocabulary(vocab - 7, 5)
    ways = [(1, 1, 1), (2, 2, 1), (5, 1, 1), (5, 2, 1), (5, 5, 1), (2, 1, 2), (5, 2, 3), (1, 1, 9)]
    tiles = [
        lens_tile(
            separate(x),
            PAIRS,
            NEXT,
            TRACKED,
            few,
            rows=rows,
            at_once=at_once,
            exact=exact,
            spaces=[Space() for _ in range(threads)],
        )
        for rows, at_once, threads in ways
    ]
    for other in tiles[1:]:
        for a, b in zip(tiles[0][0], other[0], strict=True):
            assert torch.equal(a.entropy, b.entropy)
            assert torch.equal(a.top.values, b.top.values)
        for pair in PAIRS:
            assert torch.equal(tiles[0][1][pair].kl_ba, other[1][pair].kl_ba)
            assert torch.equal(tiles[0][1][pair].kl_ab, other[1][pair].kl_ab)
            assert torch.equal(tiles[0][1][pair].increased.ids, other[1][pair].increased.ids)


def test_threads_leave_torch_its_own_and_tell_what_went_wrong_in_one_of_them():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen = {}
        with alone():
            in_threads(lambda i, first, last: seen.update({i: (first, last, torch.get_num_threads())}), 7, 3)
        assert seen == {0: (0, 2, 1), 1: (2, 4, 1), 2: (4, 7, 1)}
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), alone():
            in_threads(lambda i, first, last: 1 // (2 - i), 3, 3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("pairs", [[(0, 3)], [(1, 2), (0, 2)], [(2, 1), (3, 0)], []])
def test_some_pairs_alone_are_as_they_are_among_all(pairs):
    x = logits(307, 1.0)
    few = Vocabulary(301, 5)
    slots, found = lens_tile(separate(x), pairs, NEXT, TRACKED, few, rows=5)
    all_slots, every = lens_tile(separate(x), PAIRS, NEXT, TRACKED, few, rows=5)
    assert list(found) == pairs
    for one, other in zip(slots, all_slots, strict=True):
        assert torch.equal(one.entropy, other.entropy)
    for (a, b), stats in found.items():
        turned = a > b
        want = every[min(a, b), max(a, b)]
        assert torch.equal(stats.kl_ba, want.kl_ab if turned else want.kl_ba)
        assert torch.equal(stats.increased.ids, (want.decreased if turned else want.increased).ids)
        assert torch.equal(stats.decreased.ids, (want.increased if turned else want.decreased).ids)


def local_top_k(searches, maxima, n, k):
    best = best_of(searches, maxima, n, k)
    return settled(best, searches, best.ties.numpy())


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_ties_are_broken_by_the_smaller_id(data):
    vocab = data.draw(st.sampled_from([5, 15, 16, 63, 130, 257, 600]))
    n = data.draw(st.integers(0, vocab))
    values = data.draw(st.lists(st.integers(-2, 2), min_size=vocab, max_size=vocab))
    k = data.draw(st.integers(1, 12))
    x = torch.tensor([values], dtype=torch.float32)
    maxima = torch.stack([block_maxima(x, n, lowest=lowest) for lowest in (False, True)])
    highest, lowest = local_top_k([Search(lambda take: take(x), lowest) for lowest in (False, True)], maxima, n, k)
    assert highest.ids[0].tolist() == sorted(range(n), key=lambda i: (-values[i], i))[:k]
    assert lowest.ids[0].tolist() == sorted(range(n), key=lambda i: (values[i], i))[:k]


def test_ties_beside_an_entry_that_is_no_number_are_listed():
    x = torch.arange(64.0).repeat(2, 1)
    x[1, 5], x[1, 60] = torch.nan, x[1, 59]
    (top,) = local_top_k([Search(lambda take: take(x))], block_maxima(x, 64)[None], 64, 6)
    assert top.ids.tolist() == [[63, 62, 61, 60, 59, 58], [5, 63, 62, 61, 59, 60]]


class Halves(Group):
    """The rank that has the first half of a vocabulary; the other's candidates are told."""

    def gather(self, x):
        return torch.cat([x, self.other.pop(0)], dim=1)


def test_ranks_list_as_many_tokens_where_logits_are_not_finite():
    """The first row says nothing about how many entries the ranks have: it may have overflowed."""
    x = torch.arange(20.0).repeat(3, 1)
    x[0], x[1, 4] = torch.nan, torch.inf
    group = Halves(0, 2)
    object.__setattr__(group, "other", [x[:, 10:], torch.arange(10, 20).expand(3, -1)])
    v = Vocabulary(10, 10, 0, group)
    mine = x[:, :10]
    searches = [Search(lambda take: take(mine))]
    (top,) = merged(local_top_k(searches, block_maxima(mine, 10)[None], v.n, v.k), searches, v)
    assert top.ids.shape == (3, 10)
    assert top.ids[1, :3].tolist() == [4, 19, 18]
    assert top.ids[2].tolist() == list(range(19, 9, -1))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflow_shows_as_not_finite_instead_of_a_number(way, value):
    x = logits(307, 1.0)
    x[1][2, 9] = value
    slots, _ = lens_tile(separate(x), PAIRS, NEXT, TRACKED, Vocabulary(307, 3), rows=5, **way)
    assert not slots[1].logsumexp[2].isfinite()
    assert slots[1].entropy[[0, 1, 3, 4]].isfinite().all()


def test_a_peaked_slot_beside_a_broad_one_and_its_twin_keep_their_digits(way):
    generator = torch.Generator().manual_seed(5)
    broad = torch.randn(6, 307, generator=generator)
    peaked = broad - 11 * (torch.arange(307) > 2)
    twin = peaked + 0.02 * torch.randn(6, 307, generator=generator)
    rows = torch.zeros(6, dtype=torch.long)
    slots, pairs = lens_tile(
        separate([broad, peaked, twin]), [(1, 2)], rows, TRACKED, Vocabulary(307, 5), rows=3, **way
    )
    p, q = (x.double().log_softmax(1) for x in (peaked, twin))
    assert (-(p.exp() * p).sum(1) - slots[1].entropy).abs().max() < 1e-6
    want = (q.exp() * (q - p)).sum(1)
    assert ((pairs[(1, 2)].kl_ba - want).abs() / want).max() < 1e-4


def test_two_slots_close_to_each_other_and_far_from_the_first_keep_their_divergence(way):
    generator = torch.Generator().manual_seed(5)
    x = [4 * torch.randn(6, 307, generator=generator)]
    for step in (3, 1e-3):
        x.append(x[-1] + step * torch.randn(6, 307, generator=generator))
    rows = torch.zeros(6, dtype=torch.long)
    _, pairs = lens_tile(separate(x), [(1, 2)], rows, TRACKED, Vocabulary(307, 5), rows=3, **way)
    p, q = (one.double().log_softmax(1) for one in x[1:])
    want = (q.exp() * (q - p)).sum(1)
    assert want.max() < 1e-6, "smaller than what the sums alone can tell"
    assert ((pairs[1, 2].kl_ba - want).abs() / want).max() < 1e-3


def test_a_small_kl_is_lossy_where_the_slots_hardly_differ_and_not_where_both_are_sure_of_one_token(way):
    generator = torch.Generator().manual_seed(9)
    close = torch.randn(5, 3000, generator=generator)
    sure = close.clone()
    sure[:, 7] = 20  # all but 1e-5 of the weight
    for first, scale, lossy in ((close, 5e-3, True), (sure, 0.3, False), (close, 0.3, False)):
        x = [first, first + scale * torch.randn(5, 3000, generator=generator)]
        _, pairs = lens_tile(separate(x), [(0, 1)], NEXT, TRACKED, Vocabulary(3000, 5), rows=2, **way)
        assert bool((pairs[0, 1].kl_ba < 1e-4).all()) == (lossy or first is sure)
        assert pairs[0, 1].lossy.tolist() == [lossy] * 5


@pytest.mark.parametrize("listed", [301, 307, 9])
def test_one_slot_alone_has_its_entropy_and_lists(listed):
    x = logits(307, 1.0)[:1]
    (slot,), pairs = lens_tile(separate(x), [], NEXT, TRACKED, Vocabulary(listed, 4), rows=2)
    log_p = x[0].double().log_softmax(1)
    assert pairs == {}
    assert torch.allclose(slot.entropy, -(log_p.exp() * log_p).sum(1), atol=1e-5)
    assert torch.equal(slot.top.values, x[0][:, :listed].topk(4, dim=1).values)


def test_a_row_alone_has_the_bits_that_it_has_among_others():
    """torch adds up one long row in as many parts as there are threads, and one of several in one."""
    x = logits(40_009, 1.0)
    x[1][3] *= 40
    few = Vocabulary(40_009, 5)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        both = [Space(), Space()]
        _, all_rows = lens_tile(separate(x), PAIRS, NEXT, TRACKED, few, rows=5, spaces=both)
        for row in range(5):
            some = slice(row, row + 1)
            _, one = lens_tile(separate([s[some] for s in x]), PAIRS, NEXT[some], TRACKED, few, rows=5, spaces=both)
            for pair in PAIRS:
                assert torch.equal(one[pair].kl_ba, all_rows[pair].kl_ba[some]), (row, pair)
    finally:
        torch.set_num_threads(before)


def test_a_workspace_lets_go_what_it_had_before_it_takes_more():
    space, like = Space(), torch.zeros(1)
    with Live(torch.device("cpu")) as live:
        space.take(2, 0, 4, 5000, 5000, like)
        small = live.live
        space.take(4, 2, 8, 5000, 5000, like)
        assert live.peak == live.live > small
