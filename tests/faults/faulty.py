"""What a sweep's workers are given to do here: the product's own work, after the faults of the environment were put in.

PAIRSCOPE_FAULTS: JSON, entry -> faults, for workers of a sweep; each strikes once over all attempts where it names a file.
"""

from __future__ import annotations

import json
import os
from typing import Any

import inject

from capture.config import Entry

PLAN = "PAIRSCOPE_FAULTS"


def capture(entry: Entry, out: str, **kwargs: Any) -> Any:
    from cluster.prepare import capture_prepared

    plan = json.loads(os.environ.get(PLAN, "{}"))
    inject.install(*(inject.Fault(**f) for f in plan.get(entry.name, [])))
    return capture_prepared(entry, out, **kwargs)
