"""The label of an instance: the one thing that tells us, from any machine, whose it is and which part it plays.

ps/<cluster>/<h|w>/<k>/<node type>/<attempt>, at most 60 characters. `attempt` is new for every try at renting, so that an
instance whose reply was lost can be found, and one that was given up can be told from its replacement.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from capture.errors import ConfigError
from cluster.mesh.ports import HEAD, MOST_NODES

PREFIX = "ps"
LONGEST = 60
KINDS = {"head": "h", "worker": "w"}
K = re.compile(r"[1-9][0-9]?", re.ASCII)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Label:
    """kind: head or worker. k: the node's number in the mesh, 1 for the head."""

    cluster: str
    kind: str
    k: int
    type: str
    attempt: str

    def __str__(self) -> str:
        return f"{PREFIX}/{self.cluster}/{KINDS[self.kind]}/{self.k}/{self.type}/{self.attempt}"


def new_attempt() -> str:
    return secrets.token_hex(4)


def parse(text: str | None) -> Label | None:
    """The label as we wrote it; None for one that is not ours."""
    parts = (text or "").split("/")
    kinds = {short: kind for kind, short in KINDS.items()}
    if len(parts) != 6 or parts[0] != PREFIX or parts[2] not in kinds or not K.fullmatch(parts[3]):
        return None
    if not NAME.fullmatch(parts[1]):  # it names a folder
        return None
    if int(parts[3]) > MOST_NODES or (kinds[parts[2]] == "head") != (int(parts[3]) == HEAD):  # no place of the mesh
        return None
    return Label(parts[1], kinds[parts[2]], int(parts[3]), parts[4], parts[5])


def check_names(cluster: str, types: list[str]) -> None:
    """Raise ConfigError where a name would not fit into a label."""
    for name in [cluster, *types]:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"'{name}' cannot be part of a Vast label: use letters, digits, '-', '_' and '.' for cluster and node types"
            )
    for name in types:
        long = len(str(Label(cluster, "worker", 48, name, "0" * 8))) - LONGEST
        if long > 0:
            raise ConfigError(
                f"cluster_name '{cluster}' and node type '{name}' are {long} characters too long together: Vast keeps {LONGEST} of a label"
            )
