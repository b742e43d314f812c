"""What an entry costs: its part of a node whose rate is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.rate import rate_file, rate_text, share_of_rate


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAIRSCOPE_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("assigned", "dollars"),
    [({"GPU": 1, "CPU": 1}, 2.0), ({"GPU": 4}, 8.0), ({"GPU": 0.5}, 1.0), ({"CPU": 8.0}, 4.0), ({"CPU": 64.0}, 16.0)],
)
def test_a_part_of_the_gpus_is_a_part_of_the_rate_and_without_gpus_a_part_of_the_cores(
    assigned: dict[str, float], dollars: float
) -> None:
    rate_file().write_text(rate_text(16.0, 8))
    assert share_of_rate(assigned, 32.0) == pytest.approx(dollars)


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"dollars_per_hour": "x", "gpus": 1}'])
def test_where_no_rate_is_known_nothing_is_made_up(text: str | None) -> None:
    if text is not None:
        rate_file().write_text(text)
    assert share_of_rate({"GPU": 1}, 8.0) is None
