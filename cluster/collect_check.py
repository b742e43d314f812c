"""Whether a capture that was fetched is whole, and whether the names that a stranger's machine sends may be used as paths."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capture.schema import SCHEMA_VERSION

PAIR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
CAPTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.parquet")
LOG = re.compile(r"logs/[A-Za-z0-9][A-Za-z0-9._+-]*/[A-Za-z0-9][A-Za-z0-9._+-]*\.log")
DOCUMENT = "capture.json"
SHA256 = re.compile(r"[0-9a-f]{64}")


def unfit_marker(pair: Any, capture: Any, marker: Any) -> str | None:
    """Why a marker cannot be used, in words, or None. All that comes out of it as a path is checked here."""
    if not (isinstance(pair, str) and PAIR.fullmatch(pair) and isinstance(capture, str) and CAPTURE.fullmatch(capture)):
        return "its name is no name of ours"
    if not isinstance(marker, Mapping) or not isinstance(marker.get("files"), list) or not marker["files"]:
        return "its marker lists no files"
    if marker.get("schema_version") != SCHEMA_VERSION:
        return (
            f"it was written with schema version {marker.get('schema_version')}, this pairscope reads {SCHEMA_VERSION}"
        )
    for item in marker["files"]:
        good = isinstance(item, Mapping) and isinstance(item.get("name"), str) and FILE.fullmatch(item["name"])
        if not good or not SHA256.fullmatch(str(item.get("sha256"))):
            return "its marker has a file without a proper name or checksum"
        if not all(isinstance(item.get(key), int) and item[key] >= 0 for key in ("bytes", "rows")):
            return "its marker has a file without counts"
    return None


def contents(marker: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(name, checksum) of the files: what makes two captures of one id the same."""
    return {(f["name"], f["sha256"]) for f in marker["files"]}


def wrong_files(directory: Path, marker: Mapping[str, Any]) -> dict[str, str]:
    """Files of `directory` that are not as the marker says, with the reason: bytes, checksum, rows. Reads all of them. Of
    capture.json, for which a marker has no checksum, that it is there and whole."""
    import pyarrow.parquet as pq

    wrong = {}
    document = directory / DOCUMENT
    try:
        if not document.is_file() or document.is_symlink():
            wrong[DOCUMENT] = "is not there"
        elif not isinstance(json.loads(document.read_bytes()), dict):
            wrong[DOCUMENT] = "is no JSON object"
    except (OSError, ValueError, RecursionError) as error:
        wrong[DOCUMENT] = f"cannot be read: {' '.join(str(error).split())[:200]}"
    for item in marker["files"]:
        path = directory / item["name"]
        if not path.is_file() or path.is_symlink():
            wrong[item["name"]] = "is not there"
            continue
        if path.stat().st_size != item["bytes"]:
            wrong[item["name"]] = f"has {path.stat().st_size} bytes, its marker says {item['bytes']}"
            continue
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != item["sha256"]:
            wrong[item["name"]] = "has another checksum than its marker says"
            continue
        try:
            rows = pq.read_metadata(path).num_rows
        except Exception as error:  # whatever Arrow says about a file that is none of its own
            wrong[item["name"]] = f"is no Parquet file: {' '.join(str(error).split())[:200]}"
            continue
        if rows != item["rows"]:
            wrong[item["name"]] = f"has {rows} rows, its marker says {item['rows']}"
    return wrong
