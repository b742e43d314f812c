"""Where a sweep stands: every entry, its state, its error in one line."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from analysis.tables import fit, plain_table, width
from capture.layout import CaptureDir, RunDir, fitting
from capture.manifest import as_it_is
from capture.printable import escape
from capture.schema import MANIFEST, STAGES

COLUMNS = ("entry", "state", "seconds", "tokens", "mode", "gpu", "peak memory", "dollars", "error")
GIVE_WAY = (
    "gpu",
    "mode",
    "tokens",
    "seconds",
    "peak memory",
    "dollars",
)  # left out in this order where a terminal is too narrow


def status_rows(run: RunDir, every_attempt: bool = False) -> list[dict[str, Any]]:
    """One row per entry (its last attempt, or that which made the capture that the last one found complete), or per attempt; keys as
    in schema.MANIFEST, in the order they started.

    What lies in the run directory without an attempt of its own has a row too: a complete capture (state `complete`), and a
    capture directory without a valid marker where its entry has no attempt at all (state `partial`). An attempt that says
    `running` while its driver is dead was `interrupted`; one that says `complete` while its capture is gone becomes `missing`; while a file of it is gone or short, `damaged`. A
    capture of another schema version is `unreadable`. The `error` of a capture that was imported from a file that breaks off
    says where.
    """
    attempts = [as_it_is(fitting(row)) for row in run.manifest_rows()]
    refused: dict[tuple[str, str], str] = {}
    found = list(run.captures(include_partial=True, refused=refused))
    complete = {(c.pair, c.capture) for c in found if not c.marker.get("partial")}
    damaged = {key for key in complete if not run.is_complete(*key)}
    known = {(r.get("entry"), r.get("capture")) for r in attempts}
    entries = {r.get("entry") for r in attempts}
    rows = []
    for row in attempts:
        row = {f.name: None for f in MANIFEST} | row
        if row["state"] == "complete" and (row["entry"], row["capture"]) in refused:
            row |= {"state": "unreadable", "error": refused[row["entry"], row["capture"]]}
        elif row["state"] == "complete" and (row["entry"], row["capture"]) not in complete:
            row |= {
                "state": "missing",
                "error": f"capture {row['capture']} is no longer here; sweep again to remake it",
            }
        elif row["state"] == "complete" and (row["entry"], row["capture"]) in damaged:
            row |= {"state": "damaged", "error": "a table is gone or has lost bytes; sweep again to remake it"}
        rows.append(row)
    if not every_attempt:
        made = {(row["entry"], row["capture"]): row for row in rows if _made_it(row)}
        last = {row["entry"]: row for row in rows}
        rows = [
            made.get((row["entry"], row["capture"]), row) if row["state"] == "complete" else row
            for row in last.values()
        ]
    for c in found:
        partial = bool(c.marker.get("partial"))
        if (c.pair, c.capture) in known or (partial and c.pair in entries):
            continue
        row = {f.name: None for f in MANIFEST} | {"entry": c.pair, "capture": c.capture}
        row["state"] = "partial" if partial else "damaged" if (c.pair, c.capture) in damaged else "complete"
        row["error"] = "no valid marker, and no attempt is known" if partial else _cut_short(run, c)
        rows.append(row)
    for (pair, capture), why in refused.items():
        if (pair, capture) not in known:
            row = {f.name: None for f in MANIFEST} | {"entry": pair, "capture": capture}
            rows.append(row | {"state": "unreadable", "error": why})
    return rows


def _made_it(row: dict[str, Any]) -> bool:
    """Whether an attempt made the capture itself; of two sweeps at a time the second may find what the first one made."""
    return row["state"] == "complete" and row["n_tokens"] is not None


def _cut_short(run: RunDir, capture: CaptureDir) -> str | None:
    """Where the file breaks off that a capture was imported from, and which prompts have only a part of their cells."""
    try:
        said = json.loads(run.read_bytes(f"{capture.path}/capture.json"))["imported"]
        why, prompts = said["cut_short"], said["incomplete_prompts"]
        names = [f"{p['prompt_idx']}" + ("" if p["variant"] == "identity" else f" ({p['variant']})") for p in prompts]
    except (OSError, ValueError, KeyError, TypeError):  # captured here, or a document that is not ours
        return None
    if why is None:
        return None
    return f"cut short: {why}" + (f"; prompt {', '.join(names)} is not whole" if names else "")


def captured_again(run: RunDir) -> Iterator[str]:
    """A line for each pair that has several complete captures: it was captured with other prompts or settings before."""
    for pair in run.directories(f"{run.root}/captures"):
        there = run.directories(pair.path)
        complete = len(there) > 1 and sum(run.marker(info.path) is not None for info in there)
        if complete > 1:
            name = escape(pair.base_name.removeprefix("pair="))
            yield f"({name}: {complete} captures, with other prompts or settings; sql asks the newest, see its table captures)"


def failed(rows: list[dict[str, Any]]) -> list[str]:
    """The entries whose last row says `failed`."""
    last = {row["entry"]: row["state"] for row in rows}
    return [entry for entry, state in last.items() if state == "failed"]


def memory_text(count: float) -> str:
    """Bytes for people: 880.8 KiB, 1.7 MiB, 38.2 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def table_row(row: dict[str, Any]) -> list[Any]:
    """A row for people, columns as COLUMNS; the error with its class before it."""
    error = ": ".join(str(x) for x in (row.get("error_class"), row.get("error")) if x)
    peak = row.get("peak_memory_bytes")
    values = {
        "entry": row["entry"],
        "state": row["state"],
        "seconds": None if row.get("seconds") is None else round(row["seconds"], 1),
        "tokens": row.get("n_tokens"),
        "mode": row.get("mode"),
        "gpu": row.get("gpu"),
        "peak memory": None if peak is None else memory_text(peak),
        "dollars": None if row.get("dollars") is None else f"{row['dollars']:.3f}",
        "error": " ".join(error.split()),
    }
    return ["" if values[c] is None else values[c] for c in COLUMNS]


