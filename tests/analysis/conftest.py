"""The made-up run directory, the command line to ask it with, and a browser with a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, start_browser
from click.testing import CliRunner
from pages import Made, make_page
from synthetic import ALPHA, Capture, alpha, beta, gamma, write_attempt, write_capture

from analysis import open_run
from capture.errors import PairscopeError
from pairscope import cli


@dataclass(frozen=True)
class Synthetic:
    """The run directory and the numbers in it."""

    out: Path
    alpha: Capture
    beta: Capture


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    """Read-only: tests that change files make their own."""
    out = tmp_path_factory.mktemp("run's dir") / "out"
    made = Synthetic(out, alpha(), beta())
    write_capture(out, made.alpha)
    write_capture(out, made.beta)
    write_capture(out, gamma(), marker=False)
    write_attempt(out, "1", entry="alpha", capture=ALPHA, state="complete", started="2025-01-01T00:00:01.000", seconds=3.5,
                  n_tokens=8, peak_memory_bytes=2**30)  # fmt: skip
    return made


@pytest.fixture(scope="session")
def con(synthetic: Synthetic) -> Any:
    return open_run(str(synthetic.out))


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture(scope="session")
def call() -> Callable[..., Answer]:
    """Run a verb as the command line does: a user's error becomes its text and its exit code; a bug is raised."""

    def run(*args: object, stdin: str | None = None) -> Answer:
        result = CliRunner().invoke(cli, [str(a) for a in args], input=stdin)
        if isinstance(result.exception, PairscopeError):
            return Answer(result.exception.exit_code, result.stdout, str(result.exception))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Answer(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    started = start_browser()
    yield started
    started.quit()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Made:
    return make_page(tmp_path_factory.mktemp("page"))
