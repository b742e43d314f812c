"""docs/benchmarks.json and docs/benchmarks.md, from the result files of the benches.

    python tests/bench/page.py        take in all of .cache/bench/*.json, then write the page

A result of a bench takes the place of the one before on the same processor, since ratios differ between processors too: where
products take longer, all else is less beside them. The page is made of the JSON alone (`make docs` does it too), so that it
can be made again anywhere.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from measured import CACHE, ROOT, met, wrong_result

JSON = ROOT / "docs" / "benchmarks.json"
PAGE = ROOT / "docs" / "benchmarks.md"
TITLES = {  # in the page's order
    "capture": "A capture against the bare floor",
    "streaming": "Streamed against resident",
    "cold": "From a cold disk",
    "hub": "Straight from a hub",
    "ahead": "The next pair's files, fetched while one computes",
    "rivals": "Against other programs, on the same pair and prompts",
    "ray": "Ray's share of a sweep",
    "storage": "Bytes of the tables",
    "analysis": "Questions",
    "import": "Import of JSON",
    "page": "The page",
    "plan": "The plan",
    "gpu": "On a GPU",
}
FROM = re.compile(r"measured on (\d{4}-\d\d-\d\d)(?: at ([0-9a-f+]+))?$")  # how a note ends whose figure is older
CHANGED = 1.1  # a median that is so many times what it was on the same processor is told
SAME_ANYWHERE = ("storage",)  # bytes: one result is kept of these, the newest
HEAD = """# Benchmarks

Made by `make bench-docs` from docs/benchmarks.json, which collects what the commands below measured.

- **Ratios** are of two things that one run did in turns (A B A B ...), unless the row says otherwise: the median of the rounds, and
  the least and the most. A bar is what was asked for; where it is missed, the page says so. Figures of one round are marked.
- **The code** is the commit that was measured; a + says that files differed from it.
- **The load** is the system's load average before and after. A bench itself makes up to as many as it has threads; more means that
  others worked, and then figures in seconds, and the second digit of ratios, say little.
- **Processors** differ in ratios too: where products take longer, all else is less beside them. Each has a table of its own.
- **Words.** *Compiled* and *eager*: the two ways of the lens, `lens.compile: true` and `false`. *The lens*: logits of every layer,
  with entropies, divergences and top-k lists. *Opening*: files, configs, tokenizer and self-checks, before the layers (*walk*) begin.
  `weights: stream`, `cache`, `download`: how a hub's weights come, docs/config.md. BB, BS, SB, SS: the four passes, README.md.
"""
BARS = """
## All bars

One line for each bar, a column for each processor that it was measured on. Bold: missed. In brackets: one round only.

"""
NO_GPU = """
## On a GPU

