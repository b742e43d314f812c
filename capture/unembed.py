"""Logits of rows, through the model's own code: whatever a model does after its head (soft-capping in Gemma-2, scaling in
Granite and Cohere) is done by its own forward, with its base model stubbed and its head replaced by a product in float32.

Shapes: R rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from capture.checkpoint import StreamedModel
from capture.errors import SelfCheckError

HEAD_CHUNK = 16384  # vocabulary rows upcast at a time where the head is not float32
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@contextmanager
def _replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _precision(operands: torch.dtype) -> Iterator[None]:
    """TF32 products are exact for bfloat16- and float16-valued operands and wrong in the 4th digit for others."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = operands in (torch.bfloat16, torch.float16)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in float32 from upcast operands, whatever their dtype; a chunk of the vocabulary at a time."""
    if weight.dtype == torch.float32:
        return functional.linear(x.float(), weight, bias)
    x = x.float()
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32, device=x.device)
    for v in range(0, weight.shape[0], HEAD_CHUNK):
        part = slice(v, v + HEAD_CHUNK)
        out[..., part] = functional.linear(x, weight[part].float(), None if bias is None else bias[part].float())
    return out


class _Hidden(tuple[Tensor]):
    """What a base model returns, as far as a head looks: the last hidden state; any other field is None."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def own_logits(model: StreamedModel, rows_RD: Tensor, *, n_vocab: int | None = None) -> Tensor:
    """Logits [R, V] float32 of rows that already went through whatever norm they shall have.

    n_vocab: only the first n rows of the unembedding. The rows are in the model's dtype; the product is in float32.
    """
    head = model.head
    weight = model.head_weight if n_vocab is None else model.head_weight[:n_vocab]
    bias = getattr(head, "bias", None)
    bias = bias if bias is None or n_vocab is None else bias[:n_vocab]
    with _precision(model.head_weight.dtype):
        return _through(model, rows_RD, lambda x: _product(x, weight, bias))


def _through(model: StreamedModel, rows_RD: Tensor, head_forward: Any) -> Tensor:
    hidden = _Hidden((rows_RD[None],))
    with _replaced(model.base, lambda *_, **__: hidden), _replaced(model.head, head_forward):
        logits: Tensor = model.model(inputs_embeds=rows_RD[None], use_cache=False).logits[0]
    return logits


@torch.no_grad()
def check_against_model(model: StreamedModel, rows_RD: Tensor) -> float:
    """Compare our float32 logits of final states with the model's own in its own dtype; the largest relative error.

    Raises SelfCheckError where it is beyond what the dtype explains: the head found is then not the model's head.
    """
    ours = own_logits(model, rows_RD)
    theirs = _through(model, rows_RD, type(model.head).forward.__get__(model.head)).float()
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
    if error > LOGIT_TOLERANCE[rows_RD.dtype]:
        raise SelfCheckError(
            f"{model.label} model: logits computed from the last state differ from the model's own by {error:.2g} "
            f"(relative to the largest; {LOGIT_TOLERANCE[rows_RD.dtype]:g} is expected in {rows_RD.dtype})"
        )
    return error
