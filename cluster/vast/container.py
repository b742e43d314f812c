"""What a rented container is started with: environment and start script."""

from __future__ import annotations

import base64
import gzip
import time
from pathlib import Path

from capture.errors import ConfigError
from cluster.mesh.ports import HEAD, STATUS, address, block

LONGEST_SCRIPT = 4000  # Vast cuts longer ones


def environment(
    k: int, *, api: str, deadline: int, silence_s: float, owner: str, launch: str, request: str
) -> dict[str, str]:
    """The container's environment. No secret: Vast shows it to anybody who may list instances.

    launch and request are Ray's tags of those names; here they outlive the machine that rented. owner: see keys.owner.
    """
    return {
        "PAIRSCOPE_K": str(k),
        "PAIRSCOPE_API": api,
        "PAIRSCOPE_ASKED": str(int(time.time())),
        "PAIRSCOPE_DEADLINE": str(deadline),
        "PAIRSCOPE_SILENCE_S": f"{silence_s:g}",
        "PAIRSCOPE_HEAD": "" if k == HEAD else f"{address(HEAD)}:{block(HEAD) + STATUS}",
        "PAIRSCOPE_OWNER": owner,
        "PAIRSCOPE_LAUNCH": launch,
        "PAIRSCOPE_REQUEST": request,
    }


def start_script(first: str = "") -> str:
    """The start script: no tmux for ssh logins (Ray's commands would end in it), then the dead-man's switch, then `first`."""
    source = (Path(__file__).parent / "deadman.py").read_bytes()
    packed = base64.b64encode(gzip.compress(source, 9, mtime=0)).decode()
    script = "\n".join(
        [
            "touch ~/.no_auto_tmux",
            "mkdir -p ~/.pairscope && rm -f ~/.pairscope/deadman.beat",
            # in memory where the disk takes no file: full, as that of a machine that starts again may be, or not to be written to
            f'at=~/.pairscope; put() {{ echo {packed} | base64 -d | gunzip > "$at/deadman.py"; }}',
            "put || { at=$(mktemp -d -p /dev/shm); put; }",
            # python3 of the image, whatever it is: nothing is installed yet. Again and again: whatever kills it, as a kernel that
            # is out of memory does, must not leave a machine without it
            """nohup sh -c 'while :; do python3 "$0/deadman.py"; sleep 5; done' "$at" > "$at/deadman.log" 2>&1 < /dev/null &""",
            *([first] if first else []),
        ]
    )
    if len(script) > LONGEST_SCRIPT:
        raise ConfigError(
            f"the start script has {len(script)} characters, Vast takes {LONGEST_SCRIPT}: shorten provider: onstart"
        )
    return script
