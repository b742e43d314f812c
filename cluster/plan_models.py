"""Where a plan's sizes come from: a directory's headers, the facts that come with the project, the hub, the hub's cache."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from capture.errors import CheckpointError
from capture.weights import choose_weights, read_header
from cluster.plan_facts import sizes_from_facts
from cluster.plan_hub import HubUnreachable, hub_sizes
from cluster.plan_sizes import ModelSizes, sizes_of

log = logging.getLogger(__name__)


class Models:
    """Finds sizes, each model once, and asks the hub no more once it did not answer.

    offline: never ask the hub. refresh: ask it for models that the facts know too.
    """

    def __init__(self, *, offline: bool = False, refresh: bool = False) -> None:
        self.offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
        self.refresh = refresh
        self.unreachable: str | None = None
        self._known: dict[tuple[str, str | None, str], ModelSizes] = {}

    def sizes(self, model: str, revision: str | None, dtype: str, token: str | bool | None = None) -> ModelSizes:
        """Sizes of a directory or hub id. Raises CheckpointError or UnsupportedModelError with what to do."""
        key = (model, revision, dtype)
        if key not in self._known:
            self._known[key] = self._find(model, revision, dtype, token)
        return self._known[key]

    def _find(self, model: str, revision: str | None, dtype: str, token: str | bool | None) -> ModelSizes:
        if Path(model).is_dir():
            return directory_sizes(Path(model), model, dtype, source="directory")
        known = sizes_from_facts(model, dtype)
        if known is not None and not self.refresh:
            return known
        if not self.offline and self.unreachable is None:
            try:
                return hub_sizes(model, revision, dtype, token)
            except HubUnreachable as error:
                self.unreachable = str(error)
                log.warning("%s; going on without it", error)
        if known is not None:
            return known
        cached = _cached(model, revision)
        if cached is not None:
            return directory_sizes(cached, model, dtype, source="cache", download=True)
        why = "the plan is made offline" if self.offline else "the hub cannot be reached"
        raise CheckpointError(
            f"no sizes of '{model}': it is not in configs/models.yaml, nor in the hub's cache here, and {why}; connect and "
            "plan again, or name a directory"
        )


def directory_sizes(path: Path, model: str, dtype: str, *, source: str, download: bool = False) -> ModelSizes:
    """Sizes from the headers of a checkpoint's files on this machine; nothing else of them is read.

    download: the machine that captures will have to download it all the same, as one that is rented does not have our cache.
    """
    where = f"'{path}'"
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        config = None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: config.json cannot be read: {error}") from error
    names = {p.name for p in path.iterdir()}
    weights = choose_weights(names, lambda n: (path / n).read_bytes(), where=where, allow_pickle=False)
    if config is None:
        raise CheckpointError(f"{where}: weights but no config.json; save the model with save_pretrained")
    try:
        tensors = {
            key: (str(t["dtype"]), tuple(t["shape"]))
            for name in weights.files
            for key, t in read_header(path / name).items()
        }
        return sizes_of(model, tensors, config, dtype, source=source, download_bytes=None if download else 0)
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, MemoryError) as error:
        raise CheckpointError(f"{where}: its config.json or a header says what is no size: {error}") from error


def _cached(model: str, revision: str | None) -> Path | None:
    """The snapshot of a hub model in this machine's cache, None where it is not there."""
    import huggingface_hub as hub
    from huggingface_hub.errors import HFValidationError

    try:
        found = hub.try_to_load_from_cache(model, "config.json", revision=revision or "main")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
