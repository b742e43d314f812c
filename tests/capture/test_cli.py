"""The capture and doctor verbs. The engine is replaced: what it computes is tested elsewhere."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

import capture.run
import pairscope
from capture.cli import capture as capture_verb
from capture.cli import doctor
from capture.errors import CheckpointError, ConfigError, StoreError
from capture.layout import RunDir
from capture.progress import Progress
from capture.run import CaptureResult

GIB = 1 << 30


def write_config(folder: Path, *names: str, **block: Any) -> Path:
    (folder / "model").mkdir(exist_ok=True)
    pairs = [{"name": n, "base_model": "./model", "sft_model": "./model"} for n in names]
    path = folder / "pairs.yaml"
    path.write_text(yaml.safe_dump({"residual_compare": {"prompts": ["one"], "model_sweep": pairs} | block}))
    return path


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Puts a function in the place of capture_pair."""

    def put(work: Callable[..., Any]) -> None:
        monkeypatch.setattr(capture.run, "capture_pair", work)

    return put


def works(entry: Any, out: str, **kwargs: Any) -> CaptureResult:
    kwargs["progress"](Progress(entry.name, "layers", 1, 4, 250.0, 3.0))
    return CaptureResult(entry.name, "1f", f"{out}/x", "complete", 0.1, 3, 1234, "resident", "cpu", "cpu", 10, 9)


def call(*args: object) -> Result:
    return CliRunner().invoke(capture_verb, [str(a) for a in args])


