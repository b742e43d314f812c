"""Record how a model calls its own layers, then call them one by one.

The model's own forward runs once with every decoder layer replaced by a stub that keeps its arguments and passes the
residual through: masks, rotary tables, positions and cache arguments are what the library computed, for each layer by
itself (gemma2/3 and sliding-window models give their layers different masks). What runs after the last layer (the final
norm) is found in the same dry run and checked bit for bit.

Shapes: B batch rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from capture.checkpoint import StreamedModel
from capture.errors import UnsupportedModelError


@dataclass
class Recording:
    """One batch's calls: `entry_BTD` enters layer 0; `calls[l]` are the arguments of layer l after the residual."""

    entry_BTD: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    tail: list[nn.Module] = field(default_factory=list)


@contextmanager
def stubbed(layers: nn.ModuleList, recording: list[Any]) -> Iterator[None]:
    """Replace each layer's forward by one that records its arguments and returns the residual unchanged."""

    def stub(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if args:
                hidden, rest = args[0], args[1:]
            else:
                hidden, rest = kwargs.pop("hidden_states"), ()
            recording.append((index, hidden, rest, kwargs))
            result: Tensor = hidden
            return result

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
    recorded: list[tuple[int, Tensor, tuple[Any, ...], dict[str, Any]]] = []
    tail: list[nn.Module] = []
    kwargs: dict[str, Any] = {} if positions_BT is None else {"position_ids": positions_BT}
    name = type(streamed.model).__name__
    with stubbed(streamed.layers, recorded), tail_modules(streamed.base, streamed.layers, recorded, tail):
        output = streamed.base(inputs_embeds=embeds_BTD, attention_mask=mask_BT, use_cache=False, **kwargs)
    if [r[0] for r in recorded] != list(range(streamed.n_layers)):
        raise UnsupportedModelError(f"{name} does not call its {streamed.n_layers} layers once each, in order")
    entry = recorded[0][1]
    if entry.shape[:2] != embeds_BTD.shape[:2] or entry.dim() != 3:
        raise UnsupportedModelError(
            f"{name} carries a residual of shape {tuple(entry.shape)} between layers, not [batch, token, hidden]; "
            "several residual streams cannot be compared"
        )
    hidden = entry
    for module in tail:
        hidden = module(hidden)
    if not torch.equal(hidden, output[0]):
        raise UnsupportedModelError(
            f"{name}: what follows the last layer ({[type(m).__name__ for m in tail]}) is not a plain chain of modules"
        )
    return Recording(entry, [(rest, kw) for _, _, rest, kw in recorded], tail)


@torch.no_grad()
def run_layer(layer: nn.Module, hidden_BTD: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """One layer on one batch, with its recorded arguments. Some layers return a tuple; the residual is its first."""
    args, kwargs = call
    output = layer(hidden_BTD, *args, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


@torch.no_grad()
def run_tail(tail: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    """The final norm (and what else follows the last layer)."""
    for module in tail:
        hidden = module(hidden)
    return hidden
