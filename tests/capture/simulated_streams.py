"""A simulated GPU's streams, on the processor: what is asked of the stream of copies happens as late as its order allows, and memory
that may not be read yet holds nothing of use. The code under test is capture/upload.py's own; only torch.cuda is simulated.

What the main thread computes happens at once, as on a processor; so it is right only if it waited for what it reads.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext

import torch

from capture import upload

LOCK = threading.RLock()
CPU = torch.device("cpu")


class Stream:
    """What was asked of it, in order, and how much of that has happened."""

    def __init__(self, device=None, *, late=True):
        self.late, self.asked, self.done = late, [], 0

    def ask(self, what):
        with LOCK:
            self.asked.append(what)
            if not self.late:
                self.run(len(self.asked))

    def run(self, until):
        with LOCK:
            while self.done < until:
                what, self.asked[self.done] = self.asked[self.done], None
                self.done += 1
                what()

    def wait_event(self, event):
        self.ask(event.synchronize)


class Event:
    def __init__(self, *, blocking=False):
        self.stream = None

    def record(self, stream):
        with LOCK:
            self.stream, self.behind = stream, len(stream.asked)

    def query(self):
        return self.stream.done >= self.behind

    def synchronize(self):
        if self.stream is not None:
            self.stream.run(self.behind)


class Cuda:
    """As much of torch.cuda as an upload uses. main: the stream that layers are asked of."""

    Stream, Event = Stream, Event

    def __init__(self, *, late=False):
        self.main, self.current = Stream(late=late), threading.local()

    def default_stream(self, device=None):
        return self.main

    def current_stream(self, device=None):
        return getattr(self.current, "stream", self.main)

    @contextmanager
    def stream(self, stream):
        before, self.current.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self.current.stream = before

    def device(self, device):
        return nullcontext()

    def empty_cache(self):
        pass


class Late(upload.SideStream):
    """An upload on simulated streams. on_main: what is let go, with what was asked of the main stream by then."""

    def __init__(self, device=CPU, *, late=False):
        super().__init__(device, Cuda(late=late))
        self.copies = 0

    def put(self, source, dtype, device):
        out = torch.full(source.shape, float("nan") if dtype.is_floating_point else 77, device=device).to(dtype)
        self.fill(out, source)
        return out

    def _send(self, out, piece):
        self.copies += 1
        self.cuda.current_stream().ask(lambda: out.copy_(piece))

    def _pinned(self, nbytes):
        return torch.empty(nbytes, dtype=torch.uint8)

    def _used_by(self, weight, stream):
        pass
