"""The look at a host's listeners finds what is open: else the rehearsal's 'nothing is open' would say nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import doors
import pytest

TOKEN = "the-token"


class Served(BaseHTTPRequestHandler):
    """A job API that asks for the token, or does not."""

    open_to_all = False

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        status = 404
        if self.path == "/api/jobs/":
            right = self.open_to_all or given == f"Bearer {TOKEN}"
            status = 200 if right else 403 if given else 401
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def look(port: int, address: str = "127.0.0.1", process: str = "ray") -> list[str]:
    row = {"port": port, "addresses": [address], "process": [process], **doors.knock("127.0.0.1", port, TOKEN)}
    worker = {"port": 9, "addresses": ["::"], "process": [process], "grpc": {doors.WORKER: ["UNAUTHENTICATED"] * 2 + ["OK"]}, "http": {}}  # fmt: skip
    return doors.faults([row, worker], {port: "dashboard"}, range(9, 10), set(), 22)


def test_a_listener_is_found_with_its_address_and_process(port: int) -> None:
    addresses, names = doors.listeners()[port]
    assert addresses == {"127.0.0.1"}
    assert "python" in " ".join(names)
    assert not doors.wildcard(addresses)
    assert doors.wildcard(["::"])
    assert doors.wildcard(["0.0.0.0"])


def test_an_endpoint_that_asks_for_the_token_is_closed_and_one_that_does_not_is_named(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert look(port) == []
    monkeypatch.setattr(Served, "open_to_all", True)
    said = look(port)
    assert len(said) == 2, "to read jobs, and to make them"
    assert "GET /api/jobs/ answers ['200', '200', '200']" in said[0]


def test_what_nobody_expects_or_is_not_where_it_belongs_is_named(port: int) -> None:
    assert "the dashboard is not on loopback only" in " ".join(look(port, address="::"))
    said = doors.faults([{"port": 9999, "addresses": ["0.0.0.0"], "process": ["nc"], "grpc": {}, "http": {}}], {port: "GCS"}, range(9, 10), set(), 22)  # fmt: skip
    assert said == [
        f"{port}: no GCS was found there",
        "no worker's port was found",
        "9999: nobody said that nc listens there, on 0.0.0.0",
    ]
