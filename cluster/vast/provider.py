"""Ray's external node provider for Vast.ai. `provider: {type: external, module: cluster.vast.provider.VastNodeProvider, …}`

The same class runs on the laptop (`ray up`, `exec`, `down`), where it looks after the head, and in the autoscaler on the head,
where it looks after the workers, keeps the mesh's peers file and ends the cluster when a limit is reached.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import click
from ray.autoscaler._private import updater
from ray.autoscaler._private.cli_logger import cli_logger
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    TAG_RAY_CLUSTER_NAME,
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_LAUNCH_REQUEST,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from capture.errors import PairscopeError
from cluster.mesh.daemon import UNWATCHED_S
from cluster.mesh.peers import mesh_folder, note_poll, write_deadline, write_peers
from cluster.mesh.ports import HEAD, address
from cluster.vast import before_up, headkey, keys, machines, nodefiles
from cluster.vast.api import Vast
from cluster.vast.container import environment, start_script
from cluster.vast.errors import GoneError, VastError
from cluster.vast.fleet import Fleet, even_unnoted
from cluster.vast.money import Caps
from cluster.vast.node import Node
from cluster.vast.offers import Offer, Wish
from cluster.vast.rent import Renter
from cluster.vast.runner import Place, VastCommandRunner
from cluster.vast.settings import Settings, bootstrap, check_ours, for_head
from cluster.vast.state import SET_UP_FAILED, State, cluster_folder, open_requests

logger = logging.getLogger(__name__)
MORE_S = 120.0  # that Ray waits for a node beyond the time of its boot, so that it sees that we have ended it
F = TypeVar("F", bound=Callable[..., Any])


def _plainly(method: F) -> F:
    """On the laptop an error of ours is one line for the user and not Ray's traceback."""

    @wraps(method)
    def wrapped(self: VastNodeProvider, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except PairscopeError as error:
            if self.settings.on_head:
                raise
            raise click.ClickException(f"{type(error).__name__}: {error}") from error

    return wrapped  # type: ignore[return-value]


class VastNodeProvider(NodeProvider):
    """One cluster's nodes. Thread-safe. An API that fails makes a method raise; none ever answers with an empty list instead."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        try:
            self.settings = Settings.read(provider_config)
            self.folder = cluster_folder(cluster_name)
            self.vast = Vast(url=self.settings.api_url)
            if not self.settings.on_head:
                keys.make_missing(self.folder)
        except PairscopeError as error:
            raise click.ClickException(f"{type(error).__name__}: {error}") from error
        self.state = State(self.folder)
        s = self.settings
        _wait_for_boots(s.boot_minutes * 60)
        kinds = {"worker"} if s.on_head else {"head"}
        self.fleet = Fleet(
            self.vast, self.state, cluster_name, kinds, boot_s=s.boot_minutes * 60, poll_s=s.poll_seconds
        )
        self.caps = Caps.read(provider_config)
        self.renter = Renter(self.fleet, self.caps, s.public_key or self._public_key(), places=s.places)
        self.addresses: dict[str, tuple[str, int]] = {}
        self.asked: set[str] = set()  # workers that told how fast they download
        self.checked = False
        self.quoted: float | None = None  # dollars an hour of the head, as shown

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Check the whole config and add what the laptop makes itself: keys, token, their file mounts."""
        try:
            return bootstrap(cluster_config)
        except PairscopeError as error:
            raise click.ClickException(f"{type(error).__name__}: {error}") from error

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        return for_head(cluster_config, self._public_key(), keys.owner(self.folder))

    @_plainly
    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Ids of the nodes with these tags. One call in poll_seconds asks Vast. Raises VastError rather than guess."""
        nodes = self.fleet.refresh()
        self._refuse_others(nodes)
        self.renter.let_in(nodes)
        if self.settings.on_head:
            self._after_listing(nodes)
        found = [id_ for id_ in nodes if _matches(self.node_tags(id_), tag_filters)]
        if tag_filters == {TAG_RAY_NODE_KIND: "head"} and before_up.ray_command() == "up" and not self.checked:
            self._check(nodes, [nodes[id_] for id_ in found])
            if found:
                headkey.ensure(self.vast, self.cluster_name, self.state)
        return found

    @_plainly
    def nodes_for_teardown(self, tag_filters: dict[str, str]) -> list[str]:
        """All that is there or cannot be shown to be gone, from a fresh listing, also those that are on their way out."""
        self._refuse_others(self.fleet.listing())
        kind = tag_filters.get(TAG_RAY_NODE_KIND)
        return [id_ for id_, its in self.fleet.remaining().items() if kind in (None, its)]

    def is_running(self, node_id: str) -> bool:
        return self.fleet.is_running(node_id)

    def is_terminated(self, node_id: str) -> bool:
        """True only where Vast was heard to say so; while it cannot be reached a node counts as there."""
        try:
            return node_id not in self.fleet.refresh()
        except PairscopeError as error:
            logger.warning("cannot tell whether instance %s is there: %s", node_id, error)
            return False

    def node_tags(self, node_id: str) -> dict[str, str]:
        """From the label and the environment the node was made with, then what was set since on this machine."""
        node = self.fleet.get(node_id)
        if node is None:
            return {}
        made = {
            TAG_RAY_CLUSTER_NAME: self.cluster_name,
            TAG_RAY_NODE_KIND: node.label.kind,
            TAG_RAY_USER_NODE_TYPE: node.label.type,
            TAG_RAY_NODE_NAME: f"ray-{self.cluster_name}-{node.label.kind}",
            TAG_RAY_LAUNCH_CONFIG: node.env.get("PAIRSCOPE_LAUNCH", ""),
            TAG_RAY_LAUNCH_REQUEST: node.env.get("PAIRSCOPE_REQUEST", ""),
            TAG_RAY_NODE_STATUS: "uninitialized",
        }
        return {k: v for k, v in made.items() if v} | self.state.read()["tags"].get(node_id, {})

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        with self.state.edit() as content:
            content["tags"].setdefault(node_id, {}).update(tags)

    def external_ip(self, node_id: str) -> str | None:
        node = self.fleet.get(node_id)
        return node.ssh[0] if node and node.ssh else None

    def internal_ip(self, node_id: str) -> str | None:
        """The node's address in the mesh, 127.0.1.k."""
        node = self.fleet.get(node_id)
        return address(node.label.k) if node else None

    @_plainly
    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Rent `count` nodes one after the other. What was rented before an error stays, and is listed."""
        made = {}
        kind, type_ = tags[TAG_RAY_NODE_KIND], tags[TAG_RAY_USER_NODE_TYPE]
        wish = self.settings.wish(node_config, type_)

        def env(k: int, offer: Offer) -> Mapping[str, str]:
            return environment(
                k, api=self.vast.url, deadline=self.caps.deadline(self.fleet.bill(), offer.dph),
                silence_s=0 if k == HEAD else self.settings.head_silence_minutes * 60, owner=self.settings.owner or keys.owner(self.folder),
                launch=tags.get(TAG_RAY_LAUNCH_CONFIG, ""), request=tags.get(TAG_RAY_LAUNCH_REQUEST, ""),
            )  # fmt: skip

        if kind == "head":
            before_up.refuse_to_rent(self.cluster_name)
            if not self.checked:
                self._check(self.fleet.refresh(), [])
            headkey.ensure(self.vast, self.cluster_name, self.state)
        for _ in range(count):
            if kind == "worker" and len(self.fleet.nodes) >= self.settings.slots:
                raise click.ClickException(f"the cluster has its {self.settings.slots} nodes (max_workers + 1)")
            quoted = self.quoted if kind == "head" else None
            node = self.renter.rent(wish, kind, type_, env, start_script(self.settings.onstart), quoted=quoted)
            if kind == "head":
                cli_logger.print("Rented instance {} for ${}/h.", node.id, f"{node.dph:.3f}")
            self.set_node_tags(node.id, tags)
            made[node.id] = {"label": str(node.label)}
            if kind == "head":
                with self.state.edit() as content:
                    content["made"] = before_up.as_made(self.settings)
                    content["deadline"] = {}  # it has the one that it was made with
        return made

    @_plainly
    def terminate_node(self, node_id: str) -> None:
        self.terminate_nodes([node_id])

    @_plainly
    def terminate_nodes(self, node_ids: list[str]) -> None:
        """Destroy all and see that each is gone; what is left is named in an error after all were tried.

        A machine whose set-up failed is not rented again.
        """
        for id_ in node_ids:
            node = self.fleet.get(id_)
            if node and self.node_tags(id_).get(TAG_RAY_NODE_STATUS) == "update-failed":
                with even_unnoted(id_):
                    self.state.block_machine(node.machine, SET_UP_FAILED)
            if node and node.label.kind == "head" and not self.settings.on_head:
                before_up.refuse_to_replace(node)
                machines.fetch(node, self.folder, self.settings.user, self.state)
        self.fleet.destroy_all(node_ids, "Ray asked for it")

    def cleanup_cluster_resources(self) -> None:
        """At the end of `ray down`: look once more, since instances have been seen to come back.

        Keys and books stay while anything cannot be shown to be gone. Ray makes a warning of any error raised here, so that the
        command would end well: it is ended here instead.
        """
        self.vast.sleep(self.settings.poll_seconds)
        try:
            self.fleet.destroy_all(self.fleet.remaining(), "left after ray down")
        except PairscopeError as error:
            raise SystemExit(f"{type(error).__name__}: {error}. Keys and state are kept: `ray down` again") from error
        asked = open_requests(self.state.read())
        headkey.end(self.vast, self.cluster_name, self.state)
        if asked:
            cli_logger.warning(
                "A request for a machine of {} is not answered yet: look with `pairscope vast orphans` in a quarter of an hour.",
                self.cluster_name,
            )
        cli_logger.print("Vast lists no instance labelled for the cluster {}.", self.cluster_name)

    def get_command_runner(
        self, log_prefix: str, node_id: str, auth_config: dict[str, Any], cluster_name: str, process_runner: Any,
        use_internal_ip: bool, docker_config: dict[str, Any] | None = None,
    ) -> VastCommandRunner:  # fmt: skip
        place = Place(
            f"vast-{node_id}",
            self.folder / keys.KNOWN_HOSTS,
            lambda: self._wait_ssh(node_id),
            lambda: self._files(node_id),
        )
        return VastCommandRunner(
            place, log_prefix=log_prefix, node_id=node_id, provider=self, auth_config=auth_config, cluster_name=cluster_name,
            process_runner=process_runner, use_internal_ip=use_internal_ip,
        )  # fmt: skip

    def _check(self, nodes: Mapping[str, Node], heads: list[Node]) -> None:
        """What `ray up` looks at before it asks; without a head also the price of one."""
        self._refuse_others(nodes)
        for head in heads:  # it knows better than this machine when its workers went
            machines.fetch(head, self.folder, self.settings.user, self.state)
        self.quoted = before_up.check(self.settings, self.caps, self.fleet, heads)
        self.checked = True

    def _refuse_others(self, nodes: Mapping[str, Node]) -> None:
        """On the laptop: raise ConfigError where the name is somebody else's by now. bootstrap_config looks at that too, but Ray
        caches what it returned, and `ray down` with that would end their cluster."""
        if not self.settings.on_head:
            check_ours(self.cluster_name, self.folder, nodes.values())

    def _wait_ssh(self, node_id: str) -> tuple[str, int]:
        until = time.monotonic() + self.settings.boot_minutes * 60
        while time.monotonic() < until:
            if self.is_terminated(node_id):
                raise GoneError(f"instance {node_id} is gone")
            node = self.fleet.get(node_id)
            if node and node.ssh:
                return node.ssh
            time.sleep(self.settings.poll_seconds)
        raise VastError(f"instance {node_id} had no ssh address for {self.settings.boot_minutes:g} minutes")

    def _files(self, node_id: str) -> dict[str, str]:
        """What a node that is being set up is told."""
        node = self.fleet.get(node_id)
        if node is None:
            return {}
        places = self.settings.places
        if node.label.kind == "head":
            # until the autoscaler there says otherwise: what other nodes cost by then is in its books
            deadline = self.caps.deadline(self.fleet.bill(), node.dph)
            with self.state.edit() as content:
                content["deadline"] = {"at": deadline}
            return nodefiles.for_head(node, places, self.state, deadline)
        head = next((n for n in self.fleet.refresh().values() if n.label.kind == "head"), None)
        return nodefiles.for_worker(node, head, places, self.settings.user)

    def _after_listing(self, nodes: dict[str, Node]) -> None:
        """On the head: tunnels to the workers, and the end of the cluster when a limit is reached."""
        workers = [n for n in nodes.values() if n.label.kind == "worker"]
        # kept while the node is: an address that a listing leaves out for once must not cut the tunnel under running actors
        self.addresses |= {n.id: n.ssh for n in workers if n.ssh and n.status == "running"}
        s = self.settings
        write_peers(nodefiles.heads_mesh(workers, self.addresses, s.places, self.folder, s.user), mesh_folder())
        wanted = float(s.offers.get("min_inet_down", Wish.min_inet_down))
        machines.look_at([n for n in workers if n.id in self.addresses], self.asked, self.state, wanted)
        over = self.caps.exceeded(self.fleet.bill())
        if over:
            logger.error("the cluster ends: %s", over)
            try:
                self.fleet.destroy_all([n.id for n in workers], over)
            finally:  # the head, which does this, last; a worker that will not go hears no head then, and ends itself
                self.fleet.destroy_all([n.id for n in nodes.values() if n.label.kind == "head"], over)
        # last: where any of this fails for long, workers take the head for silent, and the head has its own last word
        for node in nodes.values():
            if node.label.kind == "head":
                when = self.caps.last_word(self.fleet.bill(), node.dph, UNWATCHED_S, s.head_silence_minutes * 60)
                write_deadline(mesh_folder(), when)
        note_poll(mesh_folder())

    def _public_key(self) -> str:
        return (self.folder / f"{keys.SSH_KEY}.pub").read_text().strip()


def _wait_for_boots(boot_s: float) -> None:
    """Make Ray wait for a node's ssh until we have given the node up. After its own 15 minutes `ray up` would fail and leave a head that
    is still booting, which nobody looks at from then on. Ray reads the time where it waits and has no public way to set it."""
    updater.AUTOSCALER_NODE_START_WAIT_S = max(updater.AUTOSCALER_NODE_START_WAIT_S, int(boot_s + MORE_S))


def _matches(tags: dict[str, str], wanted: dict[str, str]) -> bool:
    return all(tags.get(k) == v for k, v in wanted.items())
