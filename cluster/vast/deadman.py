"""The switch on every node that destroys it when its time is up or its head is silent, with nobody's help.

Runs from the container's first second (its text goes into the instance's start script), so it uses the standard library only
and needs none of our code on the node. Nothing that it hears or reads may end it: it is the last that keeps a node from billing
on when all else has failed, so each step takes any error for a "no" and goes on. The key is the container's own
CONTAINER_API_KEY, which can end this instance and nothing else.

Environment: PAIRSCOPE_DEADLINE (seconds since 1970), PAIRSCOPE_SILENCE_S (0: never) and PAIRSCOPE_HEAD (host:port of the head's
mesh; empty on the head), PAIRSCOPE_API. A later deadline may be written to ~/.pairscope/deadline.

The start script starts it again whenever it dies. Each look leaves a beat in ~/.pairscope/deadman.beat: for `pairscope doctor`, and
for the switch that comes after this one, so that a head's silence is counted on.
"""

import contextlib
import os
import socket
import time
import urllib.request


def said(name: str, otherwise: float) -> float:
    """A number of the environment; `otherwise` where there is none, or another thing stands there."""
    with contextlib.suppress(Exception):
        number = float(os.environ[name])
        return number if 0 <= number < 1e18 else otherwise
    return otherwise


EVERY_S = min(said("PAIRSCOPE_CHECK_S", 20.0), 3600.0)


def deadline() -> float:
    """The latest word on when this node has to be gone; 0, which is long ago, where there is none."""
    with contextlib.suppress(Exception), open(os.path.expanduser("~/.pairscope/deadline")) as note:
        return float(note.read())
    return said("PAIRSCOPE_DEADLINE", 0.0)


def head_speaks() -> bool:
    """True if the head's mesh daemon says through the tunnel that the cluster is looked after, or if this node is the head."""
    head = os.environ.get("PAIRSCOPE_HEAD", "")
    if not head:
        return True
    with contextlib.suppress(Exception):
        host, port = head.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=5) as peer:
            peer.settimeout(5)
            peer.sendall(b"watched\n")
            return bool(peer.recv(1))
    return False


def beat(heard: float) -> None:
    """Leave word that the switch works, and when the head was heard, by the clock that does not jump."""
    with contextlib.suppress(Exception), open(os.path.expanduser("~/.pairscope/deadman.beat"), "w") as note:
        note.write(str(heard))


def heard_before() -> float:
    """When the switch before this one heard the head; now, where there was none since the container started."""
    now = time.monotonic()
    with contextlib.suppress(Exception), open(os.path.expanduser("~/.pairscope/deadman.beat")) as note:
        return min(float(note.read()), now)
    return now


def end() -> None:
    """Ask Vast to destroy this instance."""
    instance = os.environ.get("CONTAINER_ID") or os.environ["VAST_CONTAINERLABEL"].removeprefix("C.")
    api = os.environ.get("PAIRSCOPE_API") or "https://console.vast.ai"
    request = urllib.request.Request(
        api + "/api/v0/instances/" + instance + "/",
        data=b"{}",
        method="DELETE",
        headers={"Authorization": "Bearer " + os.environ["CONTAINER_API_KEY"], "Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=30).close()


def watch() -> None:
    """Check until it is time, then ask for the end until it comes."""
    # always there; where it makes no sense, a head is silent for an hour at most
    silence = said("PAIRSCOPE_SILENCE_S", 3600.0)
    heard = heard_before()
    offset = time.time() - time.monotonic()
    while max(time.time(), offset + time.monotonic()) < deadline():  # a clock that is set back gives no more hours
        if head_speaks():
            heard = time.monotonic()
        beat(heard)
        if silence and time.monotonic() - heard > silence:
            break
        time.sleep(EVERY_S)
    while True:
        beat(heard)
        try:
            end()
        except Exception as error:
            with contextlib.suppress(Exception):  # a full disk
                print(type(error).__name__, error, flush=True)
        time.sleep(EVERY_S)


if __name__ == "__main__":
    watch()
