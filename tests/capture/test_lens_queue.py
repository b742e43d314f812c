"""Rows of several layers share a product of the lens; where a walk is cut changes none of it."""

import dataclasses

import agree
import numpy as np
import pytest
import tiny
import torch
from test_capture import captured, entry_of, expected
from torch.utils._python_dispatch import TorchDispatchMode

from capture import lens, lens_plan, lens_queue
from capture.asked import asked
from capture.config import Lens
from capture.lens_plan import layers_at_once
from capture.lens_sums import Space
from capture.run import capture_pair
from capture.settings import Spans

HEAD = 1 << 20  # bytes of an unembedding that is small beside its layers
DEEP = {"num_hidden_layers": 13}  # of which three share a product


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return tiny.make_pair("llama", tmp_path_factory.mktemp("deep"), **DEEP)


@pytest.fixture
def heights(monkeypatch):
    """Rows of every tile, as they are worked off."""
    seen = []
    statistics = lens_queue.LensQueue._statistics

    def noted(self, rows):
        seen.append((len(rows), sorted({int(x) for x in rows.layer})))
        return statistics(self, rows)

    monkeypatch.setattr(lens_queue.LensQueue, "_statistics", noted)
    return seen


def test_rows_of_three_layers_share_a_product(deep, tmp_path, heights):
    _, document = captured(entry_of(deep, prompts=("a bc", "cd")), tmp_path)
    layers = [found for _, found in heights]
    assert layers[:4] == [[i, i + 1, i + 2] for i in range(-1, 11, 3)]
    assert layers[4:] == [[11, 12]]  # the last, whose lens is that of the final norm's layer too
    assert all(n == len(found) * document["n_tokens"] for n, found in heights)


@pytest.mark.parametrize("spans", [Spans(layers=1), Spans(layers=3), Spans(seconds=1e-9)])
def test_a_walk_commits_only_where_no_row_waits_and_cutting_it_changes_no_number(spans, deep, tmp_path):
    entry = entry_of(deep, prompts=("a bc", "cd"))
    whole, _ = captured(entry, tmp_path / "whole")
    cut, document = captured(entry.model_copy(update={"spans": spans}), tmp_path / "cut")
    ends = [s["last"] for s in document["spans"]]
    assert len(ends) >= 3
    assert all((last + 2) % 3 == 0 for last in ends)
    a, b = agree.read_tables(whole.path), agree.read_tables(cut.path)
    assert a.keys() == b.keys()
    for table in a:
        keys = [(c, "ascending") for c in agree.KEYS[table]]
        assert a[table].sort_by(keys).equals(b[table].sort_by(keys)), table


def test_layers_without_a_lens_do_not_keep_rows_waiting(deep, tmp_path, heights):
    lens = Lens(layers=(0, 1, 2, 9))
    _, document = captured(entry_of(deep, prompts=("a bc",), lens=lens, spans=Spans(layers=1)), tmp_path)
    assert [found for _, found in heights] == [[0, 1], [2], [9]]
    assert len(document["spans"]) > 6


def test_layers_of_which_nothing_is_wanted_do_not_keep_rows_waiting(deep, tmp_path, heights):
    """Layers 1, 4, 7 and 10 end the groups of three; a walk that waits for one of them would never commit."""
    entry = entry_of(deep, prompts=("a bc", "cd"), layers=(-1, 2, 5, 8, 11), spans=Spans(layers=1))
    _, document = captured(entry, tmp_path)
    assert [found for _, found in heights] == [[i] for i in (-1, 2, 5, 8, 11)]
    assert len(document["spans"]) >= 4


