"""Checkpoints from the Hugging Face hub: only the files that are read, into the hub's own cache, with errors that say what to do."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from capture.errors import CheckpointError, HubFailedError, HubUnreachableError
from capture.printable import without_logins
from capture.process import temporary
from capture.ranges import RemoteFile
from capture.spool import bytes_there, drop, is_whole, is_written, part_of
from capture.weights import choose_weights

log = logging.getLogger(__name__)

GIB = 1 << 30
WAIT_S = 1.0
# Beside the weights: config, tokenizer and chat template files of the top directory, never original/ or onnx/.
SMALL_FILES = (".json", ".txt", ".model", ".tiktoken", ".jinja")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# what the hub's library runs into where an answer is something else than it expects
NOT_UNDERSTOOD = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError)

Read = Callable[[str], bytes]
Want = Callable[[Mapping[str, int], Read], list[str]]


def model_snapshot(
    repo: str,
    revision: str | None,
    *,
    download: bool,
    allow_pickle: bool,
    token: str | bool | None,
    check_config: Callable[[dict[str, Any]], None],
) -> Path:
    """The directory of a model's snapshot in the hub's cache, named by its commit.

    `check_config` sees config.json before the weights are downloaded, and may raise. Without `download`, or offline, what is
    in the cache is taken. Raises CheckpointError.
    """
    want = _model_files(repo, allow_pickle, check_config)

    def by_ranges(info: Any) -> None:
        """Large files come by several connections, are hashed meanwhile, and are gone on with after an end; the library has one
        connection for a file, and checks no hash. It is left what cannot come so."""
        from capture.keep import Keeper

        sizes, files = _needed(repo, info, token, want), _remote_weights(repo, info, token, want)
        folder = _folder(repo, info)
        there = sum(bytes_there(part_of(file, folder)) for file in files)
        _check_disk(repo, _missing(repo, info, sizes), sizes, there)
        while files:
            keeper = Keeper(token)
            try:
                keeper.fetch((file, folder) for file in files)
            except CheckpointError as error:
                log.warning("%s; it is downloaded by the hub's own library", error)
            files = [file for file in files if file in keeper.elsewhere or is_written(part_of(file, folder))]
            if files:  # what another process fetches is waited for; where it ends, its work is gone on with
                time.sleep(WAIT_S)

    return _snapshot(repo, revision, download, token, want, "config.json", by_ranges)


def model_without_weights(
    repo: str,
    revision: str | None,
    *,
    allow_pickle: bool,
    token: str | bool | None,
    check_config: Callable[[dict[str, Any]], None],
) -> tuple[Path, list[RemoteFile]]:
    """As model_snapshot, but safetensors files that are not in the cache yet are not downloaded: they are named instead.

    Offline, or where the hub cannot be reached, what is in the cache is taken. Raises CheckpointError.
    """
    want = _model_files(repo, allow_pickle, check_config)
    remote: list[RemoteFile] = []

    def want_small(sizes: Mapping[str, int], read: Read) -> list[str]:
        left = {file.name for file in remote}
        return [n for n in want(sizes, read) if n not in left]

    def rest(info: Any) -> None:
        remote.extend(_remote_weights(repo, info, token, want))

    path = _snapshot(repo, revision, True, token, want_small, "config.json", rest)
    return path, remote


def _remote_weights(repo: str, info: Any, token: str | bool | None, want: Want) -> list[RemoteFile]:
    """The safetensors files that are not in the cache."""
    sizes = _needed(repo, info, token, want)
    missing = _missing(repo, info, [n for n in sizes if n.endswith(".safetensors")])
    return [_remote_file(repo, info, name) for name in missing]


def _remote_file(repo: str, info: Any, name: str) -> RemoteFile:
    (found,) = (s for s in info.siblings if s.rfilename == name)
    sha256 = found.lfs.sha256 if found.lfs else None
    if sha256 is None and _SHA256.fullmatch(found.blob_id or ""):
        sha256 = found.blob_id
    return RemoteFile(repo, info.sha, name, found.size or 0, sha256 or found.blob_id, sha256)


def download_bytes(repo: str, revision: str | None, *, allow_pickle: bool, token: str | bool | None) -> int:
    """Bytes that `model_snapshot` would download now: asks the hub for sizes and small files only; 0 offline, and where the hub
    cannot be reached, since the cache is then taken as it is. Raises CheckpointError."""
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, HTTPError

    if constants.HF_HUB_OFFLINE:
        return 0
    try:
        info = _info(repo, revision, token)
        sizes = _needed(repo, info, token, _model_files(repo, allow_pickle, lambda config: None))
    except (OSError, HTTPError, EntryNotFoundError, HFValidationError) as error:
        if isinstance(error, OSError | HTTPError) and not isinstance(error, HfHubHTTPError):
            return 0
        raise hub_error(repo, revision, error) from error
    except ImportError as error:
        raise hub_error(repo, revision, error) from error
    except NOT_UNDERSTOOD as error:
        raise _no_hub(repo, error) from error
    return sum(sizes[n] for n in _missing(repo, info, sizes))


def _model_files(repo: str, allow_pickle: bool, check_config: Callable[[dict[str, Any]], None]) -> Want:
    """What of a model's repository is needed."""

    def want(sizes: Mapping[str, int], read: Read) -> list[str]:
        where = f"hub model '{repo}'"
        # First the formats that have no config.json either, so that the error names the format.
        weights = choose_weights(sizes, read, where=where, allow_pickle=allow_pickle)
        if "config.json" not in sizes:
            raise CheckpointError(f"{where} has no config.json; it is not in transformers' format")
        try:
            config = json.loads(read("config.json"))
            if not isinstance(config, dict):
                raise ValueError("it holds no object")
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where}: config.json cannot be read: {error}") from error
        check_config(config)
        code = (".py",) if "auto_map" in config else ()
        return [*_small(sizes, code), *weights.files]

    return want


