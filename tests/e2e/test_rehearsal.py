"""The playbook on hosts that only ssh can reach: `ray up`, a job, growth through the mesh, `ray down`, an empty list."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import doors
import pytest
from fake_server import wait_for
from rehearsal import Rehearsal, answers

from cluster.mesh import ports

ONE = """
import ray
ray.init()
@ray.remote(num_gpus=1)
def where():
    return ray.util.get_node_ip_address()
print("ran on", ray.get(where.remote()))
"""

# Three actors of a GPU each, one a node. Each passes an array to the next, and all are called for SECONDS, or until somebody
# says that it is enough.
MANY = """
import os, sys, time
import numpy as np, ray
ray.init()

@ray.remote(num_gpus=1, num_cpus=1)
class Member:
    def who(self): return os.getpid(), ray.util.get_node_ip_address()
    def make(self, n): return np.full(2_000_000, float(n))
    def take(self, array): return float(array.sum())

members = [Member.remote() for _ in range(3)]
before = ray.get([m.who.remote() for m in members])
print("nodes", sorted(ip for _, ip in before), flush=True)
arrays = [m.make.remote(n) for n, m in enumerate(members)]
sums = ray.get([members[(n + 1) % 3].take.remote(a) for n, a in enumerate(arrays)])
assert sums == [0.0, 2e6, 4e6], sums
print("objects crossed", flush=True)
until, n, cut = time.time() + float(sys.argv[1]), 0, 0
while time.time() < until and not os.path.exists(os.path.expanduser("~/enough")):
    try:  # as a sweep does: while the line is cut it asks again, and the actor is the one that it was
        assert ray.get([m.who.remote() for m in members], timeout=90) == before
        n += 1
    except ray.exceptions.ActorUnavailableError:
        cut += 1
    time.sleep(1)
assert ray.get([m.who.remote() for m in members]) == before
print("cut", cut, flush=True)
print("same actors after", n, "calls", flush=True)
"""


DOCTOR = "cd ~/pairscope && python3 -m pairscope doctor"


def job(stage: Rehearsal, text: str, *args: str) -> list[str]:
    """The command that submits a script from a folder of its own."""
    work = stage.folder / "work"
    work.mkdir(exist_ok=True)
    (work / "job.py").write_text(text)
    return ["--working-dir", str(work), "--", "python", "job.py", *args]


def _address(row: dict[str, Any]) -> tuple[str, int]:
    host, port = row["ssh"].split(":")
    return host, int(port)


@pytest.mark.slow
def test_one_machine_is_rented_runs_a_job_and_is_gone(any_stage: Rehearsal) -> None:
    stage = any_stage
    stage.write_yaml()
    said = stage.ray("up", "-y")
    assert "$0.4" in said
    assert "12 hours; after that every node destroys itself" in said
    with stage.dashboard() as address:
        out = stage.run("ray", "job", "submit", "--address", address, *job(stage, ONE))
    assert "ran on 127.0.1.1" in out
    assert "1.0/1.0 GPU" in stage.ray("exec", "RAY_AUTH_MODE=token ray status").replace("0.0/1.0", "1.0/1.0")
    told = stage.ray("exec", "pairscope doctor")
    assert "node 1 of a mesh with places for 8" in told
    assert "looked " in next(line for line in told.splitlines() if "dead-man's switch" in line)
    (head,) = stage.instances()
    mode, key = stage.on(head, "stat -c %a ~/.config/vastai/vast_api_key && cat ~/.config/vastai/vast_api_key").split()
    (made,) = stage.fake.control("keys")
    assert (mode, key) == ("600", made["key"]), "the head holds a key of its own, and no one else can read it"
    assert set(made["permissions"]["api"]) == {"instance_read", "instance_write", "misc"}
    assert "full-rights" not in stage.on(
        head, "cat /proc/*/environ ~/ray_bootstrap_config.yaml 2> /dev/null | tr '\\0' '\\n'"
    )
    assert "no instance labelled" in stage.ray("down", "-y")
    assert stage.fake.live() == []
    assert stage.fake.control("keys") == []
    assert len(stage.fake.bill()) == 1


def listeners(stage: Rehearsal, row: dict[str, Any]) -> list[dict[str, Any]]:
    """What listens on a host and what it says to those without the token, asked on the host itself."""
    said = stage.on(row, f"python3 {Path(__file__).with_name('doors.py')} ~/.ray/auth_token", timeout=240)
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def check_closed(stage: Rehearsal, rows: list[dict[str, Any]]) -> None:
    """Whoever gets at a port of Ray's needs the token, on the head and on a worker; and nobody gets at one from outside."""
    open_: dict[int, list[int]] = {}
    for row in rows:
        b = ports.block(row["k"])
        services = {
            b + ports.NODE_MANAGER: "node manager", b + ports.OBJECT_MANAGER: "object manager", b + ports.AGENT: "agent",
            b + ports.AGENT_GRPC: "agent's gRPC", b + ports.RUNTIME_ENV: "runtime environments",
        }  # fmt: skip
        metrics = {b + ports.METRICS}
        if row["k"] == ports.HEAD:
            services |= {ports.GCS: "GCS", ports.DASHBOARD: "dashboard", ports.CLIENT: "Ray client"}
            metrics |= {44217, 44227}  # of the autoscaler and of the dashboard
        workers = range(b + ports.WORKERS[0], b + ports.WORKERS[1] + 1)
        host, ssh_port = _address(row)
        until = time.monotonic() + 240
        while True:  # a busy machine's agents come up late; what listens and should not is no matter of time
            found = listeners(stage, row)
            wrong = doors.faults(found, services, workers, metrics, ssh_port)
            if time.monotonic() > until or not wrong or not all(w.endswith(" was found there") for w in wrong):
                break
            time.sleep(2)
        assert wrong == []
        # ... which says something only if the look would have found a door
        assert doors.faults(found, services | {ssh_port: "GCS"}, workers, set(), ssh_port) != []
        open_[row["k"]] = [r["port"] for r in found if doors.wildcard(r["addresses"]) and r["port"] != ssh_port]
        assert {b + ports.NODE_MANAGER, b + ports.OBJECT_MANAGER, b + ports.METRICS} <= set(open_[row["k"]]), (
            "Ray binds the wildcard address: only that nothing is mapped keeps these from being reached"
        )
        assert [p for p in open_[row["k"]] if answers(host, p, 0.2)] == [], "only ssh may be reachable"
        assert answers(host, ssh_port)
    for line in stage.fake.bill():
        assert not [name for name in line["env"] if name.startswith("-p")], "a port is mapped besides ssh"
    check_that_the_probe_can_fail(stage, rows[1], open_[rows[1]["k"]])


