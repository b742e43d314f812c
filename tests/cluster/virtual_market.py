"""The fake Vast inside this process, with a clock that tests move: hours of renting in a second."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from fake_desk import Desk, NoReply
from fake_market import Market, offer

from cluster.vast import deadman, fleet, money, rent, state
from cluster.vast.api import Vast


class Clock:
    """Seconds since 1970, as it says. Whoever sleeps moves it; `watch` is called on the way, every five seconds."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.watch: Callable[[], None] = lambda: None

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(self.now + 5.0, until)
            self.watch()


class Doors:
    """What answers at an instance's ssh port: nothing but a name in a set."""

    def __init__(self) -> None:
        self.open: set[tuple[str, int]] = set()

    def start(self, instance: int, env: dict[str, str], onstart: str) -> tuple[str, int]:
        self.open.add(("192.0.2.1", instance % 60_000 + 1000))
        return "192.0.2.1", instance % 60_000 + 1000

    def authorize(self, instance: int, key: str) -> None:
        pass

    def stop(self, instance: int) -> None:
        self.open.discard(("192.0.2.1", instance % 60_000 + 1000))


class World:
    """A market, its desk and a clock. vast(): a client whose requests end here."""

    def __init__(self, patch: pytest.MonkeyPatch, offers: int, boot_s: tuple[float, float]) -> None:
        self.clock, self.doors = Clock(), Doors()
        self.market = Market([offer(n) for n in range(offers)], self.doors, boot_s, now=self.clock.time, live=False)
        self.desk = Desk(self.market)
        self.clock.watch = self.market.tick
        time = types.SimpleNamespace(time=self.clock.time, monotonic=self.clock.time, sleep=self.clock.sleep)
        for module in (fleet, money, rent, state, deadman):
            patch.setattr(module, "time", time)
        patch.setattr(fleet, "greets", lambda address: address in self.doors.open)

    def vast(self) -> Vast:
        vast = Vast("full-rights", "http://vast", sleep=self.clock.sleep)
        vast.sdk.client._request = self._request
        return vast

    def _request(
        self, method: str, url: str, headers: dict[str, str], json_data: Any = None, timeout: Any = None
    ) -> Any:
        parts = urlsplit(url)
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        key = headers["Authorization"].removeprefix("Bearer ")
        body = json.loads(json.dumps(json_data))
        try:
            status, data = self.desk.handle(method, parts.path, query, key, body)
        except NoReply:
            raise requests.ConnectionError("no reply") from None
        response = requests.Response()
        response.status_code, response._content, response.url = status, data, url
        return response
