"""The playbook on hosts that only ssh can reach: `ray up`, a job, growth through the mesh, `ray down`, an empty list."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from fake_server import wait_for
from rehearsal import Rehearsal, answers

ONE = """
import ray
ray.init()
@ray.remote(num_gpus=1)
def where():
    return ray.util.get_node_ip_address()
print("ran on", ray.get(where.remote()))
"""

# Three actors of a GPU each, one a node. Each passes an array to the next, and all are called for SECONDS.
MANY = """
import os, sys, time
import numpy as np, ray
ray.init()

@ray.remote(num_gpus=1, num_cpus=1)
class Member:
    def __init__(self): self.calls = 0
    def who(self): return os.getpid(), ray.util.get_node_ip_address()
    def make(self, n): return np.full(2_000_000, float(n))
    def take(self, array): return float(array.sum())
    def call(self):
        self.calls += 1
        return self.calls

members = [Member.remote() for _ in range(3)]
before = ray.get([m.who.remote() for m in members])
print("nodes", sorted(ip for _, ip in before), flush=True)
arrays = [m.make.remote(n) for n, m in enumerate(members)]
sums = ray.get([members[(n + 1) % 3].take.remote(a) for n, a in enumerate(arrays)])
assert sums == [0.0, 2e6, 4e6], sums
print("objects crossed", flush=True)
until, n = time.time() + float(sys.argv[1]), 0
while time.time() < until:
    n += 1
    assert ray.get([m.call.remote() for m in members], timeout=90) == [n] * 3
    time.sleep(1)
assert ray.get([m.who.remote() for m in members]) == before
print("same actors after", n, "calls", flush=True)
"""


def job(stage: Rehearsal, text: str, *args: str) -> list[str]:
    """The command that submits a script from a folder of its own."""
    work = stage.folder / "work"
    work.mkdir(exist_ok=True)
    (work / "job.py").write_text(text)
    return ["--working-dir", str(work), "--", "python", "job.py", *args]


def test_one_machine_is_rented_runs_a_job_and_is_gone(stage: Rehearsal) -> None:
    stage.write_yaml()
    said = stage.ray("up", "-y")
    assert "$0.4" in said
    assert "12 hours; after that every node destroys itself" in said
    with stage.dashboard() as address:
        out = stage.run("ray", "job", "submit", "--address", address, *job(stage, ONE))
    assert "ran on 127.0.1.1" in out
    assert "no instance labelled" in stage.ray("down", "-y")
    assert stage.fake.live() == []
    assert len(stage.fake.bill()) == 1


@pytest.mark.slow
def test_a_cluster_grows_survives_a_cut_shrinks_and_is_gone(stage: Rehearsal) -> None:
    stage.write_yaml(idle_timeout_minutes=0.3, max_workers=2)
    stage.ray("up", "-y")
    (head,) = stage.instances()
    host, ssh_port = head["ssh"].split(":")
    open_ports = [p for p in [6379, 8265, 10001, *range(20000, 20180), 44217, 52365] if answers(host, p, 0.2)]
    assert open_ports == [], "only ssh may be reachable"
    assert answers(host, int(ssh_port))
    refused = stage.on(head, "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8265/api/jobs/")
    assert refused == "401", "the job API answers without the token"
    token = stage.on(head, "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong ray status --address 127.0.1.1:6379 2>&1 || true")
    assert "nauthenticated" in token.lower() or "authentication" in token.lower()

    log = stage.folder / "job.log"
    with stage.dashboard() as address, open(log, "w") as stream:
        import subprocess

        run = subprocess.Popen(
            ["ray", "job", "submit", "--address", address, *job(stage, MANY, "45")],
            env=stage.env,
            stdout=stream,
            stderr=stream,
        )
        try:
            wait_for(lambda: "objects crossed" in log.read_text() or run.poll() is not None, 150)
            rows = stage.instances()
            assert [r["k"] for r in rows] == [1, 2, 3]
            status = stage.on(head, "cd ~/pairscope && PATH=$PATH python3 -m cluster.mesh status")
            assert status.count(": up ") == 2
            worker = rows[1]
            name = next(p for p in stage.run("ip", "netns", "list").split() if p.endswith(f"-{worker['id']}"))
            cut = "add chain inet fence cut { type filter hook output priority 0 ; policy drop ; }"
            stage.run("ip", "netns", "exec", name, "nft", cut)
            time.sleep(20)
            stage.run("ip", "netns", "exec", name, "nft", "delete chain inet fence cut")
            run.wait(timeout=150)
        finally:
            run.kill()
            run.wait()
    text = log.read_text()
    assert "nodes ['127.0.1.1', '127.0.1.2', '127.0.1.3']" in text, text[-3000:]
    assert "same actors after" in text, text[-3000:]
    ended = time.time()
    wait_for(lambda: len(stage.fake.live()) == 1, 120)  # idle workers are given back
    gone = [line["destroyed"] for line in stage.fake.bill() if line["destroyed"]]
    assert len(gone) == 2
    assert max(gone) - ended < 0.3 * 60 + 60
    wait_for(
        lambda: (
            json.loads((Path(stage.folder) / f"hosts/{head['id']}/home/.pairscope/mesh/peers.json").read_text()) == []
        ),
        60,
    )
    stage.ray("down", "-y")
    assert stage.fake.live() == []