def check_that_the_probe_can_fail(stage: Rehearsal, row: dict[str, Any], there: list[int]) -> None:
    """Without the firewall each port is found, and Ray's own ask for the token also there."""
    host, _ = _address(row)
    fence = ["ip", "netns", "exec", stage.namespace(row), "nft", "chain inet fence input { policy %s; }"]
    stage.run(*fence[:-1], fence[-1] % "accept")
    try:
        assert [p for p in there if not answers(host, p, 2.0)] == []
        said = doors.knock(
            host, ports.block(row["k"]) + ports.NODE_MANAGER, (stage.keys / "auth_token").read_text().strip()
        )
        asked = said["grpc"][doors.SERVICES["node manager"]]
        assert asked == ["UNAUTHENTICATED", "UNAUTHENTICATED", "OK"], (
            "the token keeps strangers out where a firewall does not"
        )
    finally:
        stage.run(*fence[:-1], fence[-1] % "drop")
    assert [p for p in there if answers(host, p, 0.2)] == []


@pytest.mark.slow
def test_a_cluster_grows_survives_a_cut_shrinks_and_is_gone(stage: Rehearsal) -> None:
    stage.write_yaml(idle_timeout_minutes=0.3, max_workers=2)
    stage.ray("up", "-y")
    stage.ray("up", "-y")  # a second one finds the head by its label and its launch hash, and rents nothing
    (head,) = stage.instances()
    assert len(stage.fake.bill()) == 1
    log = stage.folder / "job.log"
    with stage.dashboard() as address, open(log, "w") as stream:
        run = subprocess.Popen(
            ["ray", "job", "submit", "--address", address, *job(stage, MANY, "600")],
            env=stage.env,
            stdout=stream,
            stderr=stream,
        )
        try:
            wait_for(lambda: "objects crossed" in log.read_text() or run.poll() is not None, 400)
            assert run.poll() is None, log.read_text()[-3000:]
            rows = stage.instances()
            assert [r["k"] for r in rows] == [1, 2, 3]
            status = stage.on(head, "cd ~/pairscope && PATH=$PATH python3 -m cluster.mesh status")
            assert status.count(": up ") == 2
            shown = [json.loads(line) for line in stage.on(head, f"{DOCTOR} --json").splitlines()]
            assert {c["check"]: c["ok"] for c in shown if "tunnel" in c["check"]} == {
                "tunnel to node 2": True,
                "tunnel to node 3": True,
            }
            worker = rows[1]
            assert "tunnel to node 1" in stage.on(worker, DOCTOR)
            assert stage.on(worker, "ls ~/.config/vastai 2> /dev/null || true") == "", (
                "a worker has no key to the account"
            )
            name = stage.namespace(worker)
            cut = "add chain inet fence cut { type filter hook output priority 0 ; } ; add rule inet fence cut oifname != lo drop"
            stage.run("ip", "netns", "exec", name, "nft", cut)
            time.sleep(20)
            assert not answers(*_address(worker))
            stage.run("ip", "netns", "exec", name, "nft", "delete chain inet fence cut")
            assert run.poll() is None, "the line was cut while the job ran"
            check_closed(stage, rows[:2])
            assert run.poll() is None, "the doors were looked at while the job ran"
            told = Path(stage.folder) / f"hosts/{worker['id']}/home/.pairscope/deadline"
            wait_for(told.exists, 120)  # by the head, through the mesh: when to be gone
            ends = min(line["created"] for line in stage.fake.bill()) + 12 * 3600
            assert abs(float(told.read_text()) - ends) < 120
            stage.on(head, "touch ~/enough")
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


