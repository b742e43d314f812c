"""Progress on stderr: one moving line per entry on a terminal, plain lines a few seconds apart elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from capture.attempt import duration, progress_line, speed
from capture.printable import escape
from capture.progress import Progress

WAITING = "waiting"  # entries that do this are counted on one line

NARROW = 70  # columns of a terminal


class Show:
    """Enter it, then report: `event` for what stays on the screen, `progress` for what moves, `end` when an entry is done.

    live: None decides by whether `stream` is a terminal. every: least seconds between two plain progress lines of an entry.
    """

    def __init__(self, *, stream: TextIO | None = None, live: bool | None = None, every: float = 5.0) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.live = self.stream.isatty() if live is None else live
        self.every = every
        self.moving: dict[str, tuple[Progress | str, float]] = {}  # what each entry does now, and since when it says so
        self._stages: dict[str, tuple[str, float]] = {}  # and since when it is at that stage
        self._said: dict[str, tuple[float, str]] = {}
        self._live: Any = None

    def __enter__(self) -> Show:
        if self.live:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                console=Console(file=self.stream, force_terminal=True), get_renderable=self._render, refresh_per_second=4, transient=True,
                redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            try:
                self._live.__exit__(None, None, None)
            except OSError:  # the terminal has gone: that is no failure of the work
                _lead_nowhere(self.stream)
            self._live = None

    def event(self, entry: str, text: str) -> None:
        """A line that stays: an entry started, was retried, is complete, failed."""
        self.note(f"{entry}: {text}")

    def note(self, line: str) -> None:
        """A line that stays and belongs to no entry."""
        line = escape(line, keep="\n")
        try:
            if self._live is not None:
                self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, file=self.stream, flush=True)
        except OSError:  # who read it, `head` say, or the terminal has gone: the work goes on unseen
            _lead_nowhere(self.stream)

    def doing(self, entry: str, what: str) -> None:
        """A few words on what an entry does before it reports progress itself; only a terminal shows them."""
        self._now(entry, what, what)

    def _now(self, entry: str, what: Progress | str, stage: str) -> None:
        now = time.monotonic()
        if self.moving.get(entry, ("", now))[0] != what:  # a sweep hears the same several times over
            self.moving[entry] = (what, now)
        if self._stages.get(entry, ("", now))[0] != stage:
            self._stages[entry] = (stage, now)

    def progress(self, progress: Progress) -> None:
        self._now(progress.entry, progress, progress.stage)
        now = time.monotonic()
        if self.live:
            return
        said, line = self._said.get(progress.entry, (-self.every, ""))
        new = progress_line(progress)
        if now - said >= self.every and new != line:
            self._said[progress.entry] = (now, new)
            self.note(f"{progress.entry}: {new}")

    def end(self, entry: str) -> None:
        self.moving.pop(entry, None)
        self._stages.pop(entry, None)

    def _render(self) -> Any:
        return _Fitting(self._lines)

    def _lines(self, columns: int) -> Any:
        """A line for each entry that moves; on a narrow terminal without its rate, and with the middle of its name left out."""
        from rich.console import Group
        from rich.table import Table

        table = Table.grid("", padding=(0, 2))
        for _ in range(4 if columns >= NARROW else 3):
            table.add_column(no_wrap=True)

        def row(entry: str, what: str, layer: str, rate: str, at_it: str) -> None:
            table.add_row(_Name(entry), what, layer, *([rate] if columns >= NARROW else []), at_it)

        waiting = sum(what == WAITING for what, _ in list(self.moving.values()))
        for entry, (what, since) in list(self.moving.items()):
            if what == WAITING:
                continue
            now = time.monotonic()
            at_it = duration(now - self._stages.get(entry, ("", since))[1])
            entry = escape(entry)
            if isinstance(what, str):
                row(entry, what, "", "", at_it)
                continue
            layer = f"layer {what.layer}/{what.n_layers}" if what.n_layers else ""
            rate = speed(what.tokens_per_second) if what.tokens_per_second is not None else ""
            stage = f"{what.stage}, {what.message}" if what.message else what.stage
            # the estimate is as old as the report, so the seconds since then are taken off
            if what.seconds_left is not None:
                at_it = f"{duration(max(0, what.seconds_left - (now - since)))} left"
            row(entry, stage, layer, rate, at_it)
        return Group(table, f"{waiting} waiting") if waiting else table


class _Fitting:
    """What is drawn anew for the width that there is. lines: takes it, in columns."""

    def __init__(self, lines: Callable[[int], Any]) -> None:
        self.lines = lines

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield self.lines(options.max_width)


class _Name:
    """A name of which both ends are seen where it does not fit: those of a sweep often begin alike."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __rich_measure__(self, console: Any, options: Any) -> Any:
        from rich.measure import Measurement

        return Measurement(min(9, len(self.name)), len(self.name))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        room = options.max_width - 1
        cut = len(self.name) > room + 1
        yield Text(f"{self.name[: room // 2]}…{self.name[room // 2 - room :]}" if cut else self.name, no_wrap=True)


def tell(line: str) -> None:
    """A line of the answer, on stdout. That nobody reads it any more is no failure of work that is done."""
    import click

    try:
        click.echo(escape(line, keep="\n\t"))
    except OSError:
        _lead_nowhere(sys.stdout)


def _lead_nowhere(stream: TextIO) -> None:
    """Send what is still to be printed to the null device, or every later line, and Python's exit, would fail."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
