"""The error of a question that cannot be answered as asked; like a wrong config it exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from capture.errors import ConfigError


class QueryError(ConfigError):
    """The question is wrong: no such run directory, pair, prompt, metric or column, or SQL that is not a query."""


def near(name: object, known: Iterable[object], *, n: int = 3) -> str:
    """A sentence that names the known things nearest to `name`, or all of them where none is near."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), names, n=n, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    if not names:
        return "There are none."
    shown = ", ".join(names[:30])
    return f"There are: {shown}{', ...' if len(names) > 30 else ''}."
