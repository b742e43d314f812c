"""A capture in a worker whose hub is made up: its repositories have what a user may stumble over, by their names."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from capture.config import Entry
from capture.run import capture_pair

FILES = {
    "large": {"config.json": 20, "model.safetensors": 10**16},
    "nemo": {"README.md": 1, "nemotron.nemo": 10},
    "zarr": {"model_config.yaml": 1, "model_weights/layer.zarr/0.0": 10},
}


def model_info(self: Any, repo: str, **kwargs: Any) -> SimpleNamespace:
    from huggingface_hub.errors import GatedRepoError

    name = repo.split("/")[1]
    if name == "gated":
        response: Any = SimpleNamespace(headers={}, request=None)
        raise GatedRepoError("401 Client Error", response=response)
    siblings = [
        SimpleNamespace(rfilename=file, size=size, lfs=None, blob_id="0" * 40) for file, size in FILES[name].items()
    ]
    return SimpleNamespace(sha="0" * 40, siblings=siblings)


def small_file(repo: str, name: str, **kwargs: Any) -> str:
    file = Path(tempfile.mkdtemp()) / name
    file.write_text(json.dumps({"model_type": "llama"}))
    return str(file)


def capture(entry: Entry, out: str, **kwargs: Any) -> Any:
    """The real capture, over that hub; an entry whose models are here only shows that the sweep goes on."""
    if "/" in entry.base_model and Path(entry.base_model).is_dir():
        from fake_work import complete

        return complete(entry, out, **kwargs)
    import huggingface_hub as hub
    from huggingface_hub import constants

    hub.HfApi.model_info = model_info  # type: ignore[method-assign, assignment]
    hub.hf_hub_download = small_file  # type: ignore[assignment]
    constants.HF_HUB_OFFLINE = False
    return capture_pair(entry, out, **kwargs)
