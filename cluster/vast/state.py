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

from capture.errors import StoreError, why_not_written
from cluster.vast.labels import check_names

OPEN_S = 900.0  # how long a request of unknown outcome counts as a machine and keeps its k
SET_UP_FAILED = "its set-up failed"  # why a machine is blocked
BLOCKED_S = 24 * 3600.0  # how long a bad machine is not rented
MOST_SEEN = 500  # instances that a head is believed to have rented
EMPTY: dict[str, Any] = {
    "tags": {},  # instance id -> tags
    "intents": {},  # attempt -> {k, kind, since}: sent, outcome not known yet
    "unknown": {},  # attempt -> {k, kind, type, since, dph}: sent, and no listing has answered since
    "abandoned": {},  # attempt -> {k, since}: to be destroyed if it ever shows up
    "destroyed": {},  # instance id -> {since, k}: must not come back
    "machines": {},  # machine id -> {reason, until}: not to be rented
    "seen": {},  # instance id -> {since, dph, kind}: first sight and price. repriced: [{since, until, dph}], added to the bill. ends: its deadline as it was made. label: of one that this machine asked for. key: it lets us in. spare: no request has it yet. sudden: a price that one listing alone has told
    "head_key": {},  # {id}: the API key that was made for the head
    "deadline": {},  # {at}: when the head was last told to be gone, by `ray up`
    "made": {},  # what the head was made with, see before_up.as_made
    "gone": [],  # {id, kind, dph, since, until}: what was paid for and is no more
}


def not_written(what: str, error: OSError) -> StoreError:
    """The error for a user where a cluster's books or keys cannot be kept."""
    return StoreError(
        f"cannot write {what}: {why_not_written(error)}. Make room there, or set PAIRSCOPE_HOME to a folder that may be written to"
    )


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
            if not isinstance(found, dict):
                raise ValueError(f"a {type(found).__name__}, no object")
        except FileNotFoundError:
            found = {}
        except ValueError as error:
            raise StoreError(
                f"'{self.path}' is not the JSON that it was written as ({error}); move it away, the listing has what matters"
            ) from error
        return {key: found.get(key, json.loads(json.dumps(value))) for key, value in EMPTY.items()}

    @contextlib.contextmanager
    def edit(self) -> Iterator[dict[str, Any]]:
        """The content, to be changed in place; written whole when the block ends without an error. StoreError where it
        cannot be."""
        with self.lock, self.alone("state"):  # two processes at once would write over what the other has rented
            content = self.read()
            before = json.dumps(content, sort_keys=True)
            yield content
            after = json.dumps(content, sort_keys=True)
            if after != before:
                tmp = self.path.with_suffix(".tmp")
                try:
                    tmp.write_text(json.dumps(content, indent=1))
                    os.replace(tmp, self.path)
                except OSError as error:
                    raise not_written(f"'{self.path}'", error) from error

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """For the length of the block nobody else on this machine is in one of the same name for this cluster; they wait. StoreError
        where there are no locks. Not to be entered twice by one thread."""
        try:
            guard = open(self.folder / f"{what}.lock", "a")  # noqa: SIM115  closed below
        except OSError as error:
            raise not_written(f"'{self.path}'", error) from error
        with guard:
            try:
                fcntl.flock(guard, fcntl.LOCK_EX)
            except OSError as error:
                raise StoreError(
                    f"cannot lock '{guard.name}': {error.strerror}. Set PAIRSCOPE_HOME to a folder on a disk whose file system has locks"
                ) from error
            yield

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

    def failed_set_ups(self, within_s: float) -> list[float]:
        """How long ago the set-ups of machines failed, in seconds, latest first; those of the last `within_s`."""
        now = time.time()
        rows = [row for row in self.read()["machines"].values() if row["reason"] == SET_UP_FAILED]
        return sorted(age for row in rows if (age := now - (row["until"] - BLOCKED_S)) < within_s)

    def given_machines(self) -> dict[str, Any]:
        """What another machine knew of bad ones when this one was set up: machines.json, as `machines` in the state."""
        try:
            return dict(json.loads((self.folder / "machines.json").read_text()))
        except (OSError, ValueError):
            return {}

    def given_spending(self) -> list[dict[str, Any]]:
        """What was paid for before this machine was there, as `gone` in the state: spent.json, which the laptop hands a head."""
        try:
            return list(json.loads((self.folder / "spent.json").read_text()))
        except (OSError, ValueError):
            return []

    def merge_machines(self, machines: dict[str, Any]) -> None:
        """Add what a head found out, taken as a stranger's; what is out of date is dropped."""
        latest = time.time() + BLOCKED_S
        fit = {
            m: {"reason": v["reason"], "until": min(v["until"], latest)}
            for m, v in machines.items()
            if _is_id(m) and isinstance(v["reason"], str) and _is_time(v["until"])
        }
        with self.edit() as content:
            both = {**content["machines"], **fit}
            content["machines"] = {m: v for m, v in both.items() if v["until"] > time.time()}

    def merge_seen(self, seen: dict[str, Any]) -> None:
        """Add instances that a head rented for the cluster, so that they are looked up also where a listing lacks them.

        Taken as a stranger's: ids that are none would end every later look, and what they are is asked of Vast.
        """
        now = time.time()
        rows = [(id_, dict(row)) for id_, row in list(seen.items())[:MOST_SEEN] if _is_id(id_)]
        fit = {
            id_: {
                "since": row["since"] if _is_time(row.get("since")) else now,
                "dph": row["dph"] if _is_time(row.get("dph")) else 0.0,
                "kind": "head" if row.get("kind") == "head" else "worker",
            }
            for id_, row in rows
        }
        with self.edit() as content:
            content["seen"] = {**fit, **content["seen"]}

    def merge_gone(self, gone: list[Any]) -> None:
        """Take over what a head noted of workers that are gone: it saw when they went, and has seen some that nobody else did.

        Taken as a stranger's: it can make shorter what is only known to be no longer here, and nothing longer.
        """
        fit = {
            row["id"]: {key: row[key] for key in ("id", "kind", "dph", "since", "until")}
            for row in gone[-MOST_SEEN:]
            if isinstance(row, dict)
            and _is_id(row.get("id"))
            and row.get("kind") == "worker"
            and all(_is_time(row.get(key)) for key in ("dph", "since", "until"))
            and row["since"] <= row["until"]
        }
        with self.edit() as content:
            for row in content["gone"]:
                theirs = fit.pop(row["id"], None)
                if theirs and row.get("kind") == "worker":
                    row["until"] = min(row["until"], max(theirs["until"], row["since"]))
            new = [row | {"until": min(row["until"], time.time())} for row in fit.values()]
            content["gone"] += [row for row in new if row["id"] not in content["seen"] and row["since"] <= row["until"]]

    def block_machine(self, machine: int | None, reason: str, hours: float = BLOCKED_S / 3600) -> None:
        if machine is not None:
            with self.edit() as content:
                content["machines"][str(machine)] = {"reason": reason, "until": time.time() + hours * 3600}


def _is_id(text: Any) -> bool:
    return isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 20


def _is_time(value: Any) -> bool:
    """A finite number from 0 up."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12


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
