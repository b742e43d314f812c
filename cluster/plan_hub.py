"""Sizes of a model on the Hugging Face hub from its safetensors headers: a few small requests, no weights are downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from capture.errors import CheckpointError
from capture.hub import hub_error
from cluster.plan_sizes import ModelSizes, sizes_of

TIMEOUT_S = 5.0  # for each request: a plan waits for no network that is not there


class HubUnreachable(CheckpointError):
    """The hub did not answer at all: there is no point in asking it for the next model."""


def hub_sizes(model: str, revision: str | None, dtype: str, token: str | bool | None = None) -> ModelSizes:
    """Ask the hub. Raises HubUnreachable where it does not answer, CheckpointError where the answer is no: no such model,
    gated without access, no safetensors weights."""
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, NotASafetensorsRepoError

    api = hub.HfApi()
    try:
        info = api.model_info(model, revision=revision, timeout=TIMEOUT_S, token=token)
        found = api.get_safetensors_metadata(model, revision=info.sha, token=token, timeout=TIMEOUT_S)
        file = api.hf_hub_download(model, "config.json", revision=info.sha, token=token, etag_timeout=TIMEOUT_S)
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except NotASafetensorsRepoError as error:
        names = [s.rfilename for s in info.siblings or []]
        raise CheckpointError(f"hub model '{model}': {_instead(names)}") from error
    except (OSError, HTTPError, HFValidationError, ValueError, ImportError) as error:
        # the hub answered, the name cannot be one, or its library lacks something
        if isinstance(error, HfHubHTTPError | HFValidationError | ImportError):
            raise hub_error(model, revision, error) from error
        raise HubUnreachable(
            f"'{model}' is not in configs/models.yaml and the hub cannot be reached ({type(error).__name__})"
        ) from error
    tensors = {
        key: (str(t.dtype), tuple(t.shape)) for file in found.files_metadata.values() for key, t in file.tensors.items()
    }
    return sizes_of(model, tensors, config, dtype, source="hub", download_bytes=None, gated=_gated(info))


def _gated(info: Any) -> str:
    return str(info.gated) if getattr(info, "gated", False) else "none"


def _instead(names: list[str]) -> str:
    from capture.weights import choose_weights

    try:
        choose_weights(names, lambda _: b"{}", where="", allow_pickle=False)
    except CheckpointError as error:
        return str(error).removeprefix(": ")
    return "its weights are not safetensors"


def has_token() -> bool:
    """Whether a login of the hub is on this machine. Its value is not looked at any further."""
    if any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")):
        return True
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    file = Path(os.environ.get("HF_TOKEN_PATH", home / "token"))
    return file.is_file() and file.stat().st_size > 0
