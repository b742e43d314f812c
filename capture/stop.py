"""Ctrl-C, SIGTERM and a closed terminal: the first asks for a clean stop, the second ends at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Stop:
    """While entered, the first SIGINT, SIGTERM or SIGHUP makes `requested()` true; the next raises KeyboardInterrupt.

    `said` is called once, at the first signal, with a line for the user. Outside the main thread nothing is installed.
    """

    def __init__(self, said: Callable[[str], None] = lambda line: None) -> None:
        self.said = said
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        self.install()
        return self

    def install(self) -> None:
        """Take the signals, or take them back from a library that put its own handlers in between."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # under nohup the work goes on without its terminal
                before = signal.signal(number, self._handle)
                self._before.setdefault(number, before)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells count: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        # the signal came in the middle of a line that is being written, or there is no terminal any more
        with contextlib.suppress(RuntimeError, OSError):
            self.said("stopping; what is complete stays complete. Once more to stop at once")
