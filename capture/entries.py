"""From the validated config to entries: what is inherited, where relative paths start, which prompts, which passes."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from capture.degrees import check_mode
from capture.errors import ConfigError, PromptError
from capture.fields import Frozen, masked, near
from capture.passes import FOUR_PASSES, Comparison, MultiPass, Pass, single_comparisons
from capture.quantize import check_asked
from capture.settings import (
    NAME_LENGTH,
    AllowedPair,
    Batching,
    Layers,
    Lens,
    LocalRun,
    Mode,
    Output,
    Settings,
    Spans,
    SweepEntry,
    Weights,
)

log = logging.getLogger(__name__)

BLOCK = "residual_compare"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Entry(Frozen):
    """All that the capture of one pair needs to know; picklable, and the same on every machine.

    `base_model`, `sft_model` and `tokenizer` are absolute directories or hub ids. capture/identity.py says which fields
    are part of the capture's identity.
    """

    name: str
    base_model: str
    sft_model: str
    base_revision: str | None = None
    sft_revision: str | None = None
    tokenizer: str
    tokenizer_kwargs: dict[str, Any] = Field(default={})
    model_kwargs: dict[str, Any] = Field(default={})
    device: str | None = None
    dtype: str = "auto"
    mode: Mode = "auto"
    weights: Weights = "cache"
    fetch_ahead: bool = True
    cache_gib: float | None = None
    top_k: int = 20
    prompts: tuple[str, ...]
    prompt_sources: tuple[str, ...] = ()  # where each prompt stands, FILE:LINE or config key; for messages
    trim_prompts: bool = False
    add_special_tokens: bool = True
    prompt_variants: tuple[str, ...] = ("identity",)
    prompt_variant_options: dict[str, dict[str, Any]] = Field(default={})
    tracked_token_ids: tuple[int, ...] = ()
    tracked_token_strings: tuple[str, ...] = ()
    interesting_token_map: dict[str, str] = Field(default={})
    passes: tuple[Pass, ...] = FOUR_PASSES
    comparisons: tuple[Comparison, ...] = MultiPass().comparisons()
    embedding_variants: dict[str, str] = Field(
        default={}
    )  # name of the variant -> its comparison; empty where multi_pass is on
    lens: Lens = Lens()
    layers: Layers = "all"
    batching: Batching = Batching()
    output: Output = Output()
    spans: Spans = Spans()
    noise_floor: bool = True
    spectrum: bool = False
    local_run: LocalRun = LocalRun()
    tensor_parallel: int | Literal["auto"] = 1
    replicate_attention: bool = False
    gpus: float | None = None
    accelerator_type: str | None = None
    device_memory_gib: float | None = None
    allow_pickle: bool = False
    notes: str | None = None

    @property
    def tokenizer_revision(self) -> str | None:
        """The tokenizer's own where it is set; else that of the model whose repository it lies in, of the sft model's first."""
        by_model = {self.base_model: self.base_revision, self.sft_model: self.sft_revision}
        found: str | None = self.tokenizer_kwargs.get("revision", by_model.get(self.tokenizer))
        return found

    def as_json(self) -> dict[str, Any]:
        """The entry as JSON values for a record of the capture, secrets in *_kwargs masked."""
        data = self.model_dump(mode="json")
        pairs = data["local_run"]["allowed_pairs"]
        for block in (data, *pairs):
            block |= {k: masked(v) for k, v in block.items() if k.endswith("_kwargs")}
        return data


@dataclass(frozen=True)
class Config:
    """A loaded config: its settings, the file they came from, which keys the environment replaced (key -> variable), and the
    tokenizer that the file has for all entries of model_sweep without one of their own."""

    settings: Settings
    path: Path
    overridden: Mapping[str, str] = field(default_factory=dict)
    shared_tokenizer: str | None = None

    def names(self) -> list[str]:
        """The entries of a sweep: model_sweep, or the one pair of the block."""
        return [e.name for e in self.settings.model_sweep] or [self.own_name()]

    def own_name(self) -> str:
        """The name of the block's own pair, `<base>_to_<sft>`. Raises ConfigError where the block names none."""
        base, sft = self.settings.base_model, self.settings.sft_model
        if base is None or sft is None:
            raise ConfigError(
                f"{self.path}: {BLOCK} names no pair; set base_model and sft_model, or list pairs in model_sweep"
            )
        name = f"{_slug(base)}_to_{_slug(sft)}"
        if len(name) > NAME_LENGTH:
            raise ConfigError(
                f"{self.path}: '{name}' is too long for an entry's name; list the pair in model_sweep, with a name"
            )
        return name

    def entries(self) -> tuple[Entry, ...]:
        """All entries of the sweep, resolved. Raises ConfigError with every entry's error, one a line."""
        checked = self.checked_entries()
        errors = [e for _, e in checked if isinstance(e, ConfigError)]
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ConfigError("\n".join(str(e) for e in errors))
        return tuple(e for _, e in checked if isinstance(e, Entry))

    def checked_entries(self) -> list[tuple[str, Entry | ConfigError]]:
        """Every entry of the sweep by name: resolved, or the error that is its own. Raises what concerns all of them."""
        self._prompts  # noqa: B018  an error in the prompts is no one entry's
        found: list[tuple[str, Entry | ConfigError]] = []
        for name in self.names():
            try:
                found.append((name, self.entry(name)))
            except ConfigError as error:
                found.append((name, error))
        return found

    def entry(self, name: str) -> Entry:
        """One entry by name: an entry of the sweep, or the block's own pair."""
        for i, sweep in enumerate(self.settings.model_sweep):
            if sweep.name == name:
                return self._resolve(sweep, f"model_sweep[{i}].")
        known = [e.name for e in self.settings.model_sweep]
        if self.settings.base_model is not None:
            known.append(self.own_name())
            if name == known[-1]:
                return self._resolve(None, "")
        raise ConfigError(f"{self.path}: no entry '{name}'{near(name, known)}; entries: {', '.join(known) or 'none'}")

    # -- one entry ---------------------------------------------------------------------------------------------------

    def _resolve(self, sweep: SweepEntry | None, prefix: str) -> Entry:
        block = self.settings
        pair: Settings | SweepEntry = sweep or block
        base, sft = pair.base_model, pair.sft_model
        if base is None or sft is None:
            raise ConfigError(f"{self.path}: {BLOCK} names no pair")
        allowed, allowed_at = self._allowed(base, sft, sweep.name if sweep else self.own_name())
        tokenizer, tokenizer_at = pair.tokenizer, f"{prefix}tokenizer"
        if tokenizer is None and sweep is not None:
            tokenizer, tokenizer_at = self.shared_tokenizer, "tokenizer"
        if allowed and allowed.tokenizer:
            tokenizer, tokenizer_at = allowed.tokenizer, f"{allowed_at}.tokenizer"

        def pick(key: str) -> Any:
            for source in (allowed, sweep, block):
                value = getattr(source, key, None)
                if value is not None:
                    return value
            return None

        try:
            check_asked(pick("model_kwargs"), pick("mode"), pick("tensor_parallel"))
        except ConfigError as error:
            raise ConfigError(f"{self._where(f'{prefix}model_kwargs')}: {error}") from error
        check_mode(pick("mode"), pick("tensor_parallel"), f"{self.path}: {BLOCK}{f'.{prefix[:-1]}' if prefix else ''}")
        passes, comparisons = block.multi_pass.runs, block.multi_pass.comparisons()
        variants: dict[str, str] = {}
        if not block.multi_pass.enabled:
            passes, comparisons, variants = single_comparisons(block.embedding_variants)
        lens, layers = pick("lens"), pick("layers")
        if lens.enabled and isinstance(layers, tuple) and isinstance(lens.layers, tuple):
            left = [layer for layer in lens.layers if layer not in layers]
            if len(left) == len(lens.layers):
                raise ConfigError(
                    f"{self._where(f'{prefix}lens.layers' if sweep and sweep.lens else 'lens.layers')}: none of {list(lens.layers)} is among "
                    f"layers, {list(layers)}; name layers of those, or set lens.enabled to false"
                )
            if left:
                log.warning("%s: lens.layers names %s, which layers leaves out: they get no lens",
                            sweep.name if sweep else self.own_name(), left)  # fmt: skip
        sft_path = self._model(sft, f"{prefix}sft_model")
        trim = block.trim_prompts
        if trim is None:
            trim = block.prompt_file is not None and Path(block.prompt_file).name == "prod_prompts.txt"
        return Entry(
            name=sweep.name if sweep else self.own_name(),
            base_model=self._model(base, f"{prefix}base_model"),
            sft_model=sft_path,
            base_revision=pair.base_revision,
            sft_revision=pair.sft_revision,
            tokenizer=self._model(tokenizer, tokenizer_at) if tokenizer else sft_path,
            tokenizer_kwargs=pick("tokenizer_kwargs"),
            model_kwargs=pick("model_kwargs"),
            device=f"cuda:{block.local_run.cuda_device_index}" if allowed else pick("device"),
            dtype=pick("dtype"),
            mode=pick("mode"),
            weights=pick("weights"),
            fetch_ahead=block.fetch_ahead,
            cache_gib=block.cache_gib,
            top_k=block.top_k,
            prompts=tuple(text for text, _ in self._prompts),
            prompt_sources=tuple(source for _, source in self._prompts),
            trim_prompts=trim,
            add_special_tokens=block.add_special_tokens,
            prompt_variants=block.prompt_variants,
            prompt_variant_options=block.prompt_variant_options,
            tracked_token_ids=block.tracked_token_ids,
            tracked_token_strings=block.tracked_token_strings,
            interesting_token_map=block.interesting_token_map,
            passes=passes,
            comparisons=comparisons,
            embedding_variants=variants,
            lens=lens,
            layers=layers,
            batching=block.batching,
            output=block.output,
            spans=pick("spans"),
            noise_floor=block.noise_floor,
            spectrum=pick("spectrum"),
            local_run=block.local_run,
            tensor_parallel=pick("tensor_parallel"),
            replicate_attention=pick("replicate_attention"),
            gpus=pick("gpus"),
            accelerator_type=pick("accelerator_type"),
            device_memory_gib=pick("device_memory_gib"),
            allow_pickle=block.allow_pickle,
            notes=sweep.notes if sweep else None,
        )

    def _allowed(self, base: str, sft: str, name: str) -> tuple[AllowedPair | None, str]:
        """The pair's item of local_run.allowed_pairs and its key; None where the guards are off."""
        guards = self.settings.local_run
        if not guards.enabled:
            return None, ""
        wanted = (self._spelling(base), self._spelling(sft))
        for i, pair in enumerate(guards.allowed_pairs):
            if (self._spelling(pair.base), self._spelling(pair.sft)) == wanted:
                return pair, f"local_run.allowed_pairs[{i}]"
        raise ConfigError(
            f"{self.path}: {BLOCK}.local_run.allowed_pairs does not list the pair of '{name}', '{base}' and '{sft}'; "
            "add it there, or set local_run.enabled to false"
        )

    # -- paths and prompts -------------------------------------------------------------------------------------------

    @cached_property
    def directories(self) -> list[Path]:
        """Where relative paths start, in order: the config's directory, its parents up to the project's, the current one."""
        start = self.path.parent
        up = [start, *start.parents]
        root = next((i for i, d in enumerate(up) if (d / "pyproject.toml").is_file()), 0)
        return list(dict.fromkeys([*up[: root + 1], Path.cwd()]))

    def _find(self, value: str) -> Path | None:
        try:
            path = Path(value).expanduser()
        except RuntimeError:  # ~name of nobody here
            return None
        candidates = (Path(os.path.abspath(d / path)) for d in self.directories)
        return next((c for c in candidates if c.exists()), None)

    def _spelling(self, value: str) -> str:
        found = self._find(value)
        return str(found) if found else value

    def _where(self, key: str) -> str:
        variable = self.overridden.get(key)
        return f"{variable} (environment)" if variable else f"{self.path}: {BLOCK}.{key}"

    def _model(self, value: str, key: str) -> str:
        """An absolute directory, or the value itself where it can only be a hub id."""
        found = self._find(value)
        if found and found.is_dir():
            return str(found)
        if found and _is_path(value):
            raise ConfigError(f"{self._where(key)}: '{value}' is a file; name the directory that holds config.json")
        if _is_path(value) or not _HUB_ID.fullmatch(value):
            looked = "" if value.startswith(("/", "~")) else f" in {_join(self.directories)}"
            kind = "" if _is_path(value) else ", and it is no hub id (owner/name) either"
            raise ConfigError(f"{self._where(key)}: no directory '{value}'{looked}{kind}")
        return value

    @cached_property
    def _prompts(self) -> list[tuple[str, str]]:
        """(text, where it stands) of every prompt: the file's first, then the inline ones."""
        block = self.settings
        found: list[tuple[str, str]] = []
        if block.prompt_file is not None:
            path = self._find(block.prompt_file)
            if path is None or not path.is_file():
                raise ConfigError(
                    f"{self._where('prompt_file')}: no file '{block.prompt_file}' in {_join(self.directories)}"
                )
            if path.suffix in (".json", ".jsonl"):
                raise ConfigError(
                    f"{self._where('prompt_file')}: a line of the file is a prompt as it stands, and '{path}' would be measured braces and "
                    "all; put the texts alone into a .txt file"
                )
            try:
                lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: U+2028 may stand in a prompt
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{self._where('prompt_file')}: cannot read '{path}' as UTF-8: {error}") from error
            found = [(text.strip(), f"{path}:{i}") for i, text in enumerate(lines, 1) if text.strip()]
        found += [(text, f"{self.path}: {BLOCK}.prompts[{i}]") for i, text in enumerate(block.prompts)]
        if not found:
            empty = f"'{block.prompt_file}' holds none" if block.prompt_file else "give prompts or prompt_file"
            raise PromptError(f"{self.path}: {BLOCK} has no prompts; {empty}")
        return found


def _is_path(value: str) -> bool:
    return value in (".", "..") or value.startswith(("./", "../", "/", "~")) or value.endswith(".safetensors")


def _slug(model: str) -> str:
    name = Path(os.path.expanduser(model)).absolute().name if _is_path(model) else model
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "model"


def _join(paths: list[Path]) -> str:
    return ", ".join(map(str, paths))
