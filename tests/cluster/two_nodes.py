"""A driver with a Ray of two nodes of its own: `python two_nodes.py OUT WORK ENTRY_JSON [lose-node]` sweeps one entry.

lose-node: when the first worker is through, its node is taken away, before anything was copied to the driver's.
Prints one JSON object: the state, what was shown, and the events of placement.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

# for the workers
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_raylet_start_wait_time_s"] = "180"  # noqa: SIM112  Ray spells it so; on a busy machine

import ray
from ray.cluster_utils import Cluster

from capture.config import Entry
from capture.show import Show
from cluster import loop as cluster_loop
from cluster.job import Job
from cluster.loop import Loop
from cluster.sweep import run_sweep


def main(out: str, work: str, entry: str, *more: str) -> None:
    store = 80 * 1024**2
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": store, "include_dashboard": False},
    )
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=store) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    by_id = {node.node_id: node for node in nodes}
    placed: list[tuple[int, str]] = []
    begin, sent = Loop._begin, Loop._sent

    def note_begin(self: Any, job: Job, span: int, crew: Any) -> None:
        placed.append((span, crew.place["node_id"]))
        begin(self, job, span, crew)

    def note_sent(self: Any, job: Job, span: int, ref: Any) -> None:
        sent(self, job, span, ref)
        if "lose-node" in more and span == 0 and len([s for s, _ in placed if s == 0]) == 1:
            cluster.remove_node(by_id[placed[0][1]], allow_graceful=False)

    if "lose-node" in more:
        cluster_loop.brought_home = lambda sent, node_id: sent
    Loop._begin, Loop._sent = note_begin, note_sent  # type: ignore[method-assign]
    said = io.StringIO()
    one = Entry.model_validate_json(entry)
    summary = run_sweep([(one.name, one)], out, work=work, show=Show(stream=said, live=False))
    (item,) = summary.items
    print(json.dumps({"state": item.state, "row": item.row, "placed": placed, "said": said.getvalue()}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
