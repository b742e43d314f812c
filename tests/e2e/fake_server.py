"""The fake Vast as a process of its own, and a client of it that does not wait long."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

E2E = Path(__file__).parent


class Fake:
    """Its address, and its switches."""

    def __init__(self, url: str) -> None:
        self.url = url

    def control(self, what: str, body: Any = None) -> Any:
        data = json.dumps(body).encode()
        with urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/control/{what}", data=data), timeout=10
        ) as reply:
            return json.loads(reply.read())

    def fault(self, call: str, kind: str, times: int = 1, after: int = 0) -> None:
        """The next `times` calls of this name go wrong, after `after` good ones."""
        rules = self.control("faults")
        self.control("faults", [*rules, {"call": call, "kind": kind, "times": times, "after": after}])

    def bill(self) -> list[dict[str, Any]]:
        return list(self.control("bill"))

    def live(self) -> list[dict[str, Any]]:
        return [line for line in self.bill() if line["destroyed"] is None]

    def calls(self, name: str) -> int:
        """How often a call came since the last look."""
        return sum(c.split()[0] == name for c in self.control("calls"))


@contextmanager
def running_fake(*options: str) -> Iterator[Fake]:
    process = subprocess.Popen([sys.executable, str(E2E / "fake_vast.py"), *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Fake(json.loads(process.stdout.readline())["url"])
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def hasty(seconds: float) -> None:
    """A sleep for tests: back-offs keep their order, not their length."""
    time.sleep(seconds * 0.01)


def wait_for(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"did not come true within {seconds} s")
