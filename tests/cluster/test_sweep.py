"""The sweep over real actors: what is skipped, refused, lost, and who goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fake_work
import pytest
from fake_work import make_entry, quiet

import cluster.placing
import cluster.sweep
from capture import quantize
from capture.config import Entry
from capture.errors import ConfigError, StoreError
from capture.layout import RunDir
from cluster.connect import Cluster
from cluster.sweep import Summary, run_sweep


def sweep(out: Path, *entries: Entry | tuple[str, ConfigError], work: str = "by_name", **options: Any) -> Summary:
    checked = [(e.name, e) if isinstance(e, Entry) else e for e in entries]
    options = {"show": quiet()[0], "work": f"fake_work:{work}", "resolve": "fake_work:resolve"} | options
    return run_sweep(checked, str(out), **options)


def states(summary: Summary) -> dict[str, str]:
    return {i.name: i.state for i in summary.items}


def write_complete(out: Path, entry: str, version: int = 1) -> None:
    folder = out / "captures" / f"pair={entry}" / f"capture=id-{entry}"
    folder.mkdir(parents=True)
    (folder / "runs.parquet").write_bytes(b"data")
    digest = hashlib.sha256(b"data").hexdigest()
    files = [{"name": "runs.parquet", "rows": 1, "bytes": 4, "sha256": digest}]
    (folder / "_COMPLETE").write_text(json.dumps({"schema_version": version, "files": files}))


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def connected(cpus: int | None = None) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr(cluster.sweep, "connected", connected)


@pytest.mark.usefixtures("no_ray")
class TestWithoutRay:
    def test_nothing_left_to_do_starts_no_ray(self, tmp_path: Path) -> None:
        write_complete(tmp_path, "a")
        summary = sweep(tmp_path, make_entry("a"))
        assert states(summary) == {"a": "skipped"}
        assert (summary.exit_code, summary.ray_used) == (0, False)

    def test_a_capture_with_a_short_file_is_done_again(self, tmp_path: Path) -> None:
        write_complete(tmp_path, "a")
        (tmp_path / "captures/pair=a/capture=id-a/runs.parquet").write_bytes(b"dat")
        with pytest.raises(AssertionError, match="Ray was asked for"):
            sweep(tmp_path, make_entry("a"))

    def test_force_does_again_what_is_complete(self, tmp_path: Path) -> None:
        write_complete(tmp_path, "a")
        with pytest.raises(AssertionError, match="Ray was asked for"):
            sweep(tmp_path, make_entry("a"), force=True)

    def test_entries_that_cannot_be_resolved_fail_with_row_and_log(self, tmp_path: Path) -> None:
        summary = sweep(tmp_path, ("wrong", ConfigError("no directory 'x'")), make_entry("unresolvable"))
        assert states(summary) == {"wrong": "failed", "unresolvable": "failed"}
        assert summary.exit_code == 1
        rows = {r["entry"]: r for r in RunDir(str(tmp_path)).manifest_rows()}
        assert rows["wrong"]["error_class"] == "ConfigError"
        assert "shard 2 of 3 is missing" in (tmp_path / rows["unresolvable"]["log"]).read_text()

    def test_a_package_that_an_entry_needs_and_nodes_lack_is_told_before_anything_is_downloaded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_complete(tmp_path, "done")
        monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
        few = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
        summary = sweep(tmp_path, *(make_entry(name, model_kwargs=few) for name in ("done", "todo")))
        assert states(summary) == {"done": "skipped", "todo": "failed"}
        (row,) = RunDir(str(tmp_path)).manifest_rows()
        assert "asks for bitsandbytes, which is not installed. Run: pip install bitsandbytes" in row["error"]

    def test_a_hub_model_that_is_not_in_the_cache_is_left_to_the_worker(self, tmp_path: Path) -> None:
        with pytest.raises(AssertionError, match="Ray was asked for"):
            sweep(tmp_path, make_entry("unresolvable", base_model="owner/model"))
        assert RunDir(str(tmp_path)).manifest_rows() == []

    def test_an_output_that_cannot_be_written_is_refused_before_any_work(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="file/out"):
            sweep(tmp_path / "file" / "out", make_entry("a"))

    def test_a_sigterm_while_ray_starts_is_a_stop_with_a_summary(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def connected(cpus: int | None = None) -> None:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as ray.init does
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(cluster.sweep, "connected", connected)
        summary = sweep(tmp_path, make_entry("a"))
        assert states(summary) == {"a": "not started"}
        assert summary.exit_code == 128 + signal.SIGTERM

    def test_an_output_of_another_schema_version_is_refused(self, tmp_path: Path) -> None:
        write_complete(tmp_path, "old", version=99)
        with pytest.raises(StoreError, match="schema version 99"):
            sweep(tmp_path, make_entry("a"))


@pytest.mark.usefixtures("local_ray")
class TestThroughRay:
    def test_a_failed_entry_does_not_end_the_others(self, tmp_path: Path) -> None:
        summary = sweep(
            tmp_path,
            make_entry("gated"),
            make_entry("bug"),
            make_entry("unresolvable"),
            make_entry("complete"),
            force=True,
        )
        assert states(summary) == {"gated": "failed", "bug": "failed", "unresolvable": "failed", "complete": "complete"}
        assert summary.exit_code == 1
        assert [i.name for i in summary.failed] == ["gated", "bug", "unresolvable"]

    def test_an_entry_that_was_interrupted_although_nobody_asked_for_a_stop_is_no_success(self, tmp_path: Path) -> None:
        summary = sweep(tmp_path, make_entry("interrupted"), make_entry("complete"))
        assert states(summary) == {"interrupted": "interrupted", "complete": "complete"}
        assert summary.exit_code == 1

    def test_a_dead_worker_is_replaced_once(self, tmp_path: Path) -> None:
        show, said = quiet()
        summary = sweep(tmp_path, make_entry("killed_once"), make_entry("killed_always"), show=show)
        assert states(summary) == {"killed_once": "complete", "killed_always": "failed"}
        first, second = fake_work.calls(tmp_path, "killed_once")
        assert first["pid"] != second["pid"]
        rows = [r for r in RunDir(str(tmp_path)).manifest_rows() if r["entry"] == "killed_always"]
        assert [(r["state"], r["error_class"]) for r in rows] == [("failed", "WorkerDiedError")] * 2
        assert "lost the worker on" in rows[0]["error"]
        assert "The driver lost this attempt's worker" in (tmp_path / rows[0]["log"]).read_text()
        assert "trying again: again, after its worker died" in said.getvalue()

    def test_a_worker_starts_without_torch(self, tmp_path: Path) -> None:
        assert sweep(tmp_path, *(make_entry(f"complete-{i}") for i in range(2))).exit_code == 0
        assert not any(n["torch"] for n in fake_work.calls(tmp_path))

    def test_a_worker_goes_on_with_the_next_entry_that_asks_for_the_same(self, tmp_path: Path) -> None:
        show, said = quiet()
        entries = [make_entry(f"complete-{i:02}") for i in range(40)]
        summary = sweep(tmp_path, *entries, show=show, jobs=1)
        assert set(states(summary).values()) == {"complete"}
        notes = fake_work.calls(tmp_path)
        assert [n["entry"] for n in notes] == [e.name for e in entries]
        assert len({n["pid"] for n in notes}) == 1
        rows = RunDir(str(tmp_path)).manifest_rows()
        assert len({r["log"] for r in rows}) == len(rows) == 40
        assert f"entry {entries[7].name}:" in (tmp_path / summary.items[7].row["log"]).read_text()
        assert "complete-39: complete in" in said.getvalue()

    def test_workers_that_share_entries_lose_none(self, tmp_path: Path) -> None:
        summary = sweep(tmp_path, *(make_entry(f"complete-{i:02}") for i in range(30)))
        assert set(states(summary).values()) == {"complete"}
        notes = fake_work.calls(tmp_path)
        assert len(notes) == len({n["entry"] for n in notes}) == 30
        assert 1 <= len({n["pid"] for n in notes}) <= 3

    def test_after_a_failure_the_next_entry_gets_a_new_process(self, tmp_path: Path) -> None:
        summary = sweep(tmp_path, make_entry("complete-0"), make_entry("bug"), make_entry("complete-1"), jobs=1)
        assert states(summary) == {"complete-0": "complete", "bug": "failed", "complete-1": "complete"}
        first, bug, last = (n["pid"] for n in fake_work.calls(tmp_path))
        assert first == bug != last

    def test_a_process_that_holds_much_memory_gets_no_other_entry(self, tmp_path: Path) -> None:
        assert sweep(tmp_path, make_entry("hoarding"), make_entry("complete"), jobs=1).exit_code == 0
        first, second = (n["pid"] for n in fake_work.calls(tmp_path))
        assert first != second

    def test_what_workers_print_is_in_the_log(self, tmp_path: Path) -> None:
        (item,) = sweep(tmp_path, make_entry("complete")).items
        assert "a printed line" in (tmp_path / item.row["log"]).read_text()

    def test_jobs_limits_how_many_run_at_a_time_and_shares_the_cores(self, tmp_path: Path) -> None:
        sweep(tmp_path, *(make_entry(f"sleeping-{i}") for i in range(2)), jobs=1)
        notes = fake_work.calls(tmp_path)
        assert all(b["began"] - a["began"] >= 0.4 for a, b in itertools.pairwise(notes))
        assert {n["threads"] for n in notes} == {"2"}

    def test_two_entries_share_two_cores_and_see_no_gpu(self, tmp_path: Path) -> None:
        assert sweep(tmp_path, make_entry("meeting-0"), make_entry("meeting-1")).exit_code == 0
        a, b = fake_work.calls(tmp_path)
        assert (a["threads"], b["threads"]) == ("1", "1")
        assert a["devices"] == ""

    def test_an_entry_for_cuda_sees_the_gpu_that_ray_gave_it(self, tmp_path: Path) -> None:
        sweep(tmp_path, make_entry("complete-0", device="cuda"), make_entry("complete-1", device=None))
        assert all(n["devices"] in ("0", "1") for n in fake_work.calls(tmp_path))

    def test_entries_that_number_a_gpu_themselves_take_turns_on_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
        sweep(tmp_path, make_entry("sleeping-0", device="cuda:1"), make_entry("sleeping-1", device="cuda:1"))
        a, b = fake_work.calls(tmp_path)
        assert (a["devices"], b["devices"]) == ("4,5", "4,5")
        assert b["began"] - a["began"] >= 0.4

    def test_a_request_that_no_node_can_hold_is_refused_at_once(self, tmp_path: Path) -> None:
        summary = sweep(tmp_path, make_entry("complete", gpus=4), make_entry("complete-2"))
        assert states(summary) == {"complete": "failed", "complete-2": "complete"}
        assert summary.items[0].row["error_class"] == "DeviceError"
        assert "asks for 4 GPU on one node; the largest node of this Ray has 2" in summary.items[0].row["error"]

    def test_a_request_that_the_autoscaler_can_do_nothing_for_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        grows = Cluster(local=False, nodes=({"CPU": 2.0},), growing=True)
        monkeypatch.setattr(cluster.sweep, "connected", lambda cpus: nullcontext(grows))
        monkeypatch.setattr(cluster.placing, "ASK_EVERY", 0.1)
        monkeypatch.setattr(cluster.placing, "never_to_come", lambda: [{"GPU": 8.0, "CPU": 1.0}])
        summary = sweep(tmp_path, make_entry("complete", gpus=8), make_entry("complete-2"), jobs=2)
        assert states(summary) == {"complete": "failed", "complete-2": "complete"}
        assert "no node type of this cluster has that" in summary.items[0].row["error"]
        assert [r["state"] for r in RunDir(str(tmp_path)).manifest_rows() if r["entry"] == "complete"] == ["failed"]

    def test_progress_reaches_the_driver_as_plain_lines(self, tmp_path: Path) -> None:
        show, said = quiet()
        sweep(tmp_path, make_entry("complete"), show=show)
        assert "complete: started on" in said.getvalue()
        assert re.search(r"complete: complete in \d[^:]*: 2 prompts, 34 tokens, resident on cpu", said.getvalue())

    def test_what_failed_is_taken_up_again_and_what_is_complete_is_not(self, tmp_path: Path) -> None:
        sweep(tmp_path, make_entry("gated"), make_entry("complete"))
        write_complete(tmp_path, "complete")
        summary = sweep(tmp_path, make_entry("gated"), make_entry("complete"))
        assert states(summary) == {"gated": "failed", "complete": "skipped"}
        assert len(fake_work.calls(tmp_path, "complete")) == 1
