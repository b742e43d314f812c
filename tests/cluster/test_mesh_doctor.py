"""`pairscope doctor` on a node: what the mesh's daemon wrote down, in words."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from capture.cli import doctor
from cluster.mesh.daemon import Daemon
from cluster.mesh.peers import Mesh, Peer, write_peers


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mesh's folder of node 1, with one worker to reach."""
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path))
    path = tmp_path / "mesh"
    mesh = Mesh(1, 4, (Peer(2, "192.0.2.1", 41002, "vast-7", "key", "known_hosts"),))
    write_peers(mesh, path)
    (path / "node.json").write_text(mesh.node_text)
    return path


def rows() -> dict[str, dict[str, Any]]:
    lines = CliRunner().invoke(doctor, ["--json"], catch_exceptions=False).output.splitlines()
    found = [json.loads(line) for line in lines]
    return {row["check"]: row for row in found if any(word in row["check"] for word in ("mesh", "tunnel", "switch"))}


def test_a_machine_that_is_no_node_shows_no_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path))
    assert rows() == {}


def test_a_node_without_a_daemon_is_told_how_to_start_it(folder: Path) -> None:
    assert rows()["mesh"]["found"] == "its daemon is not running"
    assert "cluster.mesh up" in rows()["mesh"]["remedy"]


def test_the_switch_that_ends_a_node_is_shown_with_its_last_look(folder: Path) -> None:
    name = "dead-man's switch"
    assert (rows()[name]["ok"], rows()[name]["found"]) == (False, "it does not run")
    assert "ray down" in rows()[name]["remedy"]
    beat = folder.parent / "deadman.beat"
    beat.touch()
    assert rows()[name]["ok"]
    os.utime(beat, (0, time.time() - 500))
    assert not rows()[name]["ok"]
    assert rows()[name]["found"].startswith("it has not looked for ")


def test_each_tunnel_is_shown_with_its_state(folder: Path) -> None:
    daemon = Daemon(folder)
    daemon.read()
    daemon.note()
    down = rows()
    assert down["mesh"]["found"] == "node 1 of a mesh with places for 4, 1 tunnels"
    assert (down["tunnel to node 2"]["ok"], down["tunnel to node 2"]["found"]) == (
        False, "192.0.2.1:41002, down: ssh is trying, started 0x",
    )  # fmt: skip
    status = json.loads((folder / "status.json").read_text())
    status["tunnels"][0] |= {"alive": True, "seconds": 65.2, "starts": 2}
    (folder / "status.json").write_text(json.dumps(status))
    assert rows()["tunnel to node 2"]["ok"]
    assert "up for 65 s, started 2x" in rows()["tunnel to node 2"]["found"]


def test_a_daemon_that_hangs_or_a_file_that_is_broken_is_no_healthy_mesh(folder: Path) -> None:
    Daemon(folder).note()
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"at": time.time() - 90}))
    found = rows()["mesh"]
    assert not found["ok"]
    assert found["found"].startswith("its daemon has been silent for ")
    assert found["remedy"] == "start it: cd ~/pairscope && python3 -m cluster.mesh up"
    (folder / "status.json").write_text("{")
    assert "cannot be read" in rows()["mesh"]["found"]


def test_what_the_set_up_measured_is_in_the_status(folder: Path) -> None:
    assert Daemon(folder).status()["download"] is None
    (folder.parent / "download.json").write_text('{"bytes": 5, "seconds": 1}')
    assert Daemon(folder).status()["download"] == {"bytes": 5, "seconds": 1}
