"""Weights of few bits: what a checkpoint is stored in, and what `model_kwargs.quantization_config` asks for.

FP8 checkpoints with a scale for each block (DeepSeek-V3) are read layer by layer and multiplied out: in memory they are
plain weights. Everything else is left to transformers and the backend's package: such models are loaded whole, and only
their own forward is used.

In a config:

    model_kwargs:
      quantization_config: {quant_method: bitsandbytes, load_in_4bit: true, bnb_4bit_quant_type: nf4}
    model_kwargs:
      quantization_config: {quant_method: torchao, quant_type: Int4WeightOnlyConfig, group_size: 128}

Keys are those of transformers' BitsAndBytesConfig and TorchAoConfig; with torchao, `quant_type` names a class of
torchao.quantization, and keys that TorchAoConfig does not have go to that class.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capture.errors import CheckpointError, ConfigError, UnsupportedModelError

KEY = "quantization_config"
FP8 = "fp8"  # transformers' name of block-wise FP8
BACKENDS = {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}  # quant_method -> package, of what may be asked for
# quant_method -> (module, package to install), of checkpoints stored so
_STORED_BACKENDS = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"), "torchao": ("torchao", "torchao"), "gptq": ("gptqmodel", "gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"), "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
}  # fmt: skip
_TORCHAO_OWN = frozenset({"quant_method", "quant_type", "modules_to_not_convert", "include_input_output_embeddings",
                          "untie_embedding_weights"})  # fmt: skip


@dataclass(frozen=True)
class Quantization:
    """What is done about one model's quantization.

    method: the backend whose weights stand in memory, or None where they are plain. settings: its settings, for the record.
    kwargs: what from_pretrained gets beside the user's own. block: rows and columns of an FP8 checkpoint's blocks.
    """

    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    stored: str | None = None
    block: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        """A few words for tables; empty where weights in memory are plain."""
        if self.method == "bitsandbytes":
            return "bitsandbytes 4-bit" if self.settings.get("load_in_4bit") else "bitsandbytes 8-bit"
        return " ".join(filter(None, (self.method, self.settings.get("quant_type"))))

    @property
    def record(self) -> dict[str, Any] | None:
        """For capture.json: what the numbers were computed with, None for plain weights as stored."""
        if self.method is not None:
            return {"in_memory": self.method, **self.settings}
        return {"stored": self.stored} if self.stored else None


def asked_for(model_kwargs: Mapping[str, Any]) -> str | None:
    """The quant_method that a config's model_kwargs ask for; None where they ask for none.

    Raises ConfigError that says what is wrong with them; the caller puts the file and the entry before it.
    """
    wanted = model_kwargs.get(KEY)
    if wanted is None:
        for key in ("load_in_4bit", "load_in_8bit"):
            if model_kwargs.get(key):
                raise ConfigError(f"{key} goes into {KEY}: {{quant_method: bitsandbytes, {key}: true}}")
        return None
    if not isinstance(wanted, Mapping):
        raise ConfigError(f"{KEY} must be a block with quant_method, not {wanted!r}")
    method = wanted.get("quant_method")
    if method not in BACKENDS:
        known = " or ".join(BACKENDS)
        raise ConfigError(f"{KEY}.quant_method is {method!r}; expected {known}")
    if method == "bitsandbytes" and bool(wanted.get("load_in_4bit")) == bool(wanted.get("load_in_8bit")):
        raise ConfigError(f"{KEY} needs exactly one of load_in_4bit: true and load_in_8bit: true")
    if method == "torchao" and not isinstance(wanted.get("quant_type"), str):
        raise ConfigError(f"{KEY}.quant_type must name a class of torchao.quantization, as in Int8WeightOnlyConfig")
    return str(method)


def check_asked(model_kwargs: Mapping[str, Any], mode: str, tensor_parallel: int | str) -> None:
    """Raise ConfigError where quantization is asked for in a way that cannot be run."""
    method = asked_for(model_kwargs)
    if method is None:
        return
    if mode not in ("auto", "resident"):
        raise ConfigError(f"{KEY}: weights quantized by {method} are loaded whole; set mode: resident, not {mode}")
    if isinstance(tensor_parallel, int) and tensor_parallel > 1:
        raise ConfigError(f"{KEY}: weights quantized by {method} stay on one GPU; set tensor_parallel: 1")


def check_installed(model_kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError where the package that quantizes the weights is not here."""
    method = asked_for(model_kwargs)
    if method is not None:
        _require(method, BACKENDS[method], KEY, f"quant_method: {method}")


