"""Following a sweep to its end: when it counts as over, what the exit code says, and when a cluster may be taken down."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from far import Far

import cluster.collect_follow as follow_module
from capture.layout import RunDir
from capture.manifest import Attempt
from capture.show import Show
from capture.stop import Stop
from cluster.collect_cli import collect
from cluster.collect_errors import ClusterGoneError, StrangeHeadError, UnreachableError
from cluster.collect_follow import Follow
from cluster.collect_source import HeadSource

pytestmark = pytest.mark.skipif(not shutil.which("rsync"), reason="rsync is not installed")

ID = "0123456789abcdef"


@pytest.fixture
def far(tmp_path: Path) -> Far:
    return Far(tmp_path / "far")


@pytest.fixture
def near(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    far.near(monkeypatch)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_module, "FIRST_PAUSE_S", 0.01)


class Run:
    """One call of collect without its command line; `said` and `down` tell what it did."""

    def __init__(
        self,
        far: Far,
        home: Path,
        *,
        once: bool = True,
        teardown: bool = False,
        every: float = 0.05,
        remote_out: str | None = None,
    ) -> None:
        self.down = 0
        self.stream = io.StringIO()
        self.follow = Follow(
            HeadSource(far.reach), remote_out, RunDir(str(home)), Show(stream=self.stream, live=False), Stop(), every=every, once=once,
            tear_down=self.tear_down if teardown else None,
        )  # fmt: skip

    def tear_down(self) -> int:
        self.down += 1
        return 0

    def __call__(self) -> int:
        return self.follow.run()

    @property
    def said(self) -> str:
        return self.stream.getvalue()


@pytest.mark.usefixtures("near")
def test_a_sweep_that_has_ended_with_all_at_home_is_success_and_goes_down(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(("one", "complete", ID), ("two", "skipped", ID))
    far.capture("two")
    run = Run(far, tmp_path / "home", once=False, teardown=True)
    assert (run(), run.down) == (0, 1)
    assert "the sweep has ended; 2 captures at home" in run.said


@pytest.mark.usefixtures("near")
def test_a_failed_entry_makes_the_exit_code_and_does_not_keep_the_cluster(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.failed("two")
    far.note(("one", "complete", ID), ("two", "failed", None), exit_code=1)
    run = Run(far, tmp_path / "home", once=False, teardown=True)
    assert (run(), run.down) == (1, 1)
    assert "failed: two" in run.said
    rows = RunDir(str(tmp_path / "home")).manifest_rows()
    assert {r["entry"]: r["error"] for r in rows} == {"one": None, "two": "it is broken"}


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize(
    ("first", "code", "down", "said"),
    [
        ([("two", "failed", None)], 1, 1, "failed: two"),
        ([("two", "not started", None)], 143, 0, "the sweep was stopped before two"),
        ([("two", "planned", None)], None, 0, "the sweep ended without a word"),
    ],
)
def test_of_two_sweeps_at_a_time_into_one_directory_the_first_is_judged_too(
    far: Far, tmp_path: Path, first: list[tuple[str, str, str | None]], code: int | None, down: int, said: str
) -> None:
    far.capture("one")
    far.note(*first, exit_code=code, n=0)
    far.note(("one", "complete", ID), n=1, beside=(0,))
    run = Run(far, tmp_path / "home", once=False, teardown=True)
    assert (run(), run.down) == (1, down)
    assert said in run.said


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize("code", [None, 143])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_sweep_that_was_submitted_twice_is_whole_where_one_of_the_two_was_ended(
    far: Far, tmp_path: Path, killed: int, code: int | None
) -> None:
    far.capture("one")
    for n in (0, 1):
        beside = (0,) * n
        if n == killed:
            far.note(("one", "interrupted", ID), exit_code=code, n=n, beside=beside)
        else:
            far.note(("one", "complete", ID), n=n, beside=beside)
    run = Run(far, tmp_path / "home", once=False, teardown=True)
    assert (run(), run.down) == (0, 1)


@pytest.mark.usefixtures("near")
def test_another_capture_of_an_entry_that_is_complete_may_have_failed(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(("one", "complete", ID), n=0)
    far.note(("one", "failed", "fedcba9876543210"), exit_code=1, n=1, beside=(0,))
    assert Run(far, tmp_path / "home", once=False)() == 1


@pytest.mark.usefixtures("near")
def test_what_a_sweep_left_that_had_ended_before_the_last_one_began_is_the_last_ones_matter(
    far: Far, tmp_path: Path
) -> None:
    far.capture("one")
    far.note(("one", "failed", None), ("two", "failed", None), exit_code=1, n=0)
    far.note(("one", "complete", ID), n=1)
    run = Run(far, tmp_path / "home", once=False, teardown=True)
    assert (run(), run.down) == (0, 1)


def _running(far: Far) -> None:
    far.note(alive=True)


def _died(far: Far) -> None:
    far.note(exit_code=None)


def _stopped(far: Far) -> None:
    far.note(("one", "complete", ID), ("two", "not started", None), exit_code=143)


def _lost_on_the_head(far: Far) -> None:
    far.note(("one", "complete", ID), ("two", "complete", ID))


def _damaged_on_the_head(far: Far) -> None:
    file = far.capture("two", seed=2) / "prompts.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    far.note(("one", "complete", ID), ("two", "complete", ID))


def _of_another_sweep(far: Far) -> None:
    here, far.run = far.run, RunDir(str(far.folder / "home" / "other"))
    far.capture("three", seed=3)
    far.note(("three", "complete", ID), n=0)
    far.run = here
    far.note(("one", "complete", ID), n=1)


def _of_another_version(far: Far) -> None:
    _of_another_sweep(far)
    (marker,) = (far.folder / "home" / "other").glob("captures/*/*/_COMPLETE")
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"schema_version": 99}))


def _a_note_is_broken(far: Far) -> None:
    far.note(("one", "complete", ID), n=1)
    (far.folder / "home" / ".pairscope" / "sweeps" / "2026-0.json").write_text("{}")


def _another_runs(far: Far) -> None:
    far.note(alive=True, out="/somewhere", n=0)
    far.note(("one", "complete", ID), n=1)


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (_running, "the cluster stays up: the sweep runs"),
        (_died, "submit it again, it goes on"),
        (_stopped, "the sweep was stopped before two; submit it again"),
        (
            _lost_on_the_head,
            "two (0123456789abcdef) is not at home: the sweep completed it, and it is not there any more",
        ),
        (_damaged_on_the_head, "two (0123456789abcdef) is not at home: as fetched, prompts.parquet has"),
        (
            _of_another_sweep,
            "other' on the head holds 1 complete capture that are not at home (three (0123456789abcdef): home has none, or another one of its id); "
            "collect with --remote-out",
        ),
        (_of_another_sweep, "far/home/other, or end the cluster by hand with `ray down`"),
        (_of_another_version, "other' on the head cannot be read ("),
        (_a_note_is_broken, "2026-0.json' on the head cannot be read (KeyError: 'ended'), so nobody knows"),
        (_another_runs, "a sweep into '/somewhere' runs"),
    ],
)
def test_a_cluster_that_is_still_needed_stays_up_and_it_is_said_why(
    far: Far, tmp_path: Path, state: Callable[[Far], None], reason: str
) -> None:
    far.capture("one")
    state(far)
    run = Run(far, tmp_path / "home", teardown=True)
    assert (run(), run.down) == (1, 0)
    assert reason in run.said
    assert [c.pair for c in RunDir(str(tmp_path / "home")).captures()] == ["one"]


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize("broken", [False, True])
def test_results_in_a_store_do_not_hide_what_the_last_sweep_left_on_the_heads_disk(
    far: Far, tmp_path: Path, broken: bool
) -> None:
    marker = far.capture("two") / "_COMPLETE"
    last, far.run = far.run, RunDir(str(tmp_path / "store"))
    far.capture("one")
    uri = f"file://{far.run.root}"
    far.note(("one", "complete", ID), out=uri, n=0)
    far.note(("two", "complete", ID), out=last.root, n=1)
    if broken:
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"schema_version": 99}))
    run = Run(far, tmp_path / "home", teardown=True, remote_out=uri)
    assert (run(), run.down) == (1, 0)
    assert f"'{last.root}' on the head " + ("cannot be read" if broken else "holds 1 complete capture") in run.said


@pytest.fixture
def submitted_meanwhile(far: Far, near: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep has ended; while its captures come home another is submitted into the same directory."""
    far.capture("one")
    far.failed("two")
    far.note(("one", "complete", ID), ("two", "failed", None), exit_code=1, n=0)
    fetched = HeadSource.fetch

    def fetch(source: HeadSource, *what: Any) -> None:
        fetched(source, *what)
        if far.calls("rsync") == 1:
            far.capture("two", seed=4)
            far.note(alive=True, n=1)

    monkeypatch.setattr(HeadSource, "fetch", fetch)