def tokenizer_snapshot(repo: str, revision: str | None, *, download: bool, token: str | bool | None) -> Path:
    """The same for a tokenizer of its own: small files only."""
    return _snapshot(repo, revision, download, token, lambda sizes, _: _small(sizes, (".py",)), "tokenizer_config.json")


def _small(sizes: Mapping[str, int], more: tuple[str, ...]) -> list[str]:
    return [n for n in sizes if "/" not in n and n.endswith((*SMALL_FILES, *more))]


def _snapshot(
    repo: str,
    revision: str | None,
    download: bool,
    token: str | bool | None,
    want: Want,
    known_file: str,
    look: Callable[[Any], None] = lambda info: None,
) -> Path:
    """look: sees what the hub says about the repository, before anything is downloaded."""
    import huggingface_hub as hub
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, HTTPError

    if not download or constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "nothing is to be downloaded"
        return _cached(repo, revision, known_file, why)
    try:
        try:
            info = _info(repo, revision, token)
        except (OSError, HTTPError) as error:
            if isinstance(error, HfHubHTTPError):  # the hub answered, and the answer is no
                raise
            log.warning("the hub cannot be reached for '%s' (%s); trying the cache", repo, type(error).__name__)
            why = f"the hub cannot be reached ({_one_line(error)})"
            return _cached(repo, revision, known_file, why, HubUnreachableError)
        look(info)
        sizes = _needed(repo, info, token, want)
        missing = _missing(repo, info, sizes)
        _check_disk(repo, missing, sizes)
        # By the commit that all else was asked of: the branch may have moved while the weights came.
        patterns = [glob.escape(n) for n in sizes]
        path = Path(hub.snapshot_download(repo, revision=info.sha, token=token, allow_patterns=patterns))
        if not all((path / name).exists() for name in sizes):  # without an answer it gave what the cache has
            raise HubFailedError(f"the hub did not answer for '{repo}', and not all of it is in the cache; run again")
        _check_hashes(repo, path, missing)
        for name in sizes:
            drop((path / name).resolve())
        _note_branch(path, revision or "main")
        return path
    except (OSError, HTTPError, EntryNotFoundError, HFValidationError, ImportError) as error:
        raise hub_error(repo, revision, error) from error
    except NOT_UNDERSTOOD as error:
        raise _no_hub(repo, error) from error


def _note_branch(snapshot: Path, revision: str) -> None:
    """Let the cache know which commit a branch is at, as the library does, for when the network is gone."""
    ref = snapshot.parents[1] / "refs" / revision
    try:
        if revision == snapshot.name or (ref.exists() and ref.read_text() == snapshot.name):
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        new = Path(temporary(str(ref)))
        try:
            new.write_text(snapshot.name)
            new.replace(ref)  # a full disk would leave an empty one
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:  # of a cache that may only be read
        log.info("the cache is not told that '%s' is at %s: %s", revision, snapshot.name, error)


def _info(repo: str, revision: str | None, token: str | bool | None) -> Any:
    import huggingface_hub as hub

    return hub.HfApi().model_info(repo, revision=revision, files_metadata=True, token=token)


def _needed(repo: str, info: Any, token: str | bool | None, want: Want) -> dict[str, int]:
    """The files that are needed, and the bytes of each."""
    import huggingface_hub as hub

    listed = {s.rfilename: s for s in info.siblings or []}

    def read(name: str) -> bytes:
        return Path(hub.hf_hub_download(repo, name, revision=info.sha, token=token)).read_bytes()

    names = want({n: s.size or 0 for n, s in listed.items()}, read)
    for name in names:
        one = listed[name]
        if one.size is None or not (one.lfs or one.blob_id):  # as in a mirror's list: each is asked for by itself
            found = hub.get_hf_file_metadata(hub.hf_hub_url(repo, name, revision=info.sha), token=token)
            one.size, one.blob_id = found.size, found.etag
    return {n: listed[n].size or 0 for n in names}


def _missing(repo: str, info: Any, names: Iterable[str]) -> list[str]:
    """Those of the files whose bytes are not in the cache; what it has of another commit the library only links to."""
    import huggingface_hub as hub

    absent = (n for n in names if not isinstance(hub.try_to_load_from_cache(repo, n, revision=info.sha), str))
    return [n for n in absent if not is_whole(_remote_file(repo, info, n), _folder(repo, info))]


