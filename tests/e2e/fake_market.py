"""The market behind the fake Vast: offers, instances that boot and die with delays, and a bill. No HTTP here."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

# A month of storage in hours, for turning $/GB/month into $/h.
MONTH_H = 730.0


class Hosts(Protocol):
    """What turns an instance into something that ssh can reach."""

    def start(self, instance: int, env: dict[str, str], onstart: str) -> tuple[str, int]: ...
    def authorize(self, instance: int, key: str) -> None: ...
    def stop(self, instance: int) -> None: ...


def offer(number: int, **fields: Any) -> dict[str, Any]:
    """One offer in Vast's units: gpu_ram MB per GPU, inet Mb/s, costs $/GB, dph_base $/h for the whole offer."""
    row = {
        "id": 1000 + number, "ask_contract_id": 1000 + number, "machine_id": 500 + number, "host_id": 7, "gpu_name": "RTX 4090",
        "num_gpus": 1, "gpu_ram": 24564, "compute_cap": 890, "cuda_max_good": 13.0, "cpu_ram": 64000, "cpu_cores_effective": 16.0,
        "disk_space": 500.0, "disk_bw": 3000.0, "storage_cost": 0.15, "inet_down": 2000.0, "inet_up": 1000.0, "inet_down_cost": 0.002,
        "inet_up_cost": 0.002, "direct_port_count": 20, "reliability": 0.995, "verified": True, "external": False,
        "rentable": True, "rented": False, "dph_base": 0.40, "min_bid": 0.20, "geolocation": "Nowhere, NW", "duration": 7776000.0,
        "pcie_bw": 20.0, "public_ipaddr": "192.0.2.1", "static_ip": True,
    }  # fmt: skip
    return row | fields


@dataclass
class Instance:
    id: int
    ask: dict[str, Any]
    label: str | None
    disk: float
    bid: float | None
    env: dict[str, str]
    onstart: str
    created: float
    key: str = field(default_factory=lambda: secrets.token_hex(16))
    status: str | None = None
    ssh: tuple[str, int] | None = None
    keys: list[str] = field(default_factory=list)
    stuck: bool = False
    running_since: float | None = None
    gpu_seconds: float = 0.0
    destroyed: float | None = None
    ended_by: str | None = None

    @property
    def dph(self) -> float:
        """Dollars an hour while running."""
        return self.bid if self.bid is not None else float(self.ask["dph_base"])