@pytest.mark.usefixtures("submitted_meanwhile")
def test_a_sweep_that_was_submitted_while_results_came_home_is_followed_and_not_destroyed(
    far: Far, tmp_path: Path
) -> None:
    run = Run(far, tmp_path / "home", once=False, teardown=True)
    judged = run.follow._judge

    def end_after_the_second_look(done: Any) -> int | None:
        assert run.down == 0
        if any(s["alive"] for s in done.look.sweeps):
            far.note(("two", "complete", ID), n=1)
        return judged(done)

    run.follow._judge = end_after_the_second_look  # type: ignore[method-assign]
    assert (run(), run.down) == (0, 1)
    assert "something was done there while the results came home" in run.said
    assert [c.pair for c in RunDir(str(tmp_path / "home")).captures()] == ["one", "two"]


@pytest.mark.usefixtures("submitted_meanwhile")
def test_once_leaves_a_cluster_up_on_which_a_sweep_was_submitted_meanwhile(far: Far, tmp_path: Path) -> None:
    run = Run(far, tmp_path / "home", once=True, teardown=True)
    assert (run(), run.down) == (1, 0)


@pytest.mark.usefixtures("hasty")
def test_a_head_that_is_out_of_reach_at_the_last_look_is_asked_again(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(("one", "complete", ID))
    run = Run(far, tmp_path / "home", once=False, teardown=True)
    reach = run.follow.head.reach
    away = iter([False, False, False, False, True])  # the last sweep's name, a look, a capture, a log; the last look

    def unsteady() -> Any:
        if next(away, False):
            raise UnreachableError("no answer")
        return reach()

    run.follow.head.reach = unsteady
    assert (run(), run.down) == (0, 1)
    assert run.said.count("no answer; trying again") == 1


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize("harm", ["a table is gone", "a table is damaged", "it is another of its id"])
def test_another_sweeps_capture_is_at_home_only_where_all_of_it_is(far: Far, tmp_path: Path, harm: str) -> None:
    home = tmp_path / "home"
    far.capture("one")
    _of_another_sweep(far)
    run = Run(far, home, once=True, remote_out=str(far.folder / "home" / "other"))
    assert run() == 0
    table = home / "captures" / "pair=three" / f"capture={ID}" / "prompts.parquet"
    good = table.read_bytes()
    if harm == "a table is gone":
        table.unlink()
    elif harm == "a table is damaged":
        table.write_bytes(good[:-1])
    else:
        here, far.run = far.run, RunDir(str(far.folder / "home" / "other"))
        far.capture("three", seed=5)
        far.run = here
    run = Run(far, home, teardown=True)
    assert (run(), run.down) == (1, 0)
    assert "other' on the head holds 1 complete capture that are not at home (three (0123456789abcdef): " in run.said
    Run(far, home, once=True, remote_out=str(far.folder / "home" / "other"))()
    run = Run(far, home, teardown=True)
    assert (run(), run.down) == (0, 1)


@pytest.mark.usefixtures("near")
def test_what_broke_at_home_since_keeps_the_cluster_up(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(("one", "complete", ID))
    run = Run(far, tmp_path / "home", teardown=True)
    judge = run.follow._judge

    def break_first(done: Any) -> Any:
        file = next((tmp_path / "home").glob("captures/*/*/prompts.parquet"))
        file.write_bytes(b"x" * file.stat().st_size)
        return judge(done)

    run.follow._judge = break_first  # type: ignore[method-assign]
    assert (run(), run.down) == (1, 0)
    assert "one: prompts.parquet has another checksum than its marker says" in run.said


@pytest.mark.usefixtures("hasty")
def test_a_lost_connection_is_outlasted_while_following(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(("one", "complete", ID))
    far.down()
    run = Run(far, tmp_path / "home", once=False)
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
    run = Run(far, tmp_path / "home", once=False, teardown=True)
    with pytest.raises(StrangeHeadError, match="another version"):
        run()
    assert (far.calls("strange"), run.down) == (3, 0)
    assert "the cluster stays up, and costs money" in run.said


@pytest.mark.usefixtures("hasty")
def test_once_gives_up_after_some_tries(far: Far, tmp_path: Path) -> None:
    far.down()
    with pytest.raises(UnreachableError):
        Run(far, tmp_path / "home")()
    assert far.calls("look") == 3


def test_a_cluster_that_is_gone_ends_it(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(alive=True)
    run = Run(far, tmp_path / "home", once=False, teardown=True)
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
    Run(far, home)()
    here = Attempt(RunDir(str(home)), "three")  # a sweep of this machine's own
    here.start()
    assert _states(home) == {"one": "complete", "two": "running", "three": "running"}
    run, look = Run(far, home, once=False), HeadSource.look

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
    Run(far, home)()
    assert _states(home)["two"] == "running"


@pytest.mark.usefixtures("near")
def test_what_a_sweep_had_under_way_that_died_is_interrupted(far: Far, tmp_path: Path) -> None:
    _under_way(far, "two")
    far.note(exit_code=None)
    assert Run(far, tmp_path / "home")() == 1
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
    assert Run(far, tmp_path / "home", once=False)() == 1
    assert [r["state"] for r in home.manifest_rows()] == ["interrupted"]


@pytest.mark.usefixtures("near")
def test_what_another_cluster_has_under_way_in_the_same_place_runs_on(far: Far, tmp_path: Path) -> None:
    _under_way(far, "two")
    far.capture("one")
    far.note(("one", "complete", ID))
    assert Run(far, tmp_path / "home")() == 0
    assert _states(tmp_path / "home") == {"one": "complete", "two": "running"}


@pytest.mark.usefixtures("near")
def test_before_the_first_sweep_there_is_nothing_to_fetch(far: Far, tmp_path: Path) -> None:
    run = Run(far, tmp_path / "home", teardown=True)
    assert (run(), run.down) == (1, 0)
    assert "no sweep was submitted to this cluster yet" in run.said


@pytest.mark.usefixtures("near")
def test_who_waits_for_a_sweep_that_never_began_is_told_where_to_look(
    far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "PATIENCE_S", 0.2)
    run = Run(far, tmp_path / "home", once=False, every=0.05)
    sleep, looks = run.follow._sleep, iter(range(20))

    def sleep_for_a_while(seconds: float) -> None:
        if next(looks) == 15:
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(run.follow, "_sleep", sleep_for_a_while)
    with pytest.raises(KeyboardInterrupt):
        run()
    first, second = run.said.splitlines()
    assert "no sweep yet; waiting for one" in first
    assert "the cluster costs money" in second
    assert "`ray job list`" in second


def test_results_in_a_store_are_fetched_from_there(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    uri = f"file://{far.run.root}"
    far.note(("one", "complete", ID), out=uri)
    run = Run(far, tmp_path / "home", teardown=True)
    assert (run(), run.down) == (0, 1)
    assert f"the results are in {uri}, which outlives the cluster; fetching from there" in run.said
    assert far.calls("rsync") == 0


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize(("noted", "asked"), [("", "/"), ("/", "")])
def test_a_store_with_a_slash_at_its_end_is_the_same_store(far: Far, tmp_path: Path, noted: str, asked: str) -> None:
    far.capture("one")
    uri = f"file://{far.run.root}"
    far.note(("one", "complete", ID), out=uri + noted)
    run = Run(far, tmp_path / "home", teardown=True, remote_out=uri + asked)
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
        run = Run(far, tmp_path / "home", teardown=True, remote_out=asked)
        assert (run(), run.down) == (0, 1), run.said


@pytest.mark.usefixtures("near")
def test_a_directory_into_which_nothing_was_swept_is_named_with_those_that_are_known(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(("one", "complete", ID))
    run = Run(far, tmp_path / "home", teardown=True, remote_out="/root/uot")
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
    run = Run(far, tmp_path / "home", once=False, teardown=True, remote_out=uri if asked else None)
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
from far import Far
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
