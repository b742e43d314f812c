"""What a cluster has rented, as far as Vast's listing can be believed.

A failed listing raises and changes nothing. A node that a listing leaves out is gone only when asking for it by its id says so
too. What must not be there (given up, destroyed before, lost, stuck in its boot) is destroyed on sight.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from capture.errors import StoreError
from cluster.mesh.daemon import UNWATCHED_S
from cluster.vast.api import Vast
from cluster.vast.errors import NotGoneError, VastBusyError, VastError
from cluster.vast.labels import parse
from cluster.vast.money import Bill, add_up
from cluster.vast.node import Node, listed, look_up
from cluster.vast.state import OPEN_S, State, open_requests

logger = logging.getLogger(__name__)

LOST_GRACE_S = 120.0  # for one that Vast says has exited or is offline, in which it may still come back
UNCLEAR = {"created", "loading", "unknown"}  # or no status: of one that was up, Vast has lost sight
GREETING_S = 3.0
SLOW_BOOT = 0.5  # of the time a boot may take: kept, but that machine is not rented again
LATE_S = (
    UNWATCHED_S + 300.0
)  # by which its own switch may end a node after its deadline: what the head's last word adds, and Vast takes
NEW_S = 20.0  # Vast may not know at once what it has just rented out
AT_ONCE = 8  # destroyed side by side
SUDDEN = 5.0  # times what a machine cost before: believed once two listings in a row say so, since the limits end a cluster at once


def greets(address: tuple[str, int]) -> bool:
    """True if an sshd answers there."""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=GREETING_S) as peer:
        peer.settimeout(GREETING_S)
        return peer.recv(4) == b"SSH-"
    return False


def raise_for(errors: Mapping[str, BaseException]) -> None:
    """Raise one error for all instances that could not be ended, by id; nothing where there is none."""
    for error in errors.values():
        if len(errors) == 1 or not isinstance(error, VastError):
            raise error
    if errors:
        raise NotGoneError(
            f"{len(errors)} instances are not shown to be gone and may be billed on: "
            + "; ".join(f"instance {id_}: {error}" for id_, error in errors.items())
        )


@contextlib.contextmanager
def even_unnoted(id_: str) -> Iterator[None]:
    """A machine is ended also where the disk is full and it cannot be written down."""
    try:
        yield
    except StoreError as error:
        logger.warning("the end of instance %s is not noted: %s", id_, error)


def _by_the_books(id_: str, content: dict[str, Any]) -> Node | None:
    """A node that this process has never seen, from what one before it noted; None where that does not say whose it is, or that it
    was destroyed. content: the cluster's state."""
    seen = content["seen"].get(id_, {})
    label = None if id_ in content["destroyed"] else parse(seen.get("label"))
    return Node(id_, label, {"id": int(id_), "label": str(label), "dph_total": seen.get("dph")}) if label else None


def last_hour(content: dict[str, Any], seen: Mapping[str, Any]) -> float:
    """Until when an instance that went by itself was there at most: now, or what its deadline allowed, if that is over.

    content: the cluster's state; seen: what it says of the instance. A head's deadline is the last that `ray up` told it; a worker
    takes its head's where that is later.
    """
    now = time.time()
    rows = [seen, *content["seen"].values(), *content["gone"]]
    made_with = [row["ends"] for row in rows if row.get("kind") == "head" and "ends" in row]
    heads = content["deadline"].get("at", max(made_with, default=None))
    own = heads if seen.get("kind") == "head" else seen.get("ends")
    if own is None or heads is None:
        return now
    return max(min(now, max(own, heads) + LATE_S), float(seen["since"]))


