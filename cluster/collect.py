"""Bring finished captures home while a sweep runs: look, fetch what is complete, verify it, put it in place, look again."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capture.attempt import duration
from capture.errors import ConfigError, StoreError, cannot_write
from capture.layout import MARKER, RunDir, fitting
from capture.manifest import LOST, now
from capture.process import is_here
from capture.schema import MANIFEST
from capture.show import Show
from cluster.collect_check import DOCUMENT, LOG, PAIR, contents, unfit_marker, wrong_files
from cluster.collect_errors import DamagedError
from cluster.collect_source import Found, Look, Source

INCOMING = ".incoming"  # below the run directory: what is on its way
SPARE_BYTES = 64 << 20
NOT_HERE = "home has none, or another one of its id"


@dataclass
class Round:
    """One look and what was done about it. left: captures that are complete over there and not at home, with the reason."""

    look: Look
    fetched: int = 0
    left: dict[str, str] = field(default_factory=dict)


class Collector:
    """Everything that is at home and verified stays known, so that a round fetches only what is new."""

    def __init__(self, source: Source, home: RunDir, show: Show, stop: Callable[[], bool] = lambda: False) -> None:
        if not home.is_local:
            raise ConfigError(
                f"--out '{home.out}': home is a directory of this machine; the results are in a store already"
            )
        self.source, self.home, self.show, self.stop = source, home, show, stop
        self.root = Path(home.root)
        self.verified: dict[tuple[str, str], set[tuple[str, str]]] = {}
        self.refused: dict[tuple[str, str], tuple[Any, str]] = {}  # capture -> (its marker, why it is not taken)
        self.logs: set[str] = set()  # that were asked for

    def round(self) -> Round:
        """Look once and fetch all that is new. Raises UnreachableError and ClusterGoneError of the source, StoreError of home,
        and KeyboardInterrupt where `stop` said so."""
        done = Round(self.source.look())
        for found in done.look.captures:
            if self.stop():
                raise KeyboardInterrupt
            reason = self._bring(found, done)
            if reason is not None:
                done.left[f"{found.pair} ({found.capture})"] = reason
        self._rows(done.look.rows)
        self._bring_logs(done.look)
        return done

    def at_home(self, pair: str, capture: str) -> bool:
        return (pair, capture) in self.verified

    def verify(self, found: Found) -> list[str]:
        """Read a capture at home once more, before the only other copy goes; what is wrong with it, in words."""
        marker = None if unfit_marker(found.pair, found.capture, found.marker) else self._marker_here(found)
        if marker is None:
            return [NOT_HERE]
        path = self.home.capture_path(found.pair, found.capture)
        return [f"{name} {why}" for name, why in wrong_files(Path(path), marker).items()]

    def _marker_here(self, found: Found) -> dict[str, Any] | None:
        """The marker of a capture at home; None where home has none, or another one of its id."""
        marker = self.home.marker(self.home.capture_path(found.pair, found.capture))
        if marker is None or unfit_marker(found.pair, found.capture, marker):
            return None
        return marker if contents(marker) == contents(found.marker) else None

    def _bring(self, found: Found, done: Round) -> str | None:
        """Fetch one capture unless it is here; None where it is home now, else why not."""
        key = (str(found.pair), str(found.capture))
        if key in self.refused and self.refused[key][0] == found.marker:
            return self.refused[key][1]
        unfit = unfit_marker(found.pair, found.capture, found.marker)
        if unfit is None and (self.verified.get(key) == contents(found.marker) or self._is_here(found)):
            return None
        if unfit is None:
            try:
                self._fetch(found)
                done.fetched += 1
                return None
            except DamagedError as error:
                unfit = str(error)
        self.refused[key] = (found.marker, unfit)
        self.show.event(str(found.pair)[:80], f"not taken: {unfit}")
        return unfit

    def _is_here(self, found: Found) -> bool:
        marker = self._marker_here(found)
        if marker is None:
            return False
        self.show.doing(found.pair, "checking what is at home")
        wrong = wrong_files(Path(self.home.capture_path(found.pair, found.capture)), marker)
        self.show.end(found.pair)
        if wrong:
            name, why = next(iter(wrong.items()))
            self.show.event(found.pair, f"damaged at home ({name} {why}); fetching it again")
            return False
        self.verified[(found.pair, found.capture)] = contents(found.marker)
        return True

    def _fetch(self, found: Found) -> None:
        """Fetch into a directory of its own, verify, move in place, the marker last. DamagedError after two tries."""
        began = time.monotonic()
        self.home.refuse_links(self.home.capture_path(found.pair, found.capture))
        files = found.marker["files"]
        total = sum(f["bytes"] for f in files)
        incoming = self.root / INCOMING / f"pair={found.pair}" / f"capture={found.capture}"
        with _writing(incoming):
            incoming.mkdir(parents=True, exist_ok=True)
            self._check_room(incoming, total)
        wrong: dict[str, str] = {}
        for _ in range(2):
            names = [f["name"] for f in files] + [DOCUMENT]
            # without a checksum nothing tells what an earlier try left of another capture of this id: it is small, and comes anew
            (incoming / DOCUMENT).unlink(missing_ok=True)
            self.source.fetch(found.base, names, incoming, lambda: self._tick(found.pair, incoming, total))
            self.show.doing(found.pair, "verifying")
            wrong = wrong_files(incoming, found.marker)
            if not wrong:
                break
            for name in wrong:  # what is there may be of an earlier capture of the same id
                (incoming / name).unlink(missing_ok=True)
        self.show.end(found.pair)
        if wrong:
            name, why = next(iter(wrong.items()))
            shutil.rmtree(incoming, ignore_errors=True)
            raise DamagedError(f"as fetched, {name} {why}; sweep it again with --force, or look at the head's disk")
        self._install(found, incoming)
        self.verified[(found.pair, found.capture)] = contents(found.marker)
        rows = sum(f["rows"] for f in files)
        self.show.event(
            found.pair,
            f"at home: {len(files)} file{'s' * (len(files) != 1)}, {size(total)}, {rows:,} rows, in {duration(time.monotonic() - began)}",
        )

    def _check_room(self, incoming: Path, total: int) -> None:
        there = sum(p.stat().st_size for p in incoming.iterdir())
        free = shutil.disk_usage(incoming).free
        if total - there + SPARE_BYTES > free:
            raise StoreError(
                f"'{self.root}' has {size(free)} free, and the next capture needs {size(total)}; make room and run again"
            )

    def _tick(self, pair: str, incoming: Path, total: int) -> None:
        if self.stop():
            raise KeyboardInterrupt
        have = sum(p.stat().st_size for p in incoming.iterdir() if p.is_file())
        self.show.doing(pair, f"fetching {size(min(have, total))} of {size(total)}")

    def _install(self, found: Found, incoming: Path) -> None:
        target = Path(self.home.capture_path(found.pair, found.capture))
        names = [f["name"] for f in found.marker["files"]]
        with _writing(target):
            target.mkdir(parents=True, exist_ok=True)
            (target / MARKER).unlink(missing_ok=True)  # of another capture of the same id
            for old in target.glob("*.parquet"):
                if old.name not in names:
                    old.unlink()
            for name in [*names, DOCUMENT]:
                if (incoming / name).is_file():
                    _sync(incoming / name)
                    os.replace(incoming / name, target / name)
            _sync(target)
            self.home.write_bytes(f"{target}/{MARKER}", self._marker_bytes(found))
            shutil.rmtree(incoming, ignore_errors=True)
            with contextlib.suppress(OSError):
                incoming.parent.rmdir()

    @staticmethod
    def _marker_bytes(found: Found) -> bytes:
        import json

        return (json.dumps(found.marker, indent=1) + "\n").encode()

    def _rows(self, rows: list[dict[str, Any]]) -> None:
        """Keep the manifest at home: an attempt is complete here only when its capture is."""
        known = {row.get("attempt"): row for row in self.home.manifest_rows()}
        fields = [f.name for f in MANIFEST]
        for row in rows:
            attempt = row.get("attempt")
            if not all(isinstance(name, str) and PAIR.fullmatch(name) for name in (attempt, row.get("entry"))):
                continue
            if row.get("state") == "complete" and not self.at_home(str(row.get("entry")), str(row.get("capture"))):
                continue
            ours = fitting({name: row.get(name) for name in fields})
            if known.get(attempt) != ours:
                self.home.write_manifest_row(ours)

    def _bring_logs(self, look: Look) -> None:
        """Logs of attempts that have ended, once each."""
        ended = {str(row.get("attempt")) for row in look.rows if row.get("state") != "running"}
        new = [log for log in look.logs if log not in self.logs and LOG.fullmatch(log) and _attempt(log) in ended]
        wanted = [log for log in new if not (self.root / log).exists()]
        if wanted:
            incoming = self.root / INCOMING / "logs"
            with _writing(incoming):
                incoming.mkdir(parents=True, exist_ok=True)
            self.source.fetch(".", wanted, incoming, self._stop_if_asked)
            for log in wanted:
                if (incoming / log).is_file() and not (incoming / log).is_symlink():
                    with _writing(self.root / log):
                        (self.root / log).parent.mkdir(parents=True, exist_ok=True)
                        os.replace(incoming / log, self.root / log)
            shutil.rmtree(incoming, ignore_errors=True)
        self.logs |= set(new)

    def _stop_if_asked(self) -> None:
        if self.stop():
            raise KeyboardInterrupt


@contextlib.contextmanager
def sole_collector(home: RunDir) -> Iterator[None]:
    """For the length of the block no other process collects into this directory. Raises ConfigError where one does; on a file
    system without locks nobody can tell."""
    place = Path(home.root) / INCOMING
    with _writing(place):
        place.mkdir(parents=True, exist_ok=True)
        stream = open(place / "lock", "a")  # noqa: SIM115  closed below
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another `pairscope collect` is at work on '{home.out}'") from None
        except OSError:
            pass
        try:
            yield
        finally:
            (place / "lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: what a broken transfer left, to go on with
                place.rmdir()


def settle_away(home: RunDir, attempts: Container[str] | None = None) -> None:
    """Write at home that those of the attempts (all, where none are named) were interrupted that still say `running` and were driven
    from another machine: whoever calls this knows that nobody runs them any more. Should one do, its row comes home again."""
    for row in home.manifest_rows():
        driver, attempt = row.get("driver"), row["attempt"]
        away = not (isinstance(driver, str) and is_here(driver))
        if (
            row.get("state") == "running"
            and away
            and (attempts is None or attempt in attempts)
            and PAIR.fullmatch(attempt)
        ):
            found = row | LOST | {"finished": max(now(), str(row.get("started") or ""))}
            with contextlib.suppress(OSError, StoreError):  # a record of the work; it must not end it
                home.write_manifest_row(found)


def _attempt(log: str) -> str:
    """The attempt that a log belongs to: logs/<entry>/<attempt>[.span2][.rank1].log"""
    return re.sub(r"(\.span\d+)?(\.rank\d+)?\.log$", "", log.rpartition("/")[2])


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(f"'{path}'", error) from error
