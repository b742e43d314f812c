"""The provider block of a cluster's YAML: read, checked, and completed for laptop and head."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capture.errors import ConfigError
from cluster.mesh.ports import MOST_NODES
from cluster.vast import keys
from cluster.vast.api import Vast
from cluster.vast.labels import check_names
from cluster.vast.locked import PACKAGES
from cluster.vast.money import SETTINGS as CAPS
from cluster.vast.money import Caps
from cluster.vast.node import Node, listed
from cluster.vast.offers import Wish, read_wish
from cluster.vast.state import cluster_folder

# Ray's own keys, and those that bootstrap and for_head add
FROM_RAY = {"type", "module", "_config_cache_path", "disable_node_updaters", "use_internal_ips"}
OURS = ("offers", "boot_minutes", "head_silence_minutes", "poll_seconds", "onstart", "image_versions")
ROOT = "root"
IDLE_MINUTES = 5  # as Ray's documentation has it; its autoscaler keeps idle machines where the config does not say
SPARE = 4  # places of the mesh for machines on their way out, which keep theirs until they are gone
KNOWN_API_KEY = "~/.config/vastai/vast_api_key"  # where the SDK looks
HUB_LOGIN = "~/.cache/huggingface/token"  # where `hf auth login` puts it; mounted by those who need it


@dataclass(frozen=True)
class Settings:
    """Our keys of the provider block.

    offers: conditions for all node types, see Wish. boot_minutes: until ssh must answer. head_silence_minutes: after which a
    worker that cannot hear its head destroys itself. poll_seconds: one listing serves that long. onstart: a shell line for the
    container's start. image_versions: what the image has, checked against this machine, {python: "3.12", ray: "2.60.0"}. The rest
    is filled in by us.
    """

    offers: Mapping[str, Any] = field(default_factory=dict)
    boot_minutes: float = 15.0
    head_silence_minutes: float = 20.0
    poll_seconds: float = 4.0
    onstart: str = ""
    image_versions: Mapping[str, str] = field(default_factory=dict)
    api_url: str | None = None
    user: str = ROOT
    on_head: bool = False
    slots: int = 2
    public_key: str = ""
    owner: str = ""
    head_type: str = ""
    head_config: Mapping[str, Any] = field(default_factory=dict)
    may_grow: Mapping[str, Any] = field(default_factory=dict)
    mounts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def places(self) -> int:
        """The highest k that a node may have. slots are the nodes that there may be at once, not counting those on their way out."""
        return min(self.slots + SPARE, MOST_NODES)

    @classmethod
    def read(cls, provider: Mapping[str, Any]) -> Settings:
        """Raises ConfigError for a key that nobody knows, and for what looks like a secret."""
        ours = {k: v for k, v in provider.items() if k not in FROM_RAY and k not in CAPS}
        for name in ours:
            if name not in cls.__dataclass_fields__:
                if "key" in name or "token" in name:
                    raise ConfigError(
                        f"provider: '{name}': no secrets here, Ray logs this block; set VAST_API_KEY instead"
                    )
                raise ConfigError(f"provider: unknown key '{name}'; known are {', '.join([*CAPS, *OURS])}")
        for name in ("boot_minutes", "head_silence_minutes", "poll_seconds"):
            value = ours.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"provider: '{name}' is a number above 0, not {value!r}")
        for name, example in (("offers", "{max_dph: 0.8}"), ("image_versions", '{python: "3.12"}')):
            if not isinstance(ours.get(name, {}), Mapping):
                raise ConfigError(f"provider: '{name}' is a mapping such as {example}, not {ours[name]!r}")
        if not isinstance(ours.get("onstart", ""), str):
            raise ConfigError(f"provider: 'onstart' is a line of shell, not {ours['onstart']!r}")
        for name, value in ours.get("image_versions", {}).items():
            if name not in ("python", *PACKAGES) or not isinstance(value, str):
                raise ConfigError(
                    f"provider: image_versions: '{name}: {value}': names are python, {', '.join(PACKAGES)}; versions are text in quotes"
                )
        ours.setdefault("api_url", os.environ.get("VAST_URL"))
        return cls(**ours)

    def wish(self, node_config: Mapping[str, Any], type_: str) -> Wish:
        return read_wish({**self.offers, **node_config}, f"node type '{type_}'")


def check_shape(config: Mapping[str, Any]) -> None:
    """Raise ConfigError where what we read of a cluster's config is missing, or is not the kind of value that it has to be."""
    if not isinstance(config.get("cluster_name"), str):
        raise ConfigError(f"'cluster_name' is text that names the cluster, not {config.get('cluster_name')!r}")
    for name in ("provider", "available_node_types"):
        if not isinstance(config.get(name), Mapping):
            raise ConfigError(f"'{name}' is a mapping, see ray_cluster.yaml, not {config.get(name)!r}")
    types = config["available_node_types"]
    for name, node_type in types.items():
        if not isinstance(name, str):
            raise ConfigError(f"available_node_types: {name!r} is no text; put the name in quotes")
        if not isinstance(node_type, Mapping):
            raise ConfigError(f"node type '{name}' is a mapping with resources and node_config, not {node_type!r}")
        if not isinstance(node_type.get("node_config"), Mapping):
            raise ConfigError(
                f"node type '{name}': 'node_config' is a mapping such as {{gpus: [RTX 4090], num_gpus: 1}}, not "
                f"{node_type.get('node_config')!r}; {{}} takes all from provider: offers"
            )
    for where, part in (("", config), *((f"node type '{name}': ", node_type) for name, node_type in types.items())):
        docker = part.get("docker")
        if any(docker.values()) if isinstance(docker, Mapping) else docker:
            raise ConfigError(
                f"{where}'docker' is not heeded: a machine of Vast's is a container already. Name its image under provider: offers: image (or "
                "in a node_config), and take this section out"
            )
    for name in Settings.__dataclass_fields__:
        if name in config["provider"] and name not in OURS:
            raise ConfigError(
                f"provider: '{name}' is filled in by pairscope and cannot be given; known are {', '.join([*CAPS, *OURS])}"
            )
    head = config.get("head_node_type")
    if not isinstance(head, str) or head not in types:
        raise ConfigError(f"head_node_type {head!r} is none of its node types, which are {', '.join(types) or 'none'}")
    check_names(config["cluster_name"], list(types))


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what Ray reads only once machines are rented, or takes for never. Raises ConfigError where we cannot say it."""
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        if not config.get(name):
            raise ConfigError(
                f"'{name}' is missing, and without it no Ray starts on a rented machine; take it over from ray_cluster.yaml"
            )
    return {"initialization_commands": [], "idle_timeout_minutes": IDLE_MINUTES, **config}


def bootstrap(config: dict[str, Any]) -> dict[str, Any]:
    """The cluster's config with all that the laptop adds. Raises ConfigError before anything is rented."""
    check_shape(config)
    config = complete(config)
    provider = dict(config["provider"])
    config["provider"] = provider
    settings = Settings.read(provider)
    Caps.read(provider)
    types = config["available_node_types"]
    for name, node_type in types.items():
        wish = settings.wish(node_type["node_config"], name)
        have = node_type.get("resources", {}).get("GPU")
        if have is not None and have != wish.num_gpus:
            raise ConfigError(
                f"node type '{name}': resources say {have} GPU, node_config num_gpus says {wish.num_gpus}"
            )
        for key in ("min_workers", "max_workers"):
            _check_count(node_type.get(key, 0), f"node type '{name}': '{key}'")
    _check_count(config.get("max_workers", 0), "'max_workers'")
    slots = config.get("max_workers", 0) + 1
    if slots > MOST_NODES:
        raise ConfigError(f"max_workers {slots - 1}: the mesh has room for {MOST_NODES - 1} workers")
    head = config["head_node_type"]
    user = ssh_user(config.get("auth") or {}, settings.api_url)
    provider |= {"slots": slots, "head_type": head, "head_config": types[head]["node_config"], "user": user}
    provider["mounts"] = dict(config.get("file_mounts", {}))
    most = {name: min(t.get("max_workers", slots - 1), slots - 1) for name, t in types.items()}
    least = {}
    for name, n in most.items():
        wanted, counted = types[name].get("min_workers", 0), int(name == head)  # Ray counts the head among them
        if wanted > n + counted:
            raise ConfigError(f"node type '{name}': min_workers {wanted} is more than there may be, {n}")
        least[name] = max(wanted - counted, 0)
    provider["may_grow"] = {
        name: {"most": n, "least": least[name], "node_config": types[name]["node_config"]}
        for name, n in most.items()
        if n
    }
    if settings.api_url:
        provider["api_url"] = settings.api_url
    folder = cluster_folder(config["cluster_name"])
    vast = Vast(url=settings.api_url)
    check_name(config["cluster_name"], folder, vast)
    keys.make_missing(folder)
    config["auth"] = {
        **(config.get("auth") or {}),
        "ssh_user": user,
        "ssh_private_key": str(folder / keys.SSH_KEY),
    }
    config["file_mounts"] = {
        **config.get("file_mounts", {}),
        "~/.ray/auth_token": str(folder / keys.TOKEN),
        "~/.pairscope/mesh/key": str(folder / keys.MESH_KEY),
        "~/.pairscope/mesh/key.pub": str(folder / f"{keys.MESH_KEY}.pub"),
        KNOWN_API_KEY: str(folder / keys.API_KEY),
    }
    return config


