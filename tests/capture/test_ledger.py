"""Memory is let go at the end of a capture, without a look at all that the libraries keep."""

import gc
import weakref

import pytest
import tiny
from test_capture import entry_of

from capture import checkpoint, work
from capture.ledger import own_garbage
from capture.run import capture_pair


class Knot:
    """What only a garbage collector lets go."""

    def __init__(self):
        self.itself = self


def test_garbage_of_a_block_goes_at_its_end_and_what_was_there_before_is_not_looked_at():
    set_aside, made = [], []

    def note(phase, info):
        set_aside.append(gc.get_freeze_count())

    def interrupted():
        with own_garbage():
            made.append(weakref.ref(Knot()))
            gc.callbacks.append(note)
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        gc.callbacks.remove(note)
    assert made[0]() is None
    assert min(set_aside) > 10_000
    assert gc.get_freeze_count() == 0


def test_within_another_block_nothing_of_the_outer_one_is_undone():
    with own_garbage():
        outer = gc.get_freeze_count()
        with own_garbage():
            made = weakref.ref(Knot())
        assert made() is None
        assert gc.get_freeze_count() > 0.9 * outer
    assert gc.get_freeze_count() == 0


def test_nothing_stays_set_aside_where_freeing_memory_fails(monkeypatch):
    def failing():
        raise RuntimeError("the device is gone")

    def freed():
        with own_garbage():
            monkeypatch.setattr("capture.ledger.free_memory", failing)

    with pytest.raises(RuntimeError, match="the device is gone"):
        freed()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("fails", [False, True])
def test_models_of_earlier_captures_do_not_stay(fails, tmp_path, monkeypatch):
    opened = weakref.WeakSet()
    init = checkpoint.StreamedModel.__init__

    def noted(self, *args, **kwargs):
        opened.add(self)
        init(self, *args, **kwargs)

    def wrong(self):
        raise RuntimeError("wrong")

    monkeypatch.setattr(checkpoint.StreamedModel, "__init__", noted)
    if fails:
        monkeypatch.setattr(work.Work, "_check_zeros", wrong)
    paths = tiny.make_pair("llama", tmp_path / "pair")
    alive = []
    for number in range(4):
        try:
            capture_pair(entry_of(paths, prompts=("a",)), str(tmp_path / str(number)))
        except RuntimeError:
            assert fails
        alive.append(len(opened))
    assert alive == ([2] * 4 if fails else [0] * 4)  # those of an error until the next begins
