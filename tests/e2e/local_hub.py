"""A model hub on loopback that speaks the Hugging Face hub's protocol, as slow and as ill as a test asks for.

    python tests/e2e/local_hub.py DIR [--mb-per-s 200] [--url-seconds 3600]    then HF_ENDPOINT=<what it prints>

DIR/<org>/<name>/ holds a repository's files; its commit is made from their names, sizes and contents. Two ports: the hub's,
which answers /api/models/... and /<repo>/resolve/<revision>/<file>, and a content server's, to whose signed addresses large
files are redirected, as the real hub does: these expire, know ranges, and share one bandwidth. Nothing leaves loopback.

    with LocalHub(root, bytes_per_s=50e6) as hub, hub.used_here(monkeypatch, cache):
        hub.faults.append(Fault("cut", part="model-00002", after=1000, times=3))
        ...
        assert hub.seen("content")[0].range == (0, 7)
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PIECE = 256 << 10  # bytes sent at a time
LARGE = 1 << 20  # from here on, and for all weights, files are redirected to the content server


@dataclass
class Fault:
    """What goes wrong, how often, and with what.

    kind: `status` answers with `status` (and `headers`); `cut` closes the connection after `after` bytes of the body;
    `wrong` sends other bytes of the same number; `stall` sends `after` bytes, then nothing for `seconds`; `short` says and
    sends fewer bytes than were asked for; `whole` ignores the range.
    where: hub or content; part: text that the path (on the content server: the file's name) must hold; times: how often.
    """

    kind: str
    where: str = "content"
    part: str = ""
    times: int = 1
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    seconds: float = 1.0


@dataclass(frozen=True)
class Seen:
    """One request, as it came in. where: hub or content; range: first and last byte asked for."""

    where: str
    method: str
    path: str
    name: str
    range: tuple[int, int] | None
    authorization: str | None
    status: int


class Bucket:
    """A bandwidth that all who take from it share. Bytes are given in order of asking."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self.rate, self.lock, self.next = bytes_per_s, threading.Lock(), 0.0

    def take(self, nbytes: int) -> None:
        if self.rate is None:
            return
        with self.lock:
            start = max(self.next, time.monotonic() - 0.02)  # what was not used is lost, but for a moment's worth
            self.next = start + nbytes / self.rate
            wait = self.next - time.monotonic()
        if wait > 0:
            time.sleep(wait)


class LocalHub:
    """See the module. Attributes may be changed while it runs: faults, url_seconds, token (what a login must be), bucket.rate."""

    def __init__(
        self, root: Path, *, bytes_per_s: float | None = None, url_seconds: float = 3600.0, token: str | None = None
    ) -> None:
        self.root, self.url_seconds, self.token = Path(root), url_seconds, token
        self.bucket = Bucket(bytes_per_s)
        self.faults: list[Fault] = []
        self.requests: list[Seen] = []
        self.lock = threading.Lock()
        self.secret = os.urandom(16)
        self.bare = False  # its lists of files say neither sizes nor hashes, as some mirrors' do not
        self.refused_before = 0.0  # addresses signed earlier have expired
        self._sha: dict[tuple[str, int, int], str] = {}
        self.servers = [_Server(self, "hub"), _Server(self, "content")]
        self.url, self.content_url = (f"http://127.0.0.1:{s.server_address[1]}" for s in self.servers)

    def __enter__(self) -> LocalHub:
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()
            server.drop()

    # -- for tests -----------------------------------------------------------------------------------------------------

    def environment(self, home: Path) -> dict[str, str]:
        """What a process of its own needs to use this hub; home: where its cache goes."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": self.token or "",
        }  # fmt: skip

    @contextlib.contextmanager
    def used_here(self, monkeypatch: Any, cache: Path) -> Iterator[None]:
        """Let this process's huggingface_hub, imported already, use this hub and the given cache."""
        from huggingface_hub import constants

        with monkeypatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", self.url)
            patch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
            )
            patch.setattr(constants, "HF_HUB_CACHE", str(cache))
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            patch.setenv("HF_HUB_OFFLINE", "0")
            patch.setenv("HF_TOKEN", self.token or "")
            yield

    def seen(self, where: str, part: str = "") -> list[Seen]:
        """The requests that came to the hub or to the content server, for names that hold `part`."""
        with self.lock:
            return [r for r in self.requests if r.where == where and part in r.name]

    def expire(self) -> None:
        """All signed addresses given out so far stop working now."""
        self.refused_before = time.time()

    def commit(self, repo: str) -> str:
        """The commit of a repository as it is now: 40 hexadecimal digits."""
        sha = hashlib.sha1()
        for name, path in self.files(repo).items():
            sha.update(f"{name} {self.sha256(path)}\n".encode())
        return sha.hexdigest()

    # -- what is there -------------------------------------------------------------------------------------------------

    def files(self, repo: str) -> dict[str, Path]:
        folder = self.root / repo
        found = sorted(p for p in folder.rglob("*") if p.is_file()) if (folder / "config.json").exists() else []
        return {p.relative_to(folder).as_posix(): p for p in found}

    def sha256(self, path: Path) -> str:
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        if key not in self._sha:
            with path.open("rb") as stream:
                self._sha[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._sha[key]

    def is_large(self, path: Path) -> bool:
        return path.suffix in (".safetensors", ".bin") or path.stat().st_size >= LARGE

    def etag(self, path: Path) -> str:
        return self.sha256(path) if self.is_large(path) else hashlib.sha1(path.read_bytes()).hexdigest()

    def signed(self, repo: str, name: str) -> str:
        made, until = f"{time.time():.6f}", f"{time.time() + self.url_seconds:.6f}"
        return (
            f"{self.content_url}/{repo}/{name}?made={made}&until={until}&signature={self.sign(repo, name, made, until)}"
        )

    def sign(self, *parts: str) -> str:
        return hmac.new(self.secret, "\n".join(parts).encode(), "sha256").hexdigest()

    def fault(self, where: str, name: str) -> Fault | None:
        """The first fault that fits, which then has one time less."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.where == where and fault.part in name:
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: LocalHub, where: str) -> None:
        self.hub, self.where = hub, where
        self.sockets: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.sockets.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.sockets.discard(request)
        super().shutdown_request(request)

    def drop(self) -> None:
        """Close what clients keep open."""
        for connection in list(self.sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # a head is one packet

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        split = urlsplit(self.path)
        self.at, self.query = unquote(split.path), {k: v[0] for k, v in parse_qs(split.query).items()}
        self.fault = self.server.hub.fault(self.server.where, self.at)
        if self.fault is not None and self.fault.kind == "status":
            return self._send(self.fault.status, b'{"error": "as the test asked for"}', self.fault.headers)
        return (self._hub if self.server.where == "hub" else self._content)()

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self._note(status)
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def _note(self, status: int) -> None:
        seen = Seen(
            self.server.where, self.command, self.at, self.at.rpartition("/")[2], self._range(),
            self.headers.get("Authorization"), status,
        )  # fmt: skip
        with self.server.hub.lock:
            self.server.hub.requests.append(seen)

    def _range(self) -> tuple[int, int] | None:
        asked = self.headers.get("Range", "")
        first, _, last = asked.removeprefix("bytes=").partition("-")
        return (int(first), int(last or 1 << 62)) if asked.startswith("bytes=") and first.isdigit() else None

    # -- the hub -------------------------------------------------------------------------------------------------------

    def _hub(self) -> None:
        hub, parts = self.server.hub, self.at.strip("/").split("/")
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._error(401, "GatedRepo", "log in")
        if parts[:2] == ["api", "models"]:
            for size in (2, 1):
                if hub.files(repo := "/".join(parts[2 : 2 + size])):
                    return self._api(repo, parts[2 + size :])
            return self._error(404, "RepoNotFound", "Repository not found")
        if "resolve" not in parts:
            return self._error(404, "EntryNotFound", "nothing is there")
        where = parts.index("resolve")
        repo, revision, name = "/".join(parts[:where]), parts[where + 1], "/".join(parts[where + 2 :])
        files = hub.files(repo)
        if not files:
            return self._error(404, "RepoNotFound", "Repository not found")
        commit = hub.commit(repo)
        if revision not in ("main", commit):
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name not in files:
            return self._error(404, "EntryNotFound", f"{name} is not in {repo}")
        path = files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hub.etag(path)}"', "Accept-Ranges": "bytes"}
        if hub.is_large(path):
            linked = {"X-Linked-Etag": f'"{hub.etag(path)}"', "X-Linked-Size": str(path.stat().st_size)}
            return self._send(302, b"", headers | linked | {"Location": hub.signed(repo, name)})
        return self._file(path, headers)

    def _api(self, repo: str, rest: list[str]) -> None:
        hub = self.server.hub
        commit = hub.commit(repo)
        if len(rest) > 1 and rest[1] not in ("main", commit):
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
        files = hub.files(repo).items()
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": hub.etag(p)[:40]}
                | ({"lfs": {"oid": hub.sha256(p), "size": p.stat().st_size, "pointerSize": 134}} if hub.is_large(p) else {})
                for n, p in files
            ]  # fmt: skip
            return self._json(tree)
        siblings = [
            {"rfilename": n} | (self._blob(p) if self.query.get("blobs") and not hub.bare else {}) for n, p in files
        ]
        return self._json({"_id": "0", "id": repo, "modelId": repo, "sha": commit, "private": False, "gated": False, "tags": [],
                           "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip

    def _blob(self, path: Path) -> dict[str, Any]:
        hub, size = self.server.hub, path.stat().st_size
        blob: dict[str, Any] = {"size": size, "blobId": hub.etag(path)[:40]}
        if hub.is_large(path):
            blob["lfs"] = {"sha256": hub.sha256(path), "size": size, "pointerSize": 134}
        return blob

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, text: str) -> None:
        self._send(status, json.dumps({"error": text}).encode(), {"X-Error-Code": code, "X-Error-Message": text})

    # -- the content server --------------------------------------------------------------------------------------------

    def _content(self) -> None:
        hub, query = self.server.hub, self.query
        repo, _, name = self.at.strip("/").partition("/")
        files: dict[str, Path] = {}
        for _ in range(2):
            if files := hub.files(repo):
                break
            more, _, name = name.partition("/")
            repo = f"{repo}/{more}"
        made, until = query.get("made", "0"), query.get("until", "0")
        good = hmac.compare_digest(query.get("signature", ""), hub.sign(repo, name, made, until))
        if name not in files or not good or float(until) < time.time() or float(made) < hub.refused_before:
            return self._send(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        return self._file(files[name], {"ETag": f'"{hub.etag(files[name])}"', "Accept-Ranges": "bytes"})

    def _file(self, path: Path, headers: dict[str, str]) -> None:
        size, asked, fault = path.stat().st_size, self._range(), self.fault
        kind = fault.kind if fault is not None else ""
        first, last = asked if asked and kind != "whole" else (0, size - 1)
        last = min(last, size - 1)
        if asked and first >= size:
            return self._send(416, b"", {"Content-Range": f"bytes */{size}"})
        if kind == "short":
            last = max(first, last - 1)
        self._note(206 if asked and kind != "whole" else 200)
        self.send_response(206 if asked and kind != "whole" else 200)
        if asked and kind != "whole":
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{size}"}
        for key, value in (headers | {"Content-Length": str(last - first + 1)}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.flush()
        return None if self.command == "HEAD" else self._body(path, first, last - first + 1, fault)

    def _body(self, path: Path, first: int, nbytes: int, fault: Fault | None) -> None:
        kind, sent = (fault.kind if fault is not None else ""), 0
        bucket, out = self.server.hub.bucket, self.connection.fileno()
        with path.open("rb") as stream:
            while sent < nbytes:
                piece = min(PIECE, nbytes - sent)
                if fault is not None and kind in ("cut", "stall"):
                    piece = min(piece, max(0, fault.after - sent))
                if fault is not None and piece == 0:
                    if kind == "stall":
                        time.sleep(fault.seconds)
                    self.close_connection = True
                    return
                bucket.take(piece)
                if kind == "wrong":
                    stream.seek(first + sent)
                    self.wfile.write(bytes(b ^ 0x55 for b in stream.read(piece)))
                    self.wfile.flush()
                    sent += piece
                else:
                    sent += os.sendfile(out, stream.fileno(), first + sent, piece)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of <org>/<name>/ repositories")
    parser.add_argument("--mb-per-s", type=float, default=None, help="bandwidth of all answers together (default: any)")
    parser.add_argument("--url-seconds", type=float, default=3600.0, help="how long signed addresses work")
    args = parser.parse_args()
    rate = None if args.mb_per_s is None else args.mb_per_s * 1e6
    with LocalHub(args.root, bytes_per_s=rate, url_seconds=args.url_seconds) as hub:
        for repo in sorted(p.parent.relative_to(args.root).as_posix() for p in args.root.glob("*/*/config.json")):
            hub.commit(repo)  # hashes everything once, before anybody waits for it
        print(hub.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()