def memory_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What was planned and what was alive at most, over all and stage by stage, a line for each row."""
    figures = {"planned": "planned_memory_bytes", "peak": "peak_memory_bytes"}
    figures |= {stage: f"peak_{stage}_bytes" for stage in STAGES}
    table = []
    for row in rows:
        sizes = [row.get(key) for key in figures.values()]
        known = [row.get(key) or "" for key in ("entry", "state", "mode", "gpu")]
        table.append([*known, *("" if size is None else memory_text(size) for size in sizes)])
    yield from plain_table(["entry", "state", "mode", "gpu", *figures], table)
    if any(row.get("gpu") == "cpu" for row in rows):
        yield "(on a CPU peaks are of the weights alone; planned is everything)"


def table_lines(rows: list[dict[str, Any]], columns: int | None) -> Iterator[str]:
    """The table for people, a line for each row. columns: of the terminal; None where there is none.

    On a terminal the error is wrapped below its row, and columns that are empty or do not fit are left out; entry and state
    are always whole.
    """
    table = [dict(zip(COLUMNS, table_row(row), strict=True)) for row in rows]
    known = [c for c in COLUMNS if c != "dollars" or any(row[c] != "" for row in table)]  # a laptop's work has no price
    if len({(r["entry"], r["capture"]) for r in rows if r["capture"]}) > len(
        {r["entry"] for r in rows if r["capture"]}
    ):
        known.insert(1, "capture")  # an entry was captured with other settings before
        for cells, row in zip(table, rows, strict=True):
            cells["capture"] = row["capture"] or ""
    names, left_out = known, []
    if columns is not None:
        names = [c for c in known[:-1] if any(row[c] != "" for row in table)]
        for name in GIVE_WAY:
            if max(map(width, _lines(names, table))) > columns and name in names:
                names.remove(name)
                left_out.append(name)
    header, *lines = _lines(names, table)
    yield header
    for line, row in zip(lines, table, strict=True):
        yield line
        if columns is not None:
            for part in textwrap.wrap(escape(row["error"]), max(20, columns - 4)):
                yield "    " + fit(part, max(20, columns - 4))
    if left_out:
        yield f"({', '.join(left_out)}: with --json, or on a wider terminal)"
    if "peak memory" in names and any(row["gpu"] == "cpu" for row in table):
        yield "(peak memory on a CPU: of the weights alone)"


def _lines(names: list[str], table: list[dict[str, Any]]) -> list[str]:
    return list(plain_table(names, [[row[name] for name in names] for row in table]))
