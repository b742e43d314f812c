"""The fake Vast's API without a network: who may call what, what goes wrong on order, and what each call does.

Keys: `full-rights` may do all, `read-only` may look and not touch, `no-new-keys` may do all but make keys; a key made by a call
may do what it was made for; an instance's own CONTAINER_API_KEY may only stop or destroy that instance; any other is refused.

Calls: search, create, list, show, destroy, attach, update, bid, logs, user, key_make, key_list, key_delete. Kinds of fault: a
status code (429, 500, 502, 503), `empty` (200 without a body), `malformed` (half a JSON), `no_rows` (a good reply that lists
nothing), `drop` (no reply, nothing done), `lost` (done, no reply), `503_done` (done, answered 503), `ignored` (answered, not
done), `garbage` (no HTTP, nothing done), `sold_twice`, `stuck`, `gone`.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from typing import Any

from fake_market import Market, offer

PAGE = 25
ALL_RIGHTS = {"instance_read", "instance_write", "misc", "user_read", "user_write"}

# method, path, name of the call, and the right that it takes
ROUTES = [
    ("POST", r"/api/v0/bundles/", "search", "misc"),
    ("PUT", r"/api/v0/asks/(\d+)/", "create", "instance_write"),
    ("GET", r"/api/v1/instances/", "list", "instance_read"),
    ("GET", r"/api/v0/instances/(\d+)/", "show", "instance_read"),
    ("DELETE", r"/api/v0/instances/(\d+)/", "destroy", "instance_write"),
    ("POST", r"/api/v0/instances/(\d+)/ssh/", "attach", "instance_write"),
    ("PUT", r"/api/v0/instances/(\d+)/", "update", "instance_write"),
    ("PUT", r"/api/v0/instances/bid_price/(\d+)/", "bid", "instance_write"),
    ("PUT", r"/api/v0/instances/request_logs/(\d+)/", "logs", "instance_read"),
    ("GET", r"/api/v0/users/current/?", "user", "user_read"),
    ("POST", r"/api/v0/auth/apikeys/", "key_make", "user_write"),
    ("GET", r"/api/v0/auth/apikeys/", "key_list", "user_read"),
    ("DELETE", r"/api/v0/auth/apikeys/(\d+)/", "key_delete", "user_write"),
]
Reply = tuple[int, Any]


class NoReply(Exception):
    """The connection ends without a word, or after bytes that are no HTTP."""


class Desk:
    """What stands between the HTTP server and the market. Thread-safe as far as the market is."""

    def __init__(self, market: Market) -> None:
        self.market = market
        self.faults: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.requests: list[Any] = []  # method, path, query and body of each, without the key in its header
        self.guard = threading.Lock()
        self.made_keys: dict[int, dict[str, Any]] = {}
        self.next_key = 70_001

    def handle(self, method: str, path: str, query: dict[str, str], key: str, body: Any) -> tuple[int, bytes]:
        """Status and body of the reply to one request. NoReply where there is none."""
        if path.startswith("/control/"):
            return 200, json.dumps(self.control(path, body)).encode()
        self.requests.append([method, path, query, body])
        for verb, pattern, call, right in ROUTES:
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                number = int(match[1]) if match.groups() else 0
                return self._answer(call, right, number, body or {}, query, key)
        return _json((404, {"success": False, "error": "no_such_endpoint", "msg": f"{method} {path}"}))

    def _answer(
        self, call: str, right: str, number: int, body: dict[str, Any], query: dict[str, str], key: str
    ) -> tuple[int, bytes]:
        self.calls.append(f"{call} {number}" if number else call)
        refusal = self._refusal(call, right, number, key)
        if refusal:
            return _json(refusal)
        fault = self._fault(call)
        if fault == "drop":
            raise NoReply
        if fault == "garbage":
            raise NoReply(b"garbage\r\n\r\n")
        if fault and fault.isdigit():
            return _json(
                (int(fault), {"success": False, "error": "too_many_requests" if fault == "429" else "server_error"})
            )
        if fault == "empty":
            return 200, b""
        if fault == "malformed":
            return 200, b'{"instances": [{"id": 12'
        by = "itself" if any(i.key == key for i in list(self.market.live.values())) else "account"
        status, reply = getattr(self, f"call_{call}")(number, body, query, fault, by)
        if fault == "lost":
            raise NoReply
        if fault == "503_done":
            status, reply = 503, {"success": False}
        return _json((status, reply))

    def _fault(self, call: str) -> str | None:
        """The next fault ordered for this call, used up."""
        with self.guard:
            for rule in self.faults:
                if rule["call"] == call and rule.get("after", 0) > 0:
                    rule["after"] -= 1
                elif rule["call"] == call and rule.get("times", 1) > 0:
                    rule["times"] = rule.get("times", 1) - 1
                    return str(rule["kind"])
        return None

    def _refusal(self, call: str, right: str, number: int, key: str) -> Reply | None:
        fixed = {
            "full-rights": ALL_RIGHTS,
            "read-only": {"instance_read", "misc"},
            "no-new-keys": ALL_RIGHTS - {"user_write"},
        }
        made = {row["key"]: set(row["permissions"]["api"]) for row in self.made_keys.values()}
        rights = {**fixed, **made}.get(key)
        owner = next((i for i in list(self.market.live.values()) if i.key == key), None)
        if rights is None and owner is None:
            return 401, {"success": False, "error": "auth_error", "msg": "Invalid user key"}
        if (rights and right in rights) or (owner and call in ("destroy", "update") and number == owner.id):
            return None
        return 403, {"success": False, "error": "forbidden", "msg": "this key may not do that"}

    def call_search(
        self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None, by: str
    ) -> Reply:
        return 200, {"offers": [] if fault == "no_rows" else self.market.search(body)}

    def call_create(
        self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None, by: str
    ) -> Reply:
        one = self.market.create(number, body, stuck=fault == "stuck", shared=fault == "sold_twice")
        if one is None:
            text = f"Instance type by id {number} is not available."
            return 400, {"success": False, "error": "no_such_ask", "msg": text}
        if fault == "gone":
            self.market.destroy(one.id, "its host")
        return 200, {"success": True, "new_contract": one.id}

    def call_list(self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None, by: str) -> Reply:
        with self.market.lock:
            rows = [self.market.row(i) for i in sorted(self.market.live.values(), key=lambda i: i.id)]
        if fault == "no_rows":
            rows = []
        after, limit = int(query.get("after_token") or 0), min(PAGE, int(query.get("limit") or PAGE))
        page = [r for r in rows if r["id"] > after]
        more = len(page) > limit
        page = page[:limit]
        return 200, {"success": True, "instances": page, "instances_found": len(page), "total_instances": len(rows),
                     "next_token": str(page[-1]["id"]) if more else None, "label_counts": {}}  # fmt: skip

    def call_show(self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None, by: str) -> Reply:
        one = None if fault == "no_rows" else self.market.live.get(number)
        return 200, {"instances": self.market.row(one) if one else None}

    def call_destroy(
        self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None, by: str
    ) -> Reply:
        if fault == "ignored":
            return 200, {"success": True}
        if not self.market.destroy(number, by):
            return 404, {"success": False, "error": "no_such_instance", "msg": f"no instance {number}"}
        return 200, {"success": True}

    def call_attach(
        self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None, by: str
    ) -> Reply:
        one = self.market.live.get(number)
        if one is None:
            return 404, {"success": False, "error": "no_such_instance"}
        with self.market.lock:
            one.keys.append(body["ssh_key"])
            if one.ssh:
                self.market.hosts.authorize(number, body["ssh_key"])
        return 200, {"success": True}

    def call_update(
        self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None, by: str
    ) -> Reply:
        one = self.market.live.get(number)
        if one is None:
            return 404, {"success": False, "error": "no_such_instance"}
        if "label" in body:
            one.label = body["label"]
        if body.get("state") == "stopped":
            self.market.stop(number)
        return 200, {"success": True}

    def call_bid(self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None, by: str) -> Reply:
        one = self.market.live.get(number)
        if one is None:
            return 404, {"success": False, "error": "no_such_instance"}
        one.bid = float(body["price"])
        return 200, {"success": True}

    def call_logs(self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None, by: str) -> Reply:
        return 200, {"success": True, "msg": "no log here"}

    def call_user(self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None, by: str) -> Reply:
        return 200, {"id": 1, "username": "somebody", "credit": 25.0}

    def call_key_make(
        self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None, by: str
    ) -> Reply:
        with self.guard:
            row = {
                "id": self.next_key,
                "name": body["name"],
                "key": secrets.token_hex(16),
                "permissions": body["permissions"],
            }
            self.next_key += 1
            self.made_keys[row["id"]] = row
        return 200, row

    def call_key_list(
        self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None, by: str
    ) -> Reply:
        shown = [{k: v for k, v in row.items() if k != "key"} for row in self.made_keys.values()]
        return 200, {"success": True, "apikeys": shown}

    def call_key_delete(
        self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None, by: str
    ) -> Reply:
        if self.made_keys.pop(number, None) is None:
            return 404, {"success": False, "error": "no_such_key"}
        return 200, {"success": True}

    def control(self, path: str, body: Any) -> Any:
        """The switches, below /control/: no part of Vast."""
        market = self.market
        what, _, number = path.removeprefix("/control/").partition("/")
        if what == "faults":
            with self.guard:
                self.faults = body if isinstance(body, list) else self.faults
                return self.faults
        if what == "calls":
            calls, self.calls = self.calls, []
            return calls
        if what == "requests":
            return self.requests
        if what == "keys":
            return list(self.made_keys.values())
        if what == "forget_keys":
            self.made_keys.clear()
        if what == "offers":
            market.offers = [offer(n, **fields) for n, fields in enumerate(body)]
        if what == "outbid":
            return market.stop(int(number))
        if what == "status":
            market.live[int(number)].status = body
            return True
        if what == "vanish":
            return market.destroy(int(number), "its host")
        return market.bill()


def _json(reply: Reply) -> tuple[int, bytes]:
    return reply[0], json.dumps(reply[1]).encode()
