"""Open a model without its weights: the transformers model on meta, what it would be read with, and its list of layers."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging as hf_logging

from capture import borrowed
from capture.errors import CheckpointError, UnsupportedModelError
from capture.group import is_plain
from capture.ledger import is_out_of_memory
from capture.quantize import Quantization

log = logging.getLogger(__name__)

# Where PEFT is installed, transformers looks for an adapter beside the weights and applies it to them: what no check and no id
# of a capture covers, and what another machine would not do. Below a file, which config.json is, it finds none.
NO_ADAPTER = {"subfolder": "config.json"}


def open_model(
    directory: str, label: str, dtype: str, kwargs: dict[str, Any], quantization: Quantization, device: torch.device,
    *, whole: bool, ranks: DistributedConfig | None,
) -> tuple[PreTrainedModel, dict[str, Any]]:  # fmt: skip
    """The model, on meta unless it is loaded whole, and what the library would have read it with (files, load_config); of one
    that is, the names of the weights that were not stored (lacks).

    Raises CheckpointError, UnsupportedModelError.
    """
    where = f"{label} model '{directory}'"
    record: dict[str, Any] = {}
    kwargs = kwargs | dict(quantization.kwargs) | {"adapter_kwargs": NO_ADAPTER}
    if (Path(directory) / "adapter_config.json").is_file():
        log.warning(
            "%s: the adapter beside its weights is left out; to compare with it, merge it into them and save that",
            where,
        )
    if ranks is not None:
        kwargs["distributed_config"] = ranks
    if quantization.method is not None:
        kwargs["device_map"] = {"": device}
    hf_logging.disable_progress_bar()  # else one bar per group
    try:
        with nullcontext() if whole else borrowed.recording(record):
            model, found = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, output_loading_info=True, **kwargs
            )
    except Exception as error:  # of any kind: whatever a config.json says goes into it
        text = " ".join(str(error).split())[:500]
        at_device = quantization.method is None and (whole or ranks is not None) and isinstance(error, RuntimeError)
        if at_device or is_out_of_memory(error):
            raise  # nothing that the files say
        if "does not recognize this architecture" in text or "Unrecognized configuration class" in text:
            raise UnsupportedModelError(
                f"{where}: transformers {transformers.__version__} has no causal language model for the "
                "model_type in its config.json"
            ) from error
        if isinstance(error, RuntimeError) and quantization.method is not None:
            raise CheckpointError(
                f"{where}: {quantization.method} cannot make weights of this kind on this machine; the log says why: "
                f"{str(error).splitlines()[0]}"
            ) from error
        if isinstance(error, KeyError):  # whose text is the key and nothing else
            text = f"transformers {transformers.__version__} looks for {text} in vain, which its config.json names or lacks"
        raise CheckpointError(f"{where} cannot be opened: {text or type(error).__name__}") from error
    for config in (model.config, model.config.get_text_config()):
        config.return_dict = True  # whatever its config.json says: what it returns is asked for by name
    if model.get_input_embeddings() is None or model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no input embedding or no unembedding")
    if whole:
        _check_ends(model, where)
        record["lacks"] = sorted(found["missing_keys"])  # which the library has filled with random numbers
    hidden, width = model.config.get_text_config().hidden_size, model.get_output_embeddings().weight.shape[-1]
    if width != hidden:  # OPT-350M
        raise UnsupportedModelError(
            f"{where}: its unembedding takes states of {width} numbers, and its layers have {hidden}; their states cannot be read "
            "through it"
        )
    return model, record


def _check_ends(model: PreTrainedModel, where: str) -> None:
    """The lens multiplies with the unembedding: it must be numbers."""
    ends = {"embedding": model.get_input_embeddings(), "unembedding": model.get_output_embeddings()}
    for what, module in ends.items():
        weight = module.weight
        if not is_plain(weight) or not weight.is_floating_point() or weight.dim() != 2:
            raise UnsupportedModelError(
                f"{where}: its {what} is quantized too, which the lens cannot use; leave it out of the quantization "
                "(modules_to_not_convert, or llm_int8_skip_modules with bitsandbytes)"
            )


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers: the outermost ModuleList as long as the config says."""
    config = model.config.get_text_config()
    wanted = config.num_hidden_layers
    if wanted < 1:
        raise UnsupportedModelError(f"{type(model).__name__} has no decoder layers: its config.json says {wanted}")
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of {wanted} decoder layers; its layers cannot be walked one by one"
        )
    return min(lists, key=lambda item: item[0].count("."))
