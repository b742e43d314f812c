"""Sub-layer mode: one matrix in use, the next being read; the embedding by the rows in use, the unembedding in chunks.

Each module of a layer that has matrices of its own is a *leaf*: its matrices are read just before its forward and freed
right after, by hooks. Vectors (norms, biases, a router's corrections) and convolutions, whose weights Mamba's mixers take past
their forward, are the layer's own group, and come and go as layers do in streamed mode. The order in which leaves are called is learned as they are called, and the next is read ahead. A batch
at a time walks through a layer, so a layer's matrices are read once for every batch; everything else is as in the other
modes, and so is every number.

Fused experts are one leaf: in a layer of experts this mode saves little more than its attention.
"""

from __future__ import annotations

import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from capture.assemble import held
from capture.errors import UnsupportedModelError
from capture.group import nbytes_of

if TYPE_CHECKING:
    from capture.checkpoint import StreamedModel


def leaf_groups(model: StreamedModel) -> dict[tuple[Any, ...], list[str]]:
    """The names of each leaf's matrices, by group ("layer", i, leaf), in the order in which modules were registered."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for i in range(model.n_layers):
        for name in model.names(("layer", i)):
            if (leaf := _leaf_of(model, i, name)) is not None:
                groups.setdefault(("layer", i, leaf), []).append(name)
    return groups


def _leaf_of(model: StreamedModel, i: int, name: str) -> str | None:
    """The module of layer i whose matrix a weight is; None of one that stays with its layer."""
    leaf = name.removeprefix(f"{model.layers_name}.{i}.").rpartition(".")[0]
    stays = model.meta(name).dim() < 2 or isinstance(model.layers[i].get_submodule(leaf), nn.Conv1d)
    return None if stays else leaf


def sublayer_bytes(model: StreamedModel) -> int:
    """Weights alive at most while one model's layers are walked leaf by leaf, without its rest and its unembedding.

    The two largest leaves of a layer, whichever follow each other, and the vectors of two layers: one in use, one read ahead.
    """
    leaves: dict[int, list[int]] = {i: [] for i in range(model.n_layers)}
    for group, names in leaf_groups(model).items():
        leaves[group[1]].append(sum(nbytes_of(model.meta(name)) for name in names))
    vectors = [
        sum(nbytes_of(model.meta(n)) for n in model.names(("layer", i)) if _leaf_of(model, i, n) is None)
        for i in range(model.n_layers)
    ]
    return max(sum(sorted(sizes)[-2:]) for sizes in leaves.values()) + 2 * max(vectors)


class SubLayer:
    """Makes a model's layers load leaf by leaf, from now on. One process alone, nothing loaded yet."""

    def __init__(self, model: StreamedModel) -> None:
        if model.whole or model.group.size > 1:
            why = "loaded whole" if model.whole else "divided among GPUs"
            raise UnsupportedModelError(f"mode sub-layer: the {model.label} model is {why}; set another mode")
        self.model = model
        self.thread: ThreadPoolExecutor | None = None
        self.ahead: tuple[Any, Future[None]] | None = None
        self.last: tuple[Any, ...] | None = None
        self.first: tuple[Any, ...] | None = None  # the first leaf called of the layer under way
        self.after: dict[str, str | None] = {}  # leaf -> the leaf called after it; None behind the last
        groups = leaf_groups(model)
        model.split(groups)
        self.groups = set(groups)
        self.called: set[tuple[Any, ...]] = set()
        names = list(groups)
        for one, other in itertools.pairwise(names):
            if one[1] == other[1]:
                self.after.setdefault(one[2], other[2])
        for group in groups:
            leaf: nn.Module = model.layers[group[1]].get_submodule(group[2])
            leaf.register_forward_pre_hook(self._before(group))
            leaf.register_forward_hook(self._behind(group), always_call=True)
        for i, layer in enumerate(model.layers):
            layer.register_forward_hook(self._check(i))

    def _before(self, group: tuple[Any, ...]) -> Any:
        def hook(*_: Any) -> None:
            self.called.add(group)
            self._learn(group)
            ahead, self.ahead = self.ahead, None
            if ahead is not None:
                ahead[1].result()
                if ahead[0] != group:
                    self.model.free(ahead[0])
            self.model.load(group)
            following = self.after.get(group[2])
            if following is not None and (*group[:2], following) in self.groups:
                upcoming = (*group[:2], following)
                self.model.reserve(upcoming)
                self.thread = self.thread or ThreadPoolExecutor(1, thread_name_prefix="prefetch")
                self.ahead = (upcoming, self.thread.submit(self.model.load, upcoming, ahead=True))

        return hook

    def _behind(self, group: tuple[Any, ...]) -> Any:
        def hook(*_: Any) -> None:
            self.model.free(group)

        return hook

    def _check(self, i: int) -> Any:
        def hook(layer: nn.Module, *_: Any) -> None:
            """A module that was not called has no weights, and a layer that takes them past its forward computes with nothing."""
            left = sorted(g[2] for g in self.groups - self.called if g[1] == i)
            if left and "forward" not in layer.__dict__:  # else it only stands there to be recorded: capture/replay.py
                raise UnsupportedModelError(
                    f"mode sub-layer: layer {i} of the {self.model.label} model does not call its {', '.join(left)}; set another mode"
                )

        return hook

    def _learn(self, group: tuple[Any, ...]) -> None:
        """Remember what came after what; a leaf of another layer, or the first of this one, ends a round."""
        last, self.last = self.last, group
        round_ends = last is None or last[1] != group[1] or group == self.first
        if last is not None:
            self.after[last[2]] = None if round_ends else group[2]
        if round_ends:
            self.first = group

    def close(self) -> None:
        """Let go what was read ahead and the thread that read it; a walk that goes on takes both up again."""
        if self.thread is not None:
            self.thread.shutdown(wait=True, cancel_futures=True)
        self.thread = self.ahead = self.last = self.first = None
        for group in self.groups:
            self.model.free(group)


