"""A model's files: from the name in the config to a directory whose weights are known to be whole, and its revision."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from capture.errors import CheckpointError, UnsupportedModelError
from capture.quantize import check_stored
from capture.remembered import remembered
from capture.weights import Weights, check_weights, choose_weights, fingerprint

if TYPE_CHECKING:
    from capture.ranges import RemoteFile
    from capture.remote import Source


@dataclass(frozen=True)
class ModelFiles:
    """One checkpoint on this machine, or with weights that are on the hub.

    `path` is a directory that transformers can open, a stand-in where weights are `remote` (capture/remote.py); `revision` the hub's commit, or `local:<fingerprint>` for a directory.
    `weights` are file names below `path`, in order; `weight_bytes` the bytes of all their tensors (of the files, for
    pickles); `weight_map` maps each tensor's key to its file.
    """

    source: Literal["local", "hub"]
    path: str
    revision: str
    weights: tuple[str, ...]
    weight_bytes: int
    weight_map: Mapping[str, str]
    format: Literal["safetensors", "pickle"]
    remote: bool = False


def resolve_model(
    model: str,
    revision: str | None = None,
    *,
    allow_pickle: bool = False,
    download: bool = True,
    trust_remote_code: bool = False,
    token: str | bool | None = None,
    source: Source | None = None,
) -> ModelFiles:
    """Find a model's files, download what is missing, and check all weight files before work starts.

    A directory wins over a hub id of the same name. `revision` is for the hub. Without `download` only the hub's cache is
    looked at; where that has a commit's small files alone, the commit is told, with no weights. source: where weights that are missing stay on the hub, to be read from there. Raises CheckpointError (missing, corrupt, gated, wrong format, no space) and UnsupportedModelError (code of its
    own that was not allowed).
    """
    local = Path(model).expanduser()
    if local.is_dir():
        weights = _local_weights(local, model, allow_pickle, trust_remote_code)
        total, weight_map = check_weights(local, weights)
        code = sorted(p for p in local.glob("*.py") if p.is_file()) if trust_remote_code else []
        return ModelFiles("local", str(local.absolute()), _fingerprint(local, weights, code), weights.files, total, weight_map,
                          "pickle" if weights.pickle else "safetensors")  # fmt: skip
    from capture.hub import SMALL_FILES, model_snapshot, model_without_weights

    def check(config: Mapping[str, Any]) -> None:
        check_config(config, model, trust_remote_code)

    path: Path | None = None
    missing: list[RemoteFile] = []
    if source is not None and download:
        snapshot, missing = model_without_weights(
            model, revision, allow_pickle=allow_pickle, token=token, check_config=check
        )
        path = snapshot if not missing else source.stand_in(snapshot, missing)
    if path is None:
        missing = []
        snapshot = path = model_snapshot(
            model, revision, download=download, allow_pickle=allow_pickle, token=token, check_config=check
        )
    try:
        weights = _local_weights(path, model, allow_pickle, trust_remote_code)
    except CheckpointError as error:
        if missing:
            raise
        if not download and all(p.name.endswith((*SMALL_FILES, ".py")) for p in path.iterdir()):
            # weights: stream keeps no others, and what was captured of a commit is known without them
            return ModelFiles("hub", str(path), snapshot.name, (), 0, {}, "safetensors", remote=True)
        # the hub, where it was asked, has said that all is there
        raise CheckpointError(
            f"{error}: so it is in the hub's cache, where weights: stream leaves none; with a connection, and without HF_HUB_OFFLINE, what is "
            "missing is fetched"
        ) from error
    try:
        total, weight_map = check_weights(path, weights)
    except CheckpointError as error:
        if missing:
            raise
        raise CheckpointError(f"{error}: remove it from the hub's cache and run again") from error
    return ModelFiles("hub", str(path), snapshot.name, weights.files, total, weight_map,
                      "pickle" if weights.pickle else "safetensors", remote=bool(missing))  # fmt: skip


def _fingerprint(path: Path, weights: Weights, code: Sequence[Path]) -> str:
    files = [path / "config.json", *code, *(path / name for name in weights.files)]
    return remembered(files, lambda: fingerprint(path, weights, code=code))


def resolve_tokenizer(
    tokenizer: str, revision: str | None = None, *, download: bool = True, token: str | bool | None = None
) -> str:
    """The directory that holds the tokenizer's files; only small files are downloaded. Raises CheckpointError."""
    path = Path(tokenizer).expanduser()
    if path.is_dir():
        return str(path.absolute())
    from capture.hub import tokenizer_snapshot

    return str(tokenizer_snapshot(tokenizer, revision, download=download, token=token))


def _local_weights(path: Path, model: str, allow_pickle: bool, trust_remote_code: bool) -> Weights:
    where = f"'{path}'" if str(path) == model else f"'{model}' in {path}"
    names = {p.name for p in path.iterdir()}
    if "config.json" in names:
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("it holds no object")
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{where}: config.json cannot be read: {error}") from error
        check_config(config, model, trust_remote_code)

    def read(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{where}: '{name}' cannot be read: {error.strerror or error}") from error

    weights = choose_weights(names, read, where=where, allow_pickle=allow_pickle)
    if "config.json" not in names:
        raise CheckpointError(f"{where}: weights but no config.json; save the model with save_pretrained")
    return weights


def check_config(config: Mapping[str, Any], model: str, trust_remote_code: bool) -> None:
    """Raise UnsupportedModelError if config.json has transformers read other weights than those that are checked and that the
    capture's id stands for, if its weights are stored in a way that is not known, or if the model can only run with code that comes
    with its checkpoint.

    A config.json with `auto_map` is no matter where transformers has a class of its own for the model type: that one runs.
    """
    if config.get("transformers_weights") is not None:
        raise UnsupportedModelError(
            f"'{model}': its config.json names weights beside the usual ones (transformers_weights), and nothing here reads those; "
            "open it with transformers once and save it with save_pretrained"
        )
    check_stored(config, model)
    if "auto_map" not in config or trust_remote_code:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as OWN

    if config.get("model_type") not in OWN:
        raise UnsupportedModelError(
            f"'{model}' (model type '{config.get('model_type')}') runs code of its own, transformers has no class for it; read "
            "that code, then allow it with model_kwargs: {trust_remote_code: true}"
        )
