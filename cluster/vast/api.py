"""The calls to Vast that we use, through its own SDK, with a back-off of our own and replies that are checked.

The SDK is told not to retry: after a 503 it would send `create` again and rent twice. Every failure comes out as one of
cluster.vast.errors; none of these functions ever answers a failed call with an empty list.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from cluster.vast.errors import VastBusyError, VastKeyError, VastRefusedError
from cluster.vast.rows import as_instance, is_offer

T = TypeVar("T")

TIMEOUT_S = 30
FIRST_PAUSE_S = 1.0  # doubles with every try; Vast sends no Retry-After
LONGEST_PAUSE_S = 15.0
PAGE = 25  # the listing's largest page

KEY_HELP = (
    "make one at cloud.vast.ai/manage-keys with instance_read, instance_write, misc, user_read and user_write, then set "
    "VAST_API_KEY or run `vastai set api-key`"
)


class Vast:
    """One account. url: another server than Vast's own; `sleep` is for tests."""

    def __init__(
        self, key: str | None = None, url: str | None = None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        try:
            from vastai.sdk import VastAI
        except ImportError as error:
            raise VastKeyError(
                f"renting on Vast needs the package vastai: pip install 'pairscope[vast]' ({error})"
            ) from error
        try:
            self.sdk = VastAI(api_key=key, server_url=url.rstrip("/") if url else None, retry=1)
        except RuntimeError as error:
            raise VastKeyError(f"no Vast API key found; {KEY_HELP}") from error
        self.sdk.client.timeout = TIMEOUT_S
        self.key = self.sdk.client.api_key = _clean(self.sdk.client.api_key)
        self.url: str = self.sdk.client.server_url
        self.sleep = sleep

    def search(self, query: dict[str, Any], *, bid: bool, disk_gb: float) -> list[dict[str, Any]]:
        """Offers that pass `query` ({field: {op: value}}; nothing is added to it), priced with disk_gb of storage, cheapest first."""
        offers = self._call(
            "search offers",
            lambda: self.sdk.search_offers(
                dict(query),
                type="bid" if bid else "on-demand",
                order="dph_total",
                limit=1000,
                storage=disk_gb,
                no_default=True,
            ),
        )
        return [row for row in _rows(offers, "search offers") if is_offer(row, bid)]

    def create(self, offer: int, **fields: Any) -> int:
        """Rent an offer and return the instance's id. Sent again only after a 429, which Vast sends before it acts.

        VastBusyError with done=True: it may or may not have been rented; look for the label.
        """
        reply = self._call(
            "create instance",
            lambda: self.sdk.create_instance(offer, cancel_unavail=True, **fields),
            again=lambda error: not error.done,
        )
        if isinstance(reply, dict) and reply.get("success") is False:
            raise VastRefusedError(f"Vast did not rent offer {offer}: {_message(reply)}", status=200)
        if not isinstance(reply, dict) or not isinstance(reply.get("new_contract"), int):
            raise VastBusyError(f"create instance: a reply without a contract: {_shape(reply)}")
        return int(reply["new_contract"])

    def instances(self) -> list[dict[str, Any]]:
        """Everything the account has rented, whole pages only. Raises rather than return part of it."""
        rows: dict[int, dict[str, Any]] = {}
        token: str | None = None
        while True:
            params = {"select_filters": {}, "order_by": [{"col": "id", "dir": "asc"}], "limit": PAGE}
            if token:
                params["after_token"] = token
            page = self._call("list instances", lambda p=params: _listing(self.sdk.show_instances_v1(p)), tries=3)  # type: ignore[misc]
            rows |= {row["id"]: as_instance(row) for row in page["instances"]}
            following = page.get("next_token")
            if not following:
                return list(rows.values())
            if following == token:
                raise VastBusyError("list instances: the same page came twice")
            token = following

    def instance(self, number: int) -> dict[str, Any] | None:
        """One instance, or None where Vast says that there is no such one."""

        def get() -> dict[str, Any] | None:
            response = self.sdk.client.get(f"/instances/{number}/", query_args={"owner": "me"})
            response.raise_for_status()
            reply = response.json()
            row = reply["instances"]  # the SDK's own function fails on a row without start_date
            if row is not None and row["id"] != number:
                raise ValueError(f"asked for {number}, got {row['id']}")
            return None if row is None else as_instance(row)

        try:
            return self._call("show instance", get, tries=3)
        except VastRefusedError as error:
            if error.status == 404:
                return None
            raise

    def clock_ahead(self) -> float:
        """Seconds by which this machine's clock is ahead of Vast's, by the date of a reply; 0 where that says none."""

        def get() -> float:
            date = self.sdk.client.get("/instances/0/", query_args={"owner": "me"}).headers.get("Date")
            return time.time() - parsedate_to_datetime(date).timestamp() if date else 0.0

        return self._call("ask for the time", get, tries=3)

    def destroy(self, number: int) -> bool:
        """Ask for an instance's end; False where Vast knows no such one, which is no error. Whether it is gone must be looked up."""
        try:
            self._call("destroy instance", lambda: self.sdk.destroy_instance(number))
        except VastRefusedError as error:
            if error.status != 404:
                raise
            return False
        return True

    def attach_key(self, number: int, public_key: str) -> None:
        """Let an ssh public key into an instance; Vast keeps it there."""
        reply = self._call("attach ssh key", lambda: self.sdk.attach_ssh(number, public_key))
        if not isinstance(reply, dict) or reply.get("success") is not False:
            return
        if "already" not in _message(reply):  # which a try before it did, whose reply was lost
            raise VastRefusedError(
                f"attach ssh key: Vast did not let it into instance {number}: {_message(reply)}", status=200
            )

    def create_key(self, name: str, rights: dict[str, Any]) -> tuple[int, str]:
        """A new API key of the account, as (id, key). rights: Vast's permissions, {"api": {category: {}}}.

        Like create, sent again only after a 429; where the reply is lost a key may be left over: see keys_named.
        """
        reply = self._call(
            "create API key",
            lambda: self.sdk.create_api_key(name, rights),
            again=lambda error: not error.done,
        )
        if not isinstance(reply, dict) or not isinstance(reply.get("id"), int) or not reply.get("key"):
            raise VastBusyError("create API key: a reply without a key")  # its text may hold one, so it is not shown
        return reply["id"], str(reply["key"])

    def keys_named(self, name: str) -> list[int]:
        """Ids of the account's API keys of this name."""
        rows = _rows(self._call("list API keys", self.sdk.show_api_keys), "list API keys")
        return [row["id"] for row in rows if row.get("name") == name]

    def delete_key(self, number: int) -> None:
        """Delete an API key of the account; one that is not there is no error."""
        try:
            self._call("delete API key", lambda: self.sdk.delete_api_key(number))
        except VastRefusedError as error:
            if error.status != 404:
                raise

    def _call(
        self, what: str, send: Callable[[], T], tries: int = 5, again: Callable[[VastBusyError], bool] = lambda _: True
    ) -> T:
        pause = FIRST_PAUSE_S
        for attempt in range(1, tries + 1):
            try:
                return send()
            except Exception as raised:
                error = _explain(what, raised)
                if not isinstance(error, VastBusyError) or attempt == tries or not again(error):
                    raise error from raised
            self.sleep(min(pause, LONGEST_PAUSE_S) * random.uniform(0.5, 1.5))
            pause *= 2
        raise AssertionError("unreachable")


def _clean(key: str) -> str:
    """The key without the newline that a file or a paste left at its end. VastKeyError for one that no request can carry."""
    key = key.strip()
    if not key:
        raise VastKeyError(f"the Vast API key is empty; {KEY_HELP}")
    if not all("!" <= letter <= "~" for letter in key):  # the key itself is not shown
        raise VastKeyError(
            f"the Vast API key holds what is no letter, digit or sign of ASCII: copied wrongly? {KEY_HELP}"
        )
    return key


def _explain(what: str, error: Exception) -> Exception:
    """Our error for one of requests' or of the SDK's; what is neither is a bug and stays as it is."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
        try:
            text = _message(error.response.json())
        except (ValueError, RecursionError):
            text = error.response.text[:200]
        if status == 401:
            return VastKeyError(f"{what}: Vast does not know this API key ({text}); {KEY_HELP}")
        if status == 403:
            return VastKeyError(f"{what}: the API key lacks the right to do that ({text}); {KEY_HELP}")
        if status == 429 or status >= 500:
            return VastBusyError(f"{what}: Vast answered {status} ({text})", done=status != 429)
        return VastRefusedError(f"{what}: Vast answered {status}: {text}", status=status)
    if isinstance(error, requests.exceptions.JSONDecodeError | ValueError | KeyError | TypeError | RecursionError):
        return VastBusyError(f"{what}: a reply that cannot be read ({type(error).__name__}: {str(error)[:120]})")
    if isinstance(error, requests.RequestException):
        return VastBusyError(f"{what}: no reply ({type(error).__name__}: {str(error)[:200]})")
    return error


def _message(reply: Any) -> str:
    parts = [str(reply[k]) for k in ("error", "msg") if reply.get(k)] if isinstance(reply, dict) else []
    return ": ".join(parts)[:300] or _shape(reply)


def _shape(reply: Any) -> str:
    """What kind of reply it is, without what it says: that may hold keys and tokens, of Vast's or of the request."""
    if isinstance(reply, dict):
        return f"an object with the keys {', '.join(map(str, reply))[:120] or 'nothing'}"
    if isinstance(reply, list):
        return f"a list of {len(reply)}"
    return "nothing" if reply is None else f"a {type(reply).__name__}"


def _rows(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(r, dict) and isinstance(r.get("id"), int) for r in value):
        raise VastBusyError(f"{what}: a reply that is no list of rows with ids: {_shape(value)}")
    return value


def _listing(reply: Any) -> dict[str, Any]:
    """A page of the listing, or ValueError: `{}` and half a page must not read as `nothing is rented`."""
    if not isinstance(reply, dict) or "instances" not in reply:
        raise ValueError(f"a listing without instances: {_shape(reply)}")
    _rows(reply["instances"], "list instances")
    return reply
