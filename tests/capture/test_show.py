"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest

from capture.attempt import duration
from capture.progress import Progress
from capture.show import WAITING, Show


def walk(layer: int) -> Progress:
    return Progress("a", "layers", layer, 30, 1234.5, 75.0)


def test_plain_lines_of_one_entry_are_seconds_apart() -> None:
    stream = io.StringIO()
    with Show(stream=stream, every=60) as show:
        for layer in range(5):
            show.progress(walk(layer))
        show.progress(Progress("b", "open"))
        show.event("a", "complete")
    assert stream.getvalue().splitlines() == [
        "a: layers, layer 0/30, 1,234 tokens/s, 1 min 15 s left", "b: open", "a: complete",
    ]  # fmt: skip


def test_a_stream_that_is_no_terminal_gets_plain_lines() -> None:
    assert not Show(stream=io.StringIO()).live


def test_a_terminal_shows_a_moving_line_per_entry_and_counts_the_waiting() -> None:
    stream = io.StringIO()
    with Show(stream=stream, live=True) as show:
        show.doing("x", WAITING)
        show.doing("y", WAITING)
        show.doing("b", "starting")
        show.progress(walk(7))
        show.note("[a line] that stays")
        show._live.refresh()
    text = stream.getvalue()
    for part in ("layer 7/30", "1,234 tokens/s", "s left", "starting", "2 waiting", "[a line] that stays"):
        assert part in text


def test_an_entry_that_ended_has_no_moving_line() -> None:
    show = Show(stream=io.StringIO(), live=False)
    show.progress(walk(7))
    show.end("a")
    assert show.moving == {}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (75, "1 min 15 s"), (3600, "1 h 00 min"), (7500, "2 h 05 min")]
)
def test_durations_read_like_clocks(seconds: float, text: str) -> None:
    assert duration(seconds) == text
