"""Fixtures of the fault suite: one tiny entry and its undisturbed capture, and `told`, which docs/reliability.md is made of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for processes that import these modules by name


@pytest.fixture(scope="session")
def tiny_entries(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from entries import RECIPES, make_entries

    return make_entries(tmp_path_factory.mktemp("pairs"), RECIPES[:1])


@pytest.fixture(scope="session")
def entry(tiny_entries: Any) -> Any:
    """An entry of four layers that commits each."""
    return tiny_entries[0].model_copy(update={"name": "tiny"})


@pytest.fixture(scope="session")
def undisturbed(entry: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of its capture by a process that nothing happened to."""
    import runner

    out = tmp_path_factory.mktemp("undisturbed")
    ended = runner.run(entry, out, said=out / "said")
    assert ended.code == 0, ended.said
    (found,) = out.glob("captures/*/*")
    return found


@pytest.fixture
def told(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`told(key, sees=..., seconds=..., again=...)`: what a test saw of a fault of the catalog; kept by recorder.py if it passes.

    sees: what the user sees. seconds: from the fault to a complete capture. again: what was done again.
    """
    from catalog import FAULTS

    def tell(key: str, *, sees: str, seconds: float | None = None, again: str = "") -> None:
        assert key in FAULTS, key
        row = {"fault": key, "sees": " ".join(sees.split()), "seconds": seconds and round(seconds, 1), "again": again}
        request.node.user_properties.append(("fault", row))

    return tell
