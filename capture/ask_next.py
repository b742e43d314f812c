"""What to ask of a run directory once captures are in it: the commands under `next:`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from capture.entries import Entry


def commands(out: str, entries: Sequence[Entry]) -> list[str]:
    """The commands that have an answer for what these entries capture.

    One comparison, since a mean over several is of nothing; a number of the states where an entry has no lens, and passes
    where one compares none.
    """
    out = shlex.quote(out)  # a space would end it in a shell, and an ampersand in the address of a store the command
    if not all(entry.comparisons for entry in entries):
        run = next((entry.passes[0].name for entry in entries if entry.passes), "BB")
        query = f"SELECT pair, layer, avg(norm) AS norm FROM runs WHERE run = '{run}' GROUP BY ALL ORDER BY ALL"
        lines = [f"report {out} --record-type runs", f"grid {out} --run {run}"]
    else:
        metric, short = ("kl_divergence", "kl") if all(e.lens.enabled for e in entries) else ("norm_diff", "norm_diff")
        names = [[c.name for c in entry.comparisons] for entry in entries]
        comparison = "BB-SS" if not names or any("BB-SS" in n for n in names) else names[0][0]
        query = f"SELECT pair, layer, avg({metric}) AS {short} FROM pairwise WHERE comparison = '{comparison}' GROUP BY ALL ORDER BY ALL"
        lines = [f"report {out}", f"grid {out} --metric {metric}"]
    return [f"pairscope {line}" for line in (*lines, f'sql {out} "{query}"')]
