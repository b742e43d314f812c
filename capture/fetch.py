"""Bytes of remote files, fetched ahead of their use by several connections, within a window of memory.

What will be needed is announced in order of use; *units* (tensors that lie next to each other, or one large tensor) are fetched
in that order, each in parts by several threads, as long as all units that nobody has taken yet fit the window. What somebody
waits for comes first, whatever the window. A unit's memory becomes the tensors' own: it is not copied.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from capture.ranges import CONNECTIONS, Ranges, RemoteFile, Stopped
from capture.spool import Spool

log = logging.getLogger(__name__)

UNIT = 16 << 20  # bytes of small tensors that are fetched together
GAP = 64 << 10  # bytes between two tensors that are rather fetched than left out
PART = 4 << 20  # bytes of one request
WINDOW = 512 << 20
ALIGN = 64  # a tensor lies in memory as it lies in its file, so that kernels do on it what they do on a mapped file

Span = tuple[RemoteFile, int, int]  # bytes start to stop of a file


@dataclass(eq=False)
class Unit:
    """Bytes start to stop of a file. left: spans of it that nobody has taken yet."""

    file: RemoteFile
    start: int
    stop: int
    left: set[Span]
    buffer: Tensor | None = None
    parts: deque[tuple[int, int]] = field(default_factory=deque)  # not asked for yet
    open: int = 0  # parts that have not come yet
    wanted: int = 0  # threads that wait for it
    gone: bool = False  # nobody will take anything of it any more
    error: BaseException | None = None

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def view(self, start: int, stop: int) -> Tensor:
        """Bytes of the file, as they lie in the unit's memory."""
        assert self.buffer is not None
        shift = self.start % ALIGN - self.start
        return self.buffer[start + shift : stop + shift]