@pytest.mark.parametrize("compiled", ["auto", False, "as on a GPU"])
@pytest.mark.parametrize("scale", [1e-3, 2e-2, 1.0])
def test_rows_whose_slots_hardly_differ_and_others_agree_with_float64(scale, compiled, tmp_path, monkeypatch):
    """The pair's difference runs from nothing to large over the layers, so that tiles hold rows of both kinds, in all orders."""
    on_gpu = compiled == "as on a GPU"  # where rows are led only if they have to be
    if on_gpu:
        compiled, queue = False, lens_queue.LensQueue.__init__
        monkeypatch.setattr(
            lens_queue.LensQueue, "__init__", lambda self, *a: (queue(self, *a), setattr(self, "led_at_once", False))[0]
        )
    paths = tiny.make_pair("llama", tmp_path / "pair", **DEEP, perturb=scale)
    ways = []
    by = lens_queue.LensQueue._by
    monkeypatch.setattr(lens_queue.LensQueue, "_by", lambda self, way, rows: ways.append(way) or by(self, way, rows))
    entry = entry_of(paths, dtype="float32", lens=Lens(compile=compiled))
    result, document = captured(entry, tmp_path / "out")
    assert (document["numerics"]["lens_compiled"] is True) == (compiled == "auto")
    from reference import load_pair

    want = expected(load_pair(paths, dtype=torch.float32), tiny.encode(tiny.PROMPTS))
    assert agree.disagreements(want, agree.read_tables(result.path)) == []
    separate, led, shifted = lens_queue.SEPARATE, lens_queue.LED, lens_queue.SHIFTED
    at_first = separate if on_gpu else led
    assert set(ways) == {1e-3: {shifted}, 2e-2: {at_first, led}, 1.0: {at_first}}[scale]


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for: numbers and lengths that Python has to know."""

    ASK = (
        torch.ops.aten.nonzero.default,
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.masked_select.default,
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in self.ASK or by_mask:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_decisions_about_a_tile_whose_rows_are_good_are_asked_of_the_device_in_three_copies(tmp_path, monkeypatch):
    """Where rows are led only if they have to be, and nothing is compiled, as on a GPU."""
    queue, statistics = lens_queue.LensQueue.__init__, lens_queue.LensQueue._statistics
    monkeypatch.setattr(
        lens_queue.LensQueue, "__init__", lambda self, *a: (queue(self, *a), setattr(self, "led_at_once", False))[0]
    )
    monkeypatch.setattr(lens_queue.LensQueue, "_workspaces", lambda self: [Space()])  # all in this thread
    copies, tiles = [], []
    for module in (lens, lens_queue):
        monkeypatch.setattr(module, "asked", lambda *masks: copies.append(len(masks)) or asked(*masks))

    def watched(self, rows):
        before = len(copies)
        with Waits() as waits:
            found = statistics(self, rows)
        tiles.append((len(copies) - before, len(waits.seen)))
        return found

    monkeypatch.setattr(lens_queue.LensQueue, "_statistics", watched)
    paths = tiny.make_pair("llama", tmp_path / "pair", **DEEP, perturb=0.1)
    captured(entry_of(paths, dtype="float32", lens=Lens(compile=False)), tmp_path / "out")
    assert tiles.count((3, 0)) >= 3
    assert {n for n, _ in tiles} <= {3, 4}, "one more, where a row is found again"


@pytest.mark.parametrize("compiled", ["auto", False])
@pytest.mark.parametrize("overflown", range(4))
def test_a_pass_that_overflows_costs_the_divergences_of_the_others_no_digit(overflown, compiled, tmp_path, monkeypatch):
    paths = tiny.make_pair("llama", tmp_path / "pair", perturb=1e-3)
    entry = entry_of(paths, dtype="float32", lens=Lens(compile=compiled))
    want = agree.read_tables(captured(entry, tmp_path / "whole")[0].path)["pairwise"]
    put = lens_queue.LensQueue.put

    def overflowing(self, rows):
        if len(rows.states) == 4:
            states = [s.clone() for s in rows.states]
            states[overflown][:, 3] = torch.inf
            rows = dataclasses.replace(rows, states=states)
        put(self, rows)

    monkeypatch.setattr(lens_queue.LensQueue, "put", overflowing)
    got = agree.read_tables(captured(entry, tmp_path / "overflown")[0].path)["pairwise"]
    assert got["base_run"].equals(want["base_run"])
    for column in ("kl_divergence", "kl_reverse"):
        a, b = (np.array(t[column].to_pylist(), float) for t in (want, got))
        kept = (a > 1e-6) & ~np.isnan(b)
        assert 500 < kept.sum() < (a > 1e-6).sum()
        np.testing.assert_allclose(b[kept], a[kept], rtol=1e-4)


def test_states_much_smaller_than_those_of_their_lead_are_not_led_by_them():
    """A sum is as rounded as its larger term. Rows: all alike; the third's lead is larger, and the fourth's smaller; one is zero."""
    kind = lens_queue.Kind(("base", "sft", "base", "sft"), (None, None, 0, 1), ((0, 2), (1, 3)), ())
    sizes = [[1, 5, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 5, 5, 1]]
    states = [torch.tensor(x, dtype=torch.bfloat16)[:, None].expand(-1, 7) for x in sizes]
    rows = lens_queue.Waiting(kind, states, torch.zeros(4), np.zeros(4), np.zeros(4))
    assert lens_queue._alike(rows).tolist() == [True, False, True, False]


def test_the_lens_of_models_in_float64_agrees_with_the_reference(tmp_path):
    paths = tiny.make_pair("llama", tmp_path / "pair")
    result, _ = captured(entry_of(paths, dtype="float64"), tmp_path / "out")
    from reference import load_pair

    want = expected(load_pair(paths, dtype=torch.float64), tiny.encode(tiny.PROMPTS))
    assert agree.disagreements(want, agree.read_tables(result.path)) == []


@pytest.mark.parametrize("norm", ["final", "none"])
def test_an_unembedding_is_given_states_in_its_models_dtype(norm, tmp_path, monkeypatch):
    """Mamba's layers go on in float32, and its head rounds what it is given."""
    seen, put = set(), lens_queue.LensQueue.put
    monkeypatch.setattr(
        lens_queue.LensQueue, "put", lambda self, rows: (seen.update(s.dtype for s in rows.states), put(self, rows))[1]
    )
    paths = tiny.make_pair("mamba", tmp_path / "pair")
    captured(entry_of(paths, prompts=("a bc",), dtype="bfloat16", lens=Lens(norm=norm)), tmp_path / "out")
    assert seen == {torch.bfloat16}


