"""The sweep verb: what it takes, prints and returns. Ray and the work are left out."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

import cluster.sweep
from capture.errors import ConfigError, StoreError
from cluster.cli import lasting, sweep, table_lines
from cluster.sweep import Item, Summary


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    pairs = [{"name": n, "base_model": "./model", "sft_model": "./model"} for n in ("a", "b", "c")]
    path = tmp_path / "three.yaml"
    path.write_text(yaml.safe_dump({"residual_compare": {"prompts": ["one"], "model_sweep": pairs}}))
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the verb asked for, and the summary that it gets (`asked["summary"]`)."""
    found: dict[str, Any] = {"summary": Summary("OUT", (Item("a", state="skipped"),), 0)}

    def fake(checked: list[Any], out: str, **options: Any) -> Summary:
        found.update(entries=[name for name, _ in checked], out=out, **options)
        summary: Summary = found["summary"]
        return summary

    monkeypatch.setattr(cluster.sweep, "run_sweep", fake)
    return found


def call(*args: object) -> Result:
    return CliRunner().invoke(sweep, [str(a) for a in args], catch_exceptions=True)


def test_all_entries_go_to_a_directory_named_after_the_config(config: Path, asked: dict[str, Any]) -> None:
    assert call(config).exit_code == 0
    assert (asked["entries"], asked["out"]) == (["a", "b", "c"], "out/three")
    assert (asked["force"], asked["jobs"]) == (False, None)


@pytest.mark.parametrize(
    "args",
    [
        ("{}", "--entries", "c", "a", "--jobs", "2"),
        ("{}", "--entries", "c", "--entries", "a", "--jobs", "2"),
        ("--jobs", "2", "--entries", "a", "c", "{}"),
        ("{}", "--entries=a", "--entries", "c", "--jobs=2"),
    ],
)
def test_entries_can_be_listed_in_any_way(config: Path, asked: dict[str, Any], args: tuple[str, ...]) -> None:
    result = call(*(a.format(config) for a in args))
    assert result.exit_code == 0, result.output
    assert (asked["entries"], asked["jobs"]) == (["a", "c"], 2)


def test_an_unknown_entry_is_an_error_that_lists_the_known(config: Path, asked: dict[str, Any]) -> None:
    error = call(config, "--entries", "a", "x").exception
    assert isinstance(error, ConfigError)
    assert "no entry 'x'" in str(error)
    assert "a, b, c" in str(error)
    assert "entries" not in asked


def test_entries_without_a_name_is_a_wrong_call(config: Path) -> None:
    assert call(config, "--entries").exit_code == 2


def test_a_failure_is_named_on_stderr_with_its_log_and_exits_1(config: Path, asked: dict[str, Any]) -> None:
    row = {"seconds": 2.0, "error_class": "CheckpointError", "error": "gated", "log": "logs/a/1.log"}
    asked["summary"] = Summary(
        "OUT", (Item("a", state="failed", row=row), Item("b", state="complete")), 1, ray_used=True
    )
    result = call(config)
    assert result.exit_code == 1
    assert result.stderr.strip() == "pairscope: a failed: CheckpointError, log: OUT/logs/a/1.log"
    assert "1 of 2 complete" in result.stdout
    assert "CheckpointError: gated" in result.stdout
    assert f"pairscope sweep {config} --out OUT" in result.stdout


def test_a_bug_is_named_as_one(config: Path, asked: dict[str, Any]) -> None:
    row = {"error_class": "KeyError", "error": "'x'", "log": "logs/a/1.log"}
    asked["summary"] = Summary("OUT", (Item("a", state="failed", row=row, bug=True),), 1, ray_used=True)
    assert "a failed: a bug (KeyError), its traceback is in OUT/logs/a/1.log" in call(config).stderr


def test_a_narrow_terminal_keeps_entry_state_and_the_whole_error() -> None:
    error = (
        "ConfigError: residual_compare.model_sweep[3].dtype: got 'float33'; expected auto, float32, bfloat16 or float16"
    )
    name = "qwen2.5-72b_to_qwen2.5-72b-instruct"
    columns = ["entry", "state", "seconds", "tokens", "mode", "peak memory"]
    rows = [[name, "interrupted", "1234.5", "1,234", "streamed", "38.20 GiB", error], ["b", "complete", *[""] * 5]]
    lines = list(table_lines(columns, rows, 80))
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["entry", "state", "seconds", "tokens", "mode"]
    assert lines[2].split() == [name, "interrupted", "1234.5", "1,234", "streamed"]
    assert " ".join(" ".join(lines[3:5]).split()) == error
    assert lines[5].split() == ["b", "complete"]
    assert lines[6] == "(peak memory: with --json, or on a wider terminal)"
    off = list(table_lines(columns, rows, None))
    assert off[0].split() == ["entry", "state", "seconds", "tokens", "mode", "peak", "memory", "error"]
    assert off[2].endswith(f"38.20 GiB  {error}")


def test_a_table_with_captures_on_a_cpu_says_what_their_peak_is_of(config: Path, asked: dict[str, Any]) -> None:
    for gpu, says in (("cpu", True), ("NVIDIA H100", False)):
        row = {"seconds": 2.0, "gpu": gpu, "peak_memory_bytes": 5000}
        asked["summary"] = Summary("OUT", (Item("a", state="complete", row=row),), 0, ray_used=True)
        assert ("(peak memory on a CPU: of the weights alone)" in call(config).stdout) is says


