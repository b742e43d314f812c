"""A machine whose GPU cannot be used is told from one that has none: it is not set up, and no entry computes on its CPU."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_work import make_entry

from capture.config import Entry
from capture.errors import DeviceError
from cluster import prepare
from cluster.mesh.peers import Mesh
from cluster.mesh.ports import HEAD
from cluster.rate import rate_text
from cluster.vast import cards


def torch(seen: int) -> Any:
    cuda = SimpleNamespace(is_available=lambda: seen > 0, device_count=lambda: seen)
    return SimpleNamespace(cuda=cuda, __version__="2.13.0", version=SimpleNamespace(cuda="13.0"))


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A rented node's home, and its devices."""
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path))
    (tmp_path / "mesh").mkdir()
    (tmp_path / "mesh" / "node.json").write_text(Mesh(HEAD, 4).node_text)
    (tmp_path / "dev").mkdir()
    return tmp_path


def test_cards_are_expected_where_there_are_any(node: Path) -> None:
    assert cards.rented(node / "dev") == 0
    for name in ("nvidiactl", "nvidia0"):
        (node / "dev" / name).touch()
    assert cards.rented(node / "dev") == 1
    (node / "rate.json").write_text(rate_text(1.5, 4))
    assert cards.rented(node / "dev") == 4


@pytest.mark.parametrize(("seen", "wanted", "ends"), [(0, 1, 1), (3, 4, 1), (1, 1, 0), (4, 4, 0), (0, 0, 0)])
def test_a_machine_with_fewer_cards_than_it_is_rented_for_is_not_set_up(
    seen: int, wanted: int, ends: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cards, "rented", lambda: wanted)
    monkeypatch.setitem(sys.modules, "torch", torch(seen))
    if not ends:
        cards.main()
        assert capsys.readouterr().out == ""
        return
    with pytest.raises(SystemExit) as ended:
        cards.main()
    assert ended.value.code == 1
    assert f"torch 2.13.0 can use {seen} of the {wanted} GPUs of this machine" in capsys.readouterr().out


def take(entry: Entry) -> Any:
    return prepare.capture_prepared(entry, "/nowhere")


@pytest.fixture
def held(node: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The GPUs that Ray gave the worker; torch sees none."""
    given = [0]
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get_gpu_ids", lambda: given)
    monkeypatch.setattr(prepare, "find_gate", lambda: None)
    monkeypatch.setattr("capture.run.capture_pair", lambda *_, **__: "captured")
    monkeypatch.setitem(sys.modules, "torch", torch(0))
    return given


def test_an_entry_that_was_given_a_rented_gpu_does_not_go_on_without_it(
    held: list[int], node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeviceError, match=r"cannot use the GPU of .*, which is rented for it"):
        take(make_entry(device=None))
    assert take(make_entry(device="cpu")) == "captured"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch(1))
        assert take(make_entry(device=None)) == "captured"
    held.clear()
    assert take(make_entry(device=None)) == "captured"
    held.append(0)
    (node / "mesh" / "node.json").unlink()
    assert take(make_entry(device=None)) == "captured", "a laptop's torch may have no CUDA"


def test_a_worker_whose_gpu_cannot_be_used_leaves_the_cluster(
    held: list[int], node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (node / "mesh" / "node.json").write_text(Mesh(2, 4).node_text)
    ended: list[Any] = []
    monkeypatch.setattr(cards.os, "kill", lambda *what: ended.append(what))
    monkeypatch.setattr(cards.time, "sleep", ended.append)
    with pytest.raises(DeviceError):
        take(make_entry(device=None))
    assert ended == [], "whose child this is is no raylet"
    monkeypatch.setattr(cards, "_raylet", lambda: 4711)
    with pytest.raises(DeviceError):
        take(make_entry(device=None))
    assert ended == [(4711, signal.SIGTERM), cards.RAYLET_S]
