"""Count the bytes of tensors that are alive while something runs, with data or without.

Counted are the storages of all tensors that operations make, from the moment they are made until nothing refers to them;
what was there before is not. Buffers inside an operation (a kernel's workspace) are not seen.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")


class Live(TorchDispatchMode):
    """Within the block: `live` bytes now, `peak` at most, of tensors on one kind of device. What other threads than the one that
    entered it make is not seen; what they let go is.

    beside: bytes that others count, added at every look (a ledger's weights). limit: bytes above which an operation raises
    torch.OutOfMemoryError, as an allocator would.
    """

    def __init__(
        self, device: torch.device, *, beside: Callable[[], int] = lambda: 0, limit: float = float("inf")
    ) -> None:
        super().__init__()
        self.kind = device.type
        self.peak = self._live = 0
        self.beside, self.limit = beside, limit
        self._known: dict[int, int] = {}
        self.at_peak: list[int] = []  # the sizes of what made the peak
        # What is gone, in whatever thread it went, even in the middle of a line here: taken off when it is looked at, since two
        # that change one number at a time lose a change now and then.
        self._left: deque[tuple[int, int]] = deque()

    @property
    def live(self) -> int:
        """Bytes that are alive."""
        while self._left:
            key, nbytes = self._left.popleft()
            del self._known[key]
            self._live -= nbytes
        return self._live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func is torch.ops.aten._grouped_mm.default and args[0].is_meta
        ):  # whose check without data knows bfloat16 only
            out: Any = args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1])
        else:
            out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, *(kwargs or {}).values()))}
        _ = self.live  # else what was made where something lay that is gone would be known
        for tensor in _tensors((out,)):
            if tensor.device.type == self.kind:
                self._see(tensor.untyped_storage(), given)
        now = self.live + self.beside()
        if now > self.limit:
            raise torch.OutOfMemoryError(f"{now} bytes are asked for, {self.limit:.0f} are there")
        if now > self.peak:
            self.peak, self.at_peak = now, list(self._known.values())
        return out

    def _see(self, storage: Any, given: set[int]) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self._known and key not in given:  # a view of what was there before is nothing new
            self._known[key] = nbytes
            self._live += nbytes
            weakref.finalize(storage, self._left.append, (key, nbytes))


def _tensors(of: Iterable[Any]) -> Iterator[Tensor]:
    """Those among what an operation takes or gives: tensors, and lists of them."""
    for one in of:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (tuple, list)):
            yield from _tensors(one)


class AsOn(TorchFunctionMode):
    """Lets attention without data take the memory that it takes on a device: there it is one kernel where it can be."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **kwargs)
        q: Tensor
        q, k, v = args[:3]
        mask, dropout, causal = _mask_and_causal(*args[3:], **kwargs)
        like = [None if t is None else self._thin(t) for t in (q, k, v, mask)]
        extra = {"enable_gqa": kwargs.get("enable_gqa", False), "scale": kwargs.get("scale")}
        choose: Any = torch._fused_sdp_choice
        chosen = choose(*like, dropout, causal, **extra)
        if chosen == 0:  # no kernel: products, softmax and product, which are counted one by one
            return func(*args, **kwargs)
        log_sum = q.new_empty(q.shape[:-1], dtype=torch.float32)  # what every kernel returns besides
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)  # their layout
        del log_sum
        return out

    def _thin(self, x: Tensor) -> Tensor:
        """A tensor of this shape on the device, of which one row is real."""
        return torch.empty(x.shape[-1], dtype=x.dtype, device=self.device).expand(x.shape)


def _mask_and_causal(
    attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, **_: Any
) -> tuple[Tensor | None, float, bool]:
    return attn_mask, dropout_p, is_causal
