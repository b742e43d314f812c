"""Logits of rows, through the model's own code: whatever a model does after its head (soft-capping in Gemma-2, scaling in
Granite and Cohere) is done by its own forward, with its base model stubbed and its head replaced by a product in float32.

Shapes: R rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from capture.checkpoint import StreamedModel
from capture.errors import SelfCheckError, UnsupportedModelError
from capture.ledger import is_out_of_memory
from capture.sublayer import HeadRows

log = logging.getLogger(__name__)

HEAD_CHUNK = 16384  # vocabulary rows multiplied at a time: upcast where that is needed, read where they are not there
NARROW = (torch.bfloat16, torch.float16)  # a GPU multiplies these as they are, and adds up in float32
CHANGE_CHUNK = 2048  # likewise of the difference of two heads, which is new memory even where they are float32
SAMPLES, SAMPLE = 16, 16  # where a glance at the logits is enough
SMALL_VOCABULARY = 4 * SAMPLES * SAMPLE  # looked at whole
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class _Stand(nn.Module):
    """Stands in for a module, without its hooks: in a tensor-parallel model a head's own hooks would gather all logits."""

    def __init__(self, answer: Callable[..., Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.answer = answer
        self.weight = torch.empty(0, dtype=dtype)  # Mamba's forward brings the rows to its dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)


@contextmanager
def _stubbed(model: StreamedModel, hidden: _Hidden, head: Callable[[Tensor], Tensor]) -> Iterator[list[bool]]:
    """Let the base model answer `hidden`, and `head` stand in the unembedding's place. Yields a list that is empty until the base
    model was asked.

    The base model's forward is shadowed and not the module exchanged: the next layer is being loaded into it meanwhile.
    """
    unembedding = model.head
    asked: list[bool] = []

    def answer(*_: Any, **__: Any) -> _Hidden:
        asked.append(True)
        return hidden

    if model.head_place is None:  # a walk through a thousand modules takes as long as a small product
        name = next(n for n, m in model.model.named_modules() if m is unembedding)
        owner, _, leaf = name.rpartition(".")
        model.head_place = model.model.get_submodule(owner), leaf
    parent, leaf = model.head_place
    bases = _bases(model)
    for base in bases:
        base.forward = answer
    parent._modules[leaf] = _Stand(head, hidden[0].dtype)
    try:
        yield asked
    finally:
        parent._modules[leaf] = unembedding
        for base in bases:
            del base.forward


def _bases(model: StreamedModel) -> list[nn.Module]:
    """The base model, and the modules in it on the way to its layers: OPT's own forward asks its decoder past the base model."""
    found, inside = [], model.base
    names = model.layers_name.removeprefix(f"{model.model.base_model_prefix}.").split(".")
    for name in names[:-1]:
        found.append(inside)
        inside = inside.get_submodule(name)
    return [m for m in (*found, inside) if m is not model.model]


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


class Space:
    """Memory for the logits of tiles, kept from tile to tile where that is main memory: fresh memory costs a quarter of a
    product's time there. A device's allocator keeps its own."""

    def __init__(self) -> None:
        self.flat: dict[str, Tensor] = {}

    def take(self, key: str, rows: int, weight: Tensor | HeadRows, device: torch.device) -> Tensor | None:
        """[rows, V] float32, of what was given for the same key before; None where it is not worth keeping."""
        size = rows * weight.shape[0]
        if not keeps_space(weight.shape[0], device):
            return None
        if key not in self.flat or self.flat[key].numel() < size:
            self.flat.pop(key, None)
            self.flat[key] = torch.empty(size)
        return self.flat[key][:size].view(rows, -1)


def keeps_space(n_vocab: int, device: torch.device) -> bool:
    """Whether the logits of a tile stay in memory between tiles."""
    return device.type == "cpu" and n_vocab > HEAD_CHUNK


def _product(x: Tensor, weight: Tensor | HeadRows, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x W^T + b in float32 from upcast operands, whatever their dtype; a chunk of the vocabulary at a time. out [R, V]: for it,
    where there is one.

    The same chunks in every mode, because a product of another shape may round otherwise.
    """
    if x.is_cuda and x.dtype == weight.dtype and x.dtype in NARROW and narrow_works(x.device, x.dtype):
        return _narrow_product(x, weight, bias)
    x = x.float()
    if weight.shape[0] <= HEAD_CHUNK:
        return functional.linear(x, weight[:].float(), None if bias is None else bias.float())
    rows = x.flatten(0, -2)
    if out is None:
        out = torch.empty(rows.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    for part in _chunks(weight, HEAD_CHUNK):
        torch.mm(rows, weight[part].float().T, out=out[:, part])
        if bias is not None:
            out[:, part] += bias[part].float()
    return out.unflatten(0, x.shape[:-1])


def _narrow_product(x: Tensor, weight: Tensor | HeadRows, bias: Tensor | None) -> Tensor:
    """The same of 16-bit operands on a GPU, without upcasting them: their products are exact in float32 either way, and TF32 has half
    of their speed."""
    rows = x.flatten(0, -2)
    out = torch.empty(rows.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    for part in _chunks(weight, HEAD_CHUNK):
        torch.mm(rows, weight[part].T, out_dtype=torch.float32, out=out[:, part])
        if bias is not None:
            out[:, part] += bias[part].float()
    return out.unflatten(0, x.shape[:-1])


@cache
def narrow_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device gives float32 sums of 16-bit products, into a part of larger memory, as exactly as float32: tried once."""
    numbers = torch.linspace(-1, 1, 64 * 61).view(61, 64).to(device, dtype)
    out = torch.zeros(13, 100, device=device)
    try:
        torch.mm(numbers[:13], numbers[13:].T, out_dtype=torch.float32, out=out[:, 7:55])
    except (RuntimeError, TypeError) as error:
        log.info("16-bit products are upcast: %s", str(error).splitlines()[0])
        return False
    want = numbers[:13].double() @ numbers[13:].double().T
    return bool((out[:, 7:55] - want).abs().max() < 1e-5)


def _chunks(weight: Tensor | HeadRows, size: int) -> Iterator[slice]:
    """Ranges of so many rows that together are all of them."""
    rows = weight.shape[0]
    yield from (slice(v, min(v + size, rows)) for v in range(0, rows, size))


class _Hidden(tuple[Tensor]):
    """What a base model returns, as far as a head looks: the last hidden state; any other field is None."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def own_logits(model: StreamedModel, rows_RD: Tensor, space: Space | None = None) -> Tensor:
    """Logits [R, V] float32 of rows that already went through whatever norm they shall have; V is the rank's own shard.

    The rows are in the model's dtype; the product is in float32. space: the result is good until the next is made in it.
    """
    _, weight, bias = model.head_shard()
    out = None if space is None else space.take(model.label, rows_RD.shape[0], weight, rows_RD.device)
    with _precision(weight.dtype):
        return _through(model, rows_RD, lambda x: _product(x, weight, bias, out))


@torch.no_grad()
def some_logits(model: StreamedModel, rows_RD: Tensor, size: int) -> Tensor:
    """As own_logits, at SAMPLES stretches of SAMPLE entries, evenly over the first `size` of this rank's shard, the same size in every
    call; all of these where they are few."""
    _, weight, bias = model.head_shard()
    if size <= SMALL_VOCABULARY:
        return own_logits(model, rows_RD)[:, :size]
    if model.head_sample is None or model.head_sample[0].device != rows_RD.device:  # planned without data at first
        starts = [i * (size - SAMPLE) // (SAMPLES - 1) for i in range(SAMPLES)]
        parts = [slice(i, i + SAMPLE) for i in starts]
        some_bias = None if bias is None else torch.cat([bias[p] for p in parts])
        model.head_sample = torch.cat([weight[p] for p in parts]), some_bias
    some, some_bias = model.head_sample
    with _precision(weight.dtype):
        return _through(model, rows_RD, lambda x: _product(x, some, some_bias))


@torch.no_grad()
def logits_and_shifts(model: StreamedModel, rows_RD: Tensor, n: int, space: Space | None = None) -> Tensor:
    """Logits [R, V] float32 of the first n of float32 rows [R, D], and what changes of rows, which the others are, change in logits; for
    linear heads only."""
    _, weight, bias = model.head_shard()
    out = None if space is None else space.take(model.label, rows_RD.shape[0], weight, rows_RD.device)

    def product(x: Tensor) -> Tensor:
        found = _product(x, weight, None, out)
        if bias is not None:
            found[..., :n, :] += bias.float()
        return found

    with _precision(torch.float32):  # a difference of bfloat16 rows is no bfloat16 number
        return _through(model, rows_RD, product)


@torch.no_grad()
def shifts_between(
    base: StreamedModel, other: StreamedModel, rows_RD: Tensor, moved_MD: Tensor, space: Space | None = None
) -> Tensor:
    """What changes of rows [M, D] (float32) change in the logits of the other head, [M, V] float32; in the first R of these also
    what the other head changes in the logits that rows [R, D] have under base's: rows (W_other - W_base)^T and the difference of
    the biases, a chunk of the vocabulary that both have at a time. For linear heads only."""
    _, wa, ba = base.head_shard()
    _, wb, bb = other.head_shard()
    out = None if space is None else space.take(other.label, moved_MD.shape[0], wb, moved_MD.device)
    rows = rows_RD.float()

    def product(x: Tensor) -> Tensor:
        found = _product(x, wb, None, out)
        first = found.flatten(0, -2)[: rows.shape[0]]
        for part in _chunks(min(wa, wb, key=lambda w: w.shape[0]), CHANGE_CHUNK):
            change = wb[part].to(torch.float32, copy=True).sub_(wa[part])
            first[:, part].addmm_(rows, change.T)
            del change  # one chunk in float32 at a time
            if ba is not None and bb is not None:
                first[:, part] += bb[part].float() - ba[part].float()
        return found

    with _precision(torch.float32):
        return _through(other, moved_MD, product)


@dataclass(frozen=True)
class _Answer:
    """A head that answers the same whatever it is asked."""

    logits: Tensor

    def __call__(self, _: Tensor) -> Tensor:
        return self.logits


@torch.no_grad()
def head_is_linear(model: StreamedModel) -> bool:
    """True if what the model does behind its head is a plain factor, and nothing before it: then shifts of logits may be computed as
    products. ModernBERT's decoders and BERT have layers of their own before it."""
    if model.linear_head is None:
        size = model.config.hidden_size
        rows = torch.linspace(-1, 1, size, dtype=torch.float32, device=model.device)[None]
        probe = torch.linspace(-40, 40, 64, device=model.device)[None, None]
        given: list[Tensor] = []

        def times(k: float) -> Callable[[Tensor], Tensor]:
            def answer(x: Tensor) -> Tensor:
                given.append(x)
                return probe * k

            return answer

        try:
            one, two, zero = (_through(model, rows, times(k)) for k in (1.0, 2.0, 0.0))
        except RuntimeError as error:  # layers of 16 bits before the head do not take float32
            if is_out_of_memory(error):
                raise
            model.linear_head = False
            return False
        as_it_is = all(torch.equal(x.reshape(-1), rows[0]) for x in given)
        model.linear_head = as_it_is and bool(torch.equal(two, 2 * one)) and not bool(zero.any())
        model.scaled_probe = one.cpu()  # asked about with every tile
    return model.linear_head


def heads_scale_alike(models: Sequence[StreamedModel]) -> bool:
    """True if what the models do behind their heads is the same factor, whatever else their configs say."""
    if not all(map(head_is_linear, models)):
        return False
    first, *others = (m.scaled_probe for m in models)
    return all(first is not None and x is not None and torch.equal(first, x) for x in others)


@torch.no_grad()
def head_copies(model: StreamedModel) -> bool:
    """Whether what the model does behind its head makes logits anew (a factor, a cap), beside those of the head."""
    probe = torch.zeros(1, 1, 8, device=model.device)
    rows = torch.zeros(1, model.config.hidden_size, dtype=torch.float32, device=model.device)
    return _through(model, rows, _Answer(probe)).data_ptr() != probe.data_ptr()


def _through(model: StreamedModel, rows_RD: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Raises UnsupportedModelError where the model's own forward does not ask its base model, which stands for the state."""
    unasked = f"{type(model.model).__name__} does not call its base model; its logits cannot be made from a state"
    with _stubbed(model, _Hidden((rows_RD[None],)), head) as asked:
        try:
            logits: Tensor = model.model(inputs_embeds=rows_RD[None], use_cache=False).logits[0]
        except Exception as error:
            if asked or is_out_of_memory(error):
                raise
            raise UnsupportedModelError(unasked) from error
    if not asked:
        raise UnsupportedModelError(unasked)
    return logits


def _own_product(x: Tensor, weight: Tensor | HeadRows, bias: Tensor | None) -> Tensor:
    """x W^T + b in the model's dtype, as its head gives it."""
    parts = [functional.linear(x, weight[p], None if bias is None else bias[p]) for p in _chunks(weight, HEAD_CHUNK)]
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def heads_equal(base: StreamedModel, sft: StreamedModel) -> bool:
    """True if both models' unembeddings are the same numbers, on all ranks."""
    if base is sft:
        return True
    (_, wa, ba), (_, wb, bb) = base.head_shard(), sft.head_shard()
    same = wa.shape == wb.shape and wa.dtype == wb.dtype and (ba is None) == (bb is None)
    same = same and (ba is None or bb is None or torch.equal(ba, bb))
    same = same and all(torch.equal(wa[p], wb[p]) for p in _chunks(wa, HEAD_CHUNK))
    return base.group.all(same, base.device)


@torch.no_grad()
def check_against_model(model: StreamedModel, rows_RD: Tensor) -> float:
    """Compare our float32 logits of final states with the model's own in its own dtype; the largest relative error.

    Raises SelfCheckError where it is beyond what the dtype explains: the head found is then not the model's head.
    """
    _, weight, bias = model.head_shard()
    # Else this rank's shard of the product, or a chunk after the other, in the model's dtype.
    whole = isinstance(weight, Tensor) and weight.shape == model.head_weight.shape
    own = type(model.head).forward.__get__(model.head) if whole else lambda x: _own_product(x, weight, bias)
    ours = own_logits(model, rows_RD)
    theirs = _through(model, rows_RD, own).float()
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
    if error > LOGIT_TOLERANCE[rows_RD.dtype]:
        raise SelfCheckError(
            f"{model.label} model: logits computed from the last state differ from the model's own by {error:.2g} "
            f"(relative to the largest; {LOGIT_TOLERANCE[rows_RD.dtype]:g} is expected in {rows_RD.dtype})"
        )
    return error
