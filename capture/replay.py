"""Record how a model calls its own layers, then call them one by one.

The model's own forward runs once with every decoder layer replaced by a stub that keeps its arguments and passes the
residual through: masks, rotary tables, positions and cache arguments are what the library computed, for each layer by
itself (gemma2/3 and sliding-window models give their layers different masks). What runs after the last layer (the final
norm) is found in the same dry run and checked bit for bit.

Shapes: B batch rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from capture.checkpoint import StreamedModel
from capture.errors import PairscopeError, UnsupportedModelError
from capture.ledger import is_out_of_memory

Call = tuple[int, Tensor, tuple[Any, ...], dict[str, Any]]  # of a layer: its number, the residual, its other arguments


@dataclass
class Recording:
    """One batch's calls: `entry_BTD` enters layer 0; `calls[l]` are the arguments of layer l after the residual."""

    entry_BTD: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    tail: list[nn.Module] = field(default_factory=list)


@contextmanager
def stubbed(layers: nn.ModuleList, recording: list[Call], answer: Callable[[Tensor], Any]) -> Iterator[None]:
    """Replace each layer's forward by one that records its arguments and returns the residual unchanged, as `answer` gives it."""

    def stub(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, rest = args[0], args[1:]
            else:
                hidden, rest = kwargs.pop("hidden_states"), ()
            recording.append((index, hidden, rest, kwargs))
            return answer(hidden)

        return forward

    for index, layer in enumerate(layers):
        layer.forward = stub(index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own forward shows again


@contextmanager
def tail_modules(
    base: nn.Module, layers: nn.ModuleList, recording: list[Any], found: list[nn.Module]
) -> Iterator[None]:
    """Collect the outermost modules that run after the last layer, in order."""
    inside = {id(m) for layer in layers for m in layer.modules()} | {id(base)}
    open_modules: list[nn.Module] = []

    def before(module: nn.Module, _: Any) -> None:
        if recording and recording[-1][0] == len(layers) - 1:
            if not open_modules:
                found.append(module)
            open_modules.append(module)

    def after(module: nn.Module, *_: Any) -> None:
        if open_modules and open_modules[-1] is module:
            open_modules.pop()

    hooks = []
    for module in base.modules():
        if id(module) not in inside and not isinstance(module, nn.ModuleList):
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def record(
    streamed: StreamedModel, embeds_BTD: Tensor, *, mask_BT: Tensor | None = None, positions_BT: Tensor | None = None
) -> Recording:
    """Dry-run the model on embeddings and record every layer's arguments and the modules after the last layer.

    Needs the group `rest` loaded (learned positions, projections, final norm). Raises UnsupportedModelError where the
    residual is not [B, T, D], where layers run in another order, or where the tail is not a chain of modules.
    """
    name = type(streamed.model).__name__
    recorded, tail, output = _dry_run(streamed, embeds_BTD, mask_BT, positions_BT)
    if [r[0] for r in recorded] != list(range(streamed.n_layers)):
        raise UnsupportedModelError(f"{name} does not call its {streamed.n_layers} layers once each, in order")
    entry = recorded[0][1]
    if entry.shape[:2] != embeds_BTD.shape[:2] or entry.dim() != 3:
        raise UnsupportedModelError(
            f"{name} carries a residual of shape {tuple(entry.shape)} between layers, not [batch, token, hidden]; "
            "several residual streams cannot be compared"
        )
    unlike = f"{name}: what follows the last layer ({[type(m).__name__ for m in tail]}) is not a plain chain of modules"
    try:
        hidden = run_tail(tail, entry)
    except (TypeError, ValueError, AttributeError) as error:  # a module that takes more than the state
        raise UnsupportedModelError(unlike) from error
    if not torch.equal(hidden, output[0]):
        raise UnsupportedModelError(unlike)
    return Recording(entry, [(rest, kw) for _, _, rest, kw in recorded], tail)


@contextmanager
def _no_placeholders(model: Any) -> Iterator[None]:
    """Let the embedding answer what is equal to nothing. A model that is given embeddings asks it for one thing alone: which of them are
    a placeholder's of an image (Gemma 4), of which a prompt has none; and its weights are not here. Any other use ends in a residual of
    NaN, which `record` refuses."""
    embedding, size = model.get_input_embeddings(), model.config.get_text_config().hidden_size

    def answer(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.full((*ids.shape, size), torch.nan, device=ids.device)

    own = vars(embedding).get("forward")
    embedding.forward = answer
    try:
        yield
    finally:
        del embedding.forward
        if own is not None:
            embedding.forward = own


def _dry_run(
    streamed: StreamedModel, embeds_BTD: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None
) -> tuple[list[Call], list[nn.Module], Any]:
    """The calls of all layers, the modules behind them, and what the base model gives.

    Layers return the residual, or a tuple that it is the first of (Bloom, Falcon, GPT-J): which of both a model takes it for is
    tried. A model that wants more of a layer hands on what its next layers need, and no recording has that.
    Raises UnsupportedModelError where it runs with neither.
    """
    kwargs: dict[str, Any] = {} if positions_BT is None else {"position_ids": positions_BT}
    first: Exception | None = None
    for answer in (lambda hidden: hidden, lambda hidden: (hidden,)):
        recorded: list[Call] = []
        tail: list[nn.Module] = []
        try:
            with (  # a clone: CTRL's forward multiplies what it is given, in place
                stubbed(streamed.layers, recorded, answer),
                tail_modules(streamed.base, streamed.layers, recorded, tail),
                _no_placeholders(streamed.model),
            ):
                output = streamed.base(
                    inputs_embeds=embeds_BTD.clone(), attention_mask=mask_BT, use_cache=False, **kwargs
                )
            # a model that takes the first of a tuple takes the first row of a tensor
            if (shapes := {tuple(r[1].shape) for r in recorded}) and len(shapes) > 1:
                raise ValueError(f"residuals of shapes {sorted(shapes)}")
            return recorded, tail, output
        except Exception as error:  # of any kind: it is the model's own code
            if is_out_of_memory(error) or isinstance(error, PairscopeError):
                raise
            first = first or error
    raise UnsupportedModelError(
        f"{type(streamed.model).__name__} cannot be walked layer by layer: {type(first).__name__}: {' '.join(str(first).split())[:300]}"
    ) from first


@torch.no_grad()
def run_layer(layer: nn.Module, hidden_BTD: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """One layer on one batch, with its recorded arguments. Some layers return a tuple, GPT a list; the residual is its first."""
    args, kwargs = call
    output = layer(hidden_BTD, *args, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple | list) else output
    return result


@torch.no_grad()
def calls_hold_states(streamed: StreamedModel) -> bool:
    """Whether layers are called with something that depends on the states, as Zamba's are, which get those that enter the first one
    as well: two short dry runs tell. Needs the group `rest` loaded."""
    if streamed.calls_hold_states is None:
        size = 1, 2, streamed.config.hidden_size
        dtype, device = streamed.model.dtype, streamed.device
        both = [record(streamed, torch.full(size, x, dtype=dtype, device=device)).calls for x in (0.0, 1.0)]
        one, other = ([t for t in tree_iter(calls) if isinstance(t, Tensor)] for calls in both)
        streamed.calls_hold_states = len(one) != len(other) or not all(map(torch.equal, one, other))
    return streamed.calls_hold_states


@torch.no_grad()
def check_padding(streamed: StreamedModel, *, left: bool) -> None:
    """Raise UnsupportedModelError where a prompt that is padded enters layer 0 at other positions than alone: models whose positions
    do not begin at 0 (RoBERTa), or that take none (BART's decoder), say nothing of it. Needs the group `rest` loaded."""

    def entering(mask: list[int]) -> Tensor:  # with embeddings of zero, what tells positions is all that is left
        size = 1, len(mask), streamed.config.hidden_size
        mask_BT = torch.tensor([mask], device=streamed.device)
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        given = {} if all(mask) else {"mask_BT": mask_BT, "positions_BT": positions_BT}
        empty = torch.zeros(size, dtype=streamed.model.dtype, device=streamed.device)
        return record(streamed, empty, **given).entry_BTD[mask_BT.bool()]

    alone, padded = entering([1, 1]), entering([0, 1, 1] if left else [1, 1, 0])
    if not torch.allclose(alone, padded, rtol=1e-2, atol=1e-6):
        raise UnsupportedModelError(
            f"{type(streamed.model).__name__} gives a prompt other positions where it is padded on the {'left' if left else 'right'} "
            "than where it is alone; set batching.padding: none"
        )


@torch.no_grad()
def run_tail(tail: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    """The final norm (and what else follows the last layer)."""
    for module in tail:
        hidden = module(hidden)
    return hidden
