"""Finding a Ray: errors come at once and say what to do."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from cluster.connect import ClusterError, connected, running_elsewhere


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
