"""Addresses, port blocks and what is forwarded where."""

from __future__ import annotations

from pathlib import Path

import pytest

from capture.errors import ConfigError
from cluster.mesh.peers import Mesh, Peer, read_mesh, restricted_line, write_peers
from cluster.mesh.ports import MOST_NODES, block, peer_ports, ray_flags

HEAD = Peer(1, "h", 22, "vast-1", "k", "kh")


def ports_in(flags: list[str]) -> set[int]:
    return {int(f.split("=")[1]) for f in flags if f.split("=")[-1].isdigit()}


def test_no_two_nodes_share_a_port_and_none_is_the_kernels_own() -> None:
    used = [p for k in range(1, MOST_NODES + 1) for p in range(block(k), block(k) + 256)]
    assert len(set(used)) == len(used)
    assert max(used) < 32768
    assert min(used) > 10001


def test_every_port_that_ray_is_given_lies_in_the_nodes_block() -> None:
    assert all(block(7) <= p < block(8) for p in ports_in(ray_flags(7)))
    assert ports_in(ray_flags(1)) - set(range(block(1), block(2))) == {6379, 8265, 10001}


def test_the_dashboard_is_bound_to_loopback() -> None:
    assert "--dashboard-host=127.0.0.1" in ray_flags(1)


def test_a_worker_reaches_all_others_through_the_head_and_never_forwards_its_own_block() -> None:
    forwards = Mesh(3, 4, (HEAD,)).forwards(HEAD)
    assert {a for a, _ in forwards} == {"127.0.1.1", "127.0.1.2", "127.0.1.4"}
    assert not {p for _, p in forwards} & set(range(block(3), block(4)))
    assert ("127.0.1.1", 6379) in forwards
    assert all(("127.0.1.2", p) in forwards for p in peer_ports(2))
    assert len(set(forwards)) == len(forwards)


def test_the_head_dials_a_workers_agents_and_status_too() -> None:
    worker = Peer(2, "w", 22, "vast-2", "k", "kh")
    ports = {p - block(2) for _, p in Mesh(1, 4, (worker,)).forwards(worker)}
    assert ports == {0, 1, 2, 3, 6, *range(10, 170)}


@pytest.mark.parametrize("k", [0, 49])
def test_there_is_no_node_outside_the_mesh(k: int) -> None:
    with pytest.raises(ValueError, match="at most 48"):
        block(k)


def test_the_files_read_back_as_they_were_written(tmp_path: Path) -> None:
    mesh = Mesh(2, 4, (HEAD,))
    (tmp_path / "node.json").write_text(mesh.node_text)
    assert read_mesh(tmp_path) == Mesh(2, 4)
    write_peers(mesh, tmp_path)
    assert read_mesh(tmp_path) == mesh


def test_a_machine_that_is_no_node_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a node of a cluster"):
        read_mesh(tmp_path)


def test_the_workers_key_may_forward_into_the_mesh_and_nothing_else() -> None:
    line = restricted_line("ssh-ed25519 AAAA pairscope\n", 3)
    assert line.startswith("restrict,port-forwarding,")
    assert 'command="/bin/false"' in line
    assert line.count("permitopen=") == 3
    assert line.endswith("ssh-ed25519 AAAA pairscope")