class HeadRows:
    """The unembedding [V, D], of which slices of rows are read when they are asked for; the last slice is kept."""

    def __init__(self, model: StreamedModel) -> None:
        self.model = model
        self.name = _weight_name(model, model.head)
        meta = model.meta(self.name)
        self.shape, self.dtype, self.device = meta.shape, meta.dtype, model.device
        self._kept: tuple[int, int] | None = None
        self._rows = torch.empty(0)
        _rows_recipe(model, self.name)

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        if self._kept != (start, stop):
            self.release()
            size = (stop - start) * self.shape[1] * self.dtype.itemsize
            self.model.ledger.add(size)
            self._kept = (start, stop)
            self._rows = _read_rows(self.model, self.name, start, stop)
        return self._rows

    def release(self) -> None:
        """Let the slice that was kept go."""
        if self._kept is not None:
            self.model.ledger.add(-self._rows.nbytes)
            self._kept, self._rows = None, torch.empty(0)


def embed_rows(model: StreamedModel, ids_BT: Tensor) -> Tensor:
    """What the embedding module gives for ids [B, T], from the rows of these ids alone: [B, T, D]."""
    module, name = model.embedding, _weight_name(model, model.embedding)
    used = ids_BT.unique()
    row_bytes = model.meta(name).shape[1] * model.meta(name).dtype.itemsize
    with held(model.ledger, used.numel() * row_bytes):
        runs = [_read_rows(model, name, start, stop) for start, stop in _runs(used.tolist())]
        table = nn.Parameter(torch.cat(runs), requires_grad=False)
        del runs
        before = module._parameters["weight"]
        module._parameters["weight"] = table
        try:
            embeds: Tensor = module(torch.searchsorted(used, ids_BT))
            return embeds
        finally:
            module._parameters["weight"] = before


def _runs(ids: list[int]) -> list[tuple[int, int]]:
    """Rising ids as ranges [start, stop)."""
    starts = [i for n, i in enumerate(ids) if n == 0 or ids[n - 1] != i - 1]
    stops = [i + 1 for n, i in enumerate(ids) if n == len(ids) - 1 or ids[n + 1] != i + 1]
    return list(zip(starts, stops, strict=True))


def _read_rows(model: StreamedModel, name: str, start: int, stop: int) -> Tensor:
    part = _rows_recipe(model, name)
    rows: Tensor = model.opened(part.file, part.key)[start:stop]
    return rows.to(device=model.device, dtype=model.meta(name).dtype)


def _rows_recipe(model: StreamedModel, name: str) -> Any:
    recipe = model.recipe(name)
    if recipe is None or len(recipe.parts) != 1 or recipe.parts[0].scale is not None:
        raise UnsupportedModelError(
            f"mode sub-layer: rows of '{name}' of the {model.label} model cannot be read one by one; set another mode"
        )
    return recipe.parts[0]


def _weight_name(model: StreamedModel, module: nn.Module) -> str:
    found = next(n for n, m in model.model.named_modules(remove_duplicate=False) if m is module)
    return f"{found}.weight"