def _check_count(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{what} is a whole number from 0 up, not {value!r}")


def ssh_user(auth: Mapping[str, Any], api_url: str | None) -> str:
    """Who logs in to the nodes, also through the mesh. ConfigError for another than root at Vast's own machines: its images let in
    nobody else, and the switch that ends a node, which they start as root, would look for its deadline in another home."""
    user = auth.get("ssh_user", ROOT)
    if not isinstance(user, str) or not user:
        raise ConfigError(f"auth: 'ssh_user' is a name, not {user!r}")
    if user != ROOT and api_url is None:
        raise ConfigError(
            f"auth: 'ssh_user' is {user!r}: Vast's machines let in {ROOT} only; write {ROOT}, or leave it out"
        )
    return user


def check_name(cluster: str, folder: Path, vast: Vast) -> None:
    """Raise ConfigError where the cluster's name is someone else's.

    The listing also proves the API key, before anything else is done with it.
    """
    check_ours(cluster, folder, listed(vast, cluster))


def check_ours(cluster: str, folder: Path, nodes: Iterable[Node]) -> None:
    """Raise ConfigError where instances of the cluster's name were made with other keys than lie in its folder."""
    have_keys = (folder / keys.SSH_KEY).exists()
    ours = keys.owner(folder) if have_keys else ""
    for node in nodes:
        if not have_keys or node.env.get("PAIRSCOPE_OWNER", ours) != ours:
            raise ConfigError(
                f"cluster_name '{cluster}' is in use by a cluster that was not made from this machine (instance {node.id}, and not with "
                f"the keys in '{folder}'); choose another name, or copy that folder from where it was made, or end that cluster with "
                f"`pairscope vast destroy --cluster {cluster}`"
            )


def for_head(config: dict[str, Any], public_key: str, owner: str) -> dict[str, Any]:
    """The config that goes to the head: the Vast key and a login at the hub stay there and are not passed on to workers."""
    config["file_mounts"] = {
        remote: local for remote, local in config["file_mounts"].items() if remote not in (KNOWN_API_KEY, HUB_LOGIN)
    }
    # where files lie at home is nobody's business
    ours = {"on_head": True, "public_key": public_key, "owner": owner, "mounts": {}}
    config["provider"] = config["provider"] | ours
    return config
