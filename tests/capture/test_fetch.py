"""Bytes that are fetched ahead: where there is no memory for some, who waits for them is told."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from capture import fetch
from capture.fetch import Fetcher
from capture.ranges import RemoteFile

FILE = RemoteFile(repo="a/b", commit="c", name="model.safetensors", size=1 << 24, etag="e", sha256="f")
FIRST, SECOND = (FILE, 0, 1000), (FILE, 1 << 20, (1 << 20) + 2000)  # further apart than what is fetched together
LARGE = (FILE, 1 << 22, (1 << 22) + 3000)


class Served:
    """Stands for the hub: a byte of a file is the last digit of its place."""

    def read(self, file: RemoteFile, start: int, into: memoryview) -> None:
        into[:] = bytes(i % 10 for i in range(start, start + len(into)))

    def close(self) -> None:
        pass


@pytest.fixture(params=[1, 3])
def fetcher(request: pytest.FixtureRequest) -> Iterator[Fetcher]:
    made = Fetcher(Served(), connections=request.param)  # type: ignore[arg-type]
    yield made
    made.close()


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Memory of at least so many bytes cannot be had; nor can pinned memory."""
    limits, own = {"nbytes": 1 << 40}, torch.empty

    def empty(nbytes: int, *, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        if nbytes >= limits["nbytes"] or pin_memory:
            raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {nbytes} bytes.")
        return own(nbytes, **more)

    monkeypatch.setattr(fetch.torch, "empty", empty)
    return limits


def taken(fetcher: Fetcher, *spans: Any) -> list[Any]:
    """Of each, its length or its error, within seconds."""

    def one(span: Any) -> Any:
        try:
            return len(fetcher.take(span))
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(len(spans)) as pool:
        asked = [pool.submit(one, span) for span in spans]
        try:
            return [a.result(timeout=10) for a in asked]
        except TimeoutError:
            fetcher.close()  # else the pool waits as well
            raise


def test_bytes_that_find_no_memory_are_an_error_and_not_a_wait(fetcher: Fetcher, scarce: dict[str, Any]) -> None:
    scarce["nbytes"] = 2000
    first, second, large = taken(fetcher, FIRST, SECOND, LARGE)
    assert first == 1000
    assert "can't allocate memory" in str(second)
    assert "can't allocate memory" in str(large)
    assert fetcher.held == 0


def test_what_found_no_memory_ahead_is_tried_again_when_it_is_needed(fetcher: Fetcher, scarce: dict[str, Any]) -> None:
    scarce["nbytes"] = 2000
    fetcher.announce([SECOND, FIRST])
    assert taken(fetcher, FIRST) == [1000]  # the one behind it came
    assert not fetcher.announced(SECOND)
    scarce["nbytes"] = 1 << 40
    assert taken(fetcher, SECOND) == [2000]
    assert fetcher.idle


def test_bytes_come_into_other_memory_where_none_can_be_pinned(fetcher: Fetcher, scarce: dict[str, Any]) -> None:
    fetcher.pin = True
    assert taken(fetcher, FIRST) == [1000]
