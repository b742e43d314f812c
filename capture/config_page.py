"""The page docs/config.md, made from the fields of the config's blocks: `python -m capture.config_page > docs/config.md`."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from capture.config import ENV_OVERRIDES
from capture.passes import Comparison, EmbeddingVariant, MultiPass, Pass, Swap
from capture.settings import AllowedPair, Batching, Lens, LocalRun, Output, Settings, Spans, SweepEntry
from capture.variants import OPTIONS, VARIANTS

# block -> where it stands in the file
BLOCKS: dict[type[BaseModel], str] = {
    Settings: "residual_compare",
    SweepEntry: "residual_compare.model_sweep[]",
    MultiPass: "residual_compare.multi_pass",
    Pass: "residual_compare.multi_pass.runs[]",
    Comparison: "residual_compare.multi_pass.pairwise_differences[]",
    EmbeddingVariant: "residual_compare.embedding_variants[]",
    Swap: "residual_compare.embedding_variants[].base and .sft",
    LocalRun: "residual_compare.local_run",
    AllowedPair: "residual_compare.local_run.allowed_pairs[]",
    Lens: "residual_compare.lens",
    Batching: "residual_compare.batching",
    Output: "residual_compare.output",
    Spans: "residual_compare.spans",
}

INTRO = """# The config

<!-- Made by `python -m capture.config_page > docs/config.md`; do not edit by hand. -->

A config is a YAML file with one block, `residual_compare`; other top-level keys are left alone. The shortest one:

```yaml
residual_compare:
  base_model: HuggingFaceTB/SmolLM2-135M
  sft_model: HuggingFaceTB/SmolLM2-135M-Instruct
  prompts: ["The capital of France is"]
```

A key that is left out, or null, has its default. A key that is not below, a wrong type, or the same key twice is an error
that names the file, the line, the key, what was found and what was expected; all errors are shown at once.

## Which file

A verb takes a file: `pairscope sweep configs/demo.yaml`. Where none is named, `DEV_MODE` chooses: true (the default, also 1,
yes, on) takes `configs/dev_config.yaml`, false (0, no, off) `configs/prod_config.yaml`, looked for from the current
directory upwards, then beside the package.

## From the environment

These variables replace keys of the block. An empty one counts as not set; those that end in `KWARGS` hold a JSON object.
"""

RULES = """
They do not reach into `model_sweep`: what an entry sets itself stays. The models and the tokenizer are the block's own pair,
which `pairscope capture` takes.

## Models, files and paths

A model or tokenizer is a directory or a hub id; a directory wins. A relative path is looked for in the config's directory, in
its parents up to the one with a `pyproject.toml`, and in the current directory. A value that starts with `./`, `../`, `/` or
`~`, or ends in `.safetensors`, can only be a path: if it is not there, that is an error.

Weights are safetensors. Pickled weights need `allow_pickle: true`, code that comes with a checkpoint needs
`trust_remote_code: true` in `model_kwargs` (or `tokenizer_kwargs`). An adapter that lies beside the weights is left out, with a
warning: merge it into them first (PEFT's `merge_and_unload`). Keys of `*_kwargs` that have other files read (`variant`, `subfolder`,
`gguf_file`, `key_mapping` and their like) are errors: a capture's id would not stand for them.

Checkpoints stored in FP8 with a scale for each block, as DeepSeek-V3's are, need no key: they are read layer by layer and
multiplied out, and are bfloat16 in memory (or `dtype`; float32 is the product unrounded).

Weights of 8 or 4 bits in memory are an option of an entry, for pairs that fit a card in no other way you can bear:

```yaml
model_kwargs:
  quantization_config: {quant_method: bitsandbytes, load_in_4bit: true, bnb_4bit_quant_type: nf4}
model_kwargs:
  quantization_config: {quant_method: torchao, quant_type: Int8WeightOnlyConfig}
```