def _folder(repo: str, info: Any) -> Path:
    """The commit's folder in the cache, made or not."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots" / info.sha


def _cached(
    repo: str, revision: str | None, known_file: str, why: str, absent: type[CheckpointError] = CheckpointError
) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:  # one known file: the hub cannot tell which others we meant to leave out
        return Path(hub.snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[known_file]))
    except HFValidationError as error:
        raise hub_error(repo, revision, error) from error
    except (OSError, EntryNotFoundError) as error:
        at = f" at revision '{revision}'" if revision else ""
        raise absent(
            f"'{repo}'{at} is neither a directory here nor in the hub's cache, and {why}; connect and run again, or copy "
            "the cache (HF_HOME) from a machine that has it"
        ) from error


def free_bytes() -> int:
    """What the disk of the hub's cache has free."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    return shutil.disk_usage(next(d for d in (cache, *cache.parents) if d.exists())).free


def _check_hashes(repo: str, snapshot: Path, names: Sequence[str]) -> None:
    """Raise, and take them out of the cache, if large files that have just come hold other bytes than the hub's: the library
    looks at their sizes only. In the cache such a file is called by the SHA-256 that the hub gives it."""
    large = {n: (snapshot / n).resolve() for n in names if _SHA256.fullmatch((snapshot / n).resolve().name)}
    with ThreadPoolExecutor(4, thread_name_prefix="hash") as threads:
        found = dict(zip(large, threads.map(_sha256, large.values()), strict=True))
    wrong = [n for n, blob in large.items() if found[n] != blob.name]
    for name in wrong:
        large[name].unlink(missing_ok=True)
        (snapshot / name).unlink(missing_ok=True)
    if wrong:
        raise CheckpointError(
            f"'{repo}', '{wrong[0]}': the bytes that came are not those of the hub: their hash is {found[wrong[0]]}, not "
            f"{large[wrong[0]].name}; the file was taken out of the cache. Run again"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_disk(repo: str, missing: Sequence[str], sizes: Mapping[str, int], there: int = 0) -> None:
    """Raise if what is still to be downloaded does not fit the disk. there: bytes of the missing files that are on it already."""
    from huggingface_hub import constants

    need, free, cache = sum(sizes[n] for n in missing) - there, free_bytes(), constants.HF_HUB_CACHE
    if need > free:
        raise CheckpointError(
            f"'{repo}' needs {need / GIB:.1f} GiB more on disk, {cache} has {free / GIB:.1f} GiB free; make room, or set "
            "HF_HOME to a larger disk"
        )
    if missing:
        log.info("downloading %s: %d files, %.2f GiB, to %s", repo, len(missing), need / GIB, cache)


def hub_error(repo: str, revision: str | None, error: Exception) -> CheckpointError:
    """The user's error, in one line, for what huggingface_hub raised about a repository."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        text = f"'{repo}' is gated: accept its terms at https://huggingface.co/{repo} and log in with `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        text = (
            f"no model '{repo}' on the hub, or it is private: check the name, or log in with `hf auth login`; as a "
            "directory it was not found either"
        )
    elif isinstance(error, RevisionNotFoundError):
        text = f"'{repo}' has no revision '{revision}' on the hub; check base_revision and sft_revision"
    elif isinstance(error, HFValidationError):
        text = f"'{repo}' is neither a directory here nor a name on the hub"
    elif isinstance(error, LocalEntryNotFoundError):
        text = f"the hub did not answer for '{repo}', and not all of it is in the cache: {_one_line(error)}; run again"
    elif isinstance(error, EntryNotFoundError):
        text = f"'{repo}' lacks a file on the hub: {_one_line(error)}"
    elif isinstance(error, HfHubHTTPError):
        text = f"the hub refused '{repo}': {_one_line(error)}"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        text = f"the disk is full while downloading '{repo}'; make room, or set HF_HOME to a larger disk"
    elif isinstance(error, PermissionError):
        text = (
            f"the hub's cache cannot be written for '{repo}' ({_one_line(error)}); set HF_HOME to a directory of yours"
        )
    elif isinstance(error, ImportError):  # of what its library asks for a SOCKS proxy
        text = (
            f"the hub's library cannot ask for '{repo}' here: {_one_line(error)}; install that, or name an HTTP proxy in HTTPS_PROXY "
            "and ALL_PROXY"
        )
    else:
        text = f"downloading '{repo}' failed: {_one_line(error)}; run again, files that are whole are not fetched again"
    return CheckpointError(text)


def _no_hub(repo: str, error: Exception) -> CheckpointError:
    from huggingface_hub import constants

    return CheckpointError(
        f"{without_logins(constants.ENDPOINT)} answers for '{repo}' what no hub says ({_one_line(error)}): log in to the network that "
        "stands between, or mend HF_ENDPOINT"
    )


def _one_line(error: Exception) -> str:
    text = re.sub(r"For more information check: \S+", "", str(error))  # what a status means in general
    return f"{type(error).__name__}: {without_logins(' '.join(text.split()))[:300]}"