class Market:
    """All state of the fake, behind one lock. boot_s: (created -> loading, loading -> running) in seconds.

    now: its clock. With live=False nothing moves by itself; `tick` is called instead, and a test has time in its hands.
    """

    def __init__(
        self, offers: list[dict[str, Any]], hosts: Hosts, boot_s: tuple[float, float] = (0.1, 0.2),
        now: Callable[[], float] = time.time, live: bool = True,
    ) -> None:  # fmt: skip
        self.now = now
        self.offers = offers
        self.hosts = hosts
        self.boot_s = boot_s
        self.lock = threading.RLock()
        self.live: dict[int, Instance] = {}
        self.dead: list[Instance] = []
        self.next_id = 9_000_001
        self.closing = threading.Event()
        self.ticker = threading.Thread(target=self._tick_forever, daemon=True)
        if live:
            self.ticker.start()

    def search(self, query: dict[str, Any]) -> list[dict[str, Any]]:
        bid, storage = query.get("type") == "bid", float(query.get("allocated_storage", 5))
        with self.lock:
            taken = {i.ask["id"] for i in self.live.values()}
            rows = [dict(o) for o in self.offers if o["id"] not in taken]
        for row in rows:
            row["is_bid"] = bid
            row["dph_total"] = (row["min_bid"] if bid else row["dph_base"]) + row["storage_cost"] * storage / MONTH_H
        tests = {k: v for k, v in query.items() if isinstance(v, dict)}
        rows = [r for r in rows if all(_passes(r.get(k), op, v) for k, t in tests.items() for op, v in t.items())]
        for name, direction in reversed(query.get("order") or []):
            rows.sort(key=lambda r: (r.get(name) is None, r.get(name) or 0), reverse=direction == "desc")
        return rows[: int(query.get("limit") or 64)]

    def create(
        self, ask_id: int, body: dict[str, Any], *, stuck: bool = False, shared: bool = False
    ) -> Instance | None:
        """None where the ask is not to be had. shared: somebody else got the same machine, so this never boots."""
        with self.lock:
            ask = next((o for o in self.offers if o["id"] == ask_id), None)
            if ask is None or any(i.ask["id"] == ask_id for i in self.live.values()):
                return None
            one = Instance(self.next_id, ask, body.get("label"), float(body.get("disk") or 10), body.get("price"),
                           {str(k): str(v) for k, v in (body.get("env") or {}).items()}, body.get("onstart") or "", self.now(),
                           stuck=stuck or shared)  # fmt: skip
            if one.bid is not None and one.bid < ask["min_bid"]:
                one.status, one.stuck = "stopped", True  # too low a bid: there, billing for its disk, never started
            self.next_id += 1
            self.live[one.id] = one
            return one

    def destroy(self, instance: int, by: str) -> bool:
        with self.lock:
            one = self.live.pop(instance, None)
            if one is None:
                return False
            self._set(one, "destroyed")
            one.destroyed, one.ended_by = self.now(), by
            self.dead.append(one)
        if one.ssh:
            self.hosts.stop(instance)
        return True

    def stop(self, instance: int) -> bool:
        """As when outbid: the GPU is taken away, the disk is kept and billed."""
        with self.lock:
            one = self.live.get(instance)
            if one is None:
                return False
            self._set(one, "stopped")
            one.stuck, ssh, one.ssh = True, one.ssh, None
        if ssh:
            self.hosts.stop(instance)
        return True

    def row(self, one: Instance) -> dict[str, Any]:
        """As the listing shows it. The proxy address leads nowhere here, so that mixing the two addresses is noticed."""
        host, port = one.ssh or (None, None)
        return {
            "id": one.id, "machine_id": one.ask["machine_id"], "host_id": one.ask["host_id"], "actual_status": one.status,
            "intended_status": "running", "cur_state": "running", "next_state": "running", "status_msg": "", "label": one.label,
            "public_ipaddr": host, "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(port)}]} if one.ssh else {},
            "ssh_host": "192.0.2.9", "ssh_port": 30000 + one.id % 1000, "gpu_name": one.ask["gpu_name"], "num_gpus": one.ask["num_gpus"],
            "gpu_ram": one.ask["gpu_ram"], "dph_total": one.dph + one.ask["storage_cost"] * one.disk / MONTH_H, "dph_base": one.dph,
            "storage_total_cost": one.ask["storage_cost"] * one.disk / MONTH_H, "disk_space": one.disk, "is_bid": one.bid is not None,
            "inet_down_cost": one.ask["inet_down_cost"], "inet_down": one.ask["inet_down"], "geolocation": one.ask["geolocation"],
            "start_date": one.created if one.status not in (None, "created") else None, "reliability2": one.ask["reliability"],
            "extra_env": [[k, v] for k, v in one.env.items()],
        }  # fmt: skip

    def bill(self) -> list[dict[str, Any]]:
        """One line an instance ever made: seconds with a GPU, dollars for GPU and disk, and who ended it."""
        with self.lock:
            lines = []
            for one in [*self.dead, *self.live.values()]:
                end = one.destroyed or self.now()
                gpu = one.gpu_seconds + (self.now() - one.running_since if one.running_since else 0.0)
                disk = (end - one.created) / 3600 * one.ask["storage_cost"] * one.disk / MONTH_H
                lines.append({
                    "id": one.id, "ask": one.ask["id"], "machine_id": one.ask["machine_id"], "label": one.label, "env": one.env,
                    "created": one.created, "destroyed": one.destroyed, "ended_by": one.ended_by, "gpu_seconds": gpu,
                    "dollars": gpu / 3600 * one.dph + disk, "status": one.status, "key": one.key, "bid": one.bid,
                })  # fmt: skip
            return sorted(lines, key=lambda line: line["id"])

    def close(self) -> None:
        self.closing.set()
        if self.ticker.is_alive():
            self.ticker.join(timeout=5)
        for one in list(self.live):
            self.destroy(one, "closing")

    def _set(self, one: Instance, status: str) -> None:
        if one.running_since is not None:
            one.gpu_seconds += self.now() - one.running_since
        one.running_since = self.now() if status == "running" else None
        one.status = status

    def _tick_forever(self) -> None:
        while not self.closing.wait(0.05):
            self.tick()

    def tick(self) -> None:
        """Let every instance become what it should be by now."""
        for one in list(self.live.values()):
            self._advance(one)

    def _advance(self, one: Instance) -> None:
        age = self.now() - one.created
        if one.status is None:
            one.status = "created"
        if one.status == "created" and age > self.boot_s[0]:
            one.status = "loading"
        if one.status != "loading" or one.stuck or age < sum(self.boot_s):
            return
        ssh = self.hosts.start(
            one.id, one.env | {"CONTAINER_API_KEY": one.key, "CONTAINER_ID": str(one.id)}, one.onstart
        )
        with self.lock:
            if one.id in self.live:
                one.ssh = ssh
                for key in one.keys:
                    self.hosts.authorize(one.id, key)
                if one.status == "loading":  # else it was told something else while its host came up
                    self._set(one, "running")
                return
        self.hosts.stop(one.id)  # destroyed while it booted


def _passes(value: Any, op: str, wanted: Any) -> bool:
    if op in ("in", "notin"):
        return (value in wanted) == (op == "in")
    tests: dict[str, Callable[[Any, Any], bool]] = {
        "eq": lambda a, b: a == b, "neq": lambda a, b: a != b, "gt": lambda a, b: a > b, "gte": lambda a, b: a >= b,
        "lt": lambda a, b: a < b, "lte": lambda a, b: a <= b,
    }  # fmt: skip
    return value is not None and tests[op](value, wanted)
