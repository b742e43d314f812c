"""The config: one `residual_compare` block of YAML, validated once into frozen objects.

A user's file -> `load_config` -> `Config` -> `Config.entries()` -> `Entry`, which is all that a capture needs to know.
The blocks are in capture/settings.py, the way from a block to its entries in capture/entries.py.
"""

from __future__ import annotations

import json
import logging
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from capture.entries import BLOCK, Config, Entry
from capture.errors import ConfigError
from capture.fields import masked, near
from capture.passes import FOUR_PASSES, Comparison, MultiPass, Owner, Pass
from capture.settings import NAME_LENGTH, Batching, Lens, LocalRun, Output, Settings, SweepEntry

__all__ = [
    "ENV_OVERRIDES", "FOUR_PASSES", "Batching", "Comparison", "Config", "Entry", "Lens", "LocalRun", "MultiPass", "Output",
    "Owner", "Pass", "Settings", "SweepEntry", "load_config",
]  # fmt: skip

log = logging.getLogger(__name__)

# variable -> the block's key that it replaces; *_KWARGS hold JSON objects, an empty variable counts as not set
ENV_OVERRIDES = {
    "RESIDUAL_BASE_MODEL": "base_model",
    "RESIDUAL_SFT_MODEL": "sft_model",
    "RESIDUAL_TOKENIZER": "tokenizer",
    "RESIDUAL_DEVICE": "device",
    "RESIDUAL_DTYPE": "dtype",
    "RESIDUAL_PROMPT_FILE": "prompt_file",
    "RESIDUAL_TOKENIZER_KWARGS": "tokenizer_kwargs",
    "RESIDUAL_MODEL_KWARGS": "model_kwargs",
}
_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