RETRIED = """
import sys, time, ray
ray.init()
@ray.remote(num_gpus=1, num_cpus=1, max_retries=5)
def work(n, seconds):
    time.sleep(seconds)
    return n, ray.util.get_node_ip_address()
waiting = [work.remote(n, float(sys.argv[1])) for n in range(10)]
while waiting:
    done, waiting = ray.wait(waiting, timeout=5)
    print([ray.get(d) for d in done], flush=True)
print("all done", flush=True)
"""


@pytest.mark.slow
def test_workers_that_are_destroyed_or_outbid_are_replaced_and_the_job_completes(stage: Rehearsal) -> None:
    stage.write_yaml(max_workers=2, spot=1)
    stage.ray("up", "-y")
    log = stage.folder / "job.log"
    with stage.dashboard() as address, open(log, "w") as stream:
        command = ["ray", "job", "submit", "--address", address, *job(stage, RETRIED, "25")]
        run = subprocess.Popen(command, env=stage.env, stdout=stream, stderr=stream)
        try:
            wait_for(lambda: len(stage.fake.live()) == 3, 120)
            bids = {line["id"]: line["bid"] for line in stage.fake.live()[1:]}
            workers = sorted(bids, key=lambda id_: bids[id_] is not None)
            assert [bids[id_] for id_ in workers] == [None, 0.25], "one on demand, one for 1.25 times the lowest bid"
            for id_ in workers:  # ssh and the mesh are up once the node has its keys and its daemon
                pid = stage.folder / f"hosts/{id_}/home/.pairscope/mesh/daemon.pid"
                wait_for(pid.exists, 90)
            time.sleep(15)
            stage.fake.control(f"vanish/{workers[0]}")
            stage.fake.control(f"outbid/{workers[1]}")
            run.wait(timeout=280)
        finally:
            run.kill()
            run.wait()
    assert "all done" in log.read_text(), log.read_text()[-3000:]
    assert len(stage.fake.bill()) == 5, "a head, two workers, and one for each that was lost"
    assert sum(line["bid"] is not None for line in stage.fake.bill()) == 2, "an outbid one is bid for anew"
    assert workers[1] not in [line["id"] for line in stage.fake.live()], "an outbid machine goes on billing its disk"
    stage.ray("down", "-y")
    assert stage.fake.live() == []


