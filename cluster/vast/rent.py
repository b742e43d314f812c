"""Renting one machine, once: search, ask, and find out what became of a request whose reply was lost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS

from cluster.mesh.ports import HEAD, MOST_NODES
from cluster.vast.errors import (
    CapError,
    HeadError,
    NoOfferError,
    VastBusyError,
    VastError,
    VastKeyError,
    VastRefusedError,
)
from cluster.vast.fleet import Fleet
from cluster.vast.labels import Label, new_attempt
from cluster.vast.money import Caps
from cluster.vast.node import Node
from cluster.vast.offers import Offer, Wish, find_offers
from cluster.vast.state import OPEN_S, open_requests

logger = logging.getLogger(__name__)

PRICE_MAY_RISE = 1.1  # between the price that was shown and the one that is paid
REFUSED_S = 60.0  # until a machine that would not take our key is asked again
SAME_FAULT, SAME_FAULT_S = (
    3,
    3600.0,
)  # set-ups that failed within this time, where none went well: it is not the machines
MOST_OFFERS = 8  # tried one after the other before a launch is reported as failed


@dataclass
class Renter:
    """Rents for one cluster. key: the public ssh key that nodes let in. found_within_s: how long a lost reply is looked for.
    places: the highest k of the mesh."""

    fleet: Fleet
    caps: Caps
    key: str
    found_within_s: float = 30.0
    places: int = MOST_NODES

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.in_hand: set[int] = set()  # offers that a thread of ours is asking for
        self.asking: set[str] = set()  # attempts of these
        self.refused: dict[str, float] = {}  # instance -> when Vast refused to let our key in

    def rent(
        self, wish: Wish, kind: str, type_: str, env: Callable[[int, Offer], Mapping[str, str]], onstart: str,
        *, quoted: float | None = None,
    ) -> Node:  # fmt: skip
        """One new node, known to the fleet when this returns. env(k, offer) gives the container's environment. quoted: dollars an
        hour that somebody was shown and agreed to; a machine for more than PRICE_MAY_RISE times that is not rented.

        Raises NoOfferError, CapError, VastKeyError, VastBusyError; in each case nothing that was rented here is left, or it is
        marked: destroyed as soon as the listing shows it, or, where no listing answered, taken for the next such request.
        """
        where = f"node type '{type_}'"
        if (left_over := self._settle(kind, type_)) is not None:
            return left_over
        if kind != "head":
            self._check_set_ups(where)
        # a head has the results
        hours = self.caps.max_hours - self.fleet.bill().hours if kind == "head" else 0.0
        offers = find_offers(self.fleet.vast, wish, self.fleet.state.blocked_machines(), where, hours=hours)
        if quoted is not None:
            cheapest = min(offer.dph for offer in offers)
            if cheapest > PRICE_MAY_RISE * quoted:
                raise CapError(
                    f"the price has risen: ${quoted:.3f}/h was shown, and the cheapest machine costs ${cheapest:.3f}/h now. Nothing "
                    "was rented; run `ray up` again to see the new price"
                )
            offers = [offer for offer in offers if offer.dph <= PRICE_MAY_RISE * quoted]
        # the cheapest for the work may cost more by the hour than there is room for, where another does not
        offers = self.caps.within(self.fleet.bill(), offers)
        refusals: list[str] = []
        for offer in offers[:MOST_OFFERS]:
            if not self._take(offer):
                continue
            try:
                node = self._ask(offer, wish, kind, type_, env, onstart)
            except VastRefusedError as error:  # sold to somebody else meanwhile
                refusals.append(str(error))
                continue
            finally:
                self.in_hand.discard(offer.id)
            if node is not None:
                return node
            refusals.append(f"offer {offer.id}: no reply, and no instance of ours within {self.found_within_s:.0f} s")
        raise NoOfferError(
            f"{where}: {len(offers)} offers fit, none of the first {min(len(offers), MOST_OFFERS)} could be rented; the last answer: "
            f"{refusals[-1] if refusals else 'all are being asked for already'}"
        )

    def _check_set_ups(self, where: str) -> None:
        """Raise NoOfferError where machine after machine was paid for and none of them could be set up, as where a package index is out
        of reach, or constraints that no node can meet: the next would not be either."""
        failed = self.fleet.state.failed_set_ups(SAME_FAULT_S)
        tags = self.fleet.state.read()["tags"].values()
        well = any(t.get(TAG_RAY_NODE_KIND) == "worker" and t.get(TAG_RAY_NODE_STATUS) == "up-to-date" for t in tags)
        if len(failed) >= SAME_FAULT and not well:
            minutes = max(1, round((SAME_FAULT_S - failed[SAME_FAULT - 1]) / 60))
            raise NoOfferError(
                f"{where}: the set-up of {len(failed)} machines failed within the hour, and no worker's went well: it is hardly the "
                f"machines. No other is rented for {minutes} minutes; what failed stands in /tmp/ray/session_latest/logs/monitor.* on the head"
            )

    def _take(self, offer: Offer) -> bool:
        with self.lock:
            if offer.id in self.in_hand:
                return False
            self.in_hand.add(offer.id)
            return True

    def _ask(
        self,
        offer: Offer,
        wish: Wish,
        kind: str,
        type_: str,
        env: Callable[[int, Offer], Mapping[str, str]],
        onstart: str,
    ) -> Node | None:
        """The node; None where nothing of ours came of it. VastRefusedError where the offer is not to be had."""
        with self.lock:
            self.caps.check(self.fleet.bill(), offer.dph, offer.text)
            label = self._reserve(kind, type_, offer.dph)
            self.asking.add(label.attempt)
        try:
            return self._request(offer, wish, label, dict(env(label.k, offer)), onstart)
        except KeyboardInterrupt:  # before the reply, it may be: the next request finds out, as after a lost one
            if label.attempt in self.fleet.state.read()["intents"]:
                self._leave_open(label)
            raise
        finally:
            self.asking.discard(label.attempt)

    def _request(
        self, offer: Offer, wish: Wish, label: Label, surroundings: dict[str, str], onstart: str
    ) -> Node | None:
        fleet = self.fleet
        logger.info("renting offer %s as %s: %s", offer.id, label, offer.text)
        try:
            id_ = fleet.vast.create(
                offer.id, image=wish.image, disk=wish.disk_gb, label=str(label), env=surroundings,
                onstart_cmd=onstart, ssh=True, direct=True, bid_price=offer.bid,
            )  # fmt: skip
        except VastBusyError as error:
            try:
                found = self._find(label) if error.done else None
            except VastError as silent:
                self._leave_open(label)
                raise VastBusyError(
                    f"whether offer {offer.id} was rented as {label} is not known: the reply was lost ({error}), and the listing "
                    f"does not answer ({silent}). No other machine is rented until it does; run it again, or see `pairscope vast orphans`"
                ) from error
            if found is None:
                self._give_up(label, open_=error.done)
                if not error.done:
                    raise
                return None
            id_ = int(found.id)
        except VastError:
            self._give_up(label, open_=False)
            raise
        node = Node(str(id_), label, {"id": id_, "label": str(label), "machine_id": offer.machine, "dph_total": offer.dph,
                                      "extra_env": [list(pair) for pair in surroundings.items()]})  # fmt: skip
        fleet.add(node)
        try:
            self._attach(node)
        except VastRefusedError as error:
            if error.status == 404:  # gone again at once: the listing will say so
                logger.warning("instance %s was gone before it got its ssh key", id_)
                return node
            fleet.destroy(str(id_), "its ssh key could not be attached")
            raise
        except VastError:
            fleet.destroy(str(id_), "its ssh key could not be attached")
            raise
        return node

    def _reserve(self, kind: str, type_: str, dph: float) -> Label:
        """A label with the lowest free k: not that of a node, of one on its way out, or of a request whose outcome is open."""
        if kind == "head":
            self._refuse_second_head({n.id: n.label.kind for n in self.fleet.listing().values()})
        with self.fleet.state.edit() as content:
            now = time.time()
            if kind == "head":  # under the lock that every `ray up` of this machine takes
                asked = [a for a, v in open_requests(content).items() if v["kind"] == "head"]
                seen = {id_: str(v.get("kind", "")) for id_, v in content["seen"].items()}
                self._refuse_second_head(seen | {f"(request {a}, not answered yet)": "head" for a in asked})
            used = {n.label.k for n in [*self.fleet.nodes.values(), *self.fleet.doomed.values()]}
            used |= {v["k"] for v in content["destroyed"].values() if "gone" not in v}
            used |= {v["k"] for v in open_requests(content).values()}
            used |= {v["k"] for v in content["abandoned"].values() if now - v["since"] < OPEN_S}
            k = HEAD if kind == "head" else next((k for k in range(HEAD + 1, self.places + 1) if k not in used), 0)
            if not k:
                raise NoOfferError(
                    f"all {self.places} places of the mesh are taken, also by machines that were destroyed and are not shown to be gone: "
                    "see `pairscope vast nodes`"
                )
            label = Label(self.fleet.cluster, kind, k, type_, new_attempt())
            content["intents"][label.attempt] = {"k": k, "kind": kind, "since": now, "dph": dph}
        return label

    def _refuse_second_head(self, there: Mapping[str, str]) -> None:
        """Raise HeadError where one of these, id -> kind, is a head that is not on its way out."""
        going = self.fleet.state.read()["destroyed"]
        heads = [id_ for id_, kind in there.items() if kind == "head" and id_ not in going]
        if heads:
            raise HeadError(
                f"cluster '{self.fleet.cluster}' has a head already, or one is being rented: {', '.join(heads)}. Is another `ray up` at "
                "work? Nothing was rented here; wait for it, or look with `pairscope vast nodes`. Where none is, `ray down` clears what one that was "
                "interrupted has left"
            )

    def _find(self, label: Label) -> Node | None:
        """The instance that a request of unknown outcome made, by its label; None if a listing shows none after found_within_s.

        Raises VastError where the listing does not answer by then: the machine may be there.
        """
        vast = self.fleet.vast
        waited, pause = 0.0, min(2.0, self.found_within_s / 4)
        while True:
            silent: VastError | None = None
            try:
                for node in self.fleet.listing().values():
                    if node.label.attempt == label.attempt:
                        logger.info("the reply was lost, but instance %s was rented", node.id)
                        return node
            except VastError as error:
                logger.warning("looking for %s: %s", label, error)
                silent = error
            if waited >= self.found_within_s:
                if silent is not None:
                    raise silent
                return None
            vast.sleep(pause)
            waited += pause

    def _leave_open(self, label: Label) -> None:
        """Remember a request that may have made a machine, until a listing says so or not."""
        with self.fleet.state.edit() as content:
            intent = content["intents"].pop(label.attempt, {"k": label.k, "kind": label.kind, "since": time.time()})
            content["unknown"][label.attempt] = intent | {"type": label.type}

    def _settle(self, kind: str, type_: str) -> Node | None:
        """Find out about requests that no listing had answered for: a machine of this kind and type that one made is taken now.

        Raises VastError where the listing still does not answer: nothing may be rented before it does.
        """
        fleet = self.fleet
        with self.lock:
            content = fleet.state.read()
            if not content["unknown"] and not any(row.get("spare") for row in content["seen"].values()):
                return None
            # whoever was interrupted has not looked for as long as a lost reply is looked for
            young = (
                max((v["since"] for v in content["unknown"].values()), default=0.0) + self.found_within_s - time.time()
            )
            if young > 0:
                fleet.vast.sleep(min(young, self.found_within_s))
            nodes = fleet.refresh(force=True)
            with fleet.state.edit() as changed:
                for attempt in content["unknown"]:  # a listing has answered, and does not show it
                    if attempt in changed["unknown"]:
                        changed["abandoned"][attempt] = changed["unknown"].pop(attempt)
                for id_ in set(nodes) & set(changed["tags"]) & set(changed["seen"]):  # Ray took it as it was listed
                    changed["seen"][id_].pop("spare", None)
                spare = [node for id_, node in nodes.items() if changed["seen"].get(id_, {}).get("spare")]
            for node in spare:
                if (node.label.kind, node.label.type) == (kind, type_):
                    self._attach(node)
                    logger.info("instance %s of an earlier request is taken, whose reply was lost", node.id)
                    self._note(node, spare=False)
                    return node
        return None

    def let_in(self, nodes: Mapping[str, Node]) -> None:
        """Attach our key to machines that were asked for here and have not got it: the reply was lost, or whoever asked was killed
        before. What fails is tried again at the next call, what Vast refuses after REFUSED_S.
        """
        seen = self.fleet.state.read()["seen"]
        for id_, node in nodes.items():
            row = seen.get(id_, {})
            if node.label.kind not in self.fleet.kinds or node.label.attempt in self.asking:
                continue
            if not row.get("asked_here") or row.get("key"):
                continue
            if time.monotonic() - self.refused.get(id_, float("-inf")) < REFUSED_S:
                continue
            try:
                self._attach(node)
            except VastError as error:
                if isinstance(error, VastRefusedError | VastKeyError):
                    self.refused[id_] = time.monotonic()
                logger.warning("instance %s has not got its ssh key: %s", id_, error)

    def _attach(self, node: Node) -> None:
        self.fleet.vast.attach_key(int(node.id), self.key)
        self._note(node, key=True)

    def _note(self, node: Node, **marks: bool) -> None:
        with self.fleet.state.edit() as content:
            if node.id in content["seen"]:
                content["seen"][node.id].update(marks)

    def _give_up(self, label: Label, *, open_: bool) -> None:
        with self.fleet.state.edit() as content:
            intent = content["intents"].pop(label.attempt, None)
            if open_:
                content["abandoned"][label.attempt] = intent or {"k": label.k, "since": time.time()}
