"""What every bench shares: rounds in turns, ratios with their spread, the machine, and one JSON file of results.

A result file holds {bench, date, code, command, machine, figures}; code is the commit that was measured. A figure says what was measured over what, its bar, and the ratio (or
seconds, or bytes) of every round. docs/benchmarks.json collects them, and tests/bench/page.py makes docs/benchmarks.md of it.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "bench"
STEADY = 1.3  # floors of one run that are further apart than this say that others used the machine
FIGURE = {
    "name": str,  # unique within its bench
    "what": str,  # what was measured
    "over": str,  # the floor or rival that it is divided by; empty where the figure stands for itself
    "unit": str,  # x for ratios, else s, ms, MB ...
    "bar": (int, float, type(None)),  # None where there is none
    "want": str,  # most: the median must not exceed the bar; least: it must reach it
    "median": (int, float),
    "low": (int, float),
    "high": (int, float),
    "rounds": int,
    "note": str,
}
RESULT = {"bench": str, "date": str, "code": str, "command": str, "machine": dict, "figures": list}
MACHINE = {"cpu": str, "cores": int, "threads": int, "memory_gib": (int, float), "gpu": (str, type(None)), "load_start": (int, float, type(None)),
           "load_end": (int, float, type(None)), "python": str, "torch": str, "transformers": str}  # fmt: skip


def in_turns(
    parts: Mapping[str, Callable[[], float | None]], rounds: int, *, warm: int | None = None
) -> dict[str, list[float]]:
    """Run all parts one after the other, `rounds` times after `warm` rounds that do not count: A B C A B C ...

    warm: one by default, none where there is one round only.
    A part returns its seconds, or None, and is then timed from outside. Returns each part's seconds, round by round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    warm = min(1, rounds - 1) if warm is None else warm
    for turn in range(warm + rounds):
        for name, part in parts.items():
            gc.collect()
            began = time.perf_counter()
            own = part()
            took = time.perf_counter() - began if own is None else own
            if turn >= warm:
                seconds[name].append(took)
    return seconds


def figure(
    name: str,
    what: str,
    values: Sequence[float],
    *,
    over: str = "",
    unit: str = "x",
    bar: float | None = None,
    want: str = "most",
    note: str = "",
) -> dict[str, Any]:
    """One figure from the value of each round."""
    return {
        "name": name, "what": what, "over": over, "unit": unit, "bar": bar, "want": want,
        "median": round_to(statistics.median(values)), "low": round_to(min(values)), "high": round_to(max(values)),
        "rounds": len(values), "note": note,
    }  # fmt: skip


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round: a busy minute slows both sides of a ratio."""
    return [a / b for a, b in zip(above, below, strict=True)]


def round_to(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def met(one: Mapping[str, Any]) -> bool | None:
    """Whether the median keeps the bar; None where there is none."""
    if one["bar"] is None:
        return None
    return bool(one["median"] <= one["bar"] if one["want"] == "most" else one["median"] >= one["bar"])


def load() -> float:
    """The system's load average of the last minute."""
    return round(os.getloadavg()[0], 2)


class Bench:
    """Collects the figures of one bench, shows each as it comes, and writes them. Make it before anything is measured: it notes
    the load that was there."""

    def __init__(self, bench: str, command: str, *, threads: int = 0, gpu: str | None = None) -> None:
        self.bench, self.command, self.threads, self.gpu = bench, command, threads, gpu
        self.load_start, self.code = load(), code()
        self.figures: list[dict[str, Any]] = []

    def add(self, *args: Any, **options: Any) -> dict[str, Any]:
        """As `figure`; prints it."""
        one = figure(*args, **options)
        self.figures.append(one)
        print(line(one), flush=True)
        return one

    def result(self) -> dict[str, Any]:
        return {
            "bench": self.bench, "date": datetime.date.today().isoformat(), "code": self.code, "command": self.command,
            "machine": machine(self.threads, self.gpu) | {"load_start": self.load_start, "load_end": load()},
            "figures": self.figures,
        }  # fmt: skip

    def write(self, file: Path | None = None) -> int:
        """Write the result file; 1 where a bar was missed, 2 where there is nothing to write, else 0."""
        if not self.figures:
            print("nothing was measured, and nothing is written")
            return 2
        file = file or CACHE / f"{self.bench}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.result(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        missed = [one["name"] for one in self.figures if met(one) is False]
        print(f"figures in {file}" + (f"; MISSED: {', '.join(missed)}" if missed else ""))
        return 1 if missed else 0


def at_least(least: float, kind: type = int) -> Callable[[str], Any]:
    """For argparse: a number that is not below `least`."""

    def number(text: str) -> Any:
        try:
            found = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
        if not found >= least:
            raise argparse.ArgumentTypeError(f"{text} is below {least:g}")
        return found

    return number


def code() -> str:
    """The commit that is measured, with a + where files differ from it; empty where git cannot tell."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + "+" * bool(changed)


def line(one: Mapping[str, Any]) -> str:
    bar = "" if one["bar"] is None else f", bar {one['bar']:g}: {'met' if met(one) else 'MISSED'}"
    over = f" over {one['over']}" if one["over"] else ""
    return f"{one['what']}{over}: {one['median']:g} {one['unit']} ({one['low']:g} to {one['high']:g}){bar}"


def machine(threads: int = 0, gpu: str | None = None) -> dict[str, Any]:
    """What the figures depend on. threads: of torch; 0: as torch chooses."""
    import torch
    import transformers

    return {
        "cpu": cpu_name(), "cores": os.cpu_count() or 0, "threads": threads or torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1), "gpu": gpu,
        "load_start": 0.0, "load_end": 0.0, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip


def cpu_name() -> str:
    """Its model as the kernel names it, with the model's number and the widest vector unit: on rented machines the name says little,
    and one whose products take two thirds of the time has other ratios."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    rows = [[part.strip() for part in row.split(":", 1)] for row in text.splitlines() if ":" in row]
    said = dict(reversed(rows))  # the first processor's
    model = said.get("model name", "")
    if number := said.get("model"):
        model += f", model {number}"
    units = next((u for u in ("amx_tile", "avx512f", "avx2", "asimd") if f" {u}" in text), "")
    return " ".join(filter(None, [model or platform.machine(), units and f"({units})"]))


def wrong(found: Any, schema: Mapping[str, Any], where: str = "") -> list[str]:
    """What does not agree with a schema of names and types."""
    if not isinstance(found, dict):
        return [f"{where}: not an object"]
    faults = [f"{where}: lacks '{name}'" for name in schema if name not in found]
    faults += [f"{where}: unknown key '{name}'" for name in found if name not in schema]
    faults += [f"{where}: {name} is {found[name]!r}" for name, kind in schema.items()
               if name in found and (not isinstance(found[name], kind) or (isinstance(found[name], bool) and kind is not bool))]  # fmt: skip
    return faults


def wrong_result(result: Any) -> list[str]:
    """What does not agree with the schema of a result file."""
    faults = wrong(result, RESULT, "result")
    if faults:
        return faults
    where = result["bench"]
    faults = wrong(result["machine"], MACHINE, f"{where}: machine")
    for one in result["figures"]:
        faults += wrong(one, FIGURE, f"{where}: figure")
        if isinstance(one, dict) and one.get("want") not in ("most", "least"):
            faults.append(f"{where}: want is {one.get('want')!r}")
    names = [one.get("name") for one in result["figures"] if isinstance(one, dict)]
    return faults + [f"{where}: two figures are named '{n}'" for n in sorted({n for n in names if names.count(n) > 1})]
