"""What goes wrong inside a worker and does not kill it: memory, the GPU, numbers that are none, threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import invariants
import pyarrow.parquet as pq
import pytest
import runner
from inject import Fault

from capture.layout import RunDir


def last_row(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = RunDir(str(out)).manifest_rows()[-1]
    return found


def test_a_stopped_worker_goes_on(entry: Any, undisturbed: Path, told: Any, tmp_path: Path) -> None:
    ended = runner.run(entry, tmp_path / "out", Fault("layer", "stop", nth=8, seconds=2), said=tmp_path / "said")
    assert ended.code == 0, ended.said
    assert ended.seconds > 2
    assert invariants.wrong(tmp_path / "out", as_undisturbed={"tiny": undisturbed}, attempts=1) == []
    told("stop", sees="progress stands still meanwhile", seconds=ended.seconds, again="nothing")


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("oom-layer", Fault("layer", "oom", nth=8)),
        ("oom-lens", Fault("lens", "oom", nth=8)),
        ("oom-host", Fault("load", "host oom", nth=9)),
    ],
)
def test_what_does_not_fit_is_tried_again_in_smaller_parts(
    key: str, fault: Fault, entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    ended = runner.run(entry, tmp_path / "out", fault, said=tmp_path / "said")
    assert ended.code == 0, ended.said
    assert invariants.wrong(tmp_path / "out", as_undisturbed={"tiny": undisturbed}, attempts=2) == []
    sees = "trying again, tiles divided by 4"
    assert sees in ended.said
    told(key, sees=f"`{sees}`", seconds=ended.seconds, again="from the last span on")


def test_an_error_that_poisons_the_process_is_told_and_not_tried_again_in_it(
    entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    ended = runner.run(entry, out, Fault("layer", "cuda", nth=11), said=said)
    assert ended.code == 1
    assert "(a bug)" not in ended.said
    row = last_row(out)
    assert (row["state"], row["error_class"]) == ("failed", "DeviceError")
    assert row["error"].startswith("the GPU failed, and this process cannot use it any more: CUDA error")
    again = runner.run(entry, out, said=said)
    assert again.code == 0, again.said
    assert invariants.wrong(out, as_undisturbed={"tiny": undisturbed}, attempts=2) == []
    told("cuda-poison", sees=f"`{row['error']}`", seconds=again.seconds, again="from the last span on")


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("nan-weight", Fault("load", "nan", nth=13, after=True)),
        ("inf-state", Fault("layer", "inf", nth=20, after=True)),
    ],
)
def test_numbers_that_are_none_are_nulls_and_are_told(
    key: str, fault: Fault, entry: Any, undisturbed: Path, told: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = runner.run(entry, out, fault, said=tmp_path / "said")
    assert ended.code == 0, ended.said
    assert invariants.wrong(out, attempts=1) == []
    (capture,) = out.glob("captures/*/*")
    rows = json.loads((capture / "capture.json").read_text())["numerics"]["nonfinite_lens_rows"]
    assert rows > 0
    assert f"{rows} rows of logits are not finite" in (out / last_row(out)["log"]).read_text()
    table, whole = (pq.read_table(p / "runs.parquet", partitioning=None).to_pylist() for p in (capture, undisturbed))
    spoiled = {r["layer"] for r in table if r["entropy"] is None}
    assert spoiled
    assert min(spoiled) >= 0
    before = [r for r in table if r["layer"] < min(spoiled)]
    assert [r | {"capture": 0} for r in before] == [r | {"capture": 0} for r in whole if r["layer"] < min(spoiled)]
    told(
        key,
        sees=f"the log warns: `{rows} rows of logits are not finite`; their numbers are null",
        seconds=ended.seconds,
    )


def test_an_exception_where_weights_are_read_ahead_ends_the_attempt_and_nothing_else(
    entry: Any, told: Any, tmp_path: Path
) -> None:
    entry = entry.model_copy(update={"dtype": "bfloat16"})  # what is not as it is stored is read by a thread
    out, said = tmp_path / "out", tmp_path / "said"
    assert runner.run(entry, tmp_path / "undisturbed", said=said).code == 0
    (undisturbed,) = (tmp_path / "undisturbed").glob("captures/*/*")
    ended = runner.run(entry, out, Fault("prefetch", "error", nth=3), said=said)
    assert ended.code == 1
    row = last_row(out)
    assert (row["state"], row["error_class"]) == ("failed", "RuntimeError")
    assert "concurrent/futures/thread.py" in (out / row["log"]).read_text()
    again = runner.run(entry, out, said=said)
    assert again.code == 0, again.said
    assert invariants.wrong(out, as_undisturbed={"tiny": undisturbed}, attempts=2) == []
    told(
        "prefetch",
        sees="`tiny failed: RuntimeError: …`, its traceback in the log",
        seconds=again.seconds,
        again="from the last span on",
    )
