"""The way to a cluster's head, by the road that `ray exec` takes: the config, its node provider, its ssh options.

Ray has no public function that returns it, so two private ones are used here and nowhere else.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

from capture.errors import ConfigError, PairscopeError
from cluster.collect_errors import ClusterGoneError, UnreachableError
from cluster.collect_source import Link

CONNECT_S = 20


class HeadWay:
    """Finds the head of a cluster's YAML. One listing of its instances serves a look and the fetches after it."""

    def __init__(self, path: str, name: str | None = None) -> None:
        """name: in the place of the file's, as `ray up -n` was given it. Raises ConfigError where the file is no cluster's."""
        self.path = path
        self.config: dict[str, Any] = {}
        self.provider: Any = None
        self.name = name or _read(path)["cluster_name"]
        self.up = shlex.join(["ray", "up", path, *(["-n", name] if name else [])])

    def __call__(self) -> Link:
        """Raises ClusterGoneError, UnreachableError, and what the provider says of keys."""
        with _quietly():
            if self.provider is None:
                self._open()
            head = self._head()
            if self.provider.external_ip(head) is None:  # the runner would wait for one as long as for a boot
                raise UnreachableError(f"the head, instance {head}, has no ssh address: it boots, or was stopped")
            with _explained():
                runner = self.provider.get_command_runner(
                    "", head, self.config["auth"], self.name, subprocess, False, self.config.get("docker")
                )  # fmt: skip
                host = runner._get_ssh_target()
            options = runner.ssh_options
            # a shared connection would stay behind and hold our pipes open
            options.arg_dict = {k: v for k, v in options.arg_dict.items() if not k.startswith("Control")}
            options.arg_dict["BatchMode"] = "yes"
            return Link(("ssh", *options.to_ssh_options_list(timeout=CONNECT_S)), f"{runner.ssh_user}@{host}")

    def _open(self) -> None:
        from ray.autoscaler._private.commands import _bootstrap_config
        from ray.autoscaler._private.providers import _get_node_provider

        with _explained():
            try:
                self.config = _bootstrap_config(_read(self.path) | {"cluster_name": self.name})
                self.provider = _get_node_provider(self.config["provider"], self.name)
            except (PairscopeError, click.ClickException):
                raise
            except Exception as error:  # whatever Ray says of a config that it cannot use
                line = next(iter(str(error).splitlines()), "")
                raise ConfigError(
                    f"'{self.path}' is no cluster config that Ray can use ({type(error).__name__}: {line[:300]}); name the file that `ray up` "
                    "was given, or see ray_cluster.yaml"
                ) from error

    def _head(self) -> str:
        from ray.autoscaler.tags import TAG_RAY_NODE_KIND

        with _explained():
            heads = self.provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "head"})
        if not heads:
            raise ClusterGoneError(
                f"cluster '{self.name}' has no head: it was never up, or is gone; `{self.up}` makes it"
            )
        return str(heads[0])


def _read(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"'{path}' cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not {"cluster_name", "provider"} <= set(content):
        raise ConfigError(
            f"'{path}' is no cluster config of Ray's (no cluster_name and provider in it); name the file that `ray up` was given"
        )
    return content


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What a provider raises, as our errors: too busy or out of reach is for later, gone is the end, all else for the user."""
    try:
        yield
    except PairscopeError as error:
        raise _kind(error) from error
    except click.ClickException as error:  # what our provider makes of an error of ours on a laptop
        if isinstance(error.__cause__, PairscopeError):
            raise _kind(error.__cause__) from error
        raise ConfigError(error.format_message()) from error


def _kind(error: PairscopeError) -> PairscopeError:
    from cluster.vast.errors import GoneError, VastBusyError, VastError

    if isinstance(error, GoneError):
        return ClusterGoneError(f"the cluster's head is gone: {error}")
    return UnreachableError(str(error)) if isinstance(error, VastBusyError) or type(error) is VastError else error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Ray tells of its config cache on stdout, which belongs to results, and of fields that it added itself in its log."""
    log = logging.getLogger("ray")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
