"""The config: one `residual_compare` block of YAML, validated once into frozen objects.

A user's file -> `load_config` -> `Config` -> `Config.entries()` -> `Entry`, which is all that a capture needs to know.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from capture.errors import ConfigError

Owner = Literal["base", "sft"]
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


class Frozen(BaseModel):
    """A validated, immutable block of the config; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Pass(Frozen):
    """One way through the pair (the seed's "run"): whose embeddings, whose blocks, whose unembedding."""

    name: str = Field(min_length=1, description="name of the pass; BB, BS, SB and SS are the canonical four")
    model: Owner = Field(description="whose blocks: base or sft")
    embedding_source: Owner | None = Field(None, description="whose embeddings; the blocks' model when left out")
    unembedding_source: Owner | None = Field(None, description="whose unembedding; the blocks' model when left out")

    @property
    def embeddings(self) -> Owner:
        return self.embedding_source or self.model

    @property
    def unembedding(self) -> Owner:
        return self.unembedding_source or self.model


class Comparison(Frozen):
    """An ordered pair of passes: differences are sft_run minus base_run."""

    base_run: str = Field(description="the pass subtracted")
    sft_run: str = Field(description="the pass subtracted from")

    @property
    def name(self) -> str:
        return f"{self.base_run}-{self.sft_run}"


FOUR_PASSES = (
    Pass(name="BB", model="base", embedding_source="base"),
    Pass(name="BS", model="sft", embedding_source="base"),
    Pass(name="SB", model="base", embedding_source="sft"),
    Pass(name="SS", model="sft", embedding_source="sft"),
)


