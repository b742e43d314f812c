"""Whether this node has the Python and the package versions that the cluster's maker has. Standard library only.

    python3 -m cluster.vast.locked ~/.pairscope/versions.json

The file was written by the machine that sets this node up: {"python": "3.11", "ray": "2.60.0", ...}. Ray needs the same minor
version of Python and the same Ray on every machine of a cluster, the laptop included.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "pyarrow",
    "pydantic",
    "click",
    "rich",
    "vastai",
)


def versions() -> dict[str, str]:
    """What this interpreter has. A local part such as +cu128 is the machine's own business and left out."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found


def locked_versions(constraints: str) -> dict[str, str]:
    """The versions that a constraints file fixes, of the packages named here."""
    lines = (line.split("#")[0].strip().partition("==") for line in constraints.splitlines())
    found = {
        name.strip().lower().replace("-", "_"): version.strip().split("+")[0] for name, _, version in lines if version
    }
    return {name: found[name] for name in PACKAGES if name in found}


def differences(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    """What differs, one line each."""
    return [f"{name}: {v} wanted, {found.get(name, 'none')} here" for name, v in wanted.items() if found.get(name) != v]


def main() -> None:
    """Exit 0 where all is as wanted; else say what differs and exit 1."""
    wrong = differences(json.loads(Path(sys.argv[1]).expanduser().read_text()), versions())
    print("\n".join(wrong) if wrong else "versions: as wanted")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
