"""Follow a cluster's sweep to its end: collect every few seconds, outlast lost connections, and say when all is at home."""

from __future__ import annotations

import random
import shlex
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from typing import Any

from capture.attempt import duration
from capture.layout import RunDir
from capture.show import Show
from capture.stop import Stop
from cluster.collect import Collector, Round, settle_away
from cluster.collect_errors import ClusterGoneError, StrangeHeadError, UnreachableError
from cluster.collect_source import HeadSource, Look, StoreSource

FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0  # between tries at a head that does not answer
ONCE_TRIES = 3
PATIENCE_S = 300.0  # without a sweep, until it is said that the one which was submitted may never have begun
DIED = "the sweep died"


@dataclass(frozen=True)
class Verdict:
    """Where a sweep stands, seen from home. over: nothing more will come. trouble: what is not as it should be, one line each."""

    over: bool
    state: str
    trouble: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


def verdict(done: Round, at_home: Callable[[str, str], bool]) -> Verdict:
    """What one round found, against what the sweep itself noted."""
    look = done.look
    sweep = sweep_of(look)
    trouble = [f"{name} is not at home: {why}" for name, why in done.left.items()]
    if look.error:
        trouble.append(f"'{look.out}' cannot be read on the head: {look.error}")
    if sweep is None:
        others = sorted({str(s.get("out")) for s in look.sweeps})
        into = f"; there are sweeps into {', '.join(others)}" if others else ""
        return Verdict(False, f"no sweep into '{look.out}' is known{into}", tuple(trouble))
    if sweep.get("alive"):
        return Verdict(False, "the sweep runs", tuple(trouble))
    judged = [*_beside(sweep, look), sweep]
    ended = [s for s in judged if s.get("exit_code") is not None]
    items = [i for s in ended for i in s.get("items", []) if isinstance(i, dict)]
    whole = [i for i in items if i.get("state") in ("complete", "skipped")]
    died = any(_lacks(s, {str(i.get("entry")) for i in whole}) for s in judged if s.get("exit_code") is None)
    if died:
        trouble.append("the sweep ended without a word: killed, or its job's log says why; submit it again, it goes on")
    for item in whole:
        name = f"{item.get('entry')} ({item.get('capture')})"
        if name not in done.left and not at_home(str(item.get("entry")), str(item.get("capture"))):
            trouble.append(f"{name} is not at home: the sweep completed it, and it is not there any more")
    rest = [i for i in items if not any(_serves(w, i) for w in whole)]
    failed = tuple(dict.fromkeys(str(i.get("entry")) for i in rest if i.get("state") == "failed"))
    open_ = [e for e in dict.fromkeys(str(i.get("entry")) for i in rest) if e not in failed]
    if open_:
        trouble.append(f"the sweep was stopped before {', '.join(open_)}; submit it again, it goes on")
    return Verdict(True, DIED if died else "the sweep has ended", tuple(trouble), failed)


def _beside(sweep: dict[str, Any], look: Look) -> list[dict[str, Any]]:
    """The sweeps into the same directory that ran when this one began, which took up nothing of theirs. What had ended before was
    there for it to take up."""
    beside = sweep.get("beside")
    known = beside if isinstance(beside, list) else []
    return [s for s in _ours(look) if s is not sweep and [s.get("pid"), s.get("born")] in known]


def _serves(whole: dict[str, Any], item: dict[str, Any]) -> bool:
    """Whether an entry that is complete is what another sweep has not completed: the same capture, where that came as far as to know."""
    unknown = item.get("capture") is None and item.get("state") != "failed"
    return whole.get("entry") == item.get("entry") and (unknown or whole.get("capture") == item.get("capture"))


def _lacks(sweep: dict[str, Any], done: Container[str]) -> bool:
    """Whether something that a sweep was to do is in none that has ended."""
    entries = sweep.get("entries")
    return not isinstance(entries, list) or not entries or any(str(entry) not in done for entry in entries)