@pytest.mark.slow
def test_an_api_that_fails_while_the_autoscaler_works_costs_no_machine_and_no_actor(stage: Rehearsal) -> None:
    boot_minutes = 1.0
    stage.write_yaml(max_workers=2, provider={"boot_minutes": boot_minutes})
    fake = stage.fake
    fake.control("offers", [{}] * 9)
    for call, kind in (
        ("list", "429"),
        ("search", "503"),
        ("create", "lost"),
        ("list", "malformed"),
        ("attach", "502"),
    ):
        fake.fault(call, kind)
    stage.ray("up", "-y")
    assert len(fake.bill()) == 1, "the reply to its create was lost, and the machine was found by its label"
    broken = ("stuck", "gone", "sold_twice")  # machines that are billed and never come up
    for kind in ("429", *broken, "lost", "503_done"):
        fake.fault("create", kind)
    for call, kind in (
        ("search", "no_rows"),
        ("list", "empty"),
        ("list", "drop"),
        ("attach", "500"),
        ("destroy", "ignored"),
    ):
        fake.fault(call, kind, after=1)
    log = stage.folder / "job.log"
    with stage.dashboard() as address, open(log, "w") as stream:
        command = ["ray", "job", "submit", "--address", address, *job(stage, MANY, "900")]
        run = subprocess.Popen(command, env=stage.env, stdout=stream, stderr=stream)
        try:
            wait_for(lambda: "objects crossed" in log.read_text() or run.poll() is not None, 500)
            assert run.poll() is None, log.read_text()[-3000:]
            assert all(rule["times"] == 0 for rule in fake.control("faults") if rule["call"] == "create")
            there = {line["id"] for line in fake.live()}
            for kind in ("503", "no_rows", "empty", "malformed", "drop", "429", "no_rows", "502"):
                fake.fault("list", kind, times=3)  # as often as one poll asks
                fake.fault("show", "503")
            wait_for(lambda: all(rule["times"] == 0 for rule in fake.control("faults") if rule["call"] == "list"), 180)
            time.sleep(10)
            assert {line["id"] for line in fake.live()} == there, "what a listing does not show is not dead"
            head = next(row for row in stage.instances() if row["k"] == ports.HEAD)
            stage.on(head, "touch ~/enough")
            run.wait(timeout=150)
        finally:
            run.kill()
            run.wait()
    assert "same actors after" in log.read_text(), log.read_text()[-3000:]
    bill = fake.bill()
    assert len({line["label"] for line in bill}) == len(bill), "never two machines for one request"
    assert len(bill) == 3 + len(broken), "head and two workers, and those that could not come up"
    for line in bill:
        if line["id"] not in there:
            assert line["destroyed"] - line["created"] < boot_minutes * 60 + 60
    fake.control("faults", [])
    for call, kind in (("destroy", "ignored"), ("destroy", "lost"), ("list", "503"), ("show", "503")):
        fake.fault(call, kind)
    assert "no instance labelled" in stage.ray("down", "-y")
    assert fake.live() == []


@pytest.mark.slow
def test_a_head_that_dies_takes_its_workers_with_it(stage: Rehearsal) -> None:
    stage.write_yaml(max_workers=1, provider={"head_silence_minutes": 0.5})
    stage.ray("up", "-y")
    with stage.dashboard() as address:
        stage.run("ray", "job", "submit", "--no-wait", "--address", address, *job(stage, MANY, "600"))
        wait_for(lambda: len(stage.fake.live()) == 2, 240)
        head, worker = (line["id"] for line in stage.fake.live())
        wait_for((stage.folder / f"hosts/{worker}/home/.pairscope/mesh/daemon.pid").exists, 240)
        time.sleep(10)
    stage.fake.control(f"vanish/{head}")
    began = time.time()
    wait_for(lambda: stage.fake.live() == [], 120)
    line = stage.fake.bill()[-1]
    assert line["ended_by"] == "itself"
    assert line["destroyed"] - began < 30 + 20 + 15  # the silence, one look of the switch, and its time-out


@pytest.mark.slow
def test_a_forgotten_cluster_whose_monitor_is_dead_ends_itself_at_its_deadline(stage: Rehearsal) -> None:
    hours = 0.06
    stage.write_yaml(max_workers=1, provider={"max_hours": hours})
    stage.ray("up", "-y")
    with stage.dashboard() as address:
        stage.run("ray", "job", "submit", "--no-wait", "--address", address, *job(stage, MANY, "600"))
        wait_for(lambda: len(stage.fake.live()) == 2, 200)
    head, worker = stage.instances()
    # each host has processes of its own; the brackets keep the shell that looks from finding itself
    stage.on(head, "pkill -9 -f 'autoscaler/.*[m]onitor.py'; ! pgrep -f 'autoscaler/.*[m]onitor.py'")
    # from here on nobody looks after anything: neither the laptop nor the head's autoscaler
    wait_for(lambda: stage.fake.live() == [], 400)
    lines = stage.fake.bill()
    assert {line["id"]: line["ended_by"] for line in lines} == {int(head["id"]): "itself", int(worker["id"]): "itself"}
    began = min(line["created"] for line in lines)
    assert max(line["destroyed"] for line in lines) - began < hours * 3600 + 60
