"""Ray's ssh, taught that a Vast node has a port of its own and a host key that must stay the same."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.autoscaler._private.command_runner import SSHCommandRunner

from cluster.vast.before_up import CLOCK_S
from cluster.vast.keys import as_option


@dataclass(frozen=True)
class Place:
    """How to reach one node. wait_ssh blocks until the address is known. files: written to the node before its set-up."""

    alias: str
    known_hosts: Path
    wait_ssh: Callable[[], tuple[str, int]]
    files: Callable[[], Mapping[str, str]]


class VastCommandRunner(SSHCommandRunner):
    """SSHCommandRunner with Port, HostKeyAlias and a pinned known_hosts file.

    A host key is taken on first contact and from then on has to stay, under the instance's name and not its address, since
    addresses and ports are reused by other machines.
    """

    def __init__(self, place: Place, **common: Any) -> None:
        super().__init__(**common)
        self.place = place
        self.ssh_options.arg_dict |= {
            "HostKeyAlias": place.alias,
            "UserKnownHostsFile": as_option(place.known_hosts),
            "StrictHostKeyChecking": "accept-new",
            "HashKnownHosts": "no",
            "LogLevel": "ERROR",
        }

    def _get_ssh_target(self) -> str:
        self._ensure_ssh_control_path()
        host, port = self.place.wait_ssh()
        self.ssh_options.arg_dict["Port"] = port
        self.ssh_ip = host
        return host

    def _get_node_ip(self) -> str:
        """The ssh address, also where Ray's updater asks for the internal one (version 2 always does)."""
        return self.place.wait_ssh()[0]

    def run(self, *args: Any, ssh_options_override_ssh_key: str = "", **kwargs: Any) -> Any:
        """As Ray's, but initialization commands keep our options too; Ray would start them from a bare set, without the port."""
        return super().run(*args, **kwargs)

    def run_init(self, *, as_head: bool, file_mounts: dict[str, str], sync_run_yet: bool) -> bool:
        """Between file sync and set-up: look at the node's clock, and bring the node its mesh file. Returns False: no set-up has to be
        run again."""
        self.run(clock_check(time.time()))
        for target, text in self.place.files().items():
            with tempfile.NamedTemporaryFile("w", prefix="pairscope-") as note:
                note.write(text)
                note.flush()
                self.run(f"mkdir -p {Path(target).parent}")
                self.run_rsync_up(note.name, target)
        return False

    def remote_shell_command_str(self) -> str:
        target = self._get_ssh_target()
        options = " ".join(self.ssh_options.to_ssh_options_list())
        return f"ssh {options} {self.ssh_user}@{target}\n"


def clock_check(now: float) -> str:
    """A command that fails on a node whose clock is off, which is what its deadline and the cluster's bill are kept by: hours behind,
    it would be rented for hours longer than the limits say; hours ahead, it would end itself, and what lies there, too early."""
    return (
        f'ahead=$(( $(date +%s) - {now:.0f} )); [ "${{ahead#-}}" -le {CLOCK_S:.0f} ] || {{ echo "the clock of this machine is $ahead '
        'seconds ahead, and the limits are kept by it: it cannot be used"; exit 1; }'
    )


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"
