"""An object store that speaks as much of S3 as Arrow does: objects in memory, a log of all calls, faults on order.

    with running_store() as store: RunDir(store.uri("run"))

Path-style addresses, one key pair (KEY, SECRET; requests are signed, and for the path that comes), single and multipart uploads that
are there whole or not at all, ranges, listings by page. What comes in is held against the checksum that comes with it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import re
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

KEY, SECRET, BUCKET = "a-key", "a-secret", "results"
MOST_KEYS = 5  # a page of a listing; S3 has 1000
ERRORS = {
    403: "AccessDenied",
    404: "NoSuchKey",
    429: "SlowDown",
    500: "InternalError",
    503: "SlowDown",
}


@dataclass
class Fault:
    """Calls whose line (`PUT results/run/x.parquet?partNumber=1`) matches go wrong, `times` times after `after` good ones.

    kind: a status, or `drop` (the line breaks), `hang` (no answer for hang_s), `half` (half of an object, then the line breaks).
    """

    pattern: str
    kind: str
    times: int = 1_000_000
    after: int = 0


@dataclass
class Store:
    """What is kept, and what was asked. objects: key -> bytes, of the one bucket."""

    address: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    hang_s: float = 30.0
    lock: threading.RLock = field(default_factory=threading.RLock)

    def uri(self, path: str, bucket: str = BUCKET) -> str:
        """The run directory at `path`, as a person writes it."""
        return f"s3://{bucket}/{path}?endpoint_override={self.address}&scheme=http&region=us-east-1"

    def fault(self, pattern: str, kind: int | str, times: int = 1_000_000, after: int = 0) -> None:
        with self.lock:
            self.faults.append(Fault(pattern, str(kind), times, after))

    def made(self) -> list[str]:
        """Keys in the order in which they came to be there, from the log of calls."""
        done = [c for c in self.calls if c.startswith("stored ")]
        return [c.removeprefix("stored ") for c in done]

    def due(self, line: str) -> str | None:
        with self.lock:
            for fault in self.faults:
                if re.search(fault.pattern, line):
                    if fault.after > 0:
                        fault.after -= 1
                    elif fault.times > 0:
                        fault.times -= 1
                        return fault.kind
        return None

    def keep(self, key: str, data: bytes) -> None:
        with self.lock:
            self.objects[key] = data
            self.calls.append(f"stored {key}")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, store: Store) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.store = store
        store.address = f"127.0.0.1:{self.server_address[1]}"


def is_signed(method: str, target: str, headers: dict[str, str]) -> bool:
    """Whether the signature (AWS's version 4) is that of what came: a client that signs another path than it sends is refused."""
    said = dict(re.findall(r"(Credential|SignedHeaders|Signature)=([^, ]+)", headers.get("authorization", "")))
    path, _, query = target.partition("?")
    pairs = sorted(pair if "=" in pair else f"{pair}=" for pair in query.split("&") if pair)
    signed = "".join(f"{name}:{headers.get(name, '')}\n" for name in said["SignedHeaders"].split(";"))
    request = "\n".join(
        [method, path, "&".join(pairs), signed, said["SignedHeaders"], headers.get("x-amz-content-sha256", "")]
    )
    _, *scope = said["Credential"].split("/")
    digest = hashlib.sha256(request.encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", headers.get("x-amz-date", ""), "/".join(scope), digest])
    key = f"AWS4{SECRET}".encode()
    for part in (*scope, text):
        key = hmac.digest(key, part.encode(), "sha256")
    return key.hex() == said["Signature"]


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _serve(self) -> None:
        store = self.server.store
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        body = self._body()
        line = f"{self.command} {bucket}/{key}" + (f"?{url.query}" if url.query else "")
        store.calls.append(line)
        fault = store.due(line)
        if fault == "hang":
            time.sleep(store.hang_s)
        if fault in ("hang", "drop"):
            self.close_connection = True
            return
        if fault and fault.isdigit():
            self._error(int(fault))
        elif f"Credential={KEY}/" not in self.headers.get("Authorization", ""):
            self._error(403, "InvalidAccessKeyId")
        elif not is_signed(self.command, self.path, {k.lower(): v.strip() for k, v in self.headers.items()}):
            self._error(403, "SignatureDoesNotMatch")
        elif bucket != BUCKET:
            self._error(404, "NoSuchBucket")
        elif body is None:
            self._error(400, "BadDigest")
        else:
            with store.lock:
                getattr(self, f"_{self.command.lower()}")(key, query, body, fault == "half")

    def _body(self) -> bytes | None:
        """What came, without its wrappings; None where it is not what its checksum says."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b"".join(self._chunks(self.rfile.read))
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        sums = {k.lower(): v for k, v in self.headers.items()}
        if "aws-chunked" in sums.get("content-encoding", ""):
            parts = memoryview(data)
            at = 0

            def take(count: int) -> bytes:
                nonlocal at
                at += count
                return bytes(parts[at - count : at])

            data = b"".join(self._chunks(take, lambda: take(data.index(b"\n", at) + 1 - at)))
            trailer = (line.partition(":") for line in bytes(parts[at:]).decode().splitlines())
            sums |= {name.strip().lower(): value.strip() for name, _, value in trailer if value}
        wanted = {
            "content-md5": lambda: hashlib.md5(data).digest(),
            "x-amz-checksum-crc32": lambda: zlib.crc32(data).to_bytes(4, "big"),
            "x-amz-checksum-sha256": lambda: hashlib.sha256(data).digest(),
        }
        right = all(base64.b64encode(make()).decode() == sums[name] for name, make in wanted.items() if name in sums)
        return data if right else None

    def _chunks(self, read: Any, line: Any = None) -> Iterator[bytes]:
        while size := int((line or self.rfile.readline)().split(b";")[0], 16):
            yield read(size)
            read(2)

    def _put(self, key: str, query: dict[str, str], body: bytes, half: bool) -> None:
        if "uploadId" in query:
            self.server.store.uploads[query["uploadId"]][int(query["partNumber"])] = body
        else:
            self.server.store.keep(key, body)
        self._reply(200, b"", ETag=_tag(body))

    def _post(self, key: str, query: dict[str, str], body: bytes, half: bool) -> None:
        store = self.server.store
        if "delete" in query:
            for name in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                store.objects.pop(name, None)
            self._reply(200, b"<DeleteResult></DeleteResult>")
        elif "uploads" in query:
            id_ = uuid.uuid4().hex
            store.uploads[id_] = {}
            self._reply(200, f"<InitiateMultipartUploadResult><UploadId>{id_}</UploadId></InitiateMultipartUploadResult>".encode())  # fmt: skip
        else:
            parts = store.uploads.pop(query["uploadId"], None)
            if parts is None:
                self._error(404, "NoSuchUpload")
                return
            named = [int(n) for n in re.findall(r"<PartNumber>(\d+)</PartNumber>", body.decode())]
            data = b"".join(parts[n] for n in named)
            store.keep(key, data)
            tag = escape(_tag(data))
            self._reply(200, f"<CompleteMultipartUploadResult><ETag>{tag}</ETag></CompleteMultipartUploadResult>".encode())  # fmt: skip

    def _delete(self, key: str, query: dict[str, str], body: bytes, half: bool) -> None:
        store = self.server.store
        if "uploadId" in query:
            store.uploads.pop(query["uploadId"], None)
        else:
            store.objects.pop(key, None)
        self._reply(204, b"")

    def _head(self, key: str, query: dict[str, str], body: bytes, half: bool) -> None:
        if not key:
            self._reply(200, b"")
        elif key in self.server.store.objects:
            self._object(self.server.store.objects[key], half)
        else:
            self._error(404)

    def _get(self, key: str, query: dict[str, str], body: bytes, half: bool) -> None:
        if not key:
            self._list(query)
        elif key in self.server.store.objects:
            self._object(self.server.store.objects[key], half)
        else:
            self._error(404)

    def _object(self, data: bytes, half: bool) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        more = {}
        part = data
        if found:
            first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            part = data[first : last + 1]
            more["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._reply(206 if found else 200, part, half=half, ETag=_tag(data), **more)

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        after, most = query.get("continuation-token", ""), min(MOST_KEYS, int(query.get("max-keys", MOST_KEYS)))
        seen: dict[str, str] = {}  # what the listing names, in order -> its XML
        for key in sorted(k for k in self.server.store.objects if k.startswith(prefix)):
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                name = prefix + rest.partition(delimiter)[0] + delimiter
                seen[name] = f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            else:
                size = len(self.server.store.objects[key])
                seen[key] = (
                    f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size>"
                    "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                )
        left = [name for name in seen if name > after]
        page = left[:most]
        more = len(left) > len(page)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        text = "".join(seen[name] for name in page)
        count = f"<KeyCount>{len(page)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>"
        self._reply(200, f"<ListBucketResult>{count}{token}{text}</ListBucketResult>".encode())

    def _error(self, status: int, code: str = "") -> None:
        code = code or ERRORS.get(status, "InternalError")
        self._reply(status, f"<Error><Code>{code}</Code><Message>{code} of the fake</Message></Error>".encode())

    def _reply(self, status: int, data: bytes, half: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if half else data)
        if half:
            self.close_connection = True


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@contextlib.contextmanager
def running_store() -> Iterator[Store]:
    store = Store()
    server = Server(store)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
