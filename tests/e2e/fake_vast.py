"""A fake Vast.ai: its HTTP API in a process of its own, with faults on order.

    python tests/e2e/fake_vast.py --port 0 [--hosts greet|namespaces|loopback] [--boot 0.1,0.2]

prints its address as one line of JSON. Keys, calls and kinds of fault: see fake_desk. Below /control/ (no key) lie the
switches: POST /control/faults [{"call": "list", "kind": "503", "times": 1}], GET /control/bill, GET /control/calls, GET
/control/keys, POST /control/outbid/ID, POST /control/vanish/ID, POST /control/status/ID "rebooting", POST /control/offers [{...}].
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

sys.path.insert(0, str(Path(__file__).parent))

from fake_desk import Desk, NoReply
from fake_market import Hosts, Market, offer


class FakeVast(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], market: Market) -> None:
        super().__init__(address, Handler)
        self.desk = Desk(market)


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
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        try:
            status, data = self.server.desk.handle(method, url.path, query, key, body)
        except NoReply as end:
            self.wfile.write(end.args[0] if end.args else b"")
            self.close_connection = True
            return
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
    parser.add_argument("--hosts", choices=["greet", "namespaces", "loopback"], default="greet")
    parser.add_argument("--root", default="", help="folder for the hosts' files")
    args = parser.parse_args()
    hosts: Hosts
    if args.hosts == "greet":
        from greeters import Greeters

        hosts = Greeters()
    elif args.hosts == "loopback":
        from hosts_loopback import Loopback

        hosts = Loopback(Path(args.root))
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
