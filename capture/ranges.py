"""Pieces of a hub file over HTTP: resolved once, renewed when the address expires, tried again when the line or the hub fails.

The hub redirects a large file to a signed address on another host, which works for some minutes. That address is asked for
with huggingface_hub's own functions, so that HF_ENDPOINT and the login are heeded; the login goes to the hub and nowhere else.
The bytes come by urllib3, into the memory that they are wanted in.
"""

from __future__ import annotations

import logging
import os
import random
import re
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import certifi
import urllib3

from capture.errors import CheckpointError, HubUnreachableError
from capture.printable import without_logins

log = logging.getLogger(__name__)

CONNECTIONS = 16  # at a time: one stream of a content network seldom fills a fast line
TRIES = 8  # without a single new byte
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
LONGEST_ASKED_S = 300.0  # the hub's rate limits are counted over five minutes
CONNECT_S, SILENT_S = 15.0, 30.0  # an answer that stops for so long is asked for anew
PIECE = 1 << 20  # bytes between two looks at `stop`
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_GONE = frozenset({401, 403, 404, 410})  # of a signed address: it has expired


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository at a commit. etag: the hub's name of its content: the SHA-256 of a large file (LFS), else the
    SHA-1 that git gives it; sha256: of a large file."""

    repo: str
    commit: str
    name: str
    size: int
    etag: str | None
    sha256: str | None

    def __str__(self) -> str:
        return f"'{self.repo}', '{self.name}'"

    @property
    def has_hash(self) -> bool:
        """Whether what comes of it can be held against a hash; a mirror's own tags are none."""
        return self.sha256 is not None or re.fullmatch("[0-9a-f]{40}", self.etag or "") is not None


@dataclass(frozen=True)
class _Address:
    url: str
    headers: dict[str, str]
    signed: bool  # another host than the hub's


class Stopped(Exception):
    """The reading was given up."""


