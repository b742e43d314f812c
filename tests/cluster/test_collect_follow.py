"""Following a sweep: lines that break, clusters that are gone, results in a store, and calls that are wrong."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from far import ID, Collecting, Far

import cluster.collect_follow as follow_module
from capture.layout import RunDir
from capture.manifest import Attempt
from cluster.collect_cli import collect
from cluster.collect_errors import ClusterGoneError, StrangeHeadError, UnreachableError
from cluster.collect_source import HeadSource

pytestmark = pytest.mark.skipif(not shutil.which("rsync"), reason="rsync is not installed")


@pytest.mark.usefixtures("hasty")
def test_a_lost_connection_is_outlasted_while_following(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(("one", "complete", ID))
    far.down()
    run = Collecting(far, tmp_path / "home", once=False)
    looks = run.follow._sleep

    def back_after_three(seconds: float) -> None:
        if far.calls("look") == 3:
            far.down(False)
        looks(seconds)

    run.follow._sleep = back_after_three  # type: ignore[method-assign]
    assert run() == 0
    assert run.said.count("No route to host") == 3
    assert "trying again in" in run.said


@pytest.mark.usefixtures("near", "hasty")
@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_head_of_another_version_ends_it_after_some_tries_and_stays_up(
    far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_the_start: bool
) -> None:
    far.capture("one")
    far.note(alive=True)
    look, looks = HeadSource.look, iter([] if from_the_start else [1, 2])

    def changed(source: HeadSource) -> Any:
        if next(looks, None):
            return look(source)
        far._note("strange")
        assert far.calls("strange") < 6
        raise StrangeHeadError("the head answered what cannot be read: its pairscope is of another version")

    monkeypatch.setattr(HeadSource, "look", changed)
    run = Collecting(far, tmp_path / "home", once=False, teardown=True)
    with pytest.raises(StrangeHeadError, match="another version"):
        run()
    assert (far.calls("strange"), run.down) == (3, 0)
    assert "the cluster stays up, and costs money" in run.said


@pytest.mark.usefixtures("hasty")
def test_once_gives_up_after_some_tries(far: Far, tmp_path: Path) -> None:
    far.down()
    with pytest.raises(UnreachableError):
        Collecting(far, tmp_path / "home")()
    assert far.calls("look") == 3


def test_a_cluster_that_is_gone_ends_it(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(alive=True)
    run = Collecting(far, tmp_path / "home", once=False, teardown=True)
    reach = run.follow.head.reach

    def gone() -> Any:
        if far.calls("rsync") > 1:
            raise ClusterGoneError("cluster 'x' has no head")
        return reach()

    run.follow.head.reach = gone
    assert (run(), run.down) == (1, 0)
    assert "1 capture came home before it went" in run.said


def _under_way(far: Far, entry: str) -> Attempt:
    attempt = Attempt(far.run, entry)
    attempt.start(capture=ID, driver="the-head/123/456")
    return attempt


def _states(home: Path) -> dict[str, str]:
    return {row["entry"]: row["state"] for row in RunDir(str(home)).manifest_rows()}


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize("again", [False, True])
def test_what_was_under_way_on_a_cluster_that_is_gone_is_not_said_to_run_for_ever(
    far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    home = tmp_path / "home"
    far.capture("one")
    _under_way(far, "two")
    far.note(alive=True)
    Collecting(far, home)()
    here = Attempt(RunDir(str(home)), "three")  # a sweep of this machine's own
    here.start()
    assert _states(home) == {"one": "complete", "two": "running", "three": "running"}
    run, look = Collecting(far, home, once=False), HeadSource.look

    def gone(source: HeadSource) -> Any:
        if again or run.follow.collector is not None:
            raise ClusterGoneError("cluster 'x' has no head")
        return look(source)

    monkeypatch.setattr(HeadSource, "look", gone)
    assert run() == 1
    assert _states(home) == {"one": "complete", "two": "interrupted", "three": "running"}
    (two,) = (row for row in RunDir(str(home)).manifest_rows() if row["entry"] == "two")
    assert (two["error_class"], bool(two["finished"])) == ("DriverLostError", True)
    monkeypatch.setattr(HeadSource, "look", look)  # it was another cluster that was asked for
    Collecting(far, home)()
    assert _states(home)["two"] == "running"


@pytest.mark.usefixtures("near")
def test_what_a_sweep_had_under_way_that_died_is_interrupted(far: Far, tmp_path: Path) -> None:
    _under_way(far, "two")
    far.note(exit_code=None)
    assert Collecting(far, tmp_path / "home")() == 1
    assert _states(tmp_path / "home") == {"two": "interrupted"}


@pytest.mark.usefixtures("near")
def test_what_did_not_come_home_is_not_said_to_run_once_the_sweep_is_over(far: Far, tmp_path: Path) -> None:
    home = RunDir(str(tmp_path / "home"))
    path = far.capture("one")
    (row,) = far.run.manifest_rows()
    home.write_manifest_row(row | {"state": "running", "driver": "far/1/1"})  # as it came before
    far.run.write_manifest_row(row | {"driver": "far/1/1"})
    table = next(path.glob("*.parquet"))
    table.write_bytes(bytes(table.stat().st_size))
    far.note(("one", "complete", ID))
    assert Collecting(far, tmp_path / "home", once=False)() == 1
    assert [r["state"] for r in home.manifest_rows()] == ["interrupted"]


@pytest.mark.usefixtures("near")
def test_what_another_cluster_has_under_way_in_the_same_place_runs_on(far: Far, tmp_path: Path) -> None:
    _under_way(far, "two")
    far.capture("one")
    far.note(("one", "complete", ID))
    assert Collecting(far, tmp_path / "home")() == 0
    assert _states(tmp_path / "home") == {"one": "complete", "two": "running"}


@pytest.mark.usefixtures("near")
def test_before_the_first_sweep_there_is_nothing_to_fetch(far: Far, tmp_path: Path) -> None:
    run = Collecting(far, tmp_path / "home", teardown=True)
    assert (run(), run.down) == (1, 0)
    assert "no sweep was submitted to this cluster yet" in run.said


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize(
    ("out", "state"), [(None, "no sweep yet"), ("/root/out", "no sweep into '/root/out' is known")]
)
def test_who_waits_for_a_sweep_that_never_began_is_told_where_to_look(
    far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str | None, state: str
) -> None:
    monkeypatch.setattr(follow_module, "PATIENCE_S", 0.2)
    run = Collecting(far, tmp_path / "home", once=False, every=0.05, remote_out=out)
    sleep, looks = run.follow._sleep, iter(range(20))

    def sleep_for_a_while(seconds: float) -> None:
        if next(looks) == 15:
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(run.follow, "_sleep", sleep_for_a_while)
    with pytest.raises(KeyboardInterrupt):
        run()
    first, second = run.said.splitlines()
    assert f"{state}; waiting for one" in first
    assert f"{state}, and the cluster costs money" in second
    assert "`ray job list`" in second


def test_results_in_a_store_are_fetched_from_there(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    uri = f"file://{far.run.root}"
    far.note(("one", "complete", ID), out=uri)
    run = Collecting(far, tmp_path / "home", teardown=True)
    assert (run(), run.down) == (0, 1)
    assert f"the results are in {uri}, which outlives the cluster; fetching from there" in run.said
    assert far.calls("rsync") == 0


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize(("noted", "asked"), [("", "/"), ("/", "")])
def test_a_store_with_a_slash_at_its_end_is_the_same_store(far: Far, tmp_path: Path, noted: str, asked: str) -> None:
    far.capture("one")
    uri = f"file://{far.run.root}"
    far.note(("one", "complete", ID), out=uri + noted)
    run = Collecting(far, tmp_path / "home", teardown=True, remote_out=uri + asked)
    assert (run(), run.down) == (0, 1)


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize("by", ["..", "a link"])
def test_a_directory_of_the_heads_is_the_same_whatever_way_leads_there(far: Far, tmp_path: Path, by: str) -> None:
    far.capture("one")
    (far.folder / "home" / "x").mkdir()
    (far.folder / "home" / "link").symlink_to(far.run.root)
    another = str(far.folder / "home" / ("x/../out" if by == ".." else "link"))
    for noted, asked in ((another, far.run.root), (far.run.root, another)):
        far.note(("one", "complete", ID), out=noted)
        run = Collecting(far, tmp_path / "home", teardown=True, remote_out=asked)
        assert (run(), run.down) == (0, 1), run.said


@pytest.mark.usefixtures("near")
def test_a_directory_into_which_nothing_was_swept_is_named_with_those_that_are_known(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(("one", "complete", ID))
    run = Collecting(far, tmp_path / "home", teardown=True, remote_out="/root/uot")
    assert (run(), run.down) == (1, 0)
    assert f"no sweep into '/root/uot' is known; there are sweeps into {far.run.root}" in run.said


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize("asked", [False, True])
def test_what_is_in_a_store_comes_home_also_where_the_cluster_is_gone(
    far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    far.capture("one")
    uri = f"file://{far.run.root}"
    far.note(alive=True, out=uri)
    run = Collecting(far, tmp_path / "home", once=False, teardown=True, remote_out=uri if asked else None)
    look, looks = HeadSource.look, iter([] if asked else [1, 2])  # the last sweep's name, and a first look

    def gone(source: HeadSource) -> Any:
        if next(looks, None):
            return look(source)
        far.capture("two", seed=2)
        raise ClusterGoneError("cluster 'x' has no head")

    monkeypatch.setattr(HeadSource, "look", gone)
    assert (run(), run.down) == (1, 0)
    home = RunDir(str(tmp_path / "home"))
    assert [c.pair for c in home.captures()] == ["one", "two"]
    assert {row["state"] for row in home.manifest_rows()} == {"complete"}
    assert "2 captures came home from the store; sweep again for the rest" in run.said


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from far import ID, Collecting, Far
from capture.layout import RunDir
from capture.show import Show
from capture.stop import Stop
from cluster.collect_follow import Follow
from cluster.collect_source import HeadSource, Link
folder = Path(sys.argv[1])
show = Show(live=False)
with Stop(show.note) as stop:
    follow = Follow(HeadSource(lambda: Link((str(folder / "far/ssh"),), "root@far")), None, RunDir(str(folder / "home")), show, stop,
                    every=0.2, once=False, tear_down=None)
    try:
        follow.run()
    except KeyboardInterrupt:
        sys.exit(stop.exit_code)
"""


def test_ctrl_c_ends_it_in_order(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(alive=True)
    # the sweep that seems to run is this process
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(tests=str(Path(__file__).parent)), str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not list((tmp_path / "home").glob("captures/*/*/_COMPLETE")):
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert [c.pair for c in RunDir(str(tmp_path / "home")).captures()] == ["one"]


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["nowhere.yaml", "--out", "home"], "cannot be read"),
        (["demo.yaml", "--out", "home"], "is no cluster config of Ray's"),
        (["demo.yaml"], "Missing option '--out'"),
        (["cluster.yaml", "--out", "home", "--remote-out", "out"], "must start with '/'"),
        (["cluster.yaml", "--out", "file"], "cannot write to the output"),
    ],
)
def test_a_wrong_call_is_said_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text("residual_compare: {}\n")
    (tmp_path / "cluster.yaml").write_text("cluster_name: x\nprovider: {type: external}\n")
    (tmp_path / "file").touch()
    result = CliRunner().invoke(collect, args)
    said = result.output + str(result.exception or "")
    code = getattr(result.exception, "exit_code", result.exit_code)
    assert error in said
    assert code == (1 if "cannot write" in error else 2)
    assert os.listdir(tmp_path / "home") == [] if (tmp_path / "home").exists() else True
