"""Bytes of what is alive are counted exactly, whenever it goes."""

import torch

from capture.live import Live

CPU = torch.device("cpu")


def test_what_is_made_counts_until_it_is_gone_and_views_do_not():
    with Live(CPU) as live:
        x = torch.empty(100)
        rows = x.view(10, 10)[2:]
        assert live.live == 400
        y = x + 1
        del x, y
        assert (live.live, live.peak) == (400, 800)
        assert live.at_peak == [400, 400]
        del rows
    assert live.live == 0


def test_what_is_made_where_something_lay_that_is_gone_counts():
    with Live(CPU) as live:
        row = torch.zeros(1000)
        for _ in range(50):  # the allocator gives the same places again and again
            two = torch.sort(row)
            assert live.live == 4000 + 12000
            del two


def test_what_goes_while_something_else_is_being_counted_is_taken_off(monkeypatch):
    """As when garbage is collected at that moment."""
    with Live(CPU) as live:
        old = [torch.empty(1000)]
        nbytes = torch.UntypedStorage.nbytes
        with monkeypatch.context() as patched:
            patched.setattr(torch.UntypedStorage, "nbytes", lambda storage: (old.clear(), nbytes(storage))[1])
            new = torch.empty(10)
        assert live.live == 40
    del new
    assert live.live == 0
