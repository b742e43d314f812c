"""What the blocks of the config are made of: the frozen base class, checked types, near names, and masks for secrets."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
}
# model_kwargs that have a key of their own here; two places for one thing would contradict each other.
OWN_KEYS = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "device_map": "device",
    "revision": "base_revision and sft_revision",
}
# kwargs that have other files read than those that are checked and named in a capture's id.
MODEL_FILES = frozenset(
    {
        "variant",
        "subfolder",
        "gguf_file",
        "transformers_weights",
        "state_dict",
        "key_mapping",
        "use_safetensors",
        "config",
    }
)
TOKENIZER_FILES = frozenset({"subfolder", "config"})  # and all that end in _file


def near(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known name is near."""
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""


def _check_dtype(value: str) -> str:
    name = value.removeprefix("torch.").lower()
    if name not in DTYPES:
        raise ValueError(f"'{value}' is not a dtype; expected {', '.join(dict.fromkeys(DTYPES.values()))}")
    return DTYPES[name]


def _check_device(value: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise ValueError(f"'{value}' is not a device; expected cpu, cuda or cuda:<index>")
    return value


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):  # YAML's yes and on are booleans, and Python's True is 1
        raise ValueError(f"got {str(value).lower()}; expected a number")
    return value


def _check_model_kwargs(value: dict[str, Any]) -> dict[str, Any]:
    for key in value:
        if key in OWN_KEYS:
            raise ValueError(f"'{key}' does not go here; use the key {OWN_KEYS[key]}")
        if key in MODEL_FILES:
            raise ValueError(
                f"'{key}' does not go here: it has other files read than those that are checked and that a capture's id stands "
                "for; save the model to a directory of its own, as config.json and model.safetensors"
            )
        if key.startswith("adapter_"):
            raise ValueError(
                f"'{key}' does not go here: adapters are left out; merge it into its base model and save that"
            )
    return value


def _check_tokenizer_kwargs(value: dict[str, Any]) -> dict[str, Any]:
    for key in value:
        if key in TOKENIZER_FILES or key.endswith("_file"):
            raise ValueError(
                f"'{key}' does not go here: it has other files read than those that a capture's id stands for; put the "
                "tokenizer's files into a directory of their own, and name that as tokenizer"
            )
    return value


# strict: a text in quotes is no number, and neither "no" nor 0 is false
Bool = Annotated[bool, Field(strict=True)]
Int = Annotated[int, BeforeValidator(_no_bool), Field(strict=True)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(strict=True, allow_inf_nan=False)]
Dtype = Annotated[str, AfterValidator(_check_dtype)]
Device = Annotated[str, AfterValidator(_check_device)]
Kwargs = dict[str, JsonValue]
ModelKwargs = Annotated[dict[str, JsonValue], AfterValidator(_check_model_kwargs)]
TokenizerKwargs = Annotated[dict[str, JsonValue], AfterValidator(_check_tokenizer_kwargs)]
Text = Annotated[str, Field(min_length=1)]


class Frozen(BaseModel):
    """A validated, immutable block of the config. Unknown keys are errors; null means the default."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if v is not None or k not in cls.model_fields}

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """What repr and str show: a token in *_kwargs must not get into a log."""
        for key, value in super().__repr_args__():
            yield key, masked(value) if str(key).endswith("_kwargs") else value


def unique(names: list[str], complaint: str) -> None:
    """Raise ValueError with `complaint` and the first name that comes twice."""
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"{complaint} '{name}'")


_SECRET = re.compile("token|secret|password", re.IGNORECASE)
# Keys that say "token" and mean a token of text.
_PLAIN = re.compile(
    r"(bos|eos|unk|sep|pad|cls|mask)_token|(additional|extra)_special_tokens|\w*token_ids?|(max|min|num|n)_\w*tokens"
)


def masked(value: Any, key: str = "") -> Any:
    """A copy of a *_kwargs value in which what stands under a key that says token, secret or password is `***`."""
    if isinstance(value, dict):
        inherited = key if _is_secret(key) else ""
        return {k: masked(v, str(k) if _is_secret(str(k)) else inherited) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [masked(v, key) for v in value]
    return "***" if _is_secret(key) and value is not None and not isinstance(value, bool) else value


def _is_secret(key: str) -> bool:
    return bool(_SECRET.search(key)) and not _PLAIN.fullmatch(key)
