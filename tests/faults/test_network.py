"""Lines between nodes that are lost in one direction, cut again and again, or refused; ports that strangers try. Real hosts."""

# ruff: noqa: F811  a fixture of another file

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from rehearsal import answers
from test_mesh import _ASK, PYTHON, Nodes, listen, nodes, say  # noqa: F401

from cluster.mesh.ports import STATUS, block

pytestmark = pytest.mark.slow
STATE = f"{PYTHON} -m cluster.mesh status"


@contextmanager
def fenced(nodes: Nodes, k: int, change: str, back: str) -> Iterator[None]:
    """Another rule for the packets of a host while the block runs."""
    nft = ["ip", "netns", "exec", nodes.hosts.name(k), "nft"]
    subprocess.run([*nft, change], check=True)
    try:
        yield
    finally:
        subprocess.run([*nft, back], check=True)


def until(what: Callable[[], Any], seconds: float = 180) -> float:
    """Wait for it; how long it took."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() < began + seconds, "waited in vain"
        time.sleep(0.2)
    return time.monotonic() - began


def all_hear(nodes: Nodes, port: int) -> bool:
    return all(say(nodes, a, b, port) == f"node {b}" for a in (1, 2, 3) for b in (1, 2, 3))


def starts(nodes: Nodes, at: int, to: int) -> int:
    """How often a node has started its tunnel to another."""
    return int(re.findall(rf"to node {to} at .*, started (\d+)x", nodes.on(at, STATE).stdout)[0])


@pytest.mark.parametrize(
    ("key", "hook", "card", "port"), [("one-way-out", "output", "oifname", 12), ("one-way-in", "input", "iifname", 13)]
)
def test_a_line_that_is_lost_in_one_direction_is_begun_anew_until_it_carries(
    nodes: Nodes,
    told: Any,
    key: str,
    hook: str,
    card: str,
    port: int,
) -> None:
    for k in (1, 2, 3):
        listen(nodes, k, port)
    until(lambda: all_hear(nodes, port))
    before = starts(nodes, 1, 2)
    cut = f"add chain inet fence cut {{ type filter hook {hook} priority -10 ; }} ; add rule inet fence cut {card} != lo drop"
    with fenced(nodes, 2, cut, "delete chain inet fence cut"):
        noticed = until(lambda: starts(nodes, 1, 2) > before)
        assert say(nodes, 1, 2, port) == ""
        assert (say(nodes, 1, 3, port), say(nodes, 3, 1, port)) == ("node 3", "node 1"), "the others go on"
    took = until(lambda: all_hear(nodes, port))
    sees = (
        f"nothing; `python -m cluster.mesh status` counts the tunnel's starts, the first {noticed:.0f} s after the cut"
    )
    told(key, sees=sees, again="nothing", seconds=took)


def test_a_tunnel_that_is_cut_again_and_again_carries_soon_after_the_last_cut(nodes: Nodes, told: Any) -> None:
    listen(nodes, 1, 14)
    until(lambda: say(nodes, 2, 1, 14) == "node 1")
    for pause in (0.1, 0.5, 1.0, 0.2, 2.0, 0.1):
        nodes.on(2, "pkill -f tunnel-1.conf")
        time.sleep(pause)
    took = until(lambda: say(nodes, 2, 1, 14) == "node 1")
    told("tunnel-flaps", sees="nothing; the status counts its starts", again="nothing", seconds=took)


def test_a_key_that_the_head_refuses_is_told_and_let_in_again_by_the_head_itself(nodes: Nodes, told: Any) -> None:
    key = (nodes.folder / "mesh.pub").read_text().split()[1]
    forget = (
        f"sed -i '\\|{key}|d' ~/.ssh/authorized_keys ~/.ssh/authorized_keys2; grep -c pairscope ~/.ssh/authorized_keys"
    )

    def refused() -> bool:
        """The head looks after its files every half a minute, and may be faster than the tunnel."""
        nodes.on(1, forget)
        nodes.on(3, "pkill -f tunnel-1.conf")
        time.sleep(2)
        return "Permission denied" in nodes.on(3, STATE).stdout

    until(refused)
    took = until(lambda: json.loads(nodes.on(3, _ASK.replace("probe 2", "probe 3")).stdout or "{}").get("ok"))
    told("key-refused", sees="the status says `down: … Permission denied (publickey)`", again="nothing", seconds=took)


def test_a_stranger_who_tries_the_ports_of_a_host_reaches_its_ssh_alone(nodes: Nodes, told: Any) -> None:
    for k in (1, 2, 3):
        listen(nodes, k, 15)
        host, ssh = nodes.at[k]
        ports = [block(k) + 15, block(k) + STATUS, *range(block(k), block(k) + 20)]
        assert [p for p in ports if answers(host, p, 0.2)] == []
        assert answers(host, ssh)
        with fenced(nodes, k, "chain inet fence input { policy accept; }", "chain inet fence input { policy drop; }"):
            until(lambda host=host, port=ports[0]: answers(host, port))  # or the look would find nothing anywhere
    told("probed", sees="nothing: no port but ssh answers", again="nothing")
