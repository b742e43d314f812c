"""Pieces of hub files over HTTP: whole and right whatever the server does, or an error that names the file and what to do."""

from __future__ import annotations

import threading
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from local_hub import Fault, LocalHub

from capture import ranges
from capture.errors import CheckpointError
from capture.ranges import Ranges, RemoteFile, Stopped

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
DATA = bytes(range(256)) * 12_000  # 3 MB
NAME = "model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(DATA)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(ranges, "LONGEST_PAUSE_S", 0.002)
    with LocalHub(tmp_path) as made, made.used_here(monkeypatch, tmp_path / "cache"):
        yield made


def file_of(hub: LocalHub, **other: Any) -> RemoteFile:
    sha256 = hub.sha256(hub.files("org/model")[NAME])
    known = {
        "repo": "org/model", "commit": hub.commit("org/model"), "name": NAME, "size": len(DATA), "etag": sha256, "sha256": sha256,
    }  # fmt: skip
    return RemoteFile(**(known | other))


def read(hub: LocalHub, start: int = 1000, stop: int = 2_500_000, **other: Any) -> bytes:
    reader, got = Ranges(), bytearray(stop - start)
    try:
        reader.read(file_of(hub, **other), start, memoryview(got))
    finally:
        reader.close()
    return bytes(got)


@pytest.mark.parametrize(
    "faults",
    [
        [],
        [Fault("cut", after=10, times=20)],  # more often than TRIES, but each time something came
        [Fault("cut", after=0, times=7)],
        [Fault("short")],
        [Fault("status", status=429, headers={"Retry-After": "0"}, times=3), Fault("status", status=503, times=3)],
        [Fault("status", status=403)],
        [Fault("status", where="hub", status=500, times=2), Fault("status", where="hub", status=429)],
        [Fault("status", where="hub", status=429, times=3), Fault("cut", after=700_000), Fault("status", status=502)],
    ],
)
def test_what_comes_is_what_was_asked_for_whatever_goes_wrong(hub: LocalHub, faults: list[Fault]) -> None:
    hub.faults = faults
    assert read(hub) == DATA[1000:2_500_000]
    assert not [f for f in faults if f.times]


def test_a_line_that_is_cut_is_taken_up_where_it_was(hub: LocalHub) -> None:
    hub.faults = [Fault("cut", after=500_000)]
    read(hub)
    assert [r.range for r in hub.seen("content")] == [(1000, 2_499_999), (501_000, 2_499_999)]


def test_a_silent_server_is_asked_again(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "SILENT_S", 0.2)
    hub.faults = [Fault("stall", after=100, seconds=1.0)]
    assert read(hub) == DATA[1000:2_500_000]


def test_an_address_is_asked_for_once_and_renewed_when_it_expires(hub: LocalHub) -> None:
    reader, file, got = Ranges(), file_of(hub), bytearray(100)
    for start in (0, 500, 900):
        reader.read(file, start, memoryview(got))
    assert (reader.resolved, len(hub.seen("hub"))) == (1, 1)
    hub.expire()
    threads = [threading.Thread(target=reader.read, args=(file, 0, memoryview(bytearray(9)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reader.resolved == 2
    reader.close()


def test_the_login_goes_to_the_hub_and_nowhere_else(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    read(hub)
    assert {r.authorization for r in hub.seen("hub")} == {"Bearer hf_secret"}
    assert {r.authorization for r in hub.seen("content")} == {None}


def test_small_files_that_the_hub_serves_itself_are_read_with_the_login(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert read(hub, 0, 2, name="config.json", size=2, etag=None) == b"{}"
    assert read(hub, 1, 2, name="config.json", size=2, etag=None) == b"}"
    assert hub.seen("content") == []


@pytest.mark.parametrize(
    ("faults", "other", "expected"),
    [
        ([Fault("cut", times=99)], {}, r"could not be read in 8 tries: .*; run again, or set weights: download"),
        ([Fault("status", status=403, times=99)], {}, r"could not be read in 8 tries: its address has expired \(403\)"),
        ([Fault("status", status=400)], {}, "answers 400, not 206: it does not serve ranges; set weights: download"),
        ([Fault("whole")], {}, "answers 200, not 206"),
        ([], {"etag": "e", "size": 3}, "the hub now has 3072000 bytes with the tag"),
        ([], {"name": "none.safetensors"}, "'org/model' lacks a file on the hub"),
        ([], {"commit": "f" * 40}, "no revision"),
        ([], {"repo": "org/other"}, "no model 'org/other' on the hub"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_name_and_a_remedy(
    hub: LocalHub, faults: list[Fault], other: dict[str, Any], expected: str
) -> None:
    hub.faults = faults
    with pytest.raises(CheckpointError, match=expected) as caught:
        read(hub, **other)
    assert str(other.get("repo", "org/model")) in str(caught.value)


def test_reading_ends_when_it_is_told_to(hub: LocalHub) -> None:
    hub.bucket.rate = 100_000.0
    reader, ended = Ranges(), []

    def run() -> None:
        try:
            reader.read(file_of(hub), 0, memoryview(bytearray(len(DATA))))
        except Stopped:
            ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    while not hub.seen("content"):
        thread.join(0.01)
    reader.stop.set()
    hub.bucket.rate = None
    thread.join(60)
    assert ended


def test_a_hub_that_asks_for_a_pause_is_left_alone_by_all_connections(hub: LocalHub) -> None:
    hub.faults.append(Fault("status", where="hub", status=429, headers={"Retry-After": "300"}, times=100))
    reader = Ranges()
    for _ in range(3):  # as one thread after the other does
        with pytest.raises(ranges._Again, match="429") as caught:
            reader._address(file_of(hub))
        assert caught.value.after is not None
        assert 200 < caught.value.after <= 300
    assert len(hub.seen("hub", NAME)) == 1
    reader.close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """host:port of a proxy that wants a login, between here and an address that nothing else leads to."""

    class Proxy(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            login = b64decode(self.headers.get("Proxy-Authorization", "").removeprefix("Basic "))
            ok = login == "user:pä:ss@".encode() and self.path == "http://content.invalid/file"
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            self.send_response(206 if ok else 407)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(DATA)}")
            self.send_header("Content-Length", str(last - first + 1 if ok else 0))
            self.end_headers()
            self.wfile.write(DATA[first : last + 1] if ok else b"")

    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(Ranges, "_resolve", lambda *_: ranges._Address("http://content.invalid/file", {}, True))
    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("variable", "scheme"), [("http_proxy", "http://"), ("http_proxy", ""), ("all_proxy", "http://")]
)
def test_a_proxy_is_used_as_the_hubs_library_uses_it(
    proxy: str, variable: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the login that stands in its address, named without a scheme, or for all schemes."""
    monkeypatch.setenv(variable, f"{scheme}user:p%C3%A4:ss%40@{proxy}")
    reader, got = Ranges(), bytearray(1000)
    reader.read(RemoteFile("org/model", "c", NAME, len(DATA), None, None), 500, memoryview(got))
    reader.close()
    assert got == DATA[500:1500]


def test_a_proxy_of_a_kind_that_is_not_known_is_told_at_once(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", f"socks5://{proxy}")
    reader = Ranges()
    with pytest.raises(
        CheckpointError, match=r"'org/model', .*cannot be used .*unsupported scheme socks5.*, or set weights: download"
    ):
        reader.read(RemoteFile("org/model", "c", NAME, len(DATA), None, None), 0, memoryview(bytearray(9)))
    reader.close()
