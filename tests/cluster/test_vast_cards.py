"""A machine whose GPU cannot be used is told from one that has none: it is not set up, and no entry computes on its CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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
