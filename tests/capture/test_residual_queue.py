"""States of several batches and layers go through their statistics together; waiting changes no number."""

import agree
import numpy as np
import pytest
import tiny
from test_capture import captured, entry_of

from capture import footprint, residual_queue
from capture.config import Lens
from capture.settings import Batching, Spans
from capture.spans import SpanStore

DEEP = {"num_hidden_layers": 9}
PROMPTS = ("a bc", "cd", "efghij klm")  # three batches


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return tiny.make_pair("llama", tmp_path_factory.mktemp("deep"), **DEEP)


@pytest.fixture
def flushed(monkeypatch):
    """Columns of what is worked off together, each time."""
    seen = []
    flush = residual_queue.ResidualQueue.flush

    def noted(self):
        if self.waiting:
            seen.append([w.column for w in self.waiting])
        flush(self)

    monkeypatch.setattr(residual_queue.ResidualQueue, "flush", noted)
    return seen


def tables(path):
    return {name: agree.read_tables(path)[name] for name in ("runs", "pairwise")}


def test_states_of_all_layers_that_want_the_same_go_together(deep, tmp_path, flushed):
    captured(entry_of(deep, prompts=PROMPTS, lens=Lens(enabled=False)), tmp_path)
    # what enters has none before it, what leaves the first layer had two states before it, and the final norm has its own order
    assert [sorted(set(columns)) for columns in flushed] == [[0], [1], list(range(2, 10)), [10]]
    assert flushed[2].count(2) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_how_many_wait_changes_no_bit(padding, dtype, deep, tmp_path, monkeypatch, flushed):
    entry = entry_of(deep, prompts=PROMPTS, dtype=dtype, lens=Lens(enabled=False), batching=Batching(padding=padding))
    together, _ = captured(entry, tmp_path / "together")
    assert len(flushed) == 4
    monkeypatch.setattr(footprint, "WAITING_CELLS", 0)
    alone, _ = captured(entry, tmp_path / "alone")
    assert len(flushed) > 4 + 10
    monkeypatch.setattr(footprint, "WAITING_CELLS", 3000)
    some, _ = captured(entry, tmp_path / "some")
    assert tables(together.path) == tables(alone.path) == tables(some.path)


def test_what_waits_is_in_the_span_that_is_committed(deep, tmp_path, monkeypatch):
    committed = []
    commit = SpanStore.commit

    def noted(store, first, last, columns, *more, **options):
        committed.append(columns["runs/norm"].copy())
        return commit(store, first, last, columns, *more, **options)

    monkeypatch.setattr(SpanStore, "commit", noted)
    captured(entry_of(deep, prompts=PROMPTS, lens=Lens(enabled=False), spans=Spans(layers=3)), tmp_path)
    assert len(committed) == 2
    assert all(np.isfinite(norms).all() for norms in committed)