Keys are those of transformers' `BitsAndBytesConfig`, or `TorchAoConfig`; with torchao, `quant_type` names a class of
`torchao.quantization`, and further keys go to it. It takes `pip install 'pairscope[quantized]'`, mode resident (auto is) and
one GPU. Rented machines install what `ray_cluster.yaml` names behind their set-up command, as in `bash
~/pairscope/cluster/vast/setup_node.sh bitsandbytes torchao`; where they run already, `ray up` does so. Embeddings and
unembedding stay as they are: the lens multiplies with them. Such a capture has an id of its own, says what it was made with
in `status` and in the column `quantization` of the view `captures`, and its numbers are those of other weights: do not
compare them with a capture in bfloat16.

A value under a key of `*_kwargs` that says token, secret or password is shown as `***` in messages, logs and records. Better
still, log in with `hf auth login` and write none.

## Entries

A sweep takes the entries of `model_sweep`, or where that is empty the block's own pair, named `<base>_to_<sft>`. An entry
takes `tokenizer_kwargs`, `model_kwargs`, `device`, `dtype`, `mode`, `gpus` and `accelerator_type` from the block where it does
not set them. Revisions belong to one pair and are not taken over; the block's `tokenizer` is, unless the block has a pair of its
own. An entry that is wrong (a directory that is not there, a pair that is not allowed) does not stop the others.

With `local_run.enabled: true` every pair must be in `allowed_pairs`, runs on `cuda:<cuda_device_index>`, and what
`allowed_pairs` sets for it goes before entry and block.

## Passes

With `multi_pass.enabled: true` the passes are `runs` and the comparisons `pairwise_differences`. With false there is one
comparison for each of `embedding_variants`: the base model's blocks against the sft model's, with the embeddings and
unembeddings that the variant names. Its passes get names by letters: embeddings, blocks, and the unembedding where it is not
the blocks' model's. So the plain comparison is `BB-SS`, and a base side with the sft unembedding is `BBS-SS`.

## Prompts

The prompts of `prompt_file` come first (a line each, white space at both ends and blank lines dropped), then those of
`prompts`, as written. Every variant is made from the full text and tokenised. With trimming, all of them are then cut at the end,
by token ids, to the shortest of all; the log says `Normalized N prompts to K tokens (longest was M)`.
"""


def config_page() -> str:
    """The whole page as Markdown."""
    parts = [
        INTRO,
        _table(("variable", "key"), [(f"`{v}`", f"`{k}`") for v, k in ENV_OVERRIDES.items()]),
        RULES,
        _variants(),
    ]
    parts.append("\n## Keys\n")
    for block, where in BLOCKS.items():
        doc = (block.__doc__ or "").split("\n\n")[0]
        parts.append(f"\n### `{where}`\n\n{' '.join(doc.split())}\n\n")
        rows = [
            (f"`{n}`", _type(f.annotation), _default(f), (f.description or "").replace("<", "&lt;"))
            for n, f in block.model_fields.items()
        ]
        parts.append(_table(("key", "type", "default", "description"), rows))
    return "".join(parts)


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |\n" for line in lines)


def _variants() -> str:
    rows = []
    for name, function in VARIANTS.items():
        options = [f"`{k}: {json.dumps(v)}`" if not isinstance(v, tuple) else f"`{k}: {v[0]}` or `{v[1]}`"
                   for k, v in OPTIONS.get(name, {}).items()]  # fmt: skip
        rows.append((f"`{name}`", " ".join((function.__doc__ or "").split()), ", ".join(options)))
    return "\n" + _table(("variant", "text", "options in `prompt_variant_options` and their defaults"), rows)


def _type(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(a) for a in args if a is not type(None)))
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in args)
    if origin is tuple:
        one = _type(args[0])
        return f"list of {'blocks ' + one.removeprefix('block ') if one.startswith('block ') else one + 's'}"
    if origin is dict:
        value = typing.get_args(args[1])[0] if typing.get_origin(args[1]) is typing.Annotated else args[1]
        return "keys and texts" if value is str else "keys and values"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"block `{BLOCKS[annotation].removeprefix('residual_compare.')}`"
    return {str: "text", bool: "true or false", int: "whole number", float: "number"}[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{_plain(field.default)}`" if not isinstance(field.default, BaseModel) else "as below"


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_plain(v) for v in value) + "]"
    if isinstance(value, Pass):
        return value.name
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.model_dump(exclude_defaults=True).items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    print(config_page(), end="")