def test_what_another_sweep_completed_meanwhile_is_not_said_to_have_taken_no_time(
    config: Path, asked: dict[str, Any]
) -> None:
    row = {"seconds": 0.01, "n_tokens": None}
    asked["summary"] = Summary("OUT", (Item("a", state="complete", row=row),), 0, ray_used=True)
    assert call(config).stdout.splitlines()[2].split() == ["a", "complete"]


def test_nothing_left_to_do_says_so(config: Path, asked: dict[str, Any]) -> None:
    said = call(config).stdout
    assert "nothing left to do: 1 of 1 complete in OUT" in said
    assert "  pairscope grid OUT --metric kl_divergence\n" in said
    assert "FROM pairwise WHERE comparison = 'BB-SS' GROUP BY ALL" in said


def test_json_gives_one_object_an_entry_and_nothing_else(config: Path, asked: dict[str, Any]) -> None:
    items = (Item("a", capture="1f", state="complete", row={"n_tokens": 5}), Item("b", state="not started"))
    asked["summary"] = Summary("OUT", items, 130, ray_used=True)
    result = call(config, "--json")
    assert result.exit_code == 130
    first, second = [json.loads(line) for line in result.stdout.splitlines()]
    assert (first["entry"], first["state"], first["capture"], first["n_tokens"]) == ("a", "complete", "1f", 5)
    assert (second["entry"], second["state"], second["n_tokens"]) == ("b", "not started", None)


def test_a_dry_run_shows_ids_and_writes_nothing(
    config: Path, tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(checked: list[Any], run: Any, *, force: bool, record: bool) -> list[Item]:
        assert not record
        return [Item("a", capture="1f"), Item("b", capture="2f", state="skipped")]

    monkeypatch.setattr(cluster.sweep, "plan", plan)
    result = call(config, "--out", tmp_path / "new", "--dry-run")
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()[2:4]] == [
        ["a", "to", "do", "1f"],
        ["b", "complete", "2f"],
    ]
    assert "1 of 2 entries to do" in result.stdout
    assert not (tmp_path / "new").exists()
    assert "entries" not in asked


def test_a_dry_run_refuses_an_output_of_another_schema_version(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old" / "captures" / "pair=a" / "capture=1"
    folder.mkdir(parents=True)
    (folder / "_COMPLETE").write_text('{"schema_version": 99, "files": []}')
    assert isinstance(call(config, "--out", tmp_path / "old", "--dry-run").exception, StoreError)


def test_help_ends_in_an_example() -> None:
    assert call("--help").stdout.splitlines()[-2:] == [
        "  Example:",
        "    pairscope sweep configs/demo.yaml --out out/demo",
    ]


@pytest.mark.parametrize(
    ("out", "kept"),
    [
        ("out/prod", "/root/out/prod"),
        ("~/out", "~/out"),
        ("/data/out", "/data/out"),
        ("s3://bucket/run", "s3://bucket/run"),
    ],
)
def test_a_job_does_not_leave_its_results_where_ray_deletes_them(
    monkeypatch: pytest.MonkeyPatch, out: str, kept: str
) -> None:
    monkeypatch.setenv("HOME", "/root")
    job = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1")
    assert lasting(out, job) == kept
    assert lasting(out, Path("/home/me/project")) == out


def test_a_dry_run_refuses_a_mode_that_the_gpus_of_a_group_cannot_share(config: Path, tmp_path: Path) -> None:
    block = yaml.safe_load(config.read_text())
    block["residual_compare"]["model_sweep"][1] |= {"mode": "sub-layer", "tensor_parallel": 2}
    config.write_text(yaml.safe_dump(block))
    result = call(config, "--out", tmp_path / "new", "--dry-run", "--entries", "b")
    assert result.exit_code == 1
    assert "model_sweep[1]: mode: sub-layer and tensor_parallel: 2 exclude each other" in result.stdout


def test_what_is_shown_next_can_be_pasted_into_a_shell(config: Path, asked: dict[str, Any]) -> None:
    asked["summary"] = Summary("my out", (Item("a", state="complete"), Item("b", state="interrupted")), 1)
    mine = config.rename(config.with_name("my three.yaml"))
    shown = CliRunner().invoke(sweep, [str(mine), "--out", "my out"]).stdout.split("next:\n")[1].splitlines()
    assert [shlex.split(line, comments=True) for line in shown[:2]] == [
        ["pairscope", "sweep", str(mine), "--out", "my out"],
        ["pairscope", "status", "my out"],
    ]


@pytest.mark.parametrize("way", ["file://{}/out", "{}/out", "{}/there/../out/"])
def test_a_sweep_onto_the_heads_own_disk_is_noted_by_its_path(tmp_path: Path, monkeypatch: Any, way: str) -> None:
    from cluster.cli import _noted
    from cluster.note import read_notes

    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.1.1:6379")
    with _noted(way.format(tmp_path), ["one"]):
        (found,) = read_notes()[0]
    assert "://" not in found["out"]
    assert Path(found["out"]).resolve() == tmp_path / "out"