def sweep_of(look: Look) -> dict[str, Any] | None:
    """The last sweep into the directory looked at; one that runs before one that has ended."""
    ours = _ours(look)
    running = [s for s in ours if s.get("alive")]
    return (running or ours)[-1] if ours else None


def _ours(look: Look) -> list[dict[str, Any]]:
    return [s for s in look.sweeps if place(s.get("out")) == place(look.out)]


def place(out: Any) -> Any:
    """A run directory's address as it may be compared: a store's is typed with a `/` at its end or without, and has other options
    where another machine looks at it. What a head says that is no text stays as it is."""
    return out.partition("?")[0].rstrip("/") if isinstance(out, str) and "://" in out else out


def results(look: Look) -> Look:
    """What of a look decides whether the cluster may go: all but the manifest and the logs."""
    return replace(look, rows=[], logs=[])


def why_not_down(look: Look, collector: Collector) -> list[str]:
    """Why the cluster must not be taken down although its last sweep is at home; empty if it may."""
    reasons = [f"a sweep into '{s.get('out')}' runs" for s in look.sweeps if s.get("alive")]
    reasons += [
        f"'{place}' on the head cannot be read ({why}), so nobody knows what of it is not at home; mend it or remove it there, or end "
        "the cluster by hand with `ray down`"
        for place, why in look.unread.items()
    ]
    for out, captures in look.others.items():
        wrong = {f"{c.pair} ({c.capture})": lines[0] for c in captures if (lines := collector.verify(c))}
        for name, why in list(wrong.items())[:1]:
            n = len(wrong)
            reasons.append(
                f"'{out}' on the head holds {n} complete capture{'s' * (n != 1)} that are not at home ({name}: {why}); collect with "
                f"--remote-out {shlex.quote(out)}, or end the cluster by hand with `ray down`"
            )
    return reasons + [f"{c.pair}: {line}" for c in look.captures for line in collector.verify(c)]


