"""A fake Vast.ai: its HTTP API in a process of its own, with faults on order.

    python tests/e2e/fake_vast.py --port 0 [--hosts greet|namespaces] [--boot 0.1,0.2]

prints its address as one line of JSON. Keys: `full-rights` may do all, `read-only` may not write, an instance's own
CONTAINER_API_KEY may only stop or destroy that instance; any other key is refused. Below /control/ (no key) lie the switches:
POST /control/faults [{"call": "list", "kind": "503", "times": 1}], GET /control/bill, GET /control/calls, POST
/control/outbid/ID, POST /control/vanish/ID, POST /control/status/ID "rebooting", POST /control/offers [{...}].

Calls: search, create, list, show, destroy, attach, update, user. Kinds of fault: a status code (429, 500, 502, 503), `empty`
(200 without a body), `malformed` (half a JSON), `no_rows` (a good reply that lists nothing), `drop` (no reply, nothing done),
`lost` (done, no reply), `503_done` (done, answered 503), `ignored` (answered, not done), `sold_twice`, `stuck`, `gone`.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

sys.path.insert(0, str(Path(__file__).parent))

from fake_market import Hosts, Market, offer

PAGE = 25

# method, path, name of the call
ROUTES = [
    ("POST", r"/api/v0/bundles/", "search"),
    ("PUT", r"/api/v0/asks/(\d+)/", "create"),
    ("GET", r"/api/v1/instances/", "list"),
    ("GET", r"/api/v0/instances/(\d+)/", "show"),
    ("DELETE", r"/api/v0/instances/(\d+)/", "destroy"),
    ("POST", r"/api/v0/instances/(\d+)/ssh/", "attach"),
    ("PUT", r"/api/v0/instances/(\d+)/", "update"),
    ("PUT", r"/api/v0/instances/bid_price/(\d+)/", "bid"),
    ("PUT", r"/api/v0/instances/request_logs/(\d+)/", "logs"),
    ("GET", r"/api/v0/users/current/?", "user"),
]
WRITES = {"create", "destroy", "attach", "update", "bid"}


class NoReply(Exception):
    """Close the connection without a word."""


class FakeVast(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], market: Market) -> None:
        super().__init__(address, Handler)
        self.market = market
        self.faults: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.guard = threading.Lock()

    def fault(self, call: str) -> str | None:
        """The next fault ordered for this call, used up."""
        with self.guard:
            for rule in self.faults:
                if rule["call"] == call and rule.get("after", 0) > 0:
                    rule["after"] -= 1
                elif rule["call"] == call and rule.get("times", 1) > 0:
                    rule["times"] = rule.get("times", 1) - 1
                    return str(rule["kind"])
        return None


class Handler(BaseHTTPRequestHandler):
    server: FakeVast
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.handle_any("GET")

    def do_POST(self) -> None:
        self.handle_any("POST")

    def do_PUT(self) -> None:
        self.handle_any("PUT")

    def do_DELETE(self) -> None:
        self.handle_any("DELETE")

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"null")
        url = urlsplit(self.path)
        try:
            if url.path.startswith("/control/"):
                self.reply(200, self.control(url.path, body))
                return
            for verb, pattern, call in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if verb == method and match:
                    number = int(match[1]) if match.groups() else 0
                    self.answer(call, number, body or {}, {k: v[0] for k, v in parse_qs(url.query).items()})
                    return
            self.reply(404, {"success": False, "error": "no_such_endpoint", "msg": f"{method} {url.path}"})
        except NoReply:
            self.close_connection = True

    def answer(self, call: str, number: int, body: dict[str, Any], query: dict[str, str]) -> None:
        self.server.calls.append(f"{call} {number}" if number else call)
        refusal = self.refusal(call, number)
        if refusal:
            self.reply(*refusal)
            return
        fault = self.server.fault(call)
        if fault == "drop":
            raise NoReply
        if fault and fault.isdigit():
            self.reply(
                int(fault), {"success": False, "error": "too_many_requests" if fault == "429" else "server_error"}
            )
            return
        if fault == "empty":
            self.raw(200, b"")
            return
        if fault == "malformed":
            self.raw(200, b'{"instances": [{"id": 12')
            return
        status, reply = getattr(self, f"call_{call}")(number, body, query, fault)
        if fault == "lost":
            raise NoReply
        if fault == "503_done":
            status, reply = 503, {"success": False}
        self.reply(status, reply)

    def refusal(self, call: str, number: int) -> tuple[int, dict[str, Any]] | None:
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if key == "full-rights" or (key == "read-only" and call not in WRITES):
            return None
        owner = next((i for i in self.server.market.live.values() if i.key == key), None)
        if owner and call in ("destroy", "update") and number == owner.id:
            return None
        if owner or key == "read-only":
            return 403, {"success": False, "error": "forbidden", "msg": "this key may not do that"}
        return 401, {"success": False, "error": "auth_error", "msg": "Invalid user key"}

    def call_search(
        self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None
    ) -> tuple[int, Any]:
        return 200, {"offers": [] if fault == "no_rows" else self.server.market.search(body)}

    def call_create(
        self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None
    ) -> tuple[int, Any]:
        market = self.server.market
        one = market.create(number, body, stuck=fault == "stuck", shared=fault == "sold_twice")
        if one is None:
            return 400, {
                "success": False,
                "error": "no_such_ask",
                "msg": f"Instance type by id {number} is not available.",
            }
        if fault == "gone":
            market.destroy(one.id, "its host")
        return 200, {"success": True, "new_contract": one.id}

    def call_list(self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None) -> tuple[int, Any]:
        market = self.server.market
        with market.lock:
            rows = [market.row(i) for i in sorted(market.live.values(), key=lambda i: i.id)]
        if fault == "no_rows":
            rows = []
        after, limit = int(query.get("after_token") or 0), min(PAGE, int(query.get("limit") or PAGE))
        page = [r for r in rows if r["id"] > after]
        more = len(page) > limit
        page = page[:limit]
        return 200, {"success": True, "instances": page, "instances_found": len(page), "total_instances": len(rows),
                     "next_token": str(page[-1]["id"]) if more else None, "label_counts": {}}  # fmt: skip

    def call_show(self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None) -> tuple[int, Any]:
        one = self.server.market.live.get(number)
        return 200, {"instances": self.server.market.row(one) if one else None}

    def call_destroy(
        self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None
    ) -> tuple[int, Any]:
        if fault == "ignored":
            return 200, {"success": True}
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not self.server.market.destroy(number, "account" if key == "full-rights" else "itself"):
            return 404, {"success": False, "error": "no_such_instance", "msg": f"no instance {number}"}
        return 200, {"success": True}

    def call_attach(
        self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None
    ) -> tuple[int, Any]:
        one = self.server.market.live.get(number)
        if one is None:
            return 404, {"success": False, "error": "no_such_instance"}
        with self.server.market.lock:
            one.keys.append(body["ssh_key"])
            if one.ssh:
                self.server.market.hosts.authorize(number, body["ssh_key"])
        return 200, {"success": True}

    def call_update(
        self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None
    ) -> tuple[int, Any]:
        one = self.server.market.live.get(number)
        if one is None:
            return 404, {"success": False, "error": "no_such_instance"}
        if "label" in body:
            one.label = body["label"]
        if body.get("state") == "stopped":
            self.server.market.stop(number)
        return 200, {"success": True}

    def call_bid(self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None) -> tuple[int, Any]:
        one = self.server.market.live.get(number)
        if one is None:
            return 404, {"success": False, "error": "no_such_instance"}
        one.bid = float(body["price"])
        return 200, {"success": True}

    def call_logs(self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None) -> tuple[int, Any]:
        return 200, {"success": True, "msg": "no log here"}

    def call_user(self, number: int, body: dict[str, Any], query: dict[str, str], fault: str | None) -> tuple[int, Any]:
        return 200, {"id": 1, "username": "somebody", "credit": 25.0}

    def control(self, path: str, body: Any) -> Any:
        market = self.server.market
        what, _, number = path.removeprefix("/control/").partition("/")
        if what == "faults":
            with self.server.guard:
                self.server.faults = body if isinstance(body, list) else self.server.faults
                return self.server.faults
        if what == "calls":
            calls, self.server.calls = self.server.calls, []
            return calls
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

    def reply(self, status: int, body: Any) -> None:
        self.raw(status, json.dumps(body).encode())

    def raw(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--boot", default="0.1,0.2")
    parser.add_argument("--hosts", choices=["greet", "namespaces"], default="greet")
    parser.add_argument("--root", default="", help="folder for the hosts' files")
    args = parser.parse_args()
    hosts: Hosts
    if args.hosts == "greet":
        from greeters import Greeters

        hosts = Greeters()
    else:
        from hosts import Namespaces

        hosts = Namespaces(Path(args.root))
        args.host = hosts.gateway
    first, second = (float(s) for s in args.boot.split(","))
    market = Market([offer(n) for n in range(6)], hosts, (first, second))
    server = FakeVast((args.host, args.port), market)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    print(json.dumps({"url": f"http://{args.host}:{server.server_address[1]}"}), flush=True)
    try:
        server.serve_forever(poll_interval=0.1)
    finally:
        market.close()
        if hasattr(hosts, "close"):
            hosts.close()


if __name__ == "__main__":
    main()
