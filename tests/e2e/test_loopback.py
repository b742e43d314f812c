"""The rehearsal without namespaces: sshd on loopback. Less is shown, since nothing is closed and no tunnel carries anything."""

from __future__ import annotations

import pytest
from fake_server import wait_for
from rehearsal import Rehearsal
from test_rehearsal import DOCTOR, job

TWO = """
import ray
ray.init()
@ray.remote(num_gpus=1, num_cpus=1)
class Member:
    def where(self): return ray.util.get_node_ip_address()
members = [Member.remote() for _ in range(2)]
print("on", sorted(ray.get([m.where.remote() for m in members])))
"""


@pytest.mark.slow
def test_a_cluster_grows_works_and_is_gone(loopback_stage: Rehearsal) -> None:
    stage = loopback_stage
    stage.write_yaml(max_workers=1)
    stage.ray("up", "-y")
    with stage.dashboard() as address:
        out = stage.run("ray", "job", "submit", "--address", address, *job(stage, TWO))
    assert "on ['127.0.1.1', '127.0.1.2']" in out, out[-3000:]
    head, worker = stage.instances()
    assert "tunnel to node 2" in stage.on(head, DOCTOR)
    assert "tunnel to node 1" in stage.on(worker, DOCTOR)
    stage.ray("down", "-y")
    assert stage.fake.live() == []
    wait_for(lambda: not left(stage), 10)


def left(stage: Rehearsal) -> list[str]:
    """Processes of the hosts that are still there."""
    mark = f"PAIRSCOPE_REHEARSAL_HOST={stage.folder}/hosts/"
    command = 'grep -alz -- "$0" /proc/[0-9]*/environ 2> /dev/null || true'
    return stage.run("bash", "-c", command, mark).split()
