"""A line to a worker that is cut and comes back: the attempt goes on with the same actor; a worker that is gone is told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_work import calls, make_entry

import cluster.loop
from cluster.sweep import run_sweep


class CutLine:
    """ray.get as the loop calls it, during a cut: the work's answer does not come through, so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        import ray

        self.times, self.get = times, ray.get
        monkeypatch.setattr(cluster.loop, "AGAIN_EVERY", 0.1)
        monkeypatch.setattr(cluster.loop.ray, "get", self)

    def __call__(self, ref: Any, **more: Any) -> Any:
        import ray

        value = self.get(ref, **more)
        if type(value).__name__ == "Outcome" and self.times:
            self.times -= 1
            raise ray.exceptions.ActorUnavailableError("cut", None)
        return value


@pytest.mark.usefixtures("local_ray")
def test_an_answer_that_was_cut_off_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = CutLine(monkeypatch, 3)
    summary = run_sweep(
        [("sleeping", make_entry("sleeping"))], str(tmp_path), work="fake_work:by_name", resolve="fake_work:resolve"
    )
    assert line.times == 0
    assert summary.exit_code == 0
    assert len(calls(tmp_path)) == 1, "the work was done once"
