"""Which of an entry's files are on the hub, and how they come into the cache."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from capture.config import Entry
from cluster.prepare_disk import model_folder

if TYPE_CHECKING:
    from capture.ranges import RemoteFile


def hub_models(entry: Entry) -> list[tuple[str, str | None]]:
    """(repository, revision) of the models of an entry that are not directories, each once."""
    both = [(entry.base_model, entry.base_revision), (entry.sft_model, entry.sft_revision)]
    return [m for m in dict.fromkeys(both) if not Path(m[0]).expanduser().is_dir()]


def download(entry: Entry) -> None:
    """What is there before the entry is opened: configs, tokenizer, and weights that do not come later. Checks the files once
    more, as the capture will."""
    from capture.files import check_config
    from capture.hub import model_snapshot
    from capture.run import way_of_weights

    if way_of_weights(entry) != "download":
        without_weights(entry)
        return
    remote = bool(entry.model_kwargs.get("trust_remote_code"))
    for repo, revision in hub_models(entry):
        model_snapshot(
            repo, revision, download=True, allow_pickle=entry.allow_pickle, token=entry.model_kwargs.get("token"),
            check_config=partial(check_config, model=repo, trust_remote_code=remote),
        )  # fmt: skip
    _tokenizer(entry)


def without_weights(entry: Entry) -> list[tuple[RemoteFile, Path]]:
    """Fetch an entry's small files. Returns its weight files that are not in the cache, each with its commit's folder there."""
    from capture.files import check_config
    from capture.hub import model_without_weights

    missing: list[tuple[RemoteFile, Path]] = []
    remote = bool(entry.model_kwargs.get("trust_remote_code"))
    for repo, revision in hub_models(entry):
        folder, files = model_without_weights(
            repo, revision, allow_pickle=entry.allow_pickle, token=entry.model_kwargs.get("token"),
            check_config=partial(check_config, model=repo, trust_remote_code=remote),
        )  # fmt: skip
        missing += [(file, folder) for file in files]
    _tokenizer(entry)
    return missing


def _tokenizer(entry: Entry) -> None:
    from capture.files import resolve_tokenizer

    token = entry.tokenizer_kwargs.get("token", entry.model_kwargs.get("token"))
    resolve_tokenizer(entry.tokenizer, entry.tokenizer_revision, download=True, token=token)


def cache_bytes(models: list[tuple[str, str | None]]) -> int:
    """Bytes in the cache of these models, files under way included."""
    from capture.spool import bytes_there

    return sum(
        bytes_there(path) for repo in {repo for repo, _ in models} for path in model_folder(repo).glob("blobs/*")
    )
