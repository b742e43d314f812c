"""JSON as a stranger may send it: what is whole, with one place in it made odd or taken out."""

from __future__ import annotations

import random
from typing import Any


def changed(rng: random.Random, value: Any, odd: tuple[Any, ...]) -> Any:
    """The same JSON with one place in it made one of `odd`, or taken out."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: changed(rng, value[key], odd)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], changed(rng, value[at], odd), *value[at + 1 :]]
    return rng.choice(odd)
