"""A sweep through Ray in a process of its own: `python sweeping.py OUT [CPUS]` with entries as JSON on stdin, one a line.

It is `pairscope sweep` with workers that faults were put into (faulty.py). A tag in its environment finds its processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import invariants
from inject import Fault

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TAG = "PAIRSCOPE_TAG"


class Sweep:
    """A sweep that runs. `said` is the file with what it shows."""

    def __init__(self, process: subprocess.Popen[str], tag: str, said: Path) -> None:
        self.process, self.tag, self.said = process, tag, said

    def found(self, part: str) -> list[int]:
        """Pids of the sweep's processes with this text in their command line."""
        return [pid for pid, command in invariants.tagged(self.tag).items() if part in command]

    def wait(self, seconds: float = 300) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a sweep hung for {seconds} s\n{self.said.read_text()}") from None

    def until_nothing_is_left(self, seconds: float = 90) -> None:
        """Raise where processes of this sweep outlive it."""
        end = time.monotonic() + seconds
        while left := invariants.tagged(self.tag):
            assert time.monotonic() < end, f"left behind: {left}"
            time.sleep(0.2)


def start(
    entries: Sequence[Any], out: Path, said: Path, faults: Mapping[str, Sequence[Fault]] | None = None, cpus: int = 2,
    **environment: str,
) -> Sweep:  # fmt: skip
    tag = f"sweep-{uuid.uuid4().hex}"
    plan = {name: [dataclasses.asdict(f) for f in some] for name, some in (faults or {}).items()}
    with open(said, "w") as stream:
        process = subprocess.Popen(
            [sys.executable, __file__, str(out), str(cpus)], stdin=subprocess.PIPE, stdout=stream, stderr=stream,
            text=True, cwd=ROOT, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "local", TAG: tag,
                              "RAY_raylet_start_wait_time_s": "180", "PAIRSCOPE_FAULTS": json.dumps(plan)} | environment,
        )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write("\n".join(e.model_dump_json() for e in entries))
    process.stdin.close()
    return Sweep(process, tag, said)


@contextlib.contextmanager
def sweeping(*args: Any, **kwargs: Any) -> Iterator[Sweep]:
    """A sweep for the length of the block; whatever is left of it is ended with the block, by pid."""
    sweep = start(*args, **kwargs)
    try:
        yield sweep
    finally:
        if sweep.process.poll() is None:
            sweep.process.kill()
            sweep.process.wait()
        time.sleep(0.2)
        for pid in invariants.tagged(sweep.tag):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def main(out: str, cpus: str) -> int:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(ROOT))
    from capture.config import Entry
    from capture.errors import PairscopeError
    from capture.show import Show
    from cluster.sweep import run_sweep

    entries = [Entry.model_validate_json(line) for line in sys.stdin.read().splitlines()]
    try:
        summary = run_sweep(
            [(e.name, e) for e in entries], out, work="faulty:capture", cpus=int(cpus),
            show=Show(stream=sys.stdout, live=False),
        )  # fmt: skip
    except PairscopeError as error:
        print(f"pairscope: {type(error).__name__}: {error}")
        return error.exit_code
    print({i.name: i.state for i in summary.items})
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
