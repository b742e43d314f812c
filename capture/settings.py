"""The blocks of the config as frozen, validated objects: the one list of keys, types, defaults and descriptions.

The docs page is made from the fields below, and so are the nearest keys that errors name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from capture.fields import (
    Bool,
    Device,
    Dtype,
    Frozen,
    Int,
    Kwargs,
    ModelKwargs,
    Number,
    Text,
    TokenizerKwargs,
    near,
    unique,
)
from capture.passes import EmbeddingVariant, MultiPass
from capture.variants import OPTIONS, VARIANTS, option_error

NAME_LENGTH = 128  # a file is called by an entry, a time, a process and a host, and may have 255 characters
Weights = Literal["stream", "cache", "download"]
Mode = Literal["auto", "resident", "one-at-a-time", "streamed", "streamed-2", "sub-layer"]


def _layers(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    listed = isinstance(value, list | tuple) and value and all(type(v) is int for v in value)
    if not (value == "all" or (whole and value >= 1) or listed):
        raise ValueError(f"got {value!r}; expected all, a whole number from 1 up, or a list of whole numbers")
    return value


Layers = Annotated[Literal["all"] | Int | tuple[Int, ...], BeforeValidator(_layers)]


def _degree(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"got {value!r}; expected auto or a whole number from 1 up")


Degree = Annotated[Literal["auto"] | Int, BeforeValidator(_degree)]


class Lens(Frozen):
    """The logit lens: what is read out of a state through the unembedding."""

    enabled: Bool = Field(default=True, description="false skips logits, entropies, KL and top-k, and their cost")
    norm: Literal["final", "none"] = Field(
        default="final",
        description="final: the final norm goes before the unembedding; none: the raw state",
    )
    layers: Layers = Field(
        default="all",
        description="all; n for every n-th layer and L; or a list out of -1 (what enters block 0), 0..L-1 and L (after the final norm)",
    )
    compile: Literal["auto"] | Bool = Field(
        default="auto",
        description="whether statistics of states and logits in main memory run compiled, which takes a C++ compiler once, and those of "
        "logits on a GPU in Triton kernels (Triton comes with torch for CUDA; it needs a C compiler too): auto does where that can be had; true fails where it cannot; "
        "the same tolerances hold either way",
    )


class Batching(Frozen):
    """How prompts are put together. Passes of one comparison always run at equal batch shapes."""

    padding: Literal["none", "right", "left"] = Field(
        default="none", description="none: only prompts of equal length share a batch; right, left: pad to the longest"
    )
    max_tokens: Int = Field(default=4096, ge=1, description="tokens per batch, counted once for the pair of passes")


class Output(Frozen):
    """How tables are written."""

    compression_level: Int = Field(default=3, ge=1, le=22, description="zstd level; 9 gained nothing over 3")
    topk: Bool = Field(default=True, description="false leaves out the top-k tables, nine tenths of the bytes")
    topk_values: Literal["float32", "float16"] = Field(
        default="float32",
        description="float16: logits and shifts of the top-k lists are rounded to its 11 significant bits, which makes all tables "
        "together a quarter smaller or more; everything else stays as it is",
    )


class Spans(Frozen):
    """How the layers of a walk are cut: how often it commits what it has, and over how many workers it is spread.

    After a lost worker, the next attempt goes on after the last commit.
    """

    layers: Int | None = Field(default=None, ge=1, description="commit after every n layers")
    seconds: Number | None = Field(default=300, gt=0, description="commit at the next layer after so many seconds")
    workers: Int = Field(
        default=1,
        ge=1,
        description="cut the layers into so many ranges of about equal bytes, each walked in turn by a worker (or a "
        "tensor-parallel group) of its own, on different nodes where there are some",
    )


class AllowedPair(Frozen):
    """A pair that may run on the local GPU, and the settings it must run with."""

    base: Text = Field(description="base model of the pair")
    sft: Text = Field(description="sft model of the pair")
    device: Device | None = Field(
        default=None, description="cuda or cuda:<cuda_device_index>; the latter when left out"
    )
    dtype: Dtype | None = Field(default=None, description="dtype to use instead of the config's")
    tokenizer: Text | None = Field(default=None, description="tokenizer to use instead of the config's")
    tokenizer_kwargs: TokenizerKwargs | None = Field(default=None, description="tokenizer_kwargs to use instead")
    model_kwargs: ModelKwargs | None = Field(default=None, description="model_kwargs to use instead")
    notes: str | None = Field(default=None, description="for people")


class LocalRun(Frozen):
    """Guards for runs on one's own GPU. Nothing falls back: a check that fails stops the run."""

    enabled: Bool = Field(default=False, description="true: every check below must pass before anything loads")
    min_vram_gb: Number = Field(
        default=0,
        ge=0,
        description="least total memory of the GPU in GB of 10^9 bytes, as cards are sold (24 for an RTX 4090)",
    )
    require_gpu_name_substring: str | None = Field(
        default=None, description="text that the GPU's name must hold, any case"
    )
    cuda_device_index: Int = Field(default=0, ge=0, description="which CUDA device")
    allowed_pairs: tuple[AllowedPair, ...] = Field(default=(), description="the only pairs that may run")

    @model_validator(mode="after")
    def _one_device(self) -> LocalRun:
        wanted = f"cuda:{self.cuda_device_index}"
        for i, pair in enumerate(self.allowed_pairs):
            if self.enabled and pair.device not in (None, "cuda", wanted):
                raise ValueError(
                    f"allowed_pairs[{i}].device is '{pair.device}' but cuda_device_index is {self.cuda_device_index}; "
                    f"leave device out, or set it to {wanted}"
                )
        unique([f"{p.base} -> {p.sft}" for p in self.allowed_pairs], "allowed_pairs lists twice")
        return self


