"""docs/reliability.json and docs/reliability.md, from what the fault suite told: `python tests/faults/reliability.py` takes in
the rows that tests left in .cache/reliability (recorder.py) and the summaries of soaks that lie there; with `--shown-elsewhere` it
prints the tests outside of this folder that show a fault, but for the rehearsals, which are run apart.

A row stays until its test tells another; a fault that leaves the catalog leaves the page.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catalog import FAULTS

ROOT = Path(__file__).parents[2]
TOLD = ROOT / ".cache" / "reliability"
JSON, PAGE = ROOT / "docs" / "reliability.json", ROOT / "docs" / "reliability.md"
SOAK = "soak.json"  # what soak.py leaves there

HEAD = """# What happens when things break

Made by `make reliability` from docs/reliability.json, which is what the fault suite of tests/faults saw when it last ran. Where a
capture is under way in it, the same is checked each time (tests/faults/invariants.py): every capture that was reported complete
is there with right checksums and counts; no row is there twice; what was interrupted goes on, and its tables equal an undisturbed
run's bit for bit; the manifest has a row for every attempt, and none says `running` when nobody runs; no process, placement group
or temporary file is left. What other tests show (docs/reliability.json names them) is held against what theirs must be: tables
of one worker, bytes of a store, the bill of a cluster. So in every row **nothing is lost** but the work named under "done again".

Seconds are from the fault, or from the next start where somebody has to start again, to complete captures, of a tiny pair of four
layers, and of a machine that other work shared: they say that it ends, not how fast. A capture commits spans of its layers as it
goes (docs/config.md, `spans`; every five minutes by default, every layer here), and goes on behind the last one.

| where | fault | how it is put in | what the user sees | lost | done again | seconds |
|---|---|---|---|---|---|---|
"""
TAIL = """
What is not in the table: a disk that returns other bytes than it was given, while a capture is being made, is found when the
capture is next asked for (checksums are compared then), not before. In an object store sizes are compared, and its own checksums
are relied on. `--force` over a capture that is complete gives up the old one when the new tables are put in place, if they are
other files than the old.
"""


def reliability_page(told: Mapping[str, Any] | None = None) -> str:
    """The page; told: what is in docs/reliability.json."""
    told = told or json.loads(JSON.read_text(encoding="utf-8"))
    lines = []
    for key, known in FAULTS.items():
        row = told["faults"].get(key, {"sees": "not seen yet: its test has not run", "seconds": None, "again": ""})
        lost = "nothing" if key in told["faults"] else ""
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        cells = (known.where, known.what, known.how, row["sees"], lost, row["again"], seconds)
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return HEAD + "\n".join(lines) + "\n" + TAIL + _soak(told.get("soak"))


def _soak(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(found["faults"].items()))
    return f"""
## The soak

`make soak` makes tiny captures for an hour, three processes at a time and now and then a sweep beside them on the same output,
while faults drawn from a seed strike from inside, by signals and on the disk. The last one: seed {found["seed"]},
{found["minutes"]} minutes on {found["machine"]}, {found["captures"]} captures in {found["attempts"]} attempts and
{found["sweeps"]} sweeps, {found["faults in all"]} faults; every capture complete and correct at the end.

Faults by kind: {kinds}.
"""


def main() -> None:
    told: dict[str, Any] = {"faults": {}, "soak": None}
    if JSON.exists():
        told = json.loads(JSON.read_text(encoding="utf-8"))
    taken = 0
    for file in sorted(TOLD.glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        if file.name != SOAK:
            told["faults"][found["fault"]] = {k: found[k] for k in ("test", "sees", "seconds", "again")}
        elif not found["wrong"]:
            told["soak"] = {k: v for k, v in found.items() if k != "wrong"}
        taken += 1
    told["faults"] = {key: told["faults"][key] for key in FAULTS if key in told["faults"]}
    JSON.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(reliability_page(told), encoding="utf-8")
    missing = [key for key in FAULTS if key not in told["faults"]]
    print(
        f"{taken} taken in; wrote docs/reliability.json and docs/reliability.md; never seen: {', '.join(missing) or 'none'}"
    )


def machine() -> str:
    return f"{os.cpu_count()} cores ({platform.system()}, Python {platform.python_version()})"


def shown_elsewhere() -> list[str]:
    return [t for t in dict.fromkeys(t for known in FAULTS.values() for t in known.shown_by) if "/e2e/" not in t]


if __name__ == "__main__":
    if "--shown-elsewhere" in sys.argv:
        print(" ".join(shown_elsewhere()))
    else:
        main()
