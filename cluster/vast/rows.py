"""Rows of Vast's replies, taken as a stranger's: numbers that are none, texts that are lists, fields that are not there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

MOST_DPH = 10_000.0  # dollars an hour


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_price(value: Any) -> bool:
    """Below 0 it would pay back what others cost, and no limit would be reached; above what any machine costs it would end a cluster,
    with what it has at work, within a second."""
    return _is_number(value) and 0 <= value <= MOST_DPH


def _is_numeral(value: Any) -> bool:
    return type(value) is int or (isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 6)


def _is_ports(value: Any) -> bool:
    """{"22/tcp": [{"HostIp": ..., "HostPort": "41234"}], ...}; a port that is not mapped yet has null."""
    return isinstance(value, Mapping) and all(
        at is None
        or (isinstance(at, list) and all(isinstance(a, Mapping) and _is_numeral(a.get("HostPort")) for a in at))
        for at in value.values()
    )


def _is_host(value: Any) -> bool:
    """A name or an address, and nothing that ssh would read as an option or a shell as more."""
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9:][A-Za-z0-9.:_-]*", value.strip()) is not None


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(pair, list | tuple) for pair in value)


_TEXT: Callable[[Any], bool] = lambda value: isinstance(value, str)  # noqa: E731
# what is read of an instance -> whether it is fit to be; all else passes as it is
_INSTANCE: dict[str, Callable[[Any], bool]] = {
    "label": _TEXT, "actual_status": _TEXT, "intended_status": _TEXT, "cur_state": _TEXT, "status_msg": _TEXT, "gpu_name": _TEXT,
    "public_ipaddr": _is_host, "ssh_host": _is_host, "ssh_port": _is_numeral, "ports": _is_ports, "extra_env": _is_pairs,
    "machine_id": lambda value: type(value) is int, "dph_total": _is_price, "start_date": _is_number, "num_gpus": _is_number,
}  # fmt: skip
_OFFER = ("gpu_ram", "num_gpus", "inet_down")


def as_instance(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with null for each field that is not of its kind: the instance is never lost, since it costs money."""
    return {k: None if k in _INSTANCE and v is not None and not _INSTANCE[k](v) else v for k, v in row.items()}


def is_offer(row: Mapping[str, Any], bid: bool) -> bool:
    """Whether an offer says in numbers what it is and costs; one that does not cannot be compared, and is passed over."""
    optional = (
        "inet_down_cost", "disk_space", "reliability", "cuda_max_good", "cpu_ram", "direct_port_count", "duration",
    )  # fmt: skip
    return (
        all(_is_number(row.get(key)) for key in _OFFER)
        and all(_is_price(row.get(key)) for key in ("dph_total", *(("min_bid",) if bid else ())))
        and all(row.get(key) is None or _is_number(row[key]) for key in optional)
        and type(row.get("machine_id")) is int
        and isinstance(row.get("gpu_name"), str)
        and (row.get("inet_down_cost") or 0) >= 0
    )
