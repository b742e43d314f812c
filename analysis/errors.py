"""The error of a question that cannot be answered as asked; like a wrong config it exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from capture.errors import ConfigError


class QueryError(ConfigError):
    """The question is wrong: no such run directory, pair, prompt, metric or column, or SQL that is not a query."""


_SHORT = 12  # names that are listed even where some are near


def near(name: object, known: Iterable[object], *, n: int = 3) -> str:
    """A sentence that names the known things nearest to `name`, and all of them where none is near or they are few."""
    names = [str(k) for k in known]
    if not names:
        return "There are none."
    by_lower = {k.lower(): k for k in names}
    close = [by_lower[k] for k in difflib.get_close_matches(str(name).lower(), by_lower, n=n, cutoff=0.6)]
    there = f"There are: {', '.join(names[:30])}{', ...' if len(names) > 30 else ''}."
    if not close:
        return there
    meant = f"Did you mean {' or '.join(repr(c) for c in close)}?"
    return f"{meant} {there}" if len(close) < len(names) <= _SHORT else meant


def near_label(name: str, known: Iterable[str]) -> str:
    """The same for a comparison or a pass, whose short names are all near each other: what there is, or the reverse."""
    names = list(known)
    for one in names:
        if one.lower() == name.lower():
            return f"Did you mean '{one}'?"
        if "-".join(reversed(one.split("-"))).lower() == name.lower():
            return f"There is '{one}': the same two, with all signs turned, and kl_reverse in place of kl_divergence."
    return f"There are: {', '.join(names)}." if names else "There are none."