class MultiPass(Frozen):
    """The passes of a capture and the comparisons between them."""

    enabled: bool = Field(True, description="true: the passes below; false: one comparison per embedding variant")
    runs: tuple[Pass, ...] = Field(FOUR_PASSES, description="the passes; the canonical four by default")
    pairwise_differences: tuple[Comparison, ...] | None = Field(
        None, description="pairs of passes, as [BB, SS]; all pairs in order by default"
    )

    @field_validator("runs", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        canonical = {p.name: p for p in FOUR_PASSES}
        if isinstance(value, list):
            return [canonical[v] if isinstance(v, str) and v in canonical else v for v in value]
        return FOUR_PASSES if value is None else value

    @field_validator("pairwise_differences", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        def pair(v: Any) -> Any:
            if isinstance(v, str) and v.count("-") == 1:
                v = v.split("-")
            if isinstance(v, list | tuple) and len(v) == 2:
                return {"base_run": v[0], "sft_run": v[1]}
            return v

        return [pair(v) for v in value] if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _consistent(self) -> MultiPass:
        names = [p.name for p in self.runs]
        if not names:
            raise ValueError("at least one run is needed; leave the key out for BB, BS, SB, SS")
        if len(set(names)) < len(names):
            raise ValueError(f"two runs share a name: {names}")
        for c in self.pairwise_differences or ():
            for name in (c.base_run, c.sft_run):
                if name not in names:
                    raise ValueError(f"pairwise_differences names the run '{name}', which is not one of {names}")
        return self

    def comparisons(self) -> tuple[Comparison, ...]:
        if self.pairwise_differences is not None:
            return self.pairwise_differences
        names = [p.name for p in self.runs]
        return tuple(Comparison(base_run=a, sft_run=b) for i, a in enumerate(names) for b in names[i + 1 :])


class Swap(Frozen):
    """Which embeddings and unembedding one side of an embedding variant uses."""

    embedding_source: Owner | None = Field(None, description="whose embeddings; the side's own when left out")
    unembedding_source: Owner | None = Field(None, description="whose unembedding; the side's own when left out")


class EmbeddingVariant(Frozen):
    """One single comparison: the base side and the sft side, each with its swaps."""

    name: str = Field(min_length=1, description="name of the variant")
    base: Swap = Field(Swap(), description="swaps of the base side")
    sft: Swap = Field(Swap(), description="swaps of the sft side")


class Lens(Frozen):
    """The logit lens: what is read out of a state through the unembedding."""

    enabled: bool = Field(True, description="false skips logits, entropies, KL and top-k, and their cost")
    norm: Literal["final", "none"] = Field(
        "final", description="final: the final norm goes before the unembedding; none: the raw state, as the seed did"
    )
    layers: Literal["all"] | int | tuple[int, ...] = Field(
        "all", description="all; n for every n-th layer and the last; or a list of layers (negative from the end: -1 = L)"
    )

    @field_validator("layers")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 1:
            raise ValueError("every n-th layer needs n >= 1")
        return value


class Batching(Frozen):
    """How prompts are put together. Passes of one comparison always run at equal batch shapes."""

    padding: Literal["none", "right", "left"] = Field(
        "none", description="none: only prompts of equal length share a batch; right, left: pad to the longest"
    )
    max_tokens: int = Field(4096, ge=1, description="tokens per batch, counted once for the pair of passes")


class Output(Frozen):
    """How tables are written."""

    compression_level: int = Field(3, ge=1, le=22, description="zstd level; 9 gained nothing over 3")
    topk: bool = Field(True, description="false leaves out the top-k tables, nine tenths of the bytes")


class AllowedPair(Frozen):
    """A pair that may run on the local GPU, and the settings it must run with."""

    base: str = Field(description="base model of the pair")
    sft: str = Field(description="sft model of the pair")
    device: str | None = Field(None, description="device to use instead of the config's")
    dtype: str | None = Field(None, description="dtype to use instead of the config's")
    tokenizer: str | None = Field(None, description="tokenizer to use instead of the config's")
    tokenizer_kwargs: dict[str, Any] | None = Field(None, description="tokenizer_kwargs to use instead")
    model_kwargs: dict[str, Any] | None = Field(None, description="model_kwargs to use instead")
    notes: str | None = Field(None, description="for people")


class LocalRun(Frozen):
    """Guards for runs on one's own GPU. Nothing falls back: a check that fails stops the run."""

    enabled: bool = Field(False, description="true: every check below must pass before anything loads")
    min_vram_gb: float = Field(0, ge=0, description="least total memory of the GPU, GiB")
    require_gpu_name_substring: str | None = Field(None, description="text that the GPU's name must hold, any case")
    cuda_device_index: int = Field(0, ge=0, description="which CUDA device")
    allowed_pairs: tuple[AllowedPair, ...] = Field((), description="the only pairs that may run")


class SweepEntry(Frozen):
    """One pair of the sweep. What is left out is taken from the block above it."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", description="name; part of paths")
    base_model: str = Field(description="hub id or directory of the base checkpoint")
    sft_model: str = Field(description="hub id or directory of the fine-tuned checkpoint")
    tokenizer: str | None = Field(None, description="the one tokenizer of both; the sft model's when left out")
    tokenizer_kwargs: dict[str, Any] | None = Field(None, description="passed to AutoTokenizer.from_pretrained")
    model_kwargs: dict[str, Any] | None = Field(None, description="passed to AutoModelForCausalLM.from_pretrained")
    base_revision: str | None = Field(None, description="branch, tag or commit of the base model")
    sft_revision: str | None = Field(None, description="branch, tag or commit of the sft model")
    device: str | None = Field(None, description="cuda, cuda:1, cpu")
    dtype: str | None = Field(None, description="auto, float32, bfloat16, float16")
    mode: Literal["auto", "resident", "streamed"] | None = Field(None, description="mode of this entry")
    gpus: float | None = Field(None, ge=0, description="GPUs to ask Ray for; by default 1 where the device is CUDA")
    accelerator_type: str | None = Field(None, description="Ray's accelerator type to ask for, such as H100")
    estimated_vram_gb: float | None = Field(None, ge=0, description="for people; the plan does its own arithmetic")
    notes: str | None = Field(None, description="for people")


class Settings(Frozen):
    """The `residual_compare` block."""

    base_model: str | None = Field(None, description="hub id or directory of the base checkpoint")
    sft_model: str | None = Field(None, description="hub id or directory of the fine-tuned checkpoint")
    base_revision: str | None = Field(None, description="branch, tag or commit of the base model")
    sft_revision: str | None = Field(None, description="branch, tag or commit of the sft model")
    tokenizer: str | None = Field(None, description="the one tokenizer of both; the sft model's when left out")
    tokenizer_kwargs: dict[str, Any] = Field({}, description="passed to AutoTokenizer.from_pretrained")
    model_kwargs: dict[str, Any] = Field({}, description="passed to AutoModelForCausalLM.from_pretrained")
    device: str | None = Field(None, description="cuda, cuda:1, cpu; null takes CUDA where there is one, else the CPU")
    dtype: str = Field("auto", description="auto (as the checkpoint says), float32, bfloat16, float16")
    top_k: int = Field(20, ge=1, le=1000, description="length of the top-k lists")
    prompts: tuple[str, ...] = Field((), description="prompts, inline")
    prompt_file: str | None = Field(None, description="file with a prompt a line; blank lines are skipped")
    trim_prompts: bool | None = Field(
        None, description="trim all prompts to the shortest one's tokens; by default for a file named prod_prompts.txt"
    )
    add_special_tokens: bool = Field(True, description="let the tokenizer add its own BOS and the like")
    prompt_variants: tuple[str, ...] = Field(("identity",), description="which variants of each prompt to capture")
    prompt_variant_options: dict[str, dict[str, Any]] = Field({}, description="options by variant")
    tracked_token_ids: tuple[int, ...] = Field((), description="ids whose logits are kept for every cell")
    tracked_token_strings: tuple[str, ...] = Field((), description="tokens in the tokenizer's own spelling, likewise")
    interesting_token_map: dict[str, str] = Field({}, description="label: token, likewise")
    embedding_variants: tuple[EmbeddingVariant, ...] = Field(
        (EmbeddingVariant(name="default"),), description="the comparisons made when multi_pass is off"
    )
    multi_pass: MultiPass = Field(MultiPass(), description="the passes and their comparisons")
    model_sweep: tuple[SweepEntry, ...] = Field((), description="the pairs of the sweep")
    local_run: LocalRun = Field(LocalRun(), description="guards for one's own GPU")
    lens: Lens = Field(Lens(), description="the logit lens")
    mode: Literal["auto", "resident", "streamed"] = Field(
        "auto", description="resident keeps both models, streamed a few layers; auto: resident where it fits easily"
    )
    batching: Batching = Field(Batching(), description="how prompts are batched")
    output: Output = Field(Output(), description="how tables are written")
    noise_floor: bool = Field(True, description="measure what batching alone changes, on one prompt")
    gpus: float | None = Field(None, ge=0, description="GPUs to ask Ray for; by default 1 where the device is CUDA")
    accelerator_type: str | None = Field(None, description="Ray's accelerator type to ask for, such as H100")
    device_memory_gib: float | None = Field(None, gt=0, description="cap on device memory, for shared cards and tests")
    allow_pickle: bool = Field(False, description="accept .bin checkpoints; they can run any code when opened")

    @field_validator(
        "prompts", "prompt_variants", "tracked_token_ids", "tracked_token_strings", "embedding_variants", "model_sweep",
        "tokenizer_kwargs", "model_kwargs", "prompt_variant_options", "interesting_token_map", "multi_pass", "local_run",
        "lens", "batching", "output", mode="before",
    )  # fmt: skip
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, value: str) -> str:
        return check_dtype(value)


DTYPES = {"auto": "auto", "float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16",
          "float16": "float16", "fp16": "float16", "half": "float16"}  # fmt: skip


def check_dtype(value: str) -> str:
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"expected one of {sorted(set(DTYPES.values()))}")
    return DTYPES[name]


class Entry(Frozen):
    """All that the capture of one pair needs to know; picklable, and the same on every machine.

    `config_file` and `base_dir` are where relative paths start; they are not part of the capture's identity.
    """

    name: str
    base_model: str
    sft_model: str
    base_revision: str | None = None
    sft_revision: str | None = None
    tokenizer: str
    tokenizer_kwargs: dict[str, Any] = {}
    model_kwargs: dict[str, Any] = {}
    device: str | None = None
    dtype: str = "auto"
    mode: Literal["auto", "resident", "streamed"] = "auto"
    top_k: int = 20
    prompts: tuple[str, ...]
    trim_prompts: bool = False
    add_special_tokens: bool = True
    prompt_variants: tuple[str, ...] = ("identity",)
    prompt_variant_options: dict[str, dict[str, Any]] = {}
    tracked_token_ids: tuple[int, ...] = ()
    tracked_token_strings: tuple[str, ...] = ()
    interesting_token_map: dict[str, str] = {}
    passes: tuple[Pass, ...] = FOUR_PASSES
    comparisons: tuple[Comparison, ...] = MultiPass().comparisons()
    embedding_variants: dict[str, str] = {}
    lens: Lens = Lens()
    batching: Batching = Batching()
    output: Output = Output()
    noise_floor: bool = True
    local_run: LocalRun = LocalRun()
    gpus: float | None = None
    accelerator_type: str | None = None
    device_memory_gib: float | None = None
    allow_pickle: bool = False
    notes: str | None = None
