"""One row per attempt, written when it starts and again when it ends; a killed worker leaves a row that says `running`."""

from __future__ import annotations

import datetime
import socket
import time
import uuid
from typing import Any

from capture.layout import RunDir
from capture.schema import MANIFEST


def now() -> str:
    """UTC time, ISO 8601, milliseconds, no offset (DuckDB reads it as TIMESTAMP)."""
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None).isoformat(timespec="milliseconds")


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
            "started": now(),
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
        self.row |= fields | {"state": state, "finished": now(), "seconds": round(time.monotonic() - self.began, 3)}
        if error is not None:
            self.row |= {"error_class": type(error).__name__, "error": " ".join(str(error).split())[:2000]}
        self.run.write_manifest_row(self.row)
