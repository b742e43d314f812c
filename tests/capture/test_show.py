"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import time

import pytest

from capture.attempt import complete_line, duration, speed
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


@pytest.mark.parametrize(
    ("tokens_per_second", "text"),
    [
        (0.04, "0.0 tokens/s"),
        (0.44, "0.4 tokens/s"),
        (9.94, "9.9 tokens/s"),
        (9.96, "10 tokens/s"),
        (1234.5, "1,234 tokens/s"),
    ],
)
def test_slow_speeds_keep_a_decimal(tokens_per_second: float, text: str) -> None:
    assert speed(tokens_per_second) == text


def test_prompts_are_told_apart_from_their_variants() -> None:
    row = {"seconds": 2.0, "n_prompts": 24, "n_tokens": 1000, "mode": "resident", "gpu": "cpu"}
    assert "24 prompts, 1,000 tokens" in complete_line(row)
    assert "8 prompts in 3 variants, 1,000 tokens" in complete_line(row, 3)


def shown(show: Show) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=80)
    with console.capture() as text:
        console.print(show._render())
    return text.get()


def test_an_entry_that_ends_while_the_screen_is_drawn_does_not_end_the_drawing() -> None:
    """Another thread draws: what it raises leaves a traceback and a screen that stands still."""
    show = Show(stream=io.StringIO(), live=True)

    class Ends(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            show.end("b")
            return str(self) == other

    for name in ("a", "b", "c"):
        show.doing(name, Ends("starting") if name == "a" else WAITING)
    assert shown(show).split()[:2] == ["a", "starting"]


def test_a_stage_without_an_estimate_shows_how_long_it_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    show = Show(stream=io.StringIO(), live=True)
    show.doing("a", "starting")
    clock[0] += 7
    assert shown(show).split() == ["a", "starting", "7", "s"]
    show.progress(Progress("a", "open", message="resolving files"))
    clock[0] += 30
    show.progress(Progress("a", "open", message="opening both models"))
    clock[0] += 40
    assert shown(show).split() == ["a", "open,", "opening", "both", "models", "1", "min", "10", "s"]


def test_an_estimate_that_is_reported_again_goes_on_running_down(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    show = Show(stream=io.StringIO(), live=True)
    for _ in range(3):
        show.progress(walk(7))
        clock[0] += 5
    assert "1 min 00 s left" in shown(show)


def test_work_goes_on_and_ends_well_when_nobody_reads_the_lines_any_more() -> None:
    code = "from capture.show import Show\nshow = Show()\nfor n in range(3): show.note(f'line {n}')\nprint('done')"
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "-c", code], stderr=writes, stdout=subprocess.PIPE, text=True)
    os.close(writes)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_a_terminal_that_has_gone_when_all_is_done_is_no_failure() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream, Show(stream=stream, live=True) as show:
        show.doing("a", "starting")
        os.close(ours)  # what is written there fails from here on
    assert show._live is None
