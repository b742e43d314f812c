"""Fixtures of the capture tests: tiny pairs, made once for each architecture and set of options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`pairs(arch, **options)`: PairPaths of tiny.make_pair with these options. Do not write into these directories."""
    made: dict[str, Any] = {}

    def get(arch: str, **options: Any) -> Any:
        from tiny import make_pair

        key = f"{arch} {sorted(options.items())}"
        if key not in made:
            made[key] = make_pair(arch, tmp_path_factory.mktemp(arch), **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def loaded(pairs: Callable[..., Any]) -> Callable[..., Any]:
    """`loaded(arch, **options)`: the same pair opened whole by plain transformers, a reference.LoadedPair."""
    opened: dict[str, Any] = {}

    def get(arch: str, **options: Any) -> Any:
        from reference import load_pair

        key = f"{arch} {sorted(options.items())}"
        if key not in opened:
            opened[key] = load_pair(pairs(arch, **options))
        return opened[key]

    return get
