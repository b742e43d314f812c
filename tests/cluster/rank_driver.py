"""A driver with a Ray of its own: `python rank_driver.py OUT ENTRY_JSON` has one tensor-parallel group work on OUT/jobs.json."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

# for the workers
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_raylet_start_wait_time_s"] = "180"  # noqa: SIM112  Ray spells it so; on a busy machine

import ray
from fake_work import quiet

from capture.config import Entry
from cluster.sweep import run_sweep


def main(out: str, text: str) -> None:
    entry = Entry.model_validate_json(text)
    assert entry.tensor_parallel != "auto"
    ray.init(
        address="local", num_cpus=entry.tensor_parallel, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR, object_store_memory=100 * 1024**2,
    )  # fmt: skip
    show, said = quiet()
    summary = run_sweep([(entry.name, entry)], out, show=show, work="rank_work:work_through")
    ray.shutdown()
    if summary.exit_code:
        print(said.getvalue(), *(log.read_text() for log in Path(out).glob("logs/*/*.log")))
    sys.exit(summary.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
