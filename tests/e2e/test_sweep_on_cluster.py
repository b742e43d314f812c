"""A real sweep on rented hosts: submitted, grown for, delivered to the head, collected while it runs, torn down."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import secrets_stage
import yaml
from fake_server import wait_for
from rehearsal import ROOT, Rehearsal

from capture.layout import RunDir
from cluster.collect_check import wrong_files

IDLE_MINUTES = 0.3
SETUP_S = 120.0  # from a machine's first second to a raylet in the cluster, on a busy machine
OUT = "~/out"  # of the head


def write_sweep(stage: Rehearsal, n: int, prompts: int = 6) -> Path:
    """A folder to submit: n entries of the tiny pair, each asking for one GPU of a kind although it computes on the CPU."""
    work = stage.folder / "work"
    work.mkdir()
    (work / "pydoc").symlink_to(ROOT / "configs" / "pairs" / "pydoc")
    demo = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())["residual_compare"]
    one = {
        "base_model": "pydoc/base",
        "sft_model": "pydoc/sft",
        "device": "cpu",
        "gpus": 1,
        "accelerator_type": "RTX4090",
    }
    demo["model_sweep"] = [{"name": f"pair{i}"} | one for i in range(n)]
    demo |= {"tokenizer": "pydoc/tokenizer", "spans": {"layers": 1}}
    demo["prompts"] = [f"{demo['prompts'][i % 6]} {i}" for i in range(prompts)]
    (work / "sweep.yaml").write_text(yaml.safe_dump({"residual_compare": demo}))
    return work


@contextmanager
def submitted(stage: Rehearsal, work: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The sweep as a job whose log is followed into a file."""
    log = stage.folder / "job.log"
    with stage.dashboard() as address, open(log, "w") as stream:
        command = ["ray", "job", "submit", "--address", address, "--working-dir", str(work), "--",
                   "pairscope", "sweep", "sweep.yaml", "--out", OUT]  # fmt: skip
        run = subprocess.Popen(command, env=stage.env, cwd=ROOT, stdout=stream, stderr=stream)
        try:
            yield run, log
        finally:
            run.kill()
            run.wait()