class Fetcher:
    """See the module. spools: where what passes is kept as well. window: bytes; may be changed until the first is fetched."""

    def __init__(self, ranges: Ranges, *, window: int = WINDOW, connections: int = CONNECTIONS) -> None:
        self.ranges, self.window, self.connections = ranges, window, connections
        self.spools: dict[RemoteFile, Spool] = {}
        self.pin = False
        self.held = self.peak = 0  # bytes of units that are there, or on their way, and not taken
        self.fetched = 0
        self._units: dict[Span, Unit] = {}
        self._queue: deque[Unit] = deque()  # not begun
        self._begun: deque[Unit] = deque()  # with parts to ask for
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closed = False

    # -- for those who need bytes --------------------------------------------------------------------------------------

    def announce(self, spans: Iterable[Span]) -> None:
        """These will be taken, in about this order after all that was announced before."""
        with self._changed:
            new = [s for s in dict.fromkeys(spans) if s not in self._units]
            for unit in _units(new):
                self._units |= dict.fromkeys(unit.left, unit)
                self._queue.append(unit)
            self._start_threads()
            self._changed.notify_all()

    def announced(self, span: Span) -> bool:
        with self._changed:
            return span in self._units

    def take(self, span: Span) -> Tensor:
        """The bytes of a span, uint8 [stop - start]; waited for. It may have been announced, and is not any more.

        Raises CheckpointError, Stopped.
        """
        with self._changed:
            unit = self._units.get(span)
            if unit is None:
                unit = Unit(*span, left={span})
                self._units[span] = unit
                self._queue.appendleft(unit)
                self._start_threads()
            unit.wanted += 1
            self._first(unit)
            self._changed.notify_all()
            while (unit.buffer is None or unit.open) and unit.error is None:
                if self._closed:
                    raise Stopped
                self._changed.wait()
            unit.wanted -= 1
            if unit.error is not None:
                raise unit.error
            self._let_go(unit, span)
            return unit.view(span[1], span[2])

    @property
    def idle(self) -> bool:
        """Nothing of what was announced is still to come."""
        with self._changed:
            return not self._queue and not self._begun and not any(unit.open for unit in self._units.values())

    def cancel(self, spans: Iterable[Span]) -> None:
        """These will not be taken after all."""
        with self._changed:
            for span in spans:
                if span in self._units:
                    self._let_go(self._units[span], span)

    def close(self) -> None:
        """Give up all that is under way."""
        self.ranges.close()
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._begun.clear()
            self._units.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(0.5)  # one that waits for a silent server ends with the process

    # -- fetching ------------------------------------------------------------------------------------------------------

    def _first(self, unit: Unit) -> None:
        for queue in (self._queue, self._begun):
            if unit in queue and queue[0] is not unit:
                queue.remove(unit)
                queue.appendleft(unit)

    def _let_go(self, unit: Unit, span: Span) -> None:
        unit.left.discard(span)
        self._units.pop(span, None)
        if unit.left or unit.wanted or unit.gone:
            return
        unit.gone = True
        if unit in self._queue:
            self._queue.remove(unit)
        if unit.buffer is not None:
            self.held -= unit.nbytes
            if unit in self._begun:
                self._begun.remove(unit)
                unit.open -= len(unit.parts)
                unit.parts.clear()
        self._changed.notify_all()

    def _start_threads(self) -> None:
        while len(self._threads) < self.connections and not self._closed:
            thread = threading.Thread(target=self._work, name="fetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                while (job := self._next()) is None:
                    if self._closed:
                        return
                    self._changed.wait()
            unit, start, stop = job
            try:
                if unit.error is None:
                    self._fetch(unit, start, stop)
            except BaseException as error:
                with self._changed:
                    unit.error = unit.error or error
            with self._changed:
                unit.open -= 1
                if not unit.open or unit.error is not None:
                    self._changed.notify_all()

    def _next(self) -> tuple[Unit, int, int] | None:
        """A part to ask for; None where there is none, or no room."""
        while self._queue and (self._queue[0].wanted or not self._begun):
            unit = self._queue[0]
            if not unit.wanted and self.held and self.held + unit.nbytes > self.window:
                break
            self._queue.popleft()
            if self._begin(unit):
                break
        if not self._begun:
            return None
        unit = self._begun[0]
        start, stop = unit.parts.popleft()
        if not unit.parts:
            self._begun.popleft()
        return unit, start, stop

    def _begin(self, unit: Unit) -> bool:
        """Whether there is memory for it; where there is none, who waits for the unit is told, and who comes later has it tried again."""
        try:
            unit.buffer = self._memory(unit.nbytes + unit.start % ALIGN)
        except Exception as error:
            unit.error = error
            for span in unit.left:
                self._units.pop(span, None)
            self._changed.notify_all()
            return False
        unit.parts = deque((a, min(a + PART, unit.stop)) for a in range(unit.start, unit.stop, PART))
        unit.open = len(unit.parts)
        self.held += unit.nbytes
        self.peak = max(self.peak, self.held)
        if unit.wanted:
            self._begun.appendleft(unit)
        else:
            self._begun.append(unit)
        return True

    def _memory(self, nbytes: int) -> Tensor:
        """Pinned where it shall be and can be: the system may have less of that than memory."""
        if self.pin:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                log.info("fetched bytes are not in pinned memory: %s", str(error).splitlines()[0])
        return torch.empty(nbytes, dtype=torch.uint8)

    def _fetch(self, unit: Unit, start: int, stop: int) -> None:
        view = memoryview(unit.view(start, stop).numpy())  # type: ignore[arg-type]
        spool = self.spools.get(unit.file)
        if spool is not None and spool.read(start, view):
            return
        self.ranges.read(unit.file, start, view)
        with self._changed:
            self.fetched += len(view)
        if spool is not None:
            spool.write(start, view)


def _units(spans: Sequence[Span]) -> list[Unit]:
    """Spans as units: neighbours in a file together, in the order in which the first of each was announced."""
    place = {span: i for i, span in enumerate(spans)}
    found: list[tuple[int, Unit]] = []
    for span in sorted(spans, key=lambda s: (s[0].repo, s[0].name, s[1])):
        file, start, stop = span
        last = found[-1][1] if found else None
        if (
            last
            and last.file == file
            and start - last.stop <= GAP
            and stop - last.start <= UNIT
            and start >= last.start
        ):
            last.stop = max(last.stop, stop)
            last.left.add(span)
            found[-1] = (min(found[-1][0], place[span]), last)
        elif stop > start:
            found.append((place[span], Unit(file, start, stop, {span})))
    return [unit for _, unit in sorted(found, key=lambda item: item[0])]
