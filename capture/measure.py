"""What a walk needs on its device beside weights, found by running it without data before anything large is loaded.

Layers and heads run on the `meta` device, where tensors have shapes and no memory, and what they make is counted
(capture/live.py): exact for any architecture. Only the `rest` of the weights (final norm, learned positions) is loaded for it,
because a model's own forward must once say what it gives its layers. Where a layer cannot run without data, and for shares
of tensor parallelism, the formulas of capture/footprint.py stand in.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_iter, tree_map_only

from capture import footprint
from capture.batches import Batch, halves
from capture.checkpoint import EMBEDDING, HEAD, REST, StreamedModel
from capture.config import Owner, Pass
from capture.footprint import Activations, ModelBytes, Walk
from capture.lens_kernel import MOST_SLOTS
from capture.lens_plan import LensPlan
from capture.live import META, AsOn, Live
from capture.lockstep import Pair
from capture.measure_lens import LensMeasure
from capture.replay import Recording, record
from capture.sublayer import sublayer_bytes

log = logging.getLogger(__name__)

SMALL, SMALL_PER_TOKEN = 1 << 15, 64  # bytes of ids, positions, masks of rows, and what else is too small to be counted
LIBRARY_LOADING = 1.6  # as in capture/checkpoint.py: beside a weight while the library puts it together


def model_bytes(model: StreamedModel) -> ModelBytes:
    """The weights of an opened model, by group."""
    sizes = {group: model.group_bytes(group) for group in (EMBEDDING, HEAD, REST)}
    layers = tuple(model.layer_bytes())
    weight = model.head_weight
    row = weight.shape[1] * weight.dtype.itemsize
    leaves = 0 if model.whole or model.group.size > 1 else sublayer_bytes(model)
    return ModelBytes(
        sizes[EMBEDDING], sizes[HEAD], sizes[REST], layers, tied=model.tied, row=row, leaves=leaves, loading=_loading(model)
    )  # fmt: skip


def _loading(model: StreamedModel) -> tuple[int, ...]:
    """Bytes beside each layer while it is read: of FP8 weights a strip as stored and in float32; more where the library does it."""
    if model.whole:
        return ()
    found = []
    for i in range(model.n_layers):
        most = 0
        for name in model.names(("layer", i)):
            recipe = model.recipe(name)
            shape = model.meta(name).shape
            if recipe is not None and recipe.by_library:
                most = max(most, int(LIBRARY_LOADING * model.group_bytes(("layer", i))))
            elif recipe is not None and any(p.scale is not None for p in recipe.parts):
                columns = 1 + max(p.column for p in recipe.parts)
                most = max(most, 5 * min(shape[-1] * shape[-2] // columns, max(footprint.FP8_STRIP, 128 * shape[-1])))
        found.append(most)
    return tuple(found)


@dataclass(frozen=True)
class _Calls:
    """One batch, recorded: what layers are called with, its bytes, and what recording took."""

    batch: Batch
    recordings: dict[Owner, Recording]
    nbytes: int
    opening: int


class Measure:
    """Measures one pair on its batches. Loads the `rest` of both models, which every mode keeps."""

    def __init__(
        self,
        pair: Pair,
        batches: Sequence[Batch],
        lens: LensPlan,
        passes: Sequence[Pass],
        n_pairs: int,
        n_spectra: int = 0,
    ) -> None:
        self.pair, self.lens, self.passes, self.n_pairs = pair, lens, list(passes), n_pairs
        self.batches, self.n_spectra = list(batches), n_spectra
        base = pair.models["base"]
        self.device, self.hidden, self.dtype = base.device, base.config.hidden_size, base.model.dtype
        self.exact = base.group.size == 1  # else a rank's forward means talking to the others
        self.walk = self._sizes()
        self.n = {o: len({p.embeddings for p in passes if p.model == o}) for o in pair.owners}
        for model in pair.unique():
            model.load(REST)
        self.calls = [self._record(b) for b in largest(self.batches)]
        self._forward: dict[Any, int] = {}
        self.of_lens = LensMeasure(pair, batches, lens, passes, n_pairs, self.walk)

    def activations(self, tile_bytes: int, parts: int = 1) -> Activations:
        """What is needed with lens tiles of at most tile_bytes, and batches in so many parts."""
        walk = replace(self.walk, batch_tokens=-(-self.walk.batch_tokens // parts))
        element = walk.element
        batch = footprint.state_bytes(replace(walk, tokens=self.walk.batch_tokens))
        has_padding = any(b.keep_BT is not None for b in self.batches)
        padded = batch if has_padding else 0  # rows() copies
        forward = max(self.forward(c, parts) for c in self.calls)
        spectra = self._spectra()
        probe = [b for b in self.batches if b.probe]
        probed = (
            sum(b.ids_BT.numel() for b in probe) * len(self.passes) * self.hidden * element
        )  # its rows, in its batch
        kept = sum(self.of_lens.kept(tile_bytes))
        waiting, left = self.of_lens.waiting(tile_bytes)
        held = footprint.held_bytes(self.walk)
        beside = probed + waiting + held + kept + SMALL + SMALL_PER_TOKEN * self.walk.tokens
        tail = 4 * self.walk.batch_tokens * self.hidden * max(4, element)
        products, lens = self.of_lens.stages(tile_bytes)
        more = padded + spectra - kept - (waiting - left)
        return Activations(
            states=footprint.state_bytes(walk),
            batch=batch,
            calls=sum(self._call_bytes(b) for b in self.batches) + beside,
            batch_calls=max(c.nbytes for c in self.calls) + beside,
            opening=max(max(c.opening for c in self.calls), self.of_lens.most(tile_bytes, rows=8)) - kept - waiting,
            forward=forward,
            statistics=max(self._statistics(has_padding), tail) + spectra,
            products=products + more if self.lens.layers else 0,
            lens=lens + more if self.lens.layers else 0,
        )

    def _statistics(self, padded: bool) -> int:
        compiled = self.lens.kernel is not None and self.dtype == torch.float32 and len(self.passes) <= MOST_SLOTS
        return footprint.statistics_bytes(self.walk, on_cpu=self.device.type == "cpu", padded=padded, compiled=compiled)

    def _spectra(self) -> int:
        """float64 differences of all tokens for each comparison, and one of them with its Gram matrix at work."""
        if not self.n_spectra:
            return 0
        whole, small = self.walk.tokens * self.hidden, min(self.walk.tokens, self.hidden)
        return 8 * ((self.n_spectra + 2) * whole + 4 * small * small)

    def _sizes(self) -> Walk:
        base = self.pair.models["base"]
        config = base.config
        heads = getattr(config, "num_attention_heads", None) or 1  # models without attention have none
        kinds = {o: sum(p.model == o for p in self.passes) for o in self.pair.owners}
        return Walk(
            tokens=sum(b.ids_BT.numel() for b in self.batches),
            batch_tokens=max(b.ids_BT.numel() for b in self.batches),
            passes=len(self.passes),
            passes_of_one=max(kinds.values()),
            hidden=self.hidden,
            ffn=footprint.ffn_width(config.to_dict(), self.hidden),
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=_widest_head(config) or self.hidden // heads,
            vocab=self.lens.n_vocab,
            element=self.dtype.itemsize,
            lens=bool(self.lens.layers),
            waits=footprint.waiting(
                [b.ids_BT.numel() * self.hidden for b in self.batches if not b.probe], base.n_layers
            ),
        )

    # -- layers --------------------------------------------------------------------------------------------------------

    def _record(self, batch: Batch) -> _Calls:
        """Let both models' own forward say what it gives its layers, on states of zeros."""
        found: dict[Owner, Recording] = {}
        opening = 0
        for owner in self.pair.owners:
            n = self.n[owner]
            with Live(self.device) as live, torch.no_grad():
                zeros = torch.zeros(
                    n * len(batch.items), batch.ids_BT.shape[1], self.hidden, dtype=self.dtype, device=self.device
                )
                mask = None if batch.mask_BT is None else batch.mask_BT.repeat(n, 1)
                positions = None if batch.positions_BT is None else batch.positions_BT.repeat(n, 1)
                one = record(self.pair.models[owner], zeros, mask_BT=mask, positions_BT=positions)
            opening = max(opening, live.peak)
            found[owner] = replace(one, entry_BTD=torch.empty(0))
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes()
                    for r in found.values() for t in tree_iter(r.calls) if isinstance(t, Tensor)}  # fmt: skip
        return _Calls(batch, found, sum(storages.values()), opening)

    def _call_bytes(self, batch: Batch) -> int:
        """Bytes of a batch's arguments: at most those of a larger batch, in proportion to its length."""
        n, length = len(batch.items), batch.ids_BT.shape[1]
        larger = [c for c in self.calls if len(c.batch.items) * c.batch.ids_BT.shape[1] >= n * length
                  and c.batch.ids_BT.shape[1] >= length]  # fmt: skip
        return min(-(-c.nbytes * length // c.batch.ids_BT.shape[1]) for c in larger)

    def forward(self, calls: _Calls, parts: int) -> int:
        """A layer at work on one batch in so many parts: the most of any layer of either model, with the new states."""
        batch = calls.batch
        n_items, length = len(batch.items), batch.ids_BT.shape[1]
        n_parts = min(parts, n_items)
        part = batch.part(halves(batch, n_parts)[0])
        key = (n_items, length, batch.mask_BT is None, n_parts)
        if key not in self._forward:
            some = calls if n_parts == 1 else self._record(part)
            row = length * self.hidden * self.dtype.itemsize
            most, done = 0, 0
            for owner in self.pair.owners:
                n = self.n[owner]
                stack = n * len(part.items) * row if n > 1 else 0
                whole = n * n_items * row if n_parts > 1 else 0
                peak = max(self._layer(owner, i, some) for i in self._kinds(owner, some))
                most = max(most, done + whole + stack + peak)
                done += n * n_items * row
            self._forward[key] = most
        return self._forward[key]

    def _kinds(self, owner: Owner, calls: _Calls) -> list[int]:
        """One layer of each kind: of other shapes, or called with other shapes."""
        model = self.pair.models[owner]
        kinds: dict[Any, int] = {}
        for i, layer in enumerate(model.layers):
            shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in layer.named_parameters())
            given = tuple(tuple(t.shape) for t in tree_iter(calls.recordings[owner].calls[i]) if isinstance(t, Tensor))
            kinds.setdefault((type(layer), shapes, given), i)
        return list(kinds.values())

    def _layer(self, owner: Owner, i: int, calls: _Calls) -> int:
        """The most that one layer makes while it runs, its result included."""
        model = self.pair.models[owner]
        rows = self.n[owner] * len(calls.batch.items)
        fallback = footprint.forward_bytes(replace(self.walk, batch_tokens=calls.batch.ids_BT.numel()))
        if not self.exact:
            return fallback
        layer = model.layers[i]
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(META), calls.recordings[owner].calls[i])
        weights = {n: t.detach().to(META) for n, t in (*layer.named_parameters(), *layer.named_buffers())}
        hidden = torch.empty(rows, calls.batch.ids_BT.shape[1], self.hidden, dtype=self.dtype, device=META)
        try:
            with torch.no_grad(), Live(META) as live, AsOn(self.device):
                functional_call(layer, weights, (hidden, *args), kwargs)
        except Exception as error:  # whatever a model's code does with data that is not there
            log.info(
                "layer %d of %s is planned by formula, it cannot run without data: %s", i, model.label, str(error)[:200]
            )
            return fallback
        return live.peak


def largest(batches: Sequence[Batch]) -> list[Batch]:
    """The batches that no other one surpasses in both tokens and length: whatever grows with either is largest there."""
    by_size: dict[tuple[int, int, bool], Batch] = {}
    for b in batches:
        by_size.setdefault((b.ids_BT.numel(), b.ids_BT.shape[1], b.mask_BT is None), b)
    return [
        b
        for size, b in by_size.items()
        if not any(o != size and o[0] >= size[0] and o[1] >= size[1] and o[2] <= size[2] for o in by_size)
    ]


def _widest_head(config: Any) -> int:
    """Of all layers: those of gemma4 differ, and its config refuses to name one for all. 0 where it names none."""
    each = getattr(config, "per_layer_config", None) or [config]
    return max(getattr(one, "head_dim", None) or 0 for one in each)