def collecting(stage: Rehearsal, home: Path, *options: str) -> subprocess.Popen[str]:
    command = ["pairscope", "collect", str(stage.yaml), "--out", str(home), "--every", "2", *options]
    return subprocess.Popen(
        command, env=stage.env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(run: subprocess.Popen[Any], log: Path, seconds: float) -> int:
    try:
        return run.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the job did not end within {seconds} s:\n{log.read_text()[-3000:]}") from None


def check_home(home: Path, n: int) -> list[dict[str, Any]]:
    """All n captures are there once, whole, with rows, logs and costs; the last complete row of each entry."""
    run = RunDir(str(home))
    captures = list(run.captures())
    assert sorted(c.pair for c in captures) == [f"pair{i}" for i in range(n)]
    for c in captures:
        assert wrong_files(Path(c.path), c.marker) == {}
    rows = run.manifest_rows()
    complete = [r for r in rows if r["state"] == "complete"]
    assert sorted(r["entry"] for r in complete) == [f"pair{i}" for i in range(n)], "none lost, none doubled"
    for row in complete:
        assert (home / row["log"]).is_file()
        assert row["dollars"] is not None
        assert 0 < row["dollars"] < 0.45 * row["seconds"] / 3600 * 1.1
    return complete


def test_a_sweep_is_submitted_collected_and_torn_down(stage: Rehearsal) -> None:
    planted = secrets_stage.plant(stage, max_workers=0)
    home = stage.folder / "results"
    with planted.watched() as seen:
        up = stage.ray("up", "-y")
        secrets_stage.learn(stage, planted)
        collector = collecting(stage, home, "--teardown")
        try:
            with submitted(stage, write_sweep(stage, 2)) as (run, log):
                assert ended(run, log, 240) == 0, log.read_text()[-3000:]
            said, _ = collector.communicate(timeout=90)
        finally:
            collector.kill()
    assert collector.returncode == 0, said
    assert "2 of 2 complete" in log.read_text()
    assert "pair0: at home" in said
    assert "no instance labelled" in said
    check_home(home, 2)
    assert stage.fake.live() == []
    secrets_stage.check(stage, planted, seen, up=up, collect=said)


def head_out(stage: Rehearsal, head: int) -> Path:
    """The run directory on the head's disk, seen from outside."""
    return stage.folder / f"hosts/{head}/home/out"


def time_of(stamp: str) -> float:
    return datetime.fromisoformat(stamp).replace(tzinfo=UTC).timestamp()


def on_workers(stage: Rehearsal, head: int) -> dict[int, str]:
    """Worker -> the entry that it has committed a span of and still works on."""
    out = head_out(stage, head)
    running = {int(r["node"][2:]): r["entry"] for r in RunDir(str(out)).manifest_rows() if r["state"] == "running"}
    return {
        node: entry
        for node, entry in running.items()
        if node != head and list(out.glob(f"captures/pair={entry}/capture=*/spans/state-*"))
    }


def at_work(stage: Rehearsal, head: int, *, bid: bool) -> dict[int, str]:
    """Those of on_workers that are interruptible, or those that are not."""
    kind = {line["id"]: line["bid"] is not None for line in stage.fake.live()}
    return {node: entry for node, entry in on_workers(stage, head).items() if kind.get(node) is bid}


def cut(stage: Rehearsal, *workers: int, seconds: float) -> None:
    """Nothing leaves these workers for a while."""
    hosts = [h for h in stage.run("ip", "netns", "list").split() if h.rpartition("-")[2] in map(str, workers)]
    assert len(hosts) == len(workers) > 0
    chain = (
        "add chain inet fence cut { type filter hook output priority 0 ; } ; add rule inet fence cut oifname != lo drop"
    )
    for host in hosts:
        stage.run("ip", "netns", "exec", host, "nft", chain)
    time.sleep(seconds)
    for host in hosts:
        stage.run("ip", "netns", "exec", host, "nft", "delete chain inet fence cut")


def most_at_once(bill: list[dict[str, Any]]) -> int:
    """Machines of a bill at the busiest moment."""
    return max(sum(b["created"] <= a["created"] < (b["destroyed"] or float("inf")) for b in bill) for a in bill)


@pytest.mark.slow
def test_a_cluster_grows_for_a_sweep_and_shrinks_after_it(stage: Rehearsal) -> None:
    stage.write_yaml(idle_timeout_minutes=IDLE_MINUTES, max_workers=2)
    stage.ray("up", "-y")
    assert len(stage.fake.live()) == 1
    home = stage.folder / "results"
    collector = collecting(stage, home)
    try:
        with submitted(stage, write_sweep(stage, 6, prompts=150)) as (run, log):
            wait_for(lambda: list(home.glob("captures/*/*/_COMPLETE")) or run.poll() is not None, 600)
            assert run.poll() is None, "the first capture is at home while the sweep runs\n" + log.read_text()[-3000:]
            (head, *_) = (line["id"] for line in stage.fake.bill())
            wait_for(lambda: on_workers(stage, head) or run.poll() is not None, 600)
            cut(stage, *on_workers(stage, head), seconds=20)
            assert ended(run, log, 500) == 0, log.read_text()[-3000:]
        said, _ = collector.communicate(timeout=90)
    finally:
        collector.kill()
    assert collector.returncode == 0, said
    complete = check_home(home, 6)
    states = [row["state"] for row in RunDir(str(home)).manifest_rows()]
    assert states == ["complete"] * 6, "a line that is cut for 20 seconds costs nobody an attempt"
    wait_for(lambda: len(stage.fake.live()) == 1, 180)  # idle ones are given back
    _, *workers = stage.fake.bill()
    assert len(workers) >= 2
    assert most_at_once(workers) == 2, "it grew by the two that it may"
    worked = {row["node"]: 0.0 for row in complete}
    for row in complete:
        worked[row["node"]] = max(worked[row["node"]], time_of(row["finished"]))
    assert len(worked) == 3, "all three worked"
    for line in workers:  # where one was given up while it booted there are more than the two that worked
        last = worked.get(f"C.{line['id']}", line["created"] + SETUP_S)
        assert line["destroyed"] < last + IDLE_MINUTES * 60 + 60
    done = collecting(stage, home, "--once", "--teardown")
    said, _ = done.communicate(timeout=120)
    assert done.returncode == 0, said
    assert "at home:" not in said, "nothing is fetched twice"
    assert stage.fake.live() == []


@pytest.mark.slow
def test_workers_that_are_destroyed_or_outbid_cost_no_capture(stage: Rehearsal) -> None:
    stage.write_yaml(idle_timeout_minutes=IDLE_MINUTES, max_workers=2, spot=1)
    stage.ray("up", "-y")
    (head,) = (line["id"] for line in stage.fake.live())
    home = stage.folder / "results"
    collector = collecting(stage, home, "--teardown")
    lost: dict[int, str] = {}
    try:
        with submitted(stage, write_sweep(stage, 6, prompts=150)) as (run, log):
            for how, bid in (("vanish", False), ("outbid", True)):
                found = wait_for(lambda bid=bid: at_work(stage, head, bid=bid) or run.poll() is not None, 600)
                assert run.poll() is None, log.read_text()[-3000:]
                worker, lost[worker] = next(iter(found.items()))
                stage.fake.control(f"{how}/{worker}")
            assert ended(run, log, 600) == 0, log.read_text()[-3000:]
        said, _ = collector.communicate(timeout=120)
    finally:
        collector.kill()
    assert collector.returncode == 0, said
    check_home(home, 6)
    rows = RunDir(str(home)).manifest_rows()
    died = {r["entry"]: r for r in rows if r["state"] == "failed"}
    assert set(died) == set(lost.values())
    for row in died.values():
        assert row["error_class"] == "WorkerDiedError"
        assert row["dollars"] > 0
    for entry in lost.values():
        (again,) = (r for r in rows if r["entry"] == entry and r["state"] == "complete")
        assert "going on at layer" in (home / again["log"]).read_text(), (
            "what the lost worker committed was on the head's disk"
        )
    assert stage.fake.live() == []
    assert most_at_once(stage.fake.bill()[1:]) == 2, "one machine for each that was lost, not more"
