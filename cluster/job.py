"""One entry on its way through a sweep, and who works on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from capture.attempt import Outcome, Try
from capture.config import Entry
from capture.layout import RunDir
from capture.manifest import Attempt
from capture.relay import Sent
from cluster.crew import Crew
from cluster.resources import Request


@dataclass
class Job:
    """One entry. `row` is its last attempt's manifest row.

    The layers of an entry may be cut into spans, each walked by a crew of its own, one after the other; most entries have one.
    crews: by span, two at most, the one whose turn it is and the next, which gets ready meanwhile. sent: by span, what its
    crew handed over; it outlives attempts, so that another try goes on with the first span that is missing.
    """

    entry: Entry
    request: Request
    capture: str | None = None
    tried: Try = field(default_factory=Try)
    attempt: Attempt | None = None
    row: dict[str, Any] | None = None
    outcome: Outcome | None = None
    crews: dict[int, Crew] = field(default_factory=dict)
    sent: dict[int, Sent] = field(default_factory=dict)
    furthest: int = -1  # the last span that was ever handed over
    spent: float | None = None  # dollars, of the attempt's crews that are gone
    waiting_told: bool = False

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def spans(self) -> int:
        return self.entry.spans.workers

    @property
    def span(self) -> int:
        """The span whose turn it is."""
        return next(k for k in range(self.spans) if k not in self.sent)

    @property
    def crew(self) -> Crew | None:
        """The crew whose turn it is, once it was asked for."""
        return self.crews.get(self.span)

    @property
    def shares(self) -> bool:
        """Whether its worker may have worked on another entry before, and go on with another one behind it.

        Not where code of others runs in it, or ranks or spans belong together, and not where a try failed: that may have been
        the process's own doing.
        """
        kwargs, plain = self.entry.model_kwargs, self.request.ranks == 1 and self.spans == 1
        foreign = self.entry.allow_pickle or kwargs.get("trust_remote_code") or "quantization_config" in kwargs
        return plain and not foreign and self.tried == Try()

    @property
    def working(self) -> bool:
        """Whether the crew whose turn it is has a place."""
        return self.crew is not None and self.crew.place is not None

    def begin_attempt(self, run: RunDir) -> None:
        """Have an attempt to write about, unless there is one; its row is written when it starts on a node."""
        if self.attempt is None:
            self.attempt = Attempt(run, self.name)
            self.attempt.row |= {"capture": self.capture, "node": None}

    def dollars(self) -> float | None:
        """What the attempt's places have cost so far; None where no price is known."""
        known = [d for d in (self.spent, *(crew.dollars() for crew in self.crews.values())) if d is not None]
        return sum(known) if known else None
