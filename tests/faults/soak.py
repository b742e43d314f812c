"""Hundreds of tiny captures with faults every few seconds: `python soak.py [--minutes 60] [--seed N]`, or `make soak`.

Batches of captures in one run directory each. Three lanes of processes work on it at once, sometimes on the very same capture,
and in some batches a sweep through Ray with more; whatever chance says is done to them from inside (inject.py), by signals, and
to what lies on the disk. Every capture is run until it is complete. Behind each batch everything must hold that invariants.py
knows. The same seed draws the same faults; when they strike depends on the machine.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import entries
import invariants
import reliability
import runner
import sweeping
from inject import Fault, damage

from capture.layout import RunDir

LANES = 3  # processes at once
CASES = 15  # captures of the lanes in one batch
SWEPT = 3  # captures of a batch's sweep
TRIES = 8  # with faults; the next are left alone
UNDISTURBED = 3  # tries that are left alone, by which a capture must be complete
WITHIN = 600.0  # seconds after which an attempt counts as hung

# what is done, where, at which call at most, how often in a hundred
INSIDE = (
    *(("kill", at, most, 3) for at, most in (
        ("resolve", 1), ("open", 1), ("load", 12), ("prefetch", 5), ("layer", 30), ("lens", 12), ("commit", 3), ("span file", 6),
        ("table", 9), ("finish", 1), ("rename", 8), ("marker", 2), ("clear", 2), ("row", 2), ("replace", 20), ("fsync", 20),
    )),
    *(("stop", at, most, 2) for at, most in (("layer", 20), ("table", 6), ("commit", 2))),
    *(("slow", at, most, 2) for at, most in (("table", 6), ("replace", 10), ("prefetch", 4))),
    ("oom", "layer", 20, 3), ("oom", "lens", 10, 3), ("host oom", "layer", 20, 3), ("host oom", "table", 8, 2),
    ("cuda", "layer", 20, 3), ("cuda", "load", 12, 2), ("error", "prefetch", 4, 3), ("error", "layer", 20, 2),
    *((kind, at, most, 3) for kind in ("ENOSPC", "EIO", "EROFS") for at, most in (
        ("row group", 8), ("rename", 8), ("replace", 16), ("fsync", 16),
    )),
    ("clock", "clock", 1, 4),
)  # fmt: skip
SIGNALS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT twice", "SIGSTOP")
BEHIND_A_SWEEP = ("worker", "worker", "driver", "SIGTERM", "raylet", "gcs", "SIGSTOP", "inside", "inside")


class Soak:
    def __init__(self, folder: Path, seed: int, minutes: float, sweeps: bool) -> None:
        self.folder, self.seed, self.sweeps = folder, seed, sweeps
        self.until = time.monotonic() + 60 * minutes
        self.began = time.monotonic()
        self.counted: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()
        self.wrong: list[str] = []
        self.forced: set[str] = set()  # entries that some attempt began anew
        self.recipes = entries.make_entries(folder / "pairs")
        self.undisturbed: dict[str, Path] = {}

    def run(self) -> int:
        self._say(f"seed {self.seed}, {(self.until - self.began) / 60:.0f} minutes, in {self.folder}")
        for entry in self.recipes:
            out = self.folder / "undisturbed" / entry.name
            ended = runner.run(entry, out, said=self.folder / "said")
            assert ended.code == 0, ended.said
            (self.undisturbed[entry.name],) = out.glob("captures/*/*")
        self.until += time.monotonic() - self.began  # the time is of the faults
        self.began = time.monotonic()
        number = 0
        while time.monotonic() < self.until and not self.wrong:
            self._batch(number)
            number += 1
        return self._summary()

    # -- a batch -------------------------------------------------------------------------------------------------------

    def _batch(self, number: int) -> None:
        out = self.folder / f"batch-{number}"
        chance = random.Random(f"{self.seed} {number}")
        drawn = [chance.choice(self.recipes) for _ in range(CASES)]
        cases = [recipe.model_copy(update={"name": f"case-{number}-{i}"}) for i, recipe in enumerate(drawn)]
        like = {case.name: self.undisturbed[recipe.name] for case, recipe in zip(cases, drawn, strict=True)}
        lanes: list[list[tuple[Any, random.Random]]] = [[] for _ in range(LANES)]
        for i, case in enumerate(cases):
            both = chance.random() < 0.15  # two at work on one capture at once
            for lane in {i % LANES, (i + both) % LANES}:
                lanes[lane].append((case, random.Random(f"{self.seed} {number} {i} {lane}")))
        threads = [
            threading.Thread(target=self._lane, args=(f"{number}.{k}", out, lane)) for k, lane in enumerate(lanes)
        ]
        if self.sweeps and number % 3 == 1:
            swept = [r.model_copy(update={"name": f"swept-{number}-{i}"}) for i, r in enumerate(self.recipes[:SWEPT])]
            like |= {case.name: self.undisturbed[r.name] for case, r in zip(swept, self.recipes, strict=False)}
            threads.append(threading.Thread(target=self._swept, args=(f"{number}.s", out, swept, chance)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.wrong:
            return
        reported = invariants.complete(out)
        self._spoil_what_is_complete(out, chance)
        for entry in cases:  # who asks again is told that all is there; what was spoiled is found and made again
            if chance.random() < 0.3 or entry.name in self.spoiled:
                self._undisturbed_run(entry, out, f"{number}.again")
        found = invariants.wrong(out, as_undisturbed=like, reported=reported)
        if found:
            self._is_wrong(f"batch {number} in {out}", found)
            return
        with self.lock:
            self.counted["captures"] += len(like)
            self.counted["rows of the manifest"] += len(RunDir(str(out)).manifest_rows())
        shutil.rmtree(out)
        done = ", ".join(f"{n} {what}" for what, n in self.counted.items())
        self._say(f"batch {number} is right: {done}, {sum(self.faults.values())} faults")

    def _lane(self, name: str, out: Path, cases: list[tuple[Any, random.Random]]) -> None:
        try:
            for entry, chance in cases:
                self._case(name, out, entry, chance)
        except BaseException:
            self._is_wrong(f"lane {name}", traceback.format_exc().splitlines())

    def _case(self, name: str, out: Path, entry: Any, chance: random.Random) -> None:
        """Run one entry until it is complete, with faults at first."""
        for attempt in range(TRIES + UNDISTURBED):
            faults: tuple[Fault, ...] = ()
            sign, after = None, 0.0
            if attempt < TRIES and chance.random() < 0.75:
                if chance.random() < 0.8:
                    faults = tuple(self._draw(chance) for _ in range(chance.choice([1, 1, 2])))
                else:
                    sign, after = chance.choice(SIGNALS), chance.uniform(0.3, 4.0)
            force = attempt == 0 and chance.random() < 0.1
            if force:
                self.forced.add(entry.name)
            code, said = self._attempt(name, out, entry, faults, sign, after, force)
            self._judge(entry, code, said, faults, sign)
            if code == 0:
                return
            if attempt < TRIES and chance.random() < 0.2:
                self._spoil_spans(out, entry, chance)
        raise AssertionError(f"{entry.name} is not complete after {TRIES + UNDISTURBED} tries: {said}")

    def _draw(self, chance: random.Random) -> Fault:
        do, at, most, _ = chance.choices(INSIDE, weights=[w for *_, w in INSIDE])[0]
        seconds = chance.choice([-86400.0, 86400.0, -30.0]) if do == "clock" else chance.uniform(0.2, 2.0)
        times = 10**9 if do in ("EROFS", "ENOSPC") and chance.random() < 0.5 else 1
        return Fault(at, do, nth=chance.randint(1, most), after=chance.random() < 0.5, seconds=seconds, times=times)

    def _attempt(
        self, name: str, out: Path, entry: Any, faults: tuple[Fault, ...], sign: str | None, after: float, force: bool
    ) -> tuple[int, str]:
        said = self.folder / f"said-{name}"
        said.write_text("")
        began = time.monotonic()
        process = runner.start(entry, out, *faults, force=force, said=said)
        self._count("attempts", *(f"{f.do} at {f.at}" if f.do != "clock" else "clock" for f in faults))
        if sign is not None and runner.ended(process, after) is None:
            self._count(None, sign)
            self._send(process.pid, sign)
        code = runner.ended(process, WITHIN)
        if code is None:
            process.kill()
            raise AssertionError(f"{entry.name} hung for {WITHIN} s with {[str(f) for f in faults]} {sign}")
        with self.lock:
            self.counted["seconds of attempts"] += round(time.monotonic() - began)
        return code, said.read_text()

    def _send(self, pid: int, sign: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            if sign == "SIGSTOP":
                os.kill(pid, signal.SIGSTOP)
                time.sleep(2)
                os.kill(pid, signal.SIGCONT)
            elif sign == "SIGINT twice":
                os.kill(pid, signal.SIGINT)
                time.sleep(0.1)
                os.kill(pid, signal.SIGINT)
            else:
                os.kill(pid, getattr(signal, sign))

    def _judge(self, entry: Any, code: int, said: str, faults: tuple[Fault, ...], sign: str | None) -> None:
        """An attempt ends in a result or in an error that was meant for a user; only an injected bug may look like one."""
        meant = {"error"} & {f.do for f in faults}
        late = {-15} if sign == "SIGTERM" else set()  # it came when all was done and the handlers were put back
        assert code in {0, 1, 2, 130, 143, -9} | late, f"{entry.name}: exit code {code}: {said}"
        if not meant and sign is None:
            assert "Traceback" not in said, f"{entry.name} with {[str(f) for f in faults]}: {said}"
            odd = {"EIO", "EROFS"} & {f.do for f in faults}  # of a file system; a model may lie there as well
            assert odd or "(a bug)" not in said, f"{entry.name} with {[str(f) for f in faults]}: {said}"
        if not faults and sign is None:
            told_to_go = entry.name in self.forced and "began it anew (--force)" in said  # by the other lane
            assert code == 0 or told_to_go, f"{entry.name}, left alone: {said}"

    def _undisturbed_run(self, entry: Any, out: Path, name: str) -> None:
        code, said = self._attempt(name, out, entry, (), None, 0.0, False)
        if code != 0:
            self._is_wrong(f"{entry.name} run again", [said])

    # -- a sweep -------------------------------------------------------------------------------------------------------

    def _swept(self, name: str, out: Path, swept: list[Any], chance: random.Random) -> None:
        try:
            for attempt in range(5):
                what = chance.choice(BEHIND_A_SWEEP) if attempt < 3 else None
                if self._one_sweep(name, out, swept, chance, what, attempt) == 0:
                    return
            self._is_wrong(f"sweep {name}", ["not complete after five tries", (self.folder / "said-sweep").read_text()])
        except BaseException:
            self._is_wrong(f"sweep {name}", traceback.format_exc().splitlines())

    def _one_sweep(
        self, name: str, out: Path, swept: list[Any], chance: random.Random, what: str | None, attempt: int
    ) -> int:
        faults = {}
        if what == "inside":
            drawn = {e.name: self._draw(chance) for e in swept}
            faults = {
                n: [Fault(f.at, f.do, f.nth, 1, f.after, f.seconds, str(self.folder / f"once-{name}-{attempt}-{n}"))]
                for n, f in drawn.items() if f.do != "clock"
            }  # fmt: skip
        self._count("sweeps", *(f"in a sweep: {f.do} at {f.at}" for (f,) in faults.values()))
        with sweeping.sweeping(swept, out, self.folder / "said-sweep", faults) as sweep:
            if what not in (None, "inside"):
                end = time.monotonic() + chance.uniform(5, 45)
                while time.monotonic() < end and sweep.process.poll() is None:
                    time.sleep(0.1)
                self._count(None, f"in a sweep: {what}")
                self._harm(sweep, what)
            code = sweep.wait(WITHIN)
            sweep.until_nothing_is_left(120)
        if what is None and code != 0:
            raise AssertionError(f"a sweep that was left alone ended with {code}: {sweep.said.read_text()}")
        return code

    def _harm(self, sweep: sweeping.Sweep, what: str) -> None:
        part = {"worker": "ray::", "raylet": "/raylet/raylet ", "gcs": "/gcs/gcs_server ", "SIGSTOP": "ray::"}.get(what)
        pids = sweep.found(part) if part else [sweep.process.pid]
        for pid in pids[:1]:
            self._send(pid, what if what.startswith("SIG") else "SIGKILL")

    # -- what lies on the disk -----------------------------------------------------------------------------------------

    def _spoil_spans(self, out: Path, entry: Any, chance: random.Random) -> None:
        files = sorted(out.glob(f"captures/pair={entry.name}/*/spans/*.safetensors"))
        if files:
            how = chance.choice(["truncated", "flipped"])
            self._count(None, f"a span {how}")
            with contextlib.suppress(OSError):  # another lane may be through with it
                damage(chance.choice(files), how, chance.random())

    def _spoil_what_is_complete(self, out: Path, chance: random.Random) -> None:
        self.spoiled: set[str] = set()
        for capture in list(RunDir(str(out)).captures()):
            if capture.pair.startswith("case") and chance.random() < 0.1:
                how = chance.choice(["truncated", "flipped"])
                self._count(None, f"a table {how}")
                damage(Path(capture.path) / chance.choice(capture.marker["files"])["name"], how, chance.random())
                self.spoiled.add(capture.pair)

    # -- telling -------------------------------------------------------------------------------------------------------

    def _count(self, what: str | None, *faults: str) -> None:
        with self.lock:
            if what is not None:
                self.counted[what] += 1
            self.faults.update(faults)

    def _is_wrong(self, where: str, lines: list[str]) -> None:
        with self.lock:
            self.wrong += [f"{where}:", *lines]

    def _say(self, text: str) -> None:
        print(f"{(time.monotonic() - self.began) / 60:6.1f} min  {text}", flush=True)

    def _summary(self) -> int:
        found = {
            "seed": self.seed, "machine": reliability.machine(), "minutes": round((time.monotonic() - self.began) / 60, 1), **self.counted,
            "faults": dict(self.faults.most_common()), "faults in all": sum(self.faults.values()), "wrong": self.wrong,
        }  # fmt: skip
        (self.folder / "summary.json").write_text(json.dumps(found, indent=1))
        print(json.dumps({k: v for k, v in found.items() if k != "wrong"}))
        for line in self.wrong:
            print(line)
        print(f"soak {'FAILED' if self.wrong else 'ended complete and correct'}; seed {self.seed}; {self.folder}")
        return 1 if self.wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="the same seed draws the same faults")
    parser.add_argument("--no-sweeps", action="store_true", help="leave Ray out")
    asked = parser.parse_args()
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(10**6)
    folder = Path(tempfile.mkdtemp(prefix="pairscope-soak-"))
    code = Soak(folder, seed, asked.minutes, not asked.no_sweeps).run()
    if code == 0:
        reliability.TOLD.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "summary.json", reliability.TOLD / reliability.SOAK)
        shutil.rmtree(folder)
    return code


if __name__ == "__main__":
    sys.exit(main())