class Follow:
    """One call of `pairscope collect`. remote_out: None for the last sweep's. tear_down: ends the cluster; its exit code."""

    def __init__(
        self, head: HeadSource, remote_out: str | None, home: RunDir, show: Show, stop: Stop, *, every: float, once: bool,
        tear_down: Callable[[], int] | None,
    ) -> None:  # fmt: skip
        self.head, self.remote_out, self.home, self.show, self.stop = head, remote_out, home, show, stop
        self.every, self.once, self.tear_down = every, once, tear_down
        self.collector: Collector | None = None
        self.gone: ClusterGoneError | None = None
        self.said, self.began = "", time.monotonic()

    def run(self) -> int:
        """0: the sweep has ended and all of it is at home (with `once`: all that is complete so far). 1: something failed or is
        missing. Raises KeyboardInterrupt after a stop, StrangeHeadError, and with `once` UnreachableError."""
        tries = 0
        while True:
            try:
                done = self._round()
                if self.gone is not None:
                    return self._gone(self.gone)
                code = self._judge(done) if done is not None else None
                tries = 0
            except UnreachableError as error:
                tries += 1
                if tries >= ONCE_TRIES and (self.once or isinstance(error, StrangeHeadError)):
                    if self.tear_down:
                        self.show.note("the cluster stays up, and costs money")
                    raise
                pause = min(FIRST_PAUSE_S * 2 ** (tries - 1), LONGEST_PAUSE_S) * random.uniform(0.8, 1.2)
                self.show.note(f"{error}; trying again in {duration(pause)}")
                self._sleep(pause)
                continue
            except ClusterGoneError as error:
                if not self._store_alone():
                    return self._gone(error)
                self.gone = error
                continue
            if code is not None:
                return code
            if done is None and self.once:
                self.show.note("no sweep was submitted to this cluster yet")
                return 1
            if done is None:
                self._say(self._no_sweep("no sweep yet"))
            self._sleep(self.every)

    def _no_sweep(self, state: str) -> str:
        waited = time.monotonic() - self.began
        if waited < PATIENCE_S:
            return f"{state}; waiting for one"
        return (
            f"{state}, and the cluster costs money: a job that failed before its sweep began leaves no word here, `ray job list` on "
            "the head has it; waiting for one"
        )

    def _round(self) -> Round | None:
        """None while there is no sweep."""
        if self.collector is None:
            out = self.remote_out or self.head.look().out
            if out is None:
                return None
            source: HeadSource | StoreSource = HeadSource(self.head.reach, out)
            if "://" in out:
                self.show.note(f"the results are in {out}, which outlives the cluster; fetching from there")
                source = StoreSource(out, self.head)
            self.collector = Collector(source, self.home, self.show, self.stop.requested)
        return self.collector.round()

    def _judge(self, done: Round) -> int | None:
        """The exit code, or None to go on."""
        assert self.collector is not None
        found = verdict(done, self.collector.at_home)
        n = len(self.collector.verified)
        if found.over:
            # what has ended over there and could not come home; into a store others may still write
            died = found.state == DIED
            rows = [row for row in done.look.rows if died or row.get("state") != "running"]
            settle_away(self.home, {str(row.get("attempt")) for row in rows})
            self.show.note(f"{found.state}; {n} capture{'s' * (n != 1)} at home in {self.home.out}")
            for line in found.trouble:
                self.show.note(f"  {line}")
            if found.failed:
                self.show.note(
                    f"  failed: {', '.join(found.failed)} (pairscope status {shlex.quote(self.home.out)} has the errors)"
                )
            code = 1 if found.trouble or found.failed else 0
            return self._finish(done, found, code) if self.tear_down else code
        if self.once:
            self.show.note(f"{found.state}; {n} capture{'s' * (n != 1)} at home in {self.home.out}")
            if self.tear_down:
                self.show.note(f"the cluster stays up: {found.state}")
            return 1 if found.trouble or self.tear_down else 0
        state = found.state if sweep_of(done.look) else self._no_sweep(found.state)
        self._say(f"{state}; {n} at home")
        return None

    def _finish(self, done: Round, found: Verdict, code: int) -> int | None:
        """End the cluster, or say why not; the exit code, `code` at least. None to go on, where the head's disk has changed since it
        was looked at."""
        assert self.collector is not None
        assert self.tear_down is not None
        reasons = [*found.trouble, *why_not_down(done.look, self.collector)]
        if reasons:
            self.show.note("the cluster stays up, and costs money:")
            for line in dict.fromkeys(reasons):
                self.show.note(f"  {line}")
            return 1
        # the look is as old as all that was fetched and read since: a sweep may have been submitted meanwhile
        if results(self.collector.source.look()) != results(done.look):
            self.show.note("the cluster stays up: something was done there while the results came home; looking again")
            return 1 if self.once else None
        self.show.note("all that is complete is at home and verified; taking the cluster down")
        return max(code, self.tear_down())

    def _store_alone(self) -> bool:
        """From here on look into the store without asking the cluster, which it outlives; False where the results are in none."""
        source = self.collector.source if self.collector is not None else None
        if not isinstance(source, StoreSource):
            return False
        source.head = None
        return True

    def _gone(self, error: ClusterGoneError) -> int:
        self.show.note(str(error))
        settle_away(self.home)
        if self.collector is not None:
            n = len(self.collector.verified)
            rest = (
                "from the store; sweep again for the rest"
                if self._store_alone()
                else "before it went; a new head has none of them, so name the others when you sweep again (--entries)"
            )
            self.show.note(f"{n} capture{'s' * (n != 1)} came home {rest}")
        return 1

    def _say(self, line: str) -> None:
        """A line where it says something new; on a terminal it is always there."""
        self.show.doing("collect", f"{line}; looking every {self.every:g} s")
        if line != self.said and not self.show.live:
            self.show.note(line)
        self.said = line

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.stop.requested():
                raise KeyboardInterrupt
            time.sleep(min(0.2, max(0.0, until - time.monotonic())))