class _Again(Exception):
    """It may go well the next time. after: seconds that the server asked for."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


class _Expired(_Again):
    """The signed address does not work any more."""


class Ranges:
    """Reads pieces of files; safe from several threads. stop: an event that ends all reading."""

    def __init__(self, token: str | bool | None = None) -> None:
        self.token, self.stop = token, threading.Event()
        self.resolved = 0  # addresses asked for
        self._lock = threading.Lock()
        self._asking: dict[RemoteFile, threading.Lock] = {}
        self._addresses: dict[RemoteFile, _Address] = {}
        self._held: tuple[float, str] = (0.0, "")  # until when the hub asked not to be asked, and what it said
        self._pools: dict[str | None, urllib3.PoolManager] = {}

    def read(self, file: RemoteFile, start: int, view: memoryview) -> None:
        """Fill `view` with the file's bytes from `start` on.

        Raises HubUnreachableError once TRIES tries in a row brought nothing; CheckpointError where the hub refuses; Stopped.
        """
        got = failures = 0
        while got < len(view):
            if self.stop.is_set():
                raise Stopped
            before = got
            address: _Address | None = None
            try:
                address = self._address(file)
                for n in self._pieces(address, file, start + got, view[got:]):
                    got += n
                continue
            except _Expired as error:
                assert address is not None
                self._forget(file, address)
                why: _Again = error
            except _Again as error:
                why = error
            failures = 1 if got > before else failures + 1
            if failures >= TRIES:
                raise HubUnreachableError(
                    f"{file}: bytes {start} to {start + len(view) - 1} could not be read in {TRIES} tries: {why}; run again, "
                    "or set weights: download"
                )
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (failures - 1)) * random.uniform(0.7, 1.3)
            if isinstance(why, _Expired) and failures == 1:
                pause = 0.0
            pause = max(pause, min(why.after or 0.0, LONGEST_ASKED_S))
            log.log(logging.INFO if failures < 3 else logging.WARNING, "%s: %s; again in %.1f s", file, why, pause)
            self.stop.wait(pause)

    def close(self) -> None:
        self.stop.set()
        with self._lock:
            for pool in self._pools.values():
                pool.clear()

    # -- addresses -----------------------------------------------------------------------------------------------------

    def _address(self, file: RemoteFile) -> _Address:
        with self._lock:
            asking = self._asking.setdefault(file, threading.Lock())
        with asking:  # one thread asks, the others wait for its answer
            if file not in self._addresses:
                until, why = self._held
                if (left := until - time.monotonic()) > 0:
                    raise _Again(why, left)
                try:
                    self._addresses[file] = self._resolve(file)
                except _Again as error:
                    self._held = (time.monotonic() + min(error.after or 0.0, LONGEST_ASKED_S), str(error))
                    raise
            return self._addresses[file]

    def _forget(self, file: RemoteFile, address: _Address) -> None:
        """An address that has expired; one that another thread renewed meanwhile stays."""
        with self._lock:
            if self._addresses.get(file) is address:
                del self._addresses[file]

    def _resolve(self, file: RemoteFile) -> _Address:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError
        from huggingface_hub.utils import build_hf_headers

        from capture.hub import hub_error

        url = hf_hub_url(file.repo, file.name, revision=file.commit)
        self.resolved += 1
        try:
            found = get_hf_file_metadata(url, token=self.token, timeout=CONNECT_S)
        except HfHubHTTPError as error:
            answer = getattr(error, "response", None)
            if answer is not None and answer.status_code in _BUSY:
                raise _Again(f"the hub answers {answer.status_code}", _retry_after(answer.headers)) from error
            raise hub_error(file.repo, file.commit, error) from error
        except EntryNotFoundError as error:
            raise hub_error(file.repo, file.commit, error) from error
        except (OSError, HTTPError) as error:
            raise _Again(f"the hub cannot be reached: {_one_line(error)}") from error
        if found.size not in (None, file.size) or (file.etag and found.etag not in (None, file.etag)):
            raise CheckpointError(
                f"{file}: the hub now has {found.size} bytes with the tag {found.etag}, it said {file.size} and {file.etag} before"
            )
        signed = urlsplit(found.location).netloc != urlsplit(url).netloc
        headers = build_hf_headers(token=False if signed else self.token)
        return _Address(found.location, headers | {"Accept-Encoding": "identity"}, signed)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _pieces(self, address: _Address, file: RemoteFile, start: int, view: memoryview) -> Any:
        """One request; the number of bytes of every piece, once it is in its place."""
        asked = {"Range": f"bytes={start}-{start + len(view) - 1}"}
        try:
            answer = self._pool(address.url).request(
                "GET",
                address.url,
                headers=address.headers | asked,
                preload_content=False,
                redirect=False,
                retries=False,
            )
        except urllib3.exceptions.LocationValueError as error:  # it would be the same the next time
            raise CheckpointError(
                f"{file}: its address or the proxy that the environment names for it cannot be used ({_one_line(error)}); mend "
                "HTTPS_PROXY or ALL_PROXY, or set weights: download"
            ) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _Again(_one_line(error)) from error
        got = 0
        try:
            _check(answer, address, file, start, len(view))
            while got < len(view):
                if self.stop.is_set():
                    raise Stopped
                piece = answer.read1(min(PIECE, len(view) - got))  # read() would forget what came before a cut
                if not piece:
                    raise _Again(f"the line was cut after {got} of {len(view)} bytes")
                view[got : got + len(piece)] = piece
                got += len(piece)
                yield len(piece)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _Again(_one_line(error)) from error
        finally:
            if got < len(view):
                answer.close()  # what is still on its way is of no use
            answer.release_conn()

    def _pool(self, url: str) -> urllib3.PoolManager:
        proxy = _proxy_for(url)
        with self._lock:
            if proxy not in self._pools:
                trusted = os.environ.get("SSL_CERT_FILE") or os.environ.get("REQUESTS_CA_BUNDLE") or certifi.where()
                options: dict[str, Any] = {
                    "maxsize": CONNECTIONS, "timeout": urllib3.Timeout(connect=CONNECT_S, read=SILENT_S),
                    "ssl_context": ssl.create_default_context(cafile=trusted),
                }  # fmt: skip
                make: Callable[..., urllib3.PoolManager] = urllib3.PoolManager
                if proxy is not None:
                    make, options = (
                        urllib3.ProxyManager,
                        options | {"proxy_url": proxy, "proxy_headers": _login_at(proxy)},
                    )
                self._pools[proxy] = make(**options)
            return self._pools[proxy]


def _proxy_for(url: str) -> str | None:
    """The proxy that the environment names for an address, read as the hub's library reads it."""
    split, named = urlsplit(url), getproxies()
    found = None if proxy_bypass(split.hostname or "") else named.get(split.scheme) or named.get("all")
    return found if not found or "://" in found else f"http://{found}"


def _login_at(proxy: str) -> dict[str, str]:
    """urllib3 does not send the login that stands in a proxy's address by itself."""
    login = urllib3.util.parse_url(proxy).auth
    return {"Proxy-Authorization": f"Basic {b64encode(unquote(login).encode()).decode()}"} if login else {}


def _check(answer: Any, address: _Address, file: RemoteFile, start: int, nbytes: int) -> None:
    """Raise unless the answer is the range that was asked for."""
    status = answer.status
    if status in _BUSY:
        raise _Again(f"the server answers {status}", _retry_after(answer.headers))
    if status in _GONE or 300 <= status < 400:
        if address.signed or 300 <= status < 400:
            raise _Expired(f"its address has expired ({status})")
        raise CheckpointError(
            f"{file}: the hub answers {status}; log in with `hf auth login`, or set weights: download"
        )
    if status == 200 and start == 0 and nbytes == file.size:
        return
    if status != 206:
        raise CheckpointError(
            f"{file}: asked for bytes {start} to {start + nbytes - 1} the server answers {status}, not 206: it does not serve "
            "ranges; set weights: download"
        )
    first, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").replace("/", "-").partition("-")
    if first != str(start) or total.rpartition("-")[2] not in (str(file.size), "*"):
        raise CheckpointError(
            f"{file}: asked for bytes from {start} of {file.size} the server sends {answer.headers.get('Content-Range')!r}; set "
            "weights: download"
        )


def _retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait, where it says them as a number."""
    try:
        return max(0.0, float(headers.get("Retry-After")))
    except (TypeError, ValueError):
        return None


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {without_logins(' '.join(str(error).split()))[:200]}"
