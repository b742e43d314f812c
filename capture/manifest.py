"""One row per attempt, written when it starts and again when it ends.

Who is killed in between leaves a row that says `running`; who comes next, and whoever asks meanwhile, sees by its `driver`
that nobody runs it any more.
"""

from __future__ import annotations

import datetime
import re
import socket
import time
import uuid
from typing import Any

from capture.errors import StoreError
from capture.layout import RunDir
from capture.process import is_here, me, runs
from capture.schema import MANIFEST


def now() -> str:
    """UTC time, ISO 8601, milliseconds, no offset (DuckDB reads it as TIMESTAMP)."""
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None).isoformat(timespec="milliseconds")


def later_than(before: str, present: str) -> str:
    """The present moment, or a millisecond after the one before where the clock was set back: attempts and sweeps are ordered by it."""
    if before < present:
        return present
    try:
        after = datetime.datetime.fromisoformat(before) + datetime.timedelta(milliseconds=1)
    except (ValueError, OverflowError):  # a run directory may be a stranger's
        return present
    return after.isoformat(timespec="milliseconds")


_ATTEMPT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class Attempt:
    """One try at one entry. `start` writes the row, `finish` rewrites it with how it ended."""

    def __init__(self, run: RunDir, entry: str) -> None:
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        self.run = run
        self.id = f"{stamp}-{entry}-{uuid.uuid4().hex[:6]}"
        self.began = time.monotonic()
        self.row: dict[str, Any] = {f.name: None for f in MANIFEST} | {
            "attempt": self.id,
            "entry": entry,
            "state": "running",
            "started": later_than(run.last_started, now()),
            "driver": me(),
            "node": socket.gethostname(),
            "log": run.log_path(entry, self.id).removeprefix(run.root + "/"),
        }

    @property
    def log_path(self) -> str:
        return self.run.log_path(self.row["entry"], self.id)

    def start(self, **fields: Any) -> None:
        self.row |= fields
        self.run.write_manifest_row(self.row)

    def finish(self, state: str, error: BaseException | None = None, **fields: Any) -> None:
        """`state` is complete, failed or interrupted; `fields` are those of schema.MANIFEST."""
        unknown = set(fields) - {f.name for f in MANIFEST}
        if unknown:
            raise ValueError(f"not in the manifest: {unknown}")
        finished = max(now(), self.row["started"])
        self.row |= fields | {"state": state, "finished": finished, "seconds": round(time.monotonic() - self.began, 3)}
        if error is not None:
            self.row |= {"error_class": type(error).__name__, "error": " ".join(str(error).split())[:2000]}
        self.run.write_manifest_row(self.row)


LOST = {
    "state": "interrupted",
    "error_class": "DriverLostError",
    "error": "the process that ran this attempt is gone without a word: killed, or its machine went down; run again",
}


def as_it_is(row: dict[str, Any]) -> dict[str, Any]:
    """A manifest row as it is to be read: one that says `running` while its driver, a process of this machine, is dead was
    interrupted. Of a driver on another machine nothing is known."""
    driver = row.get("driver")
    if row.get("state") == "running" and isinstance(driver, str) and is_here(driver) and not runs(driver):
        return row | LOST
    return row


def settle_lost(run: RunDir) -> list[dict[str, Any]]:
    """Write how attempts ended whose driver is gone; the rows. For whoever starts to work on the same run directory.

    A driver on another machine is taken for gone once an attempt at the same entry began after it: if it is not, it writes
    its row anew when it ends.
    """
    rows = run.manifest_rows()
    last = {row.get("entry"): row.get("attempt") for row in rows}
    settled = []
    for row in rows:
        found = as_it_is(row)
        passed = row.get("state") == "running" and last[row.get("entry")] != row.get("attempt")
        driver = row.get("driver")
        if passed and not (isinstance(driver, str) and is_here(driver)):
            found = row | LOST
        if found is not row and _ATTEMPT.fullmatch(str(row["attempt"])):  # it names the file, and may be a stranger's
            found["finished"] = max(now(), str(found.get("started") or ""))
            try:
                run.write_manifest_row(found)
            except (OSError, StoreError):  # a record of the work; it must not end it
                continue
            settled.append(found)
    return settled
