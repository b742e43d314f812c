"""Memory is let go at the end of a capture, without a look at all that the libraries keep."""

import gc
import weakref

import pytest

from capture.ledger import own_garbage


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

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    gc.callbacks.remove(note)
    assert made[0]() is None
    assert min(set_aside) > 10_000
    assert gc.get_freeze_count() == 0
