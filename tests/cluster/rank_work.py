"""Work for a tensor-parallel group of real actors: many pairs in one go, so that the group starts once."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from capture.config import Entry
from capture.ranks import Ranks


def work_through(entry: Entry, out: str, *, ranks: Ranks, **kwargs: Any) -> Any:
    """Walk every pair of OUT/jobs.json as one rank, and capture it; rank 0 keeps the states, all keep what they read."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))
    import tiny
    import torch
    from fake_work import Result
    from test_capture import entry_of
    from walked import open_pair, walk

    from capture.group import join_group, leave_group
    from capture.run import capture_pair

    torch.set_num_threads(1)
    folder = Path(out)
    todo = json.loads((folder / "jobs.json").read_text())
    paths_of = {job["name"]: tiny.PairPaths(*map(Path, job["paths"])) for job in todo["jobs"]}
    group = join_group(replace(ranks, port=todo["walks_port"], listener=None), torch.device("cpu"), minutes=5)
    for job in todo["jobs"]:
        name = job["name"]
        pair = open_pair(paths_of[name], group=replace(group, whole_attention=job["whole"]))
        got = walk(pair, tiny.encode(tiny.PROMPTS), streamed=True)
        if ranks.rank == 0:
            torch.save(got, folder / f"{name}.pt")
        (folder / f"{name}-{ranks.rank}.json").write_text(json.dumps(pair.models["base"].ledger.reads))
    leave_group(group)
    for job in todo["jobs"]:
        one = entry_of(paths_of[job["name"]], replicate_attention=job["whole"])
        capture_pair(one, str(folder / job["name"]), ranks=replace(ranks, port=job["port"], listener=None))
    return Result(entry.name, "id", out, "complete", 0.1, 1, 1, "streamed", "cpu", "cpu", 1, 1)
