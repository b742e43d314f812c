"""Finding a Ray: errors come at once and say what to do."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.connect import TOO_SLOW, ClusterError, _start, connected, running_elsewhere


@pytest.fixture
def no_ray_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)  # it would end the one that other tests use


@pytest.mark.usefixtures("no_ray_yet")
def test_an_address_where_nobody_listens_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with pytest.raises(ClusterError, match=f"RAY_ADDRESS={address}.*nobody listens.*unset RAY_ADDRESS"), connected():
        pass
    assert time.monotonic() - began < 5


@pytest.mark.usefixtures("no_ray_yet")
def test_a_refused_token_is_named_as_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        try:
            raise RuntimeError("RPC error: Unauthenticated: InvalidAuthToken")
        except RuntimeError as error:
            raise ConnectionError("Failed to connect to Ray cluster") from error

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ClusterError, match="refused the token; set RAY_AUTH_MODE=token"), connected():
        pass


def test_a_ray_started_by_hand_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert running_elsewhere() is None
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379")
    assert running_elsewhere() == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert running_elsewhere() is None


class SlowRay:
    """ray.init as it fails where the machine is busy: so many times, with this text."""

    def __init__(self, times: int, text: str) -> None:
        self.times, self.text, self.inits, self.ends = times, text, 0, 0

    def init(self, **options: Any) -> None:
        self.inits += 1
        if self.inits <= self.times:
            raise Exception(self.text)

    def shutdown(self) -> None:
        self.ends += 1


@pytest.mark.parametrize(
    ("times", "text", "inits"), [(0, "", 1), (2, TOO_SLOW, 3), (3, TOO_SLOW, 3), (1, "no room", 1)]
)
def test_a_ray_of_our_own_that_was_too_slow_is_started_again_and_another_error_is_told(
    times: int, text: str, inits: int
) -> None:
    ray = SlowRay(times, f"The current node {text}.")
    if inits <= times:
        with pytest.raises(Exception, match=text):
            _start(ray, "", True, 2)
    else:
        _start(ray, "", True, 2)
    assert (ray.inits, ray.ends) == (inits, inits - 1)
