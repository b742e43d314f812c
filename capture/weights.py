"""Weight files: which of a checkpoint's files to read, whether they are whole, and a fingerprint of what they hold.

Format of safetensors: 8 bytes little-endian length of the header, the header as JSON (name -> dtype, shape, data_offsets,
offsets counted from the header's end), then the data. See the safetensors README, "Format".
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from capture.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SINGLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FULL_HASH_BYTES = 4 << 30
_SAMPLE = 64 << 10
BLOCK, AHEAD = 8 << 20, 64 << 20  # hashed at a time, and asked of the disk before its turn
MAX_HEADER = 100 << 20  # the limit of the safetensors library


@dataclass(frozen=True)
class Weights:
    """The weight files to read, by name and in order. `weight_map` (key -> file) is empty for a single file: its header says."""

    files: tuple[str, ...]
    pickle: bool = False
    weight_map: dict[str, str] = field(default_factory=dict)


def choose_weights(
    names: Collection[str], read_index: Callable[[str], bytes], *, where: str, allow_pickle: bool
) -> Weights:
    """Choose what to read among a checkpoint's file names, as transformers does: one file before shards, safetensors first.

    `read_index` returns an index file's content by name. Raises CheckpointError that says what is there instead and what to do.
    """
    if SINGLE in names:
        return Weights((SINGLE,))
    if INDEX in names:
        return _sharded(INDEX, read_index, names, where, pickle=False)
    if (PICKLE_SINGLE in names or PICKLE_INDEX in names) and allow_pickle:
        if PICKLE_SINGLE in names:
            return Weights((PICKLE_SINGLE,), pickle=True)
        return _sharded(PICKLE_INDEX, read_index, names, where, pickle=True)
    raise CheckpointError(f"{where}: {_what_is_there(names)}")


def _sharded(
    index: str, read_index: Callable[[str], bytes], names: Collection[str], where: str, pickle: bool
) -> Weights:
    try:
        weight_map = json.loads(read_index(index))["weight_map"]
        files = tuple(sorted(set(weight_map.values())))
        if not files:
            raise ValueError("it names no shard")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: '{index}' is not an index of shards ({error}); fetch it again") from error
    if odd := [f for f in files if not isinstance(f, str) or "/" in f or "\\" in f]:
        raise CheckpointError(f"{where}: '{index}' names the file {odd[0]!r}; shards must lie beside the index")
    if missing := [f for f in files if f not in names]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{where}: the shard '{missing[0]}'{more} of {len(files)} is missing; '{index}' names it. Fetch the checkpoint again"
        )
    return Weights(files, pickle, dict(weight_map))


def _what_is_there(names: Collection[str]) -> str:
    """Why a checkpoint without readable weights cannot be read, by what it holds instead."""

    def some(*endings: str) -> str | None:
        return next((n for n in sorted(names) if n.endswith(endings)), None)

    plain = [n for n in sorted(names) if "/" not in n]
    danger = "a pickle can run any code when it is opened"
    convert = "AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(DIR, safe_serialization=True)"
    if found := next((n for n in plain if n.startswith("pytorch_model") and n.endswith(".bin")), None):
        return (
            f"only pickled weights ('{found}'), and {danger}. Convert it once, where you trust it: {convert}; or set "
            "allow_pickle: true"
        )
    if "adapter_config.json" in names:
        return "an adapter, not a model; merge it into its base model and save that (PEFT's merge_and_unload)"
    if any(n.startswith("consolidated") for n in plain):
        return "only consolidated weights in their maker's own layout; use the repository in transformers' format"
    if found := some(".gguf"):
        return f"only GGUF weights ('{found}'); convert them once with from_pretrained(DIR, gguf_file=...).save_pretrained(NEW)"
    if found := some(".nemo"):
        return f"only a NeMo archive ('{found}'); use a conversion to transformers' format"
    if any(n.endswith((".zarr", ".zarray")) or ".zarr/" in n for n in names) or "model_weights" in names:
        return "weights as zarr arrays (an unpacked NeMo checkpoint); use a conversion to transformers' format"
    if found := next((n for n in plain if n.endswith(".safetensors")), None):
        return f"'{found}' is there, but neither {SINGLE} nor {INDEX}; fetch the checkpoint again, index included"
    if found := some(".pt", ".pth", ".bin", ".ckpt"):
        return f"only pickled weights ('{found}'), and {danger}; convert them to transformers' format: {convert}"
    if "config.json" not in names:
        return "no checkpoint: neither config.json nor weights are in it"
    return f"no weights: neither {SINGLE} nor {INDEX}"


def read_header(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file (name -> dtype, shape, data_offsets), after checking that the file is whole.

    Raises CheckpointError with expected and actual bytes for a file that is cut off or has bytes too many.
    """
    try:
        actual = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if start.startswith(b"version "):
                raise CheckpointError(f"'{file}' is a Git LFS pointer, not the weights; run git lfs pull there")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= MAX_HEADER:
                raise CheckpointError(f"'{file}' is not a safetensors file ({actual} bytes); fetch it again")
            if actual < 8 + length:
                raise CheckpointError(
                    f"'{file}' is cut off inside its header: at least {8 + length} bytes expected, {actual} found; fetch it again"
                )
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        expected = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
    except OSError as error:
        raise CheckpointError(f"cannot read '{file}': {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"'{file}' has a corrupt safetensors header ({error}); fetch it again") from error
    if actual != expected:
        raise CheckpointError(f"'{file}' is corrupt: {expected} bytes expected, {actual} found; fetch it again")
    return dict(header)


class Extent(NamedTuple):
    """Where a tensor of a safetensors file lies, first byte and the one behind its last, and what it is, in the file's words."""

    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def span(self) -> tuple[int, int]:
        return self.start, self.stop


def places(file: Path) -> dict[str, Extent]:
    """All tensors of a safetensors file. Raises CheckpointError."""
    header = read_header(file)
    with file.open("rb") as stream:
        data = 8 + int.from_bytes(stream.read(8), "little")
    return {
        key: Extent(data + t["data_offsets"][0], data + t["data_offsets"][1], t["dtype"], tuple(t["shape"]))
        for key, t in header.items()
    }


def joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Rising ranges, those that touch as one."""
    current: tuple[int, int] | None = None
    for start, stop in sorted(ranges):
        if current is not None and start <= current[1]:
            current = (current[0], max(current[1], stop))
        else:
            if current is not None:
                yield current
            current = (start, stop)
    if current is not None:
        yield current


def check_weights(directory: Path, weights: Weights) -> tuple[int, dict[str, str]]:
    """Check every weight file before work starts. Returns the bytes of all tensors, and key -> file.

    For safetensors: every file is whole, every key of the index is in the shard that the index names. A pickle is not opened:
    its bytes are the file's and it has no keys.
    """
    if weights.pickle:
        return sum((directory / f).stat().st_size for f in weights.files), dict(weights.weight_map)
    total = 0
    found: dict[str, str] = {}
    for name in weights.files:
        header = read_header(directory / name)
        total += sum(t["data_offsets"][1] - t["data_offsets"][0] for t in header.values())
        if weights.weight_map:
            absent = [k for k, f in weights.weight_map.items() if f == name and k not in header]
            if absent:
                raise CheckpointError(
                    f"'{directory / name}' lacks the weight '{absent[0]}' that {INDEX} says it holds; fetch the shard again"
                )
        found |= dict.fromkeys(header, name)
    return total, dict(weights.weight_map) or found


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    """A file's bytes, block by block; the system reads on from its disk meanwhile."""
    ahead = 0
    while block := stream.read(BLOCK):
        if hasattr(os, "posix_fadvise") and stream.tell() + AHEAD > ahead:
            os.posix_fadvise(stream.fileno(), ahead, 2 * AHEAD, os.POSIX_FADV_WILLNEED)
            ahead += 2 * AHEAD
        yield block


def fingerprint(
    directory: Path, weights: Weights, full_hash_bytes: int = FULL_HASH_BYTES, *, code: Collection[Path] = ()
) -> str:
    """SHA-256 over config.json and the weights of a directory, wherever it lies: `local:` and 16 hexadecimal digits. code: of its
    Python files, those that may run.

    Up to `full_hash_bytes` (4 GiB: a few seconds) every byte counts. Above, reading all of it would take as long as the
    capture: then it is the headers, the sizes, the times of change, and the first 64 KiB of every tensor. The times are in it
    because a sample alone could miss a change; so a large checkpoint that is copied with new times counts as another one,
    which costs a repeated capture, never a wrong one.
    """
    sha = hashlib.sha256()
    sha.update((directory / "config.json").read_bytes())
    for file in code:
        content = file.read_bytes()
        sha.update(f"\n{file.name} {len(content)}\n".encode() + content)
    sizes = {name: (directory / name).stat().st_size for name in weights.files}
    whole = weights.pickle or sum(sizes.values()) <= full_hash_bytes
    for name, size in sizes.items():
        file = directory / name
        sha.update(f"\n{name} {size}\n".encode())
        with file.open("rb") as stream:
            if whole:
                for block in _blocks(stream):
                    sha.update(block)
                continue
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(length)
            sha.update(f"{file.stat().st_mtime_ns}\n".encode() + header)
            for key, tensor in sorted(json.loads(header).items()):
                if key != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    stream.seek(8 + length + begin)
                    sha.update(stream.read(min(_SAMPLE, end - begin)))
    return f"local:{sha.hexdigest()[:16]}"