class SweepEntry(Frozen):
    """One pair of the sweep. What is left out is taken from the block above it, but for what belongs to one pair."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$",
        max_length=NAME_LENGTH,
        description="name of the entry, part of paths: letters, digits, dot, underscore, plus and hyphen",
    )
    base_model: Text = Field(description="hub id or directory of the base checkpoint")
    sft_model: Text = Field(description="hub id or directory of the fine-tuned checkpoint")
    tokenizer: Text | None = Field(
        default=None,
        description="the one tokenizer of both models; when left out the block's where the block names no pair of its "
        "own, else the sft model's",
    )
    tokenizer_kwargs: TokenizerKwargs | None = Field(
        default=None, description="passed to AutoTokenizer.from_pretrained"
    )
    model_kwargs: ModelKwargs | None = Field(default=None, description="passed to AutoModelForCausalLM.from_pretrained")
    base_revision: Text | None = Field(default=None, description="branch, tag or commit of the base model")
    sft_revision: Text | None = Field(default=None, description="branch, tag or commit of the sft model")
    device: Device | None = Field(default=None, description="cpu, cuda or cuda:<index>")
    dtype: Dtype | None = Field(default=None, description="auto, float32, bfloat16 or float16")
    mode: Mode | None = Field(default=None, description="mode of this entry")
    weights: Weights | None = Field(default=None, description="how this entry's weights come from the hub")
    gpus: Number | None = Field(
        default=None, ge=0, description="GPUs to ask Ray for; by default 1 where the device is CUDA"
    )
    accelerator_type: Text | None = Field(default=None, description="Ray's accelerator type to ask for, such as H100")
    spans: Spans | None = Field(default=None, description="how this entry's layers are cut, instead of the block's")
    tensor_parallel: Degree | None = Field(
        default=None, description="share each layer among so many GPUs of one node, or auto"
    )
    replicate_attention: Bool | None = Field(default=None, description="every GPU of a group holds the whole attention")
    layers: Layers | None = Field(default=None, description="layers whose statistics this entry writes")
    lens: Lens | None = Field(default=None, description="the logit lens of this entry, instead of the block's")
    spectrum: Bool | None = Field(default=None, description="whether this entry writes singular values")
    device_memory_gib: Number | None = Field(default=None, gt=0, description="cap on device memory of this entry")
    estimated_vram_gb: Number | None = Field(
        default=None, ge=0, description="for people; the plan does its own arithmetic"
    )
    notes: str | None = Field(default=None, description="for people")


class Settings(Frozen):
    """The `residual_compare` block."""

    base_model: Text | None = Field(default=None, description="hub id or directory of the base checkpoint")
    sft_model: Text | None = Field(default=None, description="hub id or directory of the fine-tuned checkpoint")
    base_revision: Text | None = Field(default=None, description="branch, tag or commit of the base model")
    sft_revision: Text | None = Field(default=None, description="branch, tag or commit of the sft model")
    tokenizer: Text | None = Field(default=None, description="the one tokenizer of both; the sft model's when left out")
    tokenizer_kwargs: TokenizerKwargs = Field(default={}, description="passed to AutoTokenizer.from_pretrained")
    model_kwargs: ModelKwargs = Field(default={}, description="passed to AutoModelForCausalLM.from_pretrained")
    device: Device | None = Field(
        default=None, description="cpu, cuda or cuda:<index>; null takes CUDA where there is one, else the CPU"
    )
    dtype: Dtype = Field(default="auto", description="auto (as the checkpoint says), float32, bfloat16 or float16")
    top_k: Int = Field(default=20, ge=1, le=1000, description="length of the top-k lists")
    prompts: tuple[Text, ...] = Field(default=(), description="prompts, inline; they follow those of the file")
    prompt_file: Text | None = Field(
        default=None,
        description="file with a prompt a line; blank lines are skipped, white space at the ends of a line too",
    )
    trim_prompts: Bool | None = Field(
        default=None,
        description="trim all prompts to the shortest one's tokens; by default for a file named prod_prompts.txt",
    )
    add_special_tokens: Bool = Field(default=True, description="let the tokenizer add its own BOS and the like")
    prompt_variants: tuple[str, ...] = Field(
        default=("identity",), description="which variants of each prompt to capture"
    )
    prompt_variant_options: dict[str, Kwargs] = Field(default={}, description="options by variant")
    tracked_token_ids: tuple[Annotated[Int, Field(ge=0)], ...] = Field(
        default=(), description="ids whose logits are kept for every cell"
    )
    tracked_token_strings: tuple[Text, ...] = Field(
        default=(), description="tokens in the tokenizer's own spelling, likewise"
    )
    interesting_token_map: dict[str, Text] = Field(default={}, description="label: token, likewise")
    embedding_variants: tuple[EmbeddingVariant, ...] = Field(
        default=(EmbeddingVariant(name="default"),), description="the comparisons made when multi_pass is off"
    )
    multi_pass: MultiPass = Field(default=MultiPass(), description="the passes and their comparisons")
    model_sweep: tuple[SweepEntry, ...] = Field(default=(), description="the pairs of the sweep")
    local_run: LocalRun = Field(default=LocalRun(), description="guards for one's own GPU")
    lens: Lens = Field(default=Lens(), description="the logit lens")
    layers: Layers = Field(
        default="all",
        description="layers to compute statistics of: all; n for every n-th and L; or a list as in lens.layers; the tables have "
        "no rows of the others, and the lens reads none of them",
    )
    mode: Mode = Field(
        default="auto",
        description="how many weights are in memory at a time: resident both models; one-at-a-time one; streamed two layers of "
        "each; streamed-2 two layers in all; sub-layer two matrices. auto: the first that fits of resident, streamed, "
        "streamed-2 and sub-layer. All give the same numbers",
    )
    weights: Weights = Field(
        default="cache",
        description="how weights come that are on the hub and not in its cache here. stream: a layer is fetched while the one "
        "before computes, and nothing is written to disk; lengths are checked and hashes are not, as those are of whole files in their "
        "own order; mode sub-layer fetches layers once for every batch. cache: as stream, and files that have passed whole are kept in "
        "the hub's cache if their hashes are the hub's, else the capture fails; where the disk has no room nothing is kept and no hash "
        "checked, and the log says so. download: all of it is downloaded and checked first; so are, with cache, weights for "
        "tensor_parallel and quantized ones. All give the same numbers",
    )
    fetch_ahead: Bool = Field(
        default=True,
        description="in a sweep: once an entry's weights have come, and while it computes, the files of the entry that is likely to run "
        "there next are fetched into the hub's cache, one entry ahead; false fetches each entry's in its own turn only. Not for "
        "entries with weights: stream, spans.workers above 1, or allow_pickle",
    )
    cache_gib: Number | None = Field(
        default=None,
        gt=0,
        description="in a sweep: GiB that the models in a node's hub cache may take. Beyond it models are removed that no entry of the "
        "sweep needs any more, then those that only later entries need, never one in use; on a machine that was not rented only "
        "what this sweep fetched counts and is removed. A pair that does not fit by itself fails with weights: download, and is "
        "read without being kept with weights: cache. null: room is made when a rented node's disk is nearly full",
    )
    batching: Batching = Field(default=Batching(), description="how prompts are batched")
    output: Output = Field(default=Output(), description="how tables are written")
    spans: Spans = Field(default=Spans(), description="how often a walk commits what it has")
    noise_floor: Bool = Field(default=True, description="measure what batching alone changes, on one prompt")
    spectrum: Bool = Field(
        default=False,
        description="write singular values of every comparison's token x hidden differences, layer by layer",
    )
    tensor_parallel: Degree = Field(
        default=1,
        description="share each layer among so many GPUs of one node; heads and kv heads must divide by it. auto: as few as "
        "the plan's arithmetic says the mode needs",
    )
    replicate_attention: Bool = Field(
        default=False,
        description="under tensor_parallel every GPU holds the whole attention: the way out where heads do not divide",
    )
    gpus: Number | None = Field(
        default=None, ge=0, description="GPUs to ask Ray for; by default 1 where the device is CUDA"
    )
    accelerator_type: Text | None = Field(default=None, description="Ray's accelerator type to ask for, such as H100")
    device_memory_gib: Number | None = Field(
        default=None, gt=0, description="cap on device memory, for shared cards and tests"
    )
    allow_pickle: Bool = Field(default=False, description="accept .bin checkpoints; they can run any code when opened")

    @field_validator("prompt_variants")
    @classmethod
    def _known_variants(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in VARIANTS:
                raise ValueError(f"'{name}' is not a variant{near(name, VARIANTS)}; expected {', '.join(VARIANTS)}")
        if not value:
            raise ValueError("the list is empty; leave the key out for identity")
        unique(list(value), "the list names twice")
        return value

    @field_validator("prompt_variant_options")
    @classmethod
    def _known_options(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for variant, options in value.items():
            if variant not in VARIANTS:
                raise ValueError(f"'{variant}' is not a variant{near(variant, VARIANTS)}")
            known = OPTIONS.get(variant, {})
            for option, given in options.items():
                if option not in known:
                    allowed = ", ".join(known) or "none"
                    raise ValueError(f"{variant}.{option}: unknown option{near(option, known)}; options: {allowed}")
                if wrong := option_error(option, given, known[option]):
                    raise ValueError(f"{variant}.{option}: got {given!r}; {wrong}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        unique([e.name for e in self.model_sweep], "model_sweep has two entries named")
        unique([v.name for v in self.embedding_variants], "embedding_variants has two variants named")
        if not self.embedding_variants:
            raise ValueError("embedding_variants is empty; leave the key out for the plain comparison")
        if (self.base_model is None) != (self.sft_model is None):
            missing = "base_model" if self.base_model is None else "sft_model"
            raise ValueError(f"{missing} is missing; a pair needs base_model and sft_model")
        return self
