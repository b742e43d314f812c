"""What people do: close the terminal, shut the laptop, type the wrong directory, change the config under a run."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIG = """
residual_compare:
  model_sweep:
    - {{name: tiny, base_model: {base}, sft_model: {sft}}}
  prompts: [{prompts}]
  device: cpu
  spans: {{layers: 1}}
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))
    from tiny import make_pair

    return make_pair("llama", tmp_path_factory.mktemp("people"), num_hidden_layers=4)


@pytest.fixture
def config(model: Any, tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG.format(base=model.base, sft=model.sft, prompts="one two three"))
    return path


ID = "0123456789abcdef"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def pairscope(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pairscope", *map(str, args)], capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=300
    )  # fmt: skip


def until(what: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def rows(out: Path) -> list[dict[str, Any]]:
    return sorted(
        (json.loads(p.read_text()) for p in (out / "manifest").glob("*.json")), key=lambda row: row["started"]
    )


def begun(out: Path) -> bool:
    return any(out.glob("logs/*/*.log"))


def test_a_closed_terminal_stops_cleanly_and_the_next_call_completes(config: Path, told: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pairscope", "capture", str(config), "--out", str(out)], stdin=theirs, stdout=theirs, stderr=theirs,
        env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    until(lambda: begun(out))
    os.close(ours)  # what is written there fails from here on
    os.kill(process.pid, signal.SIGHUP)
    code = process.wait(timeout=120)
    (row,) = rows(out)
    # where the signal came behind the last layer, the capture is whole
    assert (code, row["state"]) in ((129, "interrupted"), (0, "complete")), (code, row)
    began = time.monotonic()
    again = pairscope("capture", config, "--out", out)
    assert again.returncode == 0, again.stderr
    assert rows(out)[-1]["state"] == "complete"
    told("terminal-closed", sees="`status` says `interrupted`; exit code 129. Under nohup: nothing", again="from the last span on",
         seconds=time.monotonic() - began)  # fmt: skip


def test_under_nohup_a_closed_terminal_is_nothing(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        ["nohup", sys.executable, "-m", "pairscope", "capture", str(config), "--out", str(out)], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    until(lambda: begun(out))
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=120) == 0
    assert [row["state"] for row in rows(out)] == ["complete"]


def test_a_laptop_that_sleeps_in_the_middle_completes_when_it_wakes(config: Path, told: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "pairscope", "capture", str(config), "--out", str(out)], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    until(lambda: begun(out))
    for _ in range(3):
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGCONT)
        time.sleep(0.1)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert [row["state"] for row in rows(out)] == ["complete"]
    told("asleep", sees="progress stands still meanwhile", again="nothing")


COLLECT = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import far
from capture.layout import RunDir
from capture.show import Show
from capture.stop import Stop
from cluster.collect_follow import Follow
from cluster.collect_source import HeadSource, Link
folder = Path(sys.argv[1])
follow = Follow(HeadSource(lambda: Link((str(folder / "far/ssh"),), "root@far")), None, RunDir(str(folder / "home")),
                Show(live=False), Stop(), every=0.2, once=False, tear_down=None)
sys.exit(follow.run())
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("rsync"), reason="rsync is not installed")
def test_a_laptop_that_sleeps_while_it_collects_has_all_at_home_when_it_wakes(told: Any, tmp_path: Path) -> None:
    tests = Path(__file__).parents[1] / "cluster"
    sys.path.append(str(tests))
    from far import Far

    from capture.layout import RunDir

    far = Far(tmp_path / "far")
    far.capture("one")
    far.note(alive=True)
    process = subprocess.Popen(
        [sys.executable, "-c", COLLECT.format(tests=str(tests)), str(tmp_path)], stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    try:
        until(lambda: (tmp_path / "home").exists())
        for pause in (0.1, 0.4, 1.0):  # before, in and after a transfer
            os.killpg(process.pid, signal.SIGSTOP)
            time.sleep(1.0)
            os.killpg(process.pid, signal.SIGCONT)
            time.sleep(pause)
        os.killpg(process.pid, signal.SIGSTOP)
        far.capture("two")  # the sweep goes on, and ends, while nobody looks
        far.note(("one", "complete", ID), ("two", "complete", ID))
        time.sleep(1.0)
        woken = time.monotonic()
        os.killpg(process.pid, signal.SIGCONT)
        _, said = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    assert sorted(c.pair for c in RunDir(str(tmp_path / "home")).captures()) == ["one", "two"]
    told("asleep-collect", sees="nothing", again="nothing", seconds=time.monotonic() - woken)


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once_and_the_next_call_goes_on(
    entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    import invariants
    import runner
    from inject import Fault

    out, said, there = tmp_path / "out", tmp_path / "said", tmp_path / "there"
    process = runner.start(entry, out, Fault("layer", "slow", nth=20, seconds=600, once=str(there)), said=said)
    try:
        until(there.exists)  # deaf for ten minutes
        os.kill(process.pid, signal.SIGINT)
        until(lambda: "Once more to stop at once" in said.read_text())
        os.kill(process.pid, signal.SIGINT)
        process.join(120)
        assert process.exitcode == 130, said.read_text()
    finally:
        if process.exitcode is None:
            process.kill()
    assert [row["state"] for row in rows(out)] == ["interrupted"]
    again = runner.run(entry, out, said=said)
    assert again.code == 0, again.said
    assert invariants.wrong(out, as_undisturbed={"tiny": undisturbed}, attempts=2) == []
    told("ctrl-c", sees="`stopping; … Once more to stop at once`, then it ends with exit code 130; `status` says `interrupted`",
         again="from the last span on", seconds=again.seconds)  # fmt: skip


VERBS = (
    ["status"],
    ["sql"],
    ["report"],
    ["grid"],
    ["html", "-o", "page.html"],
    ["catalog"],
    ["export-json", "-o", "x.json"],
)


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v[0])
def test_a_wrong_directory_is_said_and_nothing_is_written_there(verb: list[str], told: Any, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from capture.errors import PairscopeError
    from pairscope import cli

    (tmp_path / "photos").mkdir()
    (tmp_path / "file.txt").write_text("mine")
    for wrong in ("photos", "file.txt", "nowhere", "photos/captures"):
        before = sorted(tmp_path.rglob("*"))
        asked = CliRunner().invoke(cli, [verb[0], str(tmp_path / wrong), *verb[1:]])
        assert isinstance(asked.exception, PairscopeError), (wrong, asked.exception, asked.output)
        assert asked.exception.exit_code == 2
        said = str(asked.exception)
        assert wrong in said
        assert sorted(tmp_path.rglob("*")) == before
    assert not Path("page.html").exists()
    told(
        "wrong-directory",
        sees=f"`{said.replace(str(tmp_path), '')}`; exit code 2, nothing is written there",
        again="nothing",
    )


def test_an_output_that_is_a_file_is_said_before_any_work(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("mine")
    asked = pairscope("capture", config, "--out", tmp_path / "file.txt")
    assert asked.returncode == 1
    assert "Traceback" not in asked.stderr
    assert "file.txt" in asked.stderr
    assert (tmp_path / "file.txt").read_text() == "mine"


def here(*args: object) -> Any:
    """A verb in this process: five imports of torch less."""
    from click.testing import CliRunner

    from pairscope import cli

    return CliRunner().invoke(cli, [str(a) for a in args], catch_exceptions=True)


def test_a_config_changed_between_two_runs_makes_a_capture_beside_the_first_and_both_can_be_told_apart(
    config: Path, model: Any, told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert here("capture", config, "--out", out).exit_code == 0
    first = {p: p.read_bytes() for p in out.glob("captures/*/*/*") if p.is_file()}
    config.write_text(CONFIG.format(base=model.base, sft=model.sft, prompts="one two three, four five"))
    monkeypatch.chdir(elsewhere)
    assert here("capture", config, "--out", out).exit_code == 0
    assert {p: p.read_bytes() for p in first} == first
    ids = [row["capture"] for row in rows(out)]
    assert len(set(ids)) == 2
    asked = here("status", out, "--all").stdout
    assert all(i in asked for i in ids), asked  # which settings an attempt was of
    counted = here(
        "sql",
        out,
        "--csv",
        "--all-captures",
        "SELECT capture, count(DISTINCT prompt_idx) FROM prompts GROUP BY ALL ORDER BY 2",
    )
    assert counted.stdout.splitlines()[1:] == [f"{ids[0]},1", f"{ids[1]},2"]
    newest = here("sql", out, "--csv", "SELECT DISTINCT capture FROM pairwise")
    assert newest.stdout.splitlines()[1:] == [ids[1]]
    assert "the newest of several captures" in newest.stderr
    unclear = here("grid", out, "--metric", "norm_diff")
    assert f"capture {ids[1]}, the newest of 2 of this pair" in unclear.stdout
    told(
        "config-edited",
        sees="a capture beside the first; readers say `capture <id>, the newest of 2 of this pair`",
        again="nothing",
    )
