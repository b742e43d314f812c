"""The oracle, first half: the states of every pass, from plain transformers and nothing else.

Both models are loaded whole and run by their own forward; hooks read what goes by. The second half, the statistics of
those states in float64, is in reference_statistics.py. Neither imports the engine that they are there to check.

Shape letters: P prompts, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tiny import PairPaths
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

# pass -> layer -> states; layer -1 enters block 0, l is the output of block l, L = n_layers comes after the final norm
States = dict[str, dict[int, Tensor]]


class Way(NamedTuple):
    """Whose embeddings, whose blocks, whose head a pass uses: base or sft. The final norm goes with the blocks."""

    embeddings: str
    blocks: str
    head: str


FOUR = {
    "BB": Way("base", "base", "base"),
    "BS": Way("base", "sft", "sft"),
    "SB": Way("sft", "base", "base"),
    "SS": Way("sft", "sft", "sft"),
}


@dataclass(frozen=True)
class LoadedPair:
    """Both models, whole, in eval mode."""

    base: PreTrainedModel
    sft: PreTrainedModel

    def model(self, owner: str) -> PreTrainedModel:
        return {"base": self.base, "sft": self.sft}[owner]

    @property
    def n_layers(self) -> int:
        return len(blocks_of(self.base))


def load_pair(
    paths: PairPaths, *, dtype: torch.dtype | str = "auto", attn_implementation: str | None = None
) -> LoadedPair:
    """Open both checkpoints by from_pretrained. attn_implementation None is the library's choice for the architecture:
    sdpa, but eager for gemma2, whose soft-capped attention scores sdpa would leave uncapped."""
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    base, sft = (AutoModelForCausalLM.from_pretrained(path, **options).eval() for path in (paths.base, paths.sft))
    return LoadedPair(base, sft)


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, by the only names that the tested architectures use."""
    return model.transformer.h if hasattr(model, "transformer") else model.base_model.layers


def final_norm_of(model: PreTrainedModel) -> nn.Module:
    if hasattr(model, "transformer"):
        return model.transformer.ln_f
    return model.backbone.norm_f if hasattr(model, "backbone") else model.model.norm


def positions_of(mask: Tensor) -> Tensor:
    """Position ids [P, T] that follow a 0/1 mask [P, T]: 0 at each prompt's first real token."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def pad(prompts: Sequence[Sequence[int]], side: str, *, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and 0/1 mask, both [P, T] with T the longest prompt, padded on the `left` or `right`."""
    longest = max(len(p) for p in prompts)
    rows, masks = [], []
    for prompt in prompts:
        gap = longest - len(prompt)
        left, right = (gap, 0) if side == "left" else (0, gap)
        rows.append([fill] * left + list(prompt) + [fill] * right)
        masks.append([0] * left + [1] * len(prompt) + [0] * right)
    return torch.tensor(rows), torch.tensor(masks)


@torch.no_grad()
def run_states(model: PreTrainedModel, mask: Tensor, **inputs: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """One plain forward. inputs: input_ids [P, T] or inputs_embeds [P, T, H]; mask [P, T].

    Returns the states [P, T, H] by layer and the model's own logits [P, T, V].
    """
    states: dict[int, Tensor] = {}
    with _recording(model, states):
        out = model(**inputs, attention_mask=mask, position_ids=positions_of(mask), use_cache=False)
    return states, out.logits


@torch.no_grad()
def residuals(
    pair: LoadedPair,
    ids: Tensor,
    passes: Mapping[str, Way] = FOUR,
    *,
    attention_mask: Tensor | None = None,
    halve: bool = False,
) -> States:
    """States [P, T, H] of every pass and layer, where passes that share blocks run as one batch.

    ids [P, T]. The base blocks' batch is [BB's prompts, SB's prompts], the sft blocks' is [BS's, SS's]: passes in the
    order given, prompts within them. Embeddings are the outputs of the owners' embedding modules. halve: if both owners
    give the same embeddings, every pass takes base's and each model runs one batch of P prompts for all its passes.
    """
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    if halve and torch.equal(*(owner.get_input_embeddings()(ids) for owner in (pair.base, pair.sft))):
        one = {way.blocks: way._replace(embeddings="base") for way in passes.values()}
        found = residuals(pair, ids, one, attention_mask=mask)
        return {name: found[way.blocks] for name, way in passes.items()}
    found = {}
    for blocks in ("base", "sft"):
        names = [name for name, way in passes.items() if way.blocks == blocks]
        if not names:
            continue
        embeds = torch.cat([embed(pair, passes[name], ids) for name in names])
        stacked, _ = run_states(pair.model(blocks), mask.repeat(len(names), 1), inputs_embeds=embeds)
        for i, name in enumerate(names):
            rows = slice(i * len(ids), (i + 1) * len(ids))
            found[name] = {layer: state[rows] for layer, state in stacked.items()}
    return {name: found[name] for name in passes}


def residuals_one_by_one(
    pair: LoadedPair, prompts: Iterable[Sequence[int]], passes: Mapping[str, Way] = FOUR
) -> list[States]:
    """States [T, H] of every pass and layer for each prompt: a batch of one for each prompt and each pass."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        found.append(unpad(_one_pass_at_a_time(pair, ids, passes), torch.ones_like(ids))[0])
    return found


@torch.no_grad()
def residuals_replaced(pair: LoadedPair, ids: Tensor, way: Way) -> dict[int, Tensor]:
    """States [P, T, H] of one pass where the embedding module itself was put into the blocks' model, run by token ids.

    The head of a tied model stays what it was: replacing the module leaves lm_head with the old matrix.
    """
    model = copy.deepcopy(pair.model(way.blocks))
    head = model.get_output_embeddings().weight
    model.set_input_embeddings(copy.deepcopy(pair.model(way.embeddings).get_input_embeddings()))
    if model.get_output_embeddings().weight is not head:
        raise AssertionError("replacing the embeddings replaced the head as well")
    return run_states(model, torch.ones_like(ids), input_ids=ids)[0]


def embed(pair: LoadedPair, way: Way, ids: Tensor) -> Tensor:
    """What the pass's embedding module gives for ids [P, T]: [P, T, H]."""
    return pair.model(way.embeddings).get_input_embeddings()(ids)


def unpad(states: States, mask: Tensor) -> list[States]:
    """States [P, T, H] cut to each prompt's own tokens: for each prompt, states [its T, H]."""
    keep = mask.bool()
    return [
        {name: {layer: s[p, keep[p]] for layer, s in by_layer.items()} for name, by_layer in states.items()}
        for p in range(len(mask))
    ]


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest ||got - want|| / ||want|| over the vectors [..., H]."""
    gap = (got.double() - want.double()).norm(dim=-1)
    return float((gap / want.double().norm(dim=-1)).max())


def _one_pass_at_a_time(pair: LoadedPair, ids: Tensor, passes: Mapping[str, Way]) -> States:
    return {name: residuals(pair, ids, {name: way})[name] for name, way in passes.items()}


@contextmanager
def _recording(model: PreTrainedModel, states: dict[int, Tensor]) -> Iterator[None]:
    """Hooks that put the states of one forward into `states`."""
    blocks = blocks_of(model)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states[-1] = (args[0] if args else kwargs["hidden_states"]).clone()

    def leave(layer: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            states[layer] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    handles = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [block.register_forward_hook(leave(layer)) for layer, block in enumerate(blocks)]
    handles.append(final_norm_of(model).register_forward_hook(leave(len(blocks))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
