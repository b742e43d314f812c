"""The end of a sweep that is followed: when it counts as over, what the exit code says, and when its cluster may go down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from far import ID, Collecting, Far

from capture.layout import RunDir
from cluster.collect_errors import UnreachableError
from cluster.collect_source import HeadSource

pytestmark = pytest.mark.skipif(not shutil.which("rsync"), reason="rsync is not installed")


@pytest.mark.usefixtures("near")
def test_a_sweep_that_has_ended_with_all_at_home_is_success_and_goes_down(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(("one", "complete", ID), ("two", "skipped", ID))
    far.capture("two")
    run = Collecting(far, tmp_path / "home", once=False, teardown=True)
    assert (run(), run.down) == (0, 1)
    assert "the sweep has ended; 2 captures at home" in run.said


@pytest.mark.usefixtures("near")
def test_a_failed_entry_makes_the_exit_code_and_does_not_keep_the_cluster(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.failed("two")
    far.note(("one", "complete", ID), ("two", "failed", None), exit_code=1)
    run = Collecting(far, tmp_path / "home", once=False, teardown=True)
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
    run = Collecting(far, tmp_path / "home", once=False, teardown=True)
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
    run = Collecting(far, tmp_path / "home", once=False, teardown=True)
    assert (run(), run.down) == (0, 1)


@pytest.mark.usefixtures("near")
def test_another_capture_of_an_entry_that_is_complete_may_have_failed(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(("one", "complete", ID), n=0)
    far.note(("one", "failed", "fedcba9876543210"), exit_code=1, n=1, beside=(0,))
    assert Collecting(far, tmp_path / "home", once=False)() == 1


@pytest.mark.usefixtures("near")
def test_another_capture_of_an_entry_that_was_interrupted_keeps_the_cluster_up(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(("one", "complete", ID), n=0)
    far.note(("one", "interrupted", "fedcba9876543210"), exit_code=143, n=1, beside=(0,))
    run = Collecting(far, tmp_path / "home", once=False, teardown=True)
    assert (run(), run.down) == (1, 0)
    assert "the sweep was stopped before one" in run.said


@pytest.mark.usefixtures("near")
def test_what_a_sweep_left_that_had_ended_before_the_last_one_began_is_the_last_ones_matter(
    far: Far, tmp_path: Path
) -> None:
    far.capture("one")
    far.note(("one", "failed", None), ("two", "failed", None), exit_code=1, n=0)
    far.note(("one", "complete", ID), n=1)
    run = Collecting(far, tmp_path / "home", once=False, teardown=True)
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
    run = Collecting(far, tmp_path / "home", teardown=True)
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
    run = Collecting(far, tmp_path / "home", teardown=True, remote_out=uri)
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
    run = Collecting(far, tmp_path / "home", once=False, teardown=True)
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
    run = Collecting(far, tmp_path / "home", once=True, teardown=True)
    assert (run(), run.down) == (1, 0)


@pytest.mark.usefixtures("hasty")
def test_a_head_that_is_out_of_reach_at_the_last_look_is_asked_again(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(("one", "complete", ID))
    run = Collecting(far, tmp_path / "home", once=False, teardown=True)
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
    run = Collecting(far, home, once=True, remote_out=str(far.folder / "home" / "other"))
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
    run = Collecting(far, home, teardown=True)
    assert (run(), run.down) == (1, 0)
    assert "other' on the head holds 1 complete capture that are not at home (three (0123456789abcdef): " in run.said
    Collecting(far, home, once=True, remote_out=str(far.folder / "home" / "other"))()
    run = Collecting(far, home, teardown=True)
    assert (run(), run.down) == (0, 1)


@pytest.mark.usefixtures("near")
def test_what_broke_at_home_since_keeps_the_cluster_up(far: Far, tmp_path: Path) -> None:
    far.capture("one")
    far.note(("one", "complete", ID))
    run = Collecting(far, tmp_path / "home", teardown=True)
    judge = run.follow._judge

    def break_first(done: Any) -> Any:
        file = next((tmp_path / "home").glob("captures/*/*/prompts.parquet"))
        file.write_bytes(b"x" * file.stat().st_size)
        return judge(done)

    run.follow._judge = break_first  # type: ignore[method-assign]
    assert (run(), run.down) == (1, 0)
    assert "one: prompts.parquet has another checksum than its marker says" in run.said