def test_how_many_layers_share_a_product_follows_from_the_rows_and_the_layers():
    large = 400 << 20
    assert layers_at_once(12, 30, large, HEAD, alone=True) == 4
    assert layers_at_once(100, 30, large, HEAD, alone=True) == 4
    assert layers_at_once(160, 30, large, HEAD, alone=True) == 2
    assert layers_at_once(320, 30, large, HEAD, alone=True) == 1
    assert layers_at_once(1, 126, large, HEAD, alone=True) == 16
    assert layers_at_once(1, 4, large, HEAD, alone=True) == 1


def test_where_layers_are_small_more_of_them_share_a_product():
    assert layers_at_once(12, 30, 14 << 20, HEAD, alone=True) == 8
    assert layers_at_once(1, 126, 14 << 20, HEAD, alone=True) == 16, (
        "a quarter of these is more than what is walked again in a moment"
    )
    assert layers_at_once(64, 30, 14 << 20, HEAD, alone=True) == 5
    assert layers_at_once(12, 30, 14 << 20, HEAD, alone=False) == 4, "ranks of a group see shares of other sizes"
    assert layers_at_once(1, 4, 1 << 10, HEAD, alone=True) == 1


def test_where_the_unembedding_is_large_half_of_the_small_layers_share_a_product():
    assert layers_at_once(12, 30, 14 << 20, 108 << 20, alone=True) == 16
    assert layers_at_once(64, 30, 14 << 20, 108 << 20, alone=True) == 5
    assert layers_at_once(12, 30, 14 << 20, 108 << 20, alone=False) == 4
    assert layers_at_once(12, 30, 20 << 20, 108 << 20, alone=True) == 8, "half of these is too much, a quarter is not"
    assert layers_at_once(12, 30, 400 << 20, 2 << 30, alone=True) == 4


def test_the_capture_id_does_not_know_how_the_lens_was_computed(deep, tmp_path):
    entry = entry_of(deep, prompts=("a",))
    ids = {
        capture_pair(entry.model_copy(update={"lens": Lens(compile=way)}), str(tmp_path)).capture
        for way in ("auto", False)
    }
    assert len(ids) == 1


def test_a_processor_with_a_larger_cache_goes_through_more_rows_at_a_time(monkeypatch, tmp_path):
    told = tmp_path / "size"
    monkeypatch.setattr(lens_plan, "LAST_CACHE", told)

    def rows(n_vocab):
        lens_plan._cells_in_cache.cache_clear()
        return lens_plan.statistics_rows(n_vocab, on_cpu=True, alone=True)[1]

    try:
        assert rows(50_000) == 4, "a system that does not tell"
        for text, at_once in (("16384K\n", 4), ("46080K\n", 5), ("266240K\n", 8), ("?\n", 4)):
            told.write_text(text)
            assert rows(50_000) == at_once, text
        assert rows(500_000) == 1
    finally:
        lens_plan._cells_in_cache.cache_clear()
