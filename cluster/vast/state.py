"""What a machine that rents must not forget: a small JSON file per cluster, on the laptop for the head, on the head for the workers.

Vast's listing and the labels say what is rented. This file holds what Vast has no place for: volatile tags, tries at renting
whose outcome is open, what was given up or destroyed, machines not to use again, and what was spent on machines now gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capture.errors import StoreError
from cluster.vast.labels import check_names

OPEN_S = 900.0  # how long a request of unknown outcome counts as a machine and keeps its k
EMPTY: dict[str, Any] = {
    "tags": {},  # instance id -> tags
    "intents": {},  # attempt -> {k, kind, since}: sent, outcome not known yet
    "unknown": {},  # attempt -> {k, kind, type, since, dph}: sent, and no listing has answered since
    "abandoned": {},  # attempt -> {k, since}: to be destroyed if it ever shows up
    "destroyed": {},  # instance id -> {since, k}: must not come back
    "machines": {},  # machine id -> {reason, until}: not to be rented
    "seen": {},  # instance id -> {since, dph, kind}: first sight and price. key: it lets us in. spare: no request has it yet
    "head_key": {},  # {id}: the API key that was made for the head
    "deadline": {},  # {at}: when the head was last told to be gone, by `ray up`
    "made": {},  # what the head was made with, see before_up.as_made
    "gone": [],  # {id, kind, dph, since, until}: what was paid for and is no more
}


class State:
    """The file state.json in a folder that only its owner can read. Safe between threads and between processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "state.json"
        self.lock = threading.RLock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StoreError(f"cannot make the folder '{folder}' for the cluster's state: {error}") from error

    def read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text())
        except FileNotFoundError:
            found = {}
        except ValueError as error:
            raise StoreError(
                f"'{self.path}' is not JSON ({error}); move it away, the listing has what matters"
            ) from error
        return {key: found.get(key, json.loads(json.dumps(value))) for key, value in EMPTY.items()}

    @contextlib.contextmanager
    def edit(self) -> Iterator[dict[str, Any]]:
        """The content, to be changed in place; written whole when the block ends without an error."""
        with self.lock, open(self.folder / "state.lock", "a") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            content = self.read()
            before = json.dumps(content, sort_keys=True)
            yield content
            after = json.dumps(content, sort_keys=True)
            if after != before:
                tmp = self.path.with_suffix(".tmp")
                tmp.write_text(json.dumps(content, indent=1))
                os.replace(tmp, self.path)

    def begin_anew(self) -> None:
        """Forget a cluster that has ended, its spending included; keep what must not be used or come back.

        What an unanswered request made may turn up later: nobody waits for it any more.
        """
        with self.edit() as content:
            content["abandoned"] |= content["intents"] | content["unknown"]
            for key in ("tags", "intents", "unknown", "seen", "made", "deadline"):
                content[key] = {}
            content["gone"] = []

    def blocked_machines(self) -> dict[int, str]:
        """Machine id -> why it is not to be rented."""
        now = time.time()
        machines = self.given_machines() | self.read()["machines"]
        return {int(m): v["reason"] for m, v in machines.items() if v["until"] > now}

    def given_machines(self) -> dict[str, Any]:
        """What another machine knew of bad ones when this one was set up: machines.json, as `machines` in the state."""
        try:
            return dict(json.loads((self.folder / "machines.json").read_text()))
        except (OSError, ValueError):
            return {}

    def merge_machines(self, machines: dict[str, Any]) -> None:
        """Add what another machine found out; what is out of date is dropped."""
        with self.edit() as content:
            both = {**content["machines"], **machines}
            content["machines"] = {m: v for m, v in both.items() if v["until"] > time.time()}

    def merge_seen(self, seen: dict[str, Any]) -> None:
        """Add instances that another machine rented for the cluster, so that they are looked up also where a listing lacks them."""
        with self.edit() as content:
            content["seen"] = {**{id_: dict(row) for id_, row in seen.items()}, **content["seen"]}

    def block_machine(self, machine: int | None, reason: str, hours: float = 24.0) -> None:
        if machine is not None:
            with self.edit() as content:
                content["machines"][str(machine)] = {"reason": reason, "until": time.time() + hours * 3600}


def open_requests(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Attempt -> request: those that may have made a machine which no listing has shown yet. content: as State.read gives it."""
    sent = content["intents"] | content["unknown"]
    return {attempt: request for attempt, request in sent.items() if time.time() - request["since"] < OPEN_S}


def cluster_folder(cluster: str) -> Path:
    """Where a cluster's state, keys and token lie: PAIRSCOPE_HOME (or ~/.pairscope)/clusters/<name>.

    Raises ConfigError for a name that leads elsewhere, as `../..` would: files in this folder are removed by their names.
    """
    check_names(cluster, [])
    home = Path(os.environ.get("PAIRSCOPE_HOME") or Path.home() / ".pairscope")
    return home / "clusters" / cluster