`make bench-gpu` (tests/bench/bench_gpu.py) was **never run on a GPU**: none was at hand. It was only rehearsed on a CPU, with
`--device cpu`, which shows that it runs and nothing about speed. Of what a capture does differently there, the stream that weights take and its
order are tested with simulated streams, the two Triton kernels of the lens by Triton's own interpreter (`make triton`, then `make
test`); tests/capture/test_on_gpu.py (marked `gpu`) waits for a GPU.
"""


def read(file: Path = JSON) -> list[dict[str, Any]]:
    """All results, in the page's order."""
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return _in_order(found)


def _in_order(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By bench, and of each the newest first."""
    order = list(TITLES)
    return sorted(sorted(results, key=lambda r: str(r["date"]), reverse=True), key=lambda r: order.index(r["bench"]))


def benchmarks_page(results: Sequence[dict[str, Any]] | None = None) -> str:
    """The whole page."""
    results = read() if results is None else _in_order(results)
    parts = [HEAD, BARS, *_bars(results)]
    for bench, of_it in groupby(results, key=lambda r: r["bench"]):
        parts += [f"\n## {TITLES[bench]}\n", *map(_section, of_it)]
    if not any(r["bench"] == "gpu" for r in results):
        parts.append(NO_GPU)
    return "".join(parts)


def _bars(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of all figures that have bars, each with its median on each processor."""
    places = list(dict.fromkeys(_place(r)[1] for r in results))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        for one in result["figures"]:
            if one["bar"] is None:
                continue
            over = f" over {one['over']}" if one["over"] else ""
            text = f"{one['median']:g}" if one["rounds"] > 1 else f"({one['median']:g})"
            cells = rows.setdefault((f"{one['what']}{over}", _bar(one)), {})
            cells[_place(result)[1]] = text if met(one) else f"**{text}**"
    head = [f"| what | bar | {' | '.join(places)} |\n", f"|---|---|{'---|' * len(places)}\n"]
    table = [
        f"| {what} | {bar} | {' | '.join(cells.get(p, '') for p in places)} |\n" for (what, bar), cells in rows.items()
    ]
    return head + table + ["\n", *(_when(place, [r for r in results if _place(r)[1] == place]) for place in places)]


def _when(place: str, results: Sequence[Mapping[str, Any]]) -> str:
    """On which days, and of which code, the figures of a processor were measured."""
    found = {(r["date"], r["code"]) for r in results}
    notes = (FROM.search(one["note"]) for r in results for one in r["figures"] if one["bar"] is not None)
    found |= {(note[1], note[2] or "") for note in notes if note}
    days = groupby(sorted(found), key=lambda one: one[0])
    said = (f"{day} ({', '.join(code or 'code not noted' for _, code in of_it)})" for day, of_it in days)
    return f"- {place}: measured on {', '.join(said)}\n"


def _section(result: Mapping[str, Any]) -> str:
    m = result["machine"]
    facts = [m["gpu"], m["cpu"], f"{m['cores']} cores", f"{m['threads']} threads" if m["threads"] else "", f"{m['memory_gib']:g} GiB",
             f"torch {m['torch']}", f"transformers {m['transformers']}", _load(m)]  # fmt: skip
    rows = [_row(one) for one in result["figures"]]
    notes = [f"- {one['what']}: {one['note']}" for one in result["figures"] if one["note"]]
    text = [
        f"\n`{result['command']}`, {result['date']}, code {result['code'] or 'not noted'}; {', '.join(filter(None, facts))}.\n",
        "| what | over | bar | median | least to most | rounds | |\n|---|---|---|---|---|---|---|",
        *rows,
    ]
    if notes:
        text += ["", *notes]
    return "\n".join(text) + "\n"


def _load(m: Mapping[str, Any]) -> str:
    if m["load_start"] is None:
        return "load not noted"
    return f"load {m['load_start']:g} to {m['load_end']:g}"


def _unit(one: Mapping[str, Any]) -> str:
    return str(one["unit"]) if one["unit"] in ("x", "%") else f" {one['unit']}"


def _bar(one: Mapping[str, Any]) -> str:
    return (
        "" if one["bar"] is None else f"{'at most' if one['want'] == 'most' else 'at least'} {one['bar']:g}{_unit(one)}"
    )


def _row(one: Mapping[str, Any]) -> str:
    kept = met(one)
    spread = f"{one['low']:g} to {one['high']:g}" if one["rounds"] > 1 else ""
    verdict = "" if kept is None else "met" if kept else "**MISSED**"
    if verdict and one["rounds"] == 1:
        verdict += ", one round"
    cells = (one["what"], one["over"], _bar(one), f"{one['median']:g}{_unit(one)}", spread, str(one["rounds"]), verdict)
    return f"| {' | '.join(cells)} |"


def _place(result: Mapping[str, Any]) -> tuple[str, str]:
    """Two results with the same are of one bench on one kind of machine."""
    return result["bench"], result["machine"]["gpu"] or result["machine"]["cpu"]


def _kind(result: Mapping[str, Any]) -> tuple[str, str]:
    """Of results with the same kind the newest is kept."""
    bench, processor = _place(result)
    return bench, "" if bench in SAME_ANYWHERE else processor


def collect(known: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> list[dict[str, Any]]:
    """The results known, with those of the files in their place, where these are not older. Raises ValueError for a file that is
    not a result."""
    found = {_kind(r): dict(r) for r in sorted(known, key=lambda r: str(r["date"]))}
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        if faults := wrong_result(result):
            raise ValueError(f"{file}: {'; '.join(faults)}")
        if result["bench"] not in TITLES:
            raise ValueError(f"{file}: unknown bench '{result['bench']}'")
        found.pop((result["bench"], platform.machine()), None)  # from when a processor's name was not noted
        before = found.get(_kind(result))
        if before is not None and before["date"] > result["date"]:
            print(f"{file} is older than what the page has, and left out")
            continue
        found[_kind(result)] = _with_others(result, before)
    return _in_order(list(found.values()))


def _with_others(result: dict[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """A result, with the figures of an earlier one that it lacks: each of these says from when it is."""
    mine = {one["name"] for one in result["figures"]}
    for one in before["figures"] if before is not None else ():
        if one["name"] not in mine:
            note = one["note"]
            if not FROM.search(note):
                at = f" at {before['code']}" if before["code"] else ""
                note = "; ".join(filter(None, (note, f"measured on {before['date']}{at}")))
            result["figures"].append({**one, "note": note})
    return result


def changes(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[str]:
    """Medians that are others now than they were on the same processor, by more than a tenth: whether the code or the day is to
    blame is for people to say."""
    was = {(_kind(r), one["name"]): (one, r["code"]) for r in before for one in r["figures"]}
    found = []
    for result in after:
        for one in result["figures"]:
            old, code = was.get((_kind(result), one["name"]), (one, ""))
            least, most = sorted((old["median"], one["median"]))
            if most > 0 and most > CHANGED * least:
                found.append(f"{result['bench']}: {one['what']}: {old['median']:g} ({code or 'code not noted'}) -> {one['median']:g}{_unit(one)}")  # fmt: skip
    return found


def main() -> int:
    files = sorted(CACHE.glob("*.json"))
    before = read() if JSON.exists() else []
    results = collect(before, files)
    for line in changes(before, results):
        print(line)
    JSON.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(benchmarks_page(results), encoding="utf-8")
    print(f"{len(files)} result files taken in; wrote docs/benchmarks.json and docs/benchmarks.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