def load_config(path: str | os.PathLike[str] | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read, override from the environment and validate a config.

    `path` None: `DEV_MODE` (default true) chooses configs/dev_config.yaml or configs/prod_config.yaml, looked for from the
    current directory upwards and then next to the package. Raises ConfigError that names file, line, key, value and what
    was expected, for all errors at once, one a line. Model paths and prompts are looked at by `Config.entries`.
    """
    file = Path(os.path.abspath(Path(path).expanduser())) if path is not None else _default_config(environ)
    data, root = _read_yaml(file)
    if not isinstance(data, dict) or BLOCK not in data:
        keys = [str(k) for k in data] if isinstance(data, dict) else []
        raise ConfigError(f"{file}: no top-level key '{BLOCK}'{_near_key(keys)}; put the settings under it")
    block = {} if data[BLOCK] is None else data[BLOCK]
    if not isinstance(block, dict):
        raise ConfigError(f"{file}:{_line(root, (BLOCK,))}: {BLOCK}: got {_shown(block, ())}; expected keys and values")
    overrides = _overrides(environ)
    overridden = {key: variable for key, (variable, _) in overrides.items()}
    try:
        settings = Settings.model_validate(block | {key: value for key, (_, value) in overrides.items()})
    except ValidationError as error:
        found = sorted(error.errors(), key=lambda e: _line(root, (BLOCK, *e["loc"])))
        raise ConfigError("\n".join(_message(e, file, root, overridden) for e in found)) from None
    if overridden:
        log.info("%s: from the environment: %s", file, ", ".join(f"{v} -> {k}" for k, v in overridden.items()))
    own = [v for k, v in overridden.items() if k in ("base_model", "sft_model", "tokenizer")]
    if own and settings.model_sweep:
        log.warning("%s set the block's own pair; the %d entries of model_sweep keep theirs", ", ".join(own),
                    len(settings.model_sweep))  # fmt: skip
    shared = block.get("tokenizer") if block.get("base_model") is None else None  # else it is that pair's
    return Config(settings, file, overridden, shared if isinstance(shared, str) else None)


def _default_config(environ: Mapping[str, str]) -> Path:
    mode = environ.get("DEV_MODE", "").strip().lower() or "true"
    if mode not in _TRUE | _FALSE:
        raise ConfigError(f"DEV_MODE is '{environ['DEV_MODE']}'; expected true or false")
    name = "dev_config.yaml" if mode in _TRUE else "prod_config.yaml"
    here = Path.cwd()
    for directory in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (directory / "configs" / name).is_file():
            return directory / "configs" / name
    raise ConfigError(f"no configs/{name} in {here} or above it; name a config file, or go to the project's directory")


# -- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML in which two escapes of half a character each are the character, as JSON writes those beyond U+FFFF: "\\ud83d\\ude00"."""

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _read_yaml(file: Path) -> tuple[Any, yaml.Node | None]:
    """The file's data, and its node tree, which knows the lines."""
    try:
        loader = _Loader(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        beside = [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise ConfigError(f"no config file '{file}'{near(file.name, beside)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config '{file}': {error}") from error
    try:
        root = loader.get_single_node()
        data = loader.construct_document(root) if root is not None else None
        _reject_duplicates(file, root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark  # not str(error): it quotes the line, which may hold a secret
        raise ConfigError(f"{file}:{mark.line + 1 if mark else '?'}: YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise ConfigError(f"{file}: YAML: nested too deeply, or in itself") from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:  # PyYAML's own of odd values
        raise ConfigError(f"{file}: YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()
    return data, root


def _reject_duplicates(file: Path, root: yaml.Node | None) -> None:
    """YAML readers let the last of two equal keys win without a word; here that is an error."""

    seen: set[int] = set()  # what an alias stands for is looked at once: aliases of aliases are as many as one likes

    def walk(node: yaml.Node, path: tuple[str | int, ...]) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                walk(item, (*path, i))
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                here = key.start_mark.line + 1
                if key.value in lines:
                    raise ConfigError(
                        f"{file}:{here}: {_key((*path, key.value))}: the key is there already, at line {lines[key.value]}"
                    )
                lines[str(key.value)] = here
                if path or key.value == BLOCK:  # other top-level blocks are not ours
                    walk(value, (*path, str(key.value)))

    if root is not None:
        walk(root, ())


def _line(node: yaml.Node | None, path: tuple[str | int, ...]) -> int:
    """The line of a key, or of the nearest one above it that is in the file."""
    line = node.start_mark.line + 1 if node is not None else 1
    for part in path:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            pair = (node.value[part], node.value[part])
        else:
            pair = None
        if pair is None:
            return line
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line


# -- environment -----------------------------------------------------------------------------------------------------


def _overrides(environ: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """The block's key -> (variable, value)."""
    found: dict[str, tuple[str, Any]] = {}
    for variable, key in ENV_OVERRIDES.items():
        text = environ.get(variable, "")
        if not text.strip():
            continue
        value: Any = text
        if key.endswith("_kwargs"):  # the text is never shown: it may hold a token
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = type(error).__name__
                if isinstance(error, json.JSONDecodeError):
                    reason = f"{error.msg} at character {error.pos + 1}"
                raise ConfigError(
                    f"{variable}: not JSON ({reason}); expected an object such as '{{\"key\": 1}}'"
                ) from None
            if not isinstance(value, dict):
                raise ConfigError(f"{variable}: expected a JSON object such as '{{\"key\": 1}}'")
        found[key] = (variable, value)
    return found


# -- messages --------------------------------------------------------------------------------------------------------

_EXPECTED = {
    "string_type": "text (in quotes, if it looks like a number, a date or true)",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "string_too_short": "text that is not empty",
    "string_too_long": f"at most {NAME_LENGTH} characters",
    "invalid-json-value": "text, a number, true, false, null, a list, or keys and values (a date in quotes)",
}


def _message(error: Any, file: Path, root: yaml.Node | None, overridden: Mapping[str, str]) -> str:
    """One line for one validation error: where, which key, what was found, what was expected."""
    loc, kind, value = tuple(error["loc"]), error["type"], error["input"]
    path = (BLOCK, *loc)
    where = f"{overridden[loc[0]]} (environment)" if loc and loc[0] in overridden else f"{file}:{_line(root, path)}"
    text = f"{where}: {_key(path)}: "
    if kind == "extra_forbidden":
        known = list(_model_at(loc[:-1]).model_fields)
        return text + f"unknown key{near(str(loc[-1]), known) or '; expected one of ' + ', '.join(known)}"
    if kind == "missing":
        description = _model_at(loc[:-1]).model_fields[str(loc[-1])].description
        return text + f"missing; expected {description}"
    if kind == "invalid_key":
        return f"{where}: {_key(path[:-1])}: the key {loc[-1]} is not text; put it in quotes"
    if kind == "value_error":
        return text + str(error["ctx"]["error"])
    if kind == "literal_error":
        expected = error["ctx"]["expected"].replace("'", "")
    elif kind == "string_pattern_mismatch":
        signs = ". _ + -" if "-]" in error["ctx"]["pattern"] else ". _ +"
        expected = f"letters, digits and {signs}, a letter or digit first"
    elif kind in ("greater_than", "greater_than_equal", "less_than_equal"):
        expected = "a number " + error["msg"].removeprefix("Input should be ")
    else:
        expected = _EXPECTED.get(kind) or error["msg"].removeprefix("Input should be ")
    return text + f"got {_shown(value, loc)}; expected {expected}"


def _key(path: tuple[str | int, ...]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _shown(value: Any, loc: tuple[str | int, ...]) -> str:
    """A value as a message shows it: short, containers by kind, secrets not at all."""
    if isinstance(value, dict | list | tuple):
        return "keys and values" if isinstance(value, dict) else "a list"
    if any(str(part).endswith("_kwargs") for part in loc):
        if str(loc[-1]).endswith("_kwargs"):
            return f"{type(value).__name__}"  # one text instead of keys and values may hold anything
        value = masked(value, next((str(p) for p in reversed(loc) if isinstance(p, str)), ""))
    try:
        shown = json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a very large number"
    shown = f"'{shown[1:-1]}'" if isinstance(value, str) else shown
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _model_at(loc: tuple[str | int, ...]) -> type[BaseModel]:
    """The block of the config that a location lies in."""
    model: type[BaseModel] = Settings
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = _block_in(model.model_fields[part].annotation) or model
    return model


def _block_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in typing.get_args(annotation) if (m := _block_in(a)) is not None), None)


def _near_key(keys: list[str]) -> str:
    import difflib

    match = difflib.get_close_matches(BLOCK, keys, n=1)
    return f" (the nearest is '{match[0]}')" if match else ""