class Fleet:
    """The nodes of one cluster. `kinds`: which of them this machine looks after, head or worker; the others are only listed."""

    def __init__(
        self, vast: Vast, state: State, cluster: str, kinds: set[str], *, boot_s: float, poll_s: float
    ) -> None:
        self.vast, self.state, self.cluster, self.kinds = vast, state, cluster, kinds
        self.boot_s, self.poll_s = boot_s, poll_s
        self.lock = threading.RLock()
        self.nodes: dict[str, Node] = {}
        self.doomed: dict[str, Node] = {}  # still listed, on their way out: they bill, and keep their k
        self.listed_at = float("-inf")
        self.greeted: dict[str, tuple[str, int]] = {}
        self.added: dict[str, float] = {}  # when this process rented it

    def refresh(self, *, force: bool = False) -> dict[str, Node]:
        """The nodes now, by id. One listing serves all callers for poll_s seconds. Raises VastError and keeps what was known."""
        with self.lock:
            if not force and time.monotonic() - self.listed_at < self.poll_s:
                return dict(self.nodes)
            now = time.time()  # what is judged is as old as the listing, however long Vast takes from here on
            found, kept, content = self.listing(), {}, self.state.read()
            # all that was ever seen and not heard to be gone, also what was destroyed and could not be looked up since
            for id_ in (set(self.nodes) | set(content["seen"])) - set(found):
                try:
                    node = look_up(self.vast, id_, self.cluster, content["seen"].get(id_))
                except VastError as error:
                    logger.warning("instance %s is not in the listing, and asking for it failed (%s): kept", id_, error)
                    kept[id_] = self.nodes.get(id_) or self.doomed.get(id_) or _by_the_books(id_, content)
                    continue
                if node is not None:
                    found[id_] = node
                elif id_ not in content["destroyed"] and (
                    time.monotonic() - self.added.get(id_, float("-inf")) < NEW_S or self._is_new(id_, content)
                ):
                    kept[id_] = self.nodes.get(id_) or _by_the_books(id_, content)
                else:
                    logger.info("instance %s is gone", id_)
                    self._blame(id_, content)
                    self._forget(id_)
            self._record(found, now)
            self._expire(now)
            # what is not known now is not judged: it stays what it was
            doomed = {id_: node for id_, node in found.items() if self._weed(node, now)}
            self.nodes = {
                id_: n for id_, n in (found | kept).items() if n and id_ not in doomed and id_ not in self.doomed
            }
            doomed |= {id_: n for id_, n in kept.items() if n and id_ in self.doomed}
            self.doomed = {id_: node for id_, node in doomed.items() if not self._is_gone(id_)}
            self.listed_at = time.monotonic()
            return dict(self.nodes)

    def listing(self) -> dict[str, Node]:
        """All instances that Vast lists now with the cluster's label, also those that should not be there."""
        return {node.id: node for node in listed(self.vast, self.cluster)}

    def remaining(self) -> dict[str, str]:
        """Id -> kind of all that is listed, and of all that was ever seen and cannot be shown to be gone. Raises VastError."""
        found = {id_: node.label.kind for id_, node in self.listing().items()}
        content = self.state.read()
        seen = {id_: str(row.get("kind", "")) for id_, row in content["seen"].items()}
        with self.lock:
            seen |= {id_: node.label.kind for id_, node in (self.nodes | self.doomed).items()}
        for id_, kind in seen.items():
            if id_ in found:
                continue
            try:
                gone = look_up(self.vast, id_, self.cluster, content["seen"].get(id_)) is None
            except VastError as error:
                logger.warning("instance %s is not in the listing, and asking for it failed (%s)", id_, error)
                gone = False
            if gone and not self._is_new(id_, content):
                self._forget(id_)
            else:
                found[id_] = kind
        return found

    def add(self, node: Node) -> None:
        """Make a node known that was just rented; the listing may lag behind."""
        with self.lock:
            self._record({node.id: node}, time.time())
            self.nodes[node.id] = node
            self.added[node.id] = time.monotonic()

    def get(self, id_: str) -> Node | None:
        with self.lock:
            return self.nodes.get(id_)

    def is_running(self, id_: str) -> bool:
        """True if Vast says running and, where this machine looks after the node, an sshd answers; asked once per address."""
        node = self.get(id_)
        if node is None or node.status != "running":
            return False
        return node.label.kind not in self.kinds or self._answers(node)

    def bill(self) -> Bill:
        content = self.state.read()
        with self.lock:
            nodes = [*self.nodes.values(), *self.doomed.values()]
        live = [(self._since(content, node), node.dph) for node in nodes]
        live += [(i["since"], i.get("dph", 0.0)) for i in open_requests(content).values()]
        known = {row["id"] for row in content["gone"]} | {node.id for node in nodes}
        gone = [*content["gone"], *(row for row in self.state.given_spending() if row["id"] not in known)]
        rows = [*gone, *(content["seen"].get(node.id, {}) for node in nodes)]
        return add_up(live, [*gone, *(change for row in rows for change in row.get("repriced", []))])

    def destroy(self, id_: str, reason: str, *, tries: int = 6, pause_s: float = 2.0) -> bool:
        """Destroy an instance and see that it is gone, asking again where Vast forgot. NotGoneError where it stays.

        False where Vast never knew of it here: it was gone before, or there was none.
        """
        with self.lock:
            node = self.nodes.get(id_)
        k = node.label.k if node else 0
        with even_unnoted(id_), self.state.edit() as content:
            content["destroyed"].setdefault(id_, {"since": time.time(), "k": k, "reason": reason})
        logger.info("destroying instance %s: %s", id_, reason)
        known = False
        for attempt in range(tries):
            known |= self.vast.destroy(int(id_))
            with contextlib.suppress(VastBusyError):
                if self.vast.instance(int(id_)) is None and (known or not self._is_new(id_, self.state.read())):
                    self._forget(id_, ended=known)
                    return known
            if attempt + 1 < tries:
                self.vast.sleep(pause_s * (attempt + 1))
        raise NotGoneError(
            f"instance {id_} was destroyed {tries}x and Vast still lists it, and bills it; destroy it at cloud.vast.ai/instances"
        )

    def destroy_all(self, ids: Iterable[str], reason: str) -> None:
        """Destroy each and see that it is gone. All are tried; an error at the end names those that are left."""
        with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
            tries = {id_: pool.submit(self.destroy, id_, reason) for id_ in ids}
        raise_for({id_: error for id_, one in tries.items() if (error := one.exception()) is not None})

    def _blame(self, id_: str, content: dict[str, Any]) -> None:
        """A machine whose instance went by itself before it was ready is not rented again."""
        node, seen = self.nodes.get(id_), content["seen"].get(id_, {})
        if node and node.label.kind in self.kinds and id_ not in content["destroyed"] and not seen.get("ready"):
            self.state.block_machine(node.machine, "its instance was gone before it was ready")

    def _forget(self, id_: str, *, ended: bool = False) -> None:
        """Close the account of an instance that is gone. ended: just now, and by us."""
        with self.lock:
            node = self.nodes.pop(id_, None)
            self.greeted.pop(id_, None)
        with even_unnoted(id_), self.state.edit() as content:
            content["tags"].pop(id_, None)
            if id_ in content["destroyed"]:
                content["destroyed"][id_]["gone"] = time.time()
            seen = content["seen"].pop(id_, None)
            if seen:
                # the head looks every few seconds, and is not told here of limits that were raised
                known = ended or "worker" in self.kinds
                until = time.time() if known else last_hour(content, seen)
                content["gone"].append({"id": id_, **seen, "until": until})
            elif node is not None:
                now = time.time()
                content["gone"].append(
                    {"id": id_, "kind": node.label.kind, "dph": node.dph, "since": now, "until": now}
                )

    def _record(self, found: dict[str, Node], now: float) -> None:
        with self.state.edit() as content:
            for id_, node in found.items():
                attempt = node.label.attempt
                parts = (content[part].get(attempt) for part in ("intents", "unknown", "abandoned"))
                request = next((found for found in parts if found), None)
                asked = request["since"] if request else now
                since = min(asked, node.start or asked)
                fresh = {"since": since, "kind": node.label.kind, "asked_here": request is not None}
                if request and request.get("dph"):  # what it was offered for, until Vast says what it costs
                    fresh["dph"] = request["dph"]
                seen = content["seen"].setdefault(id_, fresh)
                if not node.row.get("dph_total") and seen.get("dph"):  # a row that does not say is not free of charge
                    node.row["dph_total"] = seen["dph"]
                was = seen.get("dph")
                if was and node.dph > SUDDEN * was and not seen.get("sudden"):
                    seen["sudden"] = node.dph
                    logger.warning("instance %s is listed at $%g/h, after $%g/h: not believed yet", id_, node.dph, was)
                    node.row["dph_total"] = was
                else:
                    seen.pop("sudden", None)
                if was and abs(was - node.dph) > 1e-6:  # a bid that was changed, say: what it cost until now stays
                    change = {"since": seen["since"], "until": now, "dph": was - node.dph}
                    seen["repriced"] = [*seen.get("repriced", []), change]
                seen["dph"] = node.dph
                if node.deadline is not None:
                    seen["ends"] = node.deadline
                if seen.get("asked_here"):
                    seen["label"] = str(node.label)
                if node.status == "running":
                    seen.pop("odd", None)
                else:
                    seen.setdefault("odd", now)
                if node.status in ("exited", "offline"):
                    seen.setdefault("lost", now)
                else:
                    seen.pop("lost", None)
                content["intents"].pop(attempt, None)
                if content["unknown"].pop(attempt, None):  # whoever asked was told that it failed
                    seen["spare"] = True

    def _expire(self, now: float) -> None:
        """What a request made would have been listed by now. Should it be all the same some day, it is destroyed."""
        with self.state.edit() as content:
            for attempt, request in list(content["unknown"].items()):
                if now - request["since"] >= OPEN_S:
                    content["abandoned"][attempt] = content["unknown"].pop(attempt)

    def _since(self, content: dict[str, Any], node: Node) -> float:
        known = [node.start, content["seen"].get(node.id, {}).get("since")]
        return min((float(t) for t in known if t), default=time.time())

    def _weed(self, node: Node, now: float) -> bool:
        """Destroy a node that must not be there; True if it is gone or going."""
        if node.label.kind not in self.kinds:
            return False
        reason = self._fault(node, now)
        if reason is None:
            return False
        if not reason.startswith("again"):
            self.state.block_machine(node.machine, reason)
        try:
            self.destroy(node.id, reason, tries=1)  # the next listing tries again; nobody may wait here
        except VastError as error:
            logger.warning("instance %s (%s) is not gone yet: %s", node.id, reason, error)
        return True

    def _fault(self, node: Node, now: float) -> str | None:
        """Why a node must not be there, by its row of `now`; None where it may stay."""
        content = self.state.read()
        if node.id in content["destroyed"]:
            return "again: it was destroyed before"
        if node.label.attempt in content["abandoned"]:
            return "again: its renting had been given up"
        seen = content["seen"].get(node.id, {})
        answers = node.status == "running" and (node.id in self.greeted or self._answers(node))
        # one that was ready, or of which this machine's books do not tell that it never was, may have results on its disk
        keep = node.label.kind == "head" and (seen.get("ready") or not seen.get("asked_here"))
        if keep and not answers:  # that is for a person to decide
            logger.warning(
                "the head, instance %s, is %s and does not answer; `ray down` destroys it", node.id, node.status
            )
            return None
        dim = node.status in ("exited", "offline") or (seen.get("ready") and node.status in UNCLEAR)
        if dim and node.ssh and greets(node.ssh):
            return None  # Vast cannot see it, and it may be at work
        if node.status == "stopped" or now - seen.get("lost", now) >= LOST_GRACE_S:  # outbid is final
            return f"lost: {node.status}"
        if answers:
            if not seen.get("ready"):
                with self.state.edit() as changed:
                    changed["seen"].setdefault(node.id, {})["ready"] = True
                took_s = now - seen.get("since", now)
                if took_s > SLOW_BOOT * self.boot_s:
                    self.state.block_machine(node.machine, f"it took {took_s / 60:.1f} minutes to boot")
            return None
        # one that was ready once and is rebooting, say, gets the time of a boot from then on
        waited_s = now - (seen.get("odd", now) if seen.get("ready") else seen.get("since", now))
        if waited_s > self.boot_s:
            return f"not ready for {waited_s:.0f} s ({node.status})"
        return None

    def _answers(self, node: Node) -> bool:
        if node.ssh is None:
            return False
        if self.greeted.get(node.id) != node.ssh:
            if not greets(node.ssh):
                return False
            self.greeted[node.id] = node.ssh
        return True

    def _is_new(self, id_: str, content: dict[str, Any]) -> bool:
        """Whether this machine, whatever process, asked for it so lately that Vast may not know it yet."""
        seen = content["seen"].get(id_, {})
        return bool(seen.get("asked_here")) and abs(time.time() - seen["since"]) < NEW_S

    def _is_gone(self, id_: str) -> bool:
        return "gone" in self.state.read()["destroyed"].get(id_, {})
