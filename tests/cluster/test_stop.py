"""Ctrl-C, SIGTERM and a killed driver, in processes of their own, with signals as a terminal sends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fake_work
import pytest

from capture.layout import RunDir

DRIVER = Path(__file__).with_name("drive.py")


@contextmanager
def driving(out: Path, *names: str, address: str = "local", grace: float = 30) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"RAY_ADDRESS": address}
    driver = subprocess.Popen(
        [sys.executable, str(DRIVER), str(grace), str(out), *names], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        yield driver
    finally:
        if driver.poll() is None:
            driver.kill()
        driver.communicate()


def until(what: Callable[[], Any], seconds: float = 90) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def rows(out: Path) -> dict[str, str]:
    return {r["entry"]: r["state"] for r in RunDir(str(out)).manifest_rows()}


@pytest.fixture
def address(local_ray: None) -> str:
    """The tests' own Ray, to be used as a running cluster: it is there at once."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def test_ctrl_c_stops_cleanly_and_keeps_what_is_complete(tmp_path: Path) -> None:
    names = ["complete", "obliging", "stubborn", "sleeping"]
    with driving(tmp_path, *names, grace=1.5) as driver:
        until(lambda: rows(tmp_path).get("complete") == "complete" and fake_work.calls(tmp_path, "stubborn"))
        os.killpg(driver.pid, signal.SIGINT)  # a terminal sends it to the whole group
        out, err = driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert rows(tmp_path) == {"complete": "complete", "obliging": "interrupted", "stubborn": "interrupted"}
    assert "'sleeping': 'not started'" in out
    assert err.count("stopping; what is complete stays complete") == 1
    assert not any(alive(n["pid"]) for n in fake_work.calls(tmp_path))


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, address: str) -> None:
    with driving(tmp_path, "stubborn", address=address) as driver:
        until(lambda: fake_work.calls(tmp_path, "stubborn"))
        began = time.monotonic()
        os.killpg(driver.pid, signal.SIGINT)
        time.sleep(0.5)
        os.killpg(driver.pid, signal.SIGINT)
        driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert time.monotonic() - began < 15  # the grace alone is 30 seconds
    assert rows(tmp_path) == {"stubborn": "interrupted"}
    assert not any(alive(n["pid"]) for n in fake_work.calls(tmp_path))


def test_sigterm_stops_like_ctrl_c(tmp_path: Path, address: str) -> None:
    with driving(tmp_path, "obliging", address=address) as driver:
        until(lambda: fake_work.calls(tmp_path, "obliging"))
        driver.terminate()
        driver.communicate(timeout=30)
    assert driver.returncode == 143
    assert rows(tmp_path) == {"obliging": "interrupted"}


def test_workers_do_not_outlive_a_killed_driver(tmp_path: Path, address: str) -> None:
    with driving(tmp_path, "stubborn", address=address) as driver:
        (note,) = until(lambda: fake_work.calls(tmp_path, "stubborn"))
        driver.kill()
        driver.wait()
        until(lambda: not alive(note["pid"]))
    assert rows(tmp_path) == {"stubborn": "running"}  # nobody was left to say how it ended
