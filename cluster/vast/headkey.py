"""The API key that the head holds: never the user's own, since the host of a rented machine can read all that is on it.

It is made when the head is, may do what the autoscaler does and no more, lies in one file of mode 0600 on the laptop and on the
head, and is deleted by `ray down`. Rights: docs.vast.ai/api-reference/permissions.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from cluster.vast import keys
from cluster.vast.api import Vast
from cluster.vast.errors import VastError, VastKeyError
from cluster.vast.state import State

logger = logging.getLogger(__name__)

# list and show; rent, attach a key, destroy; search offers. Nothing about money, the account or other keys.
RIGHTS: dict[str, dict[str, dict[str, str]]] = {"api": {"instance_read": {}, "instance_write": {}, "misc": {}}}
GIVEN = "VAST_HEAD_API_KEY"


def name(cluster: str) -> str:
    """The key's name in the account."""
    return f"pairscope head of {cluster}"


def ensure(vast: Vast, cluster: str, state: State) -> None:
    """Have a key for the head in the cluster's folder: the one given in VAST_HEAD_API_KEY, the one made before if Vast still
    knows it, or a new one. Raises VastKeyError where the user's key may not make keys. Costs nothing, so it comes before renting.
    """
    path = state.folder / keys.API_KEY
    given = os.environ.get(GIVEN)
    if given:
        try:
            own = Vast(given, vast.url, vast.sleep)
            own.instances()
        except VastKeyError as error:
            raise VastKeyError(f"{GIVEN}: {error}") from error
        keys.write_secret(path, own.key)
        return
    with state.alone("head_key"):  # a second `ray up` would take the first one's key for a forgotten one
        if not (path.exists() and _works(path, vast)):
            forget(vast, cluster, state)  # of a try whose reply was lost, or one that Vast no longer knows
            _make(vast, cluster, state)


def _make(vast: Vast, cluster: str, state: State) -> None:
    try:
        number, secret = vast.create_key(name(cluster), RIGHTS)
    except VastKeyError as error:
        raise VastKeyError(
            f"the head gets an API key of its own, and yours may not make one ({str(error).split(';')[0]}). Give yours the rights user_read and "
            f"user_write as well, or make a key with {', '.join(RIGHTS['api'])} only and set {GIVEN} to it"
        ) from error
    with state.edit() as content:
        content["head_key"] = {"id": number}
    keys.write_secret(state.folder / keys.API_KEY, secret)


def forget(vast: Vast, cluster: str, state: State) -> None:
    """Delete the keys that were made for this cluster's head. One that cannot be deleted is named in a warning."""
    known = state.read()["head_key"].get("id")
    found = {known} if known else set()
    try:
        found |= set(vast.keys_named(name(cluster)))
    except VastError as error:
        logger.debug("cannot list API keys (%s): only the one made here is deleted", error)
    for number in sorted(found):
        try:
            vast.delete_key(number)
        except VastError as error:
            logger.warning(
                "API key %s, '%s', is still there (%s): delete it at cloud.vast.ai/manage-keys",
                number,
                name(cluster),
                error,
            )
            continue
        if number == known:
            with state.edit() as content:
                content["head_key"] = {}


def end(vast: Vast, cluster: str, state: State) -> None:
    """After the cluster's last instance is shown to be gone: no key of it is left, and the next of its name begins with empty books."""
    forget(vast, cluster, state)
    state.begin_anew()
    keys.remove(state.folder)


def _works(path: Path, vast: Vast) -> bool:
    """Whether Vast knows the key in this file."""
    try:
        Vast(path.read_text().strip(), vast.url, vast.sleep).instances()
    except VastKeyError:
        return False
    return True