def test_a_capture_leaves_row_log_and_a_line_with_its_place(tmp_path: Path, engine: Any) -> None:
    engine(works)
    result = call(write_config(tmp_path, "a"), "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "a: complete in 0 s: 3 prompts, 1,234 tokens, resident on cpu" in result.stdout
    assert f"{tmp_path}/out/captures/pair=a/capture=1f" in result.stdout
    assert f"next:\n  pairscope report {tmp_path}/out\n  pairscope grid {tmp_path}/out --metric kl_div" in result.stdout
    assert f"pairscope report {tmp_path / 'out'}" in result.stdout
    assert "a: layers, layer 1/4, 250 tokens/s, 3 s left" in result.stderr
    (row,) = RunDir(str(tmp_path / "out")).manifest_rows()
    assert row["state"] == "complete"
    assert "layers, layer 1/4" in (tmp_path / "out" / row["log"]).read_text()


def test_json_is_the_attempts_row_and_nothing_else(tmp_path: Path, engine: Any) -> None:
    engine(works)
    result = call(write_config(tmp_path, "a"), "--out", tmp_path / "out", "--json")
    assert [json.loads(result.stdout)] == RunDir(str(tmp_path / "out")).manifest_rows()


def test_a_capture_that_was_complete_says_so(tmp_path: Path, engine: Any) -> None:
    engine(lambda entry, out, **_: CaptureResult(entry.name, "1f", "x", "skipped", 0, 0, 0, "", "", "", 0, 0))
    result = call(write_config(tmp_path, "a"), "--out", tmp_path / "out")
    assert "a: was complete already" in result.stdout


def test_a_failure_is_one_line_on_stderr_and_exits_1(tmp_path: Path, engine: Any) -> None:
    def gated(entry: Any, out: str, **_: Any) -> None:
        raise CheckpointError("'owner/model' is gated")

    engine(gated)
    result = call(write_config(tmp_path, "a"), "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("pairscope: a failed: CheckpointError: 'owner/model' is gated (more in ")
    assert result.stdout == ""


def test_a_bug_names_the_log_with_its_traceback(tmp_path: Path, engine: Any) -> None:
    def bug(entry: Any, out: str, **_: Any) -> None:
        raise KeyError("x")

    engine(bug)
    result = call(write_config(tmp_path, "a"), "--out", tmp_path / "out")
    (row,) = RunDir(str(tmp_path / "out")).manifest_rows()
    assert result.exit_code == 1
    assert f"a bug, its traceback is in {tmp_path}/out/{row['log']}" in result.stderr
    assert "Traceback" in (tmp_path / "out" / row["log"]).read_text()
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_interrupts_and_leaves_a_row(tmp_path: Path, engine: Any, number: int, code: int) -> None:
    def obliging(entry: Any, out: str, *, stop: Callable[[], bool], **_: Any) -> None:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        raise KeyboardInterrupt

    engine(obliging)
    result = call(write_config(tmp_path, "a"), "--out", tmp_path / "out")
    assert result.exit_code == code
    assert "a interrupted; type the same again, and it goes on after its last commit" in result.stderr
    assert [r["state"] for r in RunDir(str(tmp_path / "out")).manifest_rows()] == ["interrupted"]


def test_a_second_ctrl_c_ends_work_that_does_not_listen(tmp_path: Path, engine: Any) -> None:
    def stubborn(entry: Any, out: str, **_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    engine(stubborn)
    assert call(write_config(tmp_path, "a"), "--out", tmp_path / "out").exit_code == 130


@pytest.mark.parametrize("before", ["capture.config.load_config", "analysis.run.open_run_dir"])
def test_a_ctrl_c_before_the_work_or_while_something_is_asked_is_told_by_the_exit_code(
    before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(before, stopped)
    asked = CliRunner().invoke(pairscope.cli, ["capture", "c.yaml"] if "config" in before else ["status", "out"])
    assert (asked.exit_code, asked.output) == (130, "pairscope: stopped\n")


def test_pair_chooses_among_several_and_is_asked_for(tmp_path: Path, engine: Any) -> None:
    engine(works)
    config = write_config(tmp_path, "a", "b")
    assert "b: complete" in call(config, "--pair", "b", "--out", tmp_path / "out").stdout
    error = call(config, "--out", tmp_path / "out").exception
    assert isinstance(error, ConfigError)
    assert str(error) == f"--pair is needed: {config} has a, b"
    assert isinstance(call(config, "--pair", "c", "--out", tmp_path / "out").exception, ConfigError)


def test_the_configs_own_pair_comes_first(tmp_path: Path, engine: Any) -> None:
    engine(works)
    config = write_config(tmp_path, "a", "b", base_model="./model", sft_model="./model")
    assert "model_to_model: complete" in call(config, "--out", tmp_path / "out").stdout


def test_an_output_that_cannot_be_written_stops_before_the_work(tmp_path: Path, engine: Any) -> None:
    engine(lambda *_, **__: pytest.fail("the work was begun"))
    (tmp_path / "file").write_text("")
    error = call(write_config(tmp_path, "a"), "--out", tmp_path / "file" / "out").exception
    assert isinstance(error, StoreError)
    assert f"cannot write to the output '{tmp_path}/file/out'" in str(error)


@pytest.mark.parametrize("verb", [capture_verb, doctor])
def test_help_ends_in_an_example(verb: Any) -> None:
    *_, title, example = CliRunner().invoke(verb, ["--help"]).stdout.splitlines()
    assert title == "  Example:"
    assert example.startswith(f"    pairscope {verb.name}")


def test_doctor_shows_each_thing_with_a_remedy_for_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("VAST_API_KEY", "vast_secret")
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi, no rsync, no compiler
    monkeypatch.delenv("CXX", raising=False)
    result = CliRunner().invoke(doctor, ["--json"])
    assert result.exit_code == 0
    found = {row["check"]: row for row in map(json.loads, result.stdout.splitlines())}
    assert {"python", "torch", "transformers", "ray", "memory", "disk", "GPU", "sshd", "rsync"} <= set(found)
    assert (found["Hugging Face login"]["found"], found["Vast key"]["found"]) == ("present", "present")
    assert (found["rsync"]["ok"], found["GPU"]["ok"], found["lens kernel"]["ok"]) == (False, False, False)
    assert all(row["ok"] or row["remedy"] for row in found.values())
    assert "secret" not in result.stdout
    text = CliRunner().invoke(doctor, []).stdout
    assert any(line.startswith("missing rsync") for line in text.splitlines())