def quantization_of(directory: str, model_kwargs: Mapping[str, Any], label: str) -> Quantization:
    """What is to be done for the checkpoint in `directory`. Raises CheckpointError, ConfigError."""
    method = asked_for(model_kwargs)
    stored = stored_quantization(directory)
    stored_method = stored.get("quant_method")
    where = f"{label} model '{directory}'"
    if method is not None and stored:
        raise ConfigError(f"{where} is stored quantized ({stored_method}); remove model_kwargs.{KEY}")
    if method is not None:
        _require(method, BACKENDS[method], where, f"model_kwargs.{KEY}")
        wanted = dict(model_kwargs[KEY])
        try:
            return Quantization(method, wanted, {KEY: _library_config(method, wanted)})
        except (TypeError, ValueError, AttributeError, ImportError) as error:
            raise ConfigError(f"model_kwargs.{KEY}: {error}") from error
    if stored_method == FP8:
        from transformers import FineGrainedFP8Config

        block = stored.get("weight_block_size")
        try:
            pair = (int(block[0]), int(block[1])) if block else None
        except (ValueError, TypeError, LookupError):
            raise CheckpointError(
                f"{where}: the weight_block_size of its config.json is no two numbers: {block!r}"
            ) from None
        return Quantization(kwargs={KEY: FineGrainedFP8Config(dequantize=True)}, stored="float8", block=pair)
    if stored:
        module, package = _STORED_BACKENDS.get(str(stored_method), (None, ""))
        if module:
            _require(module, package, where, "its config.json")
        return Quantization(str(stored_method), {"quant_method": stored_method}, {}, stored=str(stored_method))
    return Quantization()


def stored_quantization(directory: str) -> dict[str, Any]:
    """The quantization_config of a checkpoint's config.json; empty where there is none."""
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{directory}': config.json cannot be read: {error}") from error
    found = _stored(config)
    if not isinstance(found, dict):
        raise CheckpointError(f"'{directory}': the {KEY} of its config.json is no block of keys and values")
    return found


def _stored(config: Mapping[str, Any]) -> Any:
    text = config.get("text_config") or {}
    return config.get(KEY) or (text.get(KEY) if isinstance(text, dict) else None) or {}


def check_stored(config: Mapping[str, Any], model: str) -> None:
    """Raise UnsupportedModelError where a config.json names a way of storing weights that transformers does not know: it would take
    them for plain ones, without their scales."""
    stored = _stored(config)
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if not isinstance(method, str) or method == FP8 or method in _STORED_BACKENDS:
        return
    import transformers
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    if method not in KNOWN:
        raise UnsupportedModelError(
            f"'{model}' is stored quantized by {method!r}, which transformers {transformers.__version__} does not know; use the model as it "
            f"was before that, or take {KEY} out of its config.json where its weights are plain"
        )


def _require(module: str, package: str, where: str, who: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"{where}: {who} asks for {module}, which is not installed. Run: pip install {package}; for rented machines name it behind "
            "setup_node.sh in ray_cluster.yaml"
        )


def _library_config(method: str, wanted: dict[str, Any]) -> Any:
    """The library's config object for a block of ours. Raises ValueError, TypeError with what does not fit."""
    import transformers

    if method == "bitsandbytes":
        known = set(inspect.signature(transformers.BitsAndBytesConfig).parameters) | {"quant_method"}
        _refuse_unknown(set(wanted) - known, "BitsAndBytesConfig", known)
        return transformers.BitsAndBytesConfig(**{k: v for k, v in wanted.items() if k != "quant_method"})
    import torchao.quantization

    name = wanted["quant_type"]
    of = getattr(torchao.quantization, name, None)
    if not inspect.isclass(of) or not name.endswith("Config"):
        there = sorted(n for n in dir(torchao.quantization) if n.endswith("WeightOnlyConfig"))
        raise ValueError(f"quant_type '{name}' is no class of torchao.quantization; there are {', '.join(there)}")
    own = {k: v for k, v in wanted.items() if k in _TORCHAO_OWN - {"quant_method", "quant_type"}}
    its = {k: v for k, v in wanted.items() if k not in _TORCHAO_OWN}
    known = set(inspect.signature(of).parameters)
    _refuse_unknown(set(its) - known, name, known)
    return transformers.TorchAoConfig(quant_type=of(**its), **own)


def _refuse_unknown(unknown: set[str], what: str, known: set[str]) -> None:
    if unknown:
        raise ValueError(
            f"{what} has no '{min(unknown)}'; it has {', '.join(sorted(known - {'kwargs', 'quant_method'}))}"
        )
