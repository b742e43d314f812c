"""A driver for tests that send signals: `python drive.py GRACE OUT NAME...` sweeps entries whose names choose fake work."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # for the workers

from fake_work import make_entry

import cluster.loop
from cluster.sweep import run_sweep

if __name__ == "__main__":
    grace, out, *names = sys.argv[1:]
    cluster.loop.GRACE = float(grace)
    entries = [(name, make_entry(name)) for name in names]
    summary = run_sweep(entries, out, work="fake_work:by_name", resolve="fake_work:resolve", cpus=2)
    print({i.name: i.state for i in summary.items})
    sys.exit(summary.exit_code)
