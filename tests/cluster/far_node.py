"""A Ray of two nodes where entries can only run on the one that the driver is not on: `python far_node.py CONFIG OUT`.

Sweeps as a submitted job does, with RAY_ADDRESS set. Prints the exit code and what was said, as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_raylet_start_wait_time_s"] = "180"  # noqa: SIM112  Ray's own spelling; a busy machine takes its time

from ray.cluster_utils import Cluster


def main(config: str, out: str) -> None:
    store = 80 * 1024**2
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": store, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=2, num_gpus=2, resources={"accelerator_type:FAR": 1}, object_store_memory=store)
    command = [str(Path(sys.executable).with_name("pairscope")), "sweep", config, "--out", out]
    env = os.environ | {"RAY_ADDRESS": cluster.address}
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    cluster.shutdown()
    print(json.dumps({"code": done.returncode, "said": done.stdout + done.stderr}))


if __name__ == "__main__":
    main(*sys.argv[1:])
