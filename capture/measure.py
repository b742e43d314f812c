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
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only

from capture import footprint
from capture.batches import Batch, halves
from capture.checkpoint import EMBEDDING, HEAD, REST, StreamedModel
from capture.config import Owner
from capture.config import Pass as ModelPass
from capture.divergence import PLAIN_PIECES, Pairs
from capture.footprint import Activations, ModelBytes, Walk
from capture.group import Group
from capture.lens import lens_tile
from capture.lens_kernel import Kernel
from capture.lens_plan import LensPlan
from capture.lens_sums import Pass, Space, fused_bytes, one_pass, space_bytes
from capture.live import META, AsOn, Live
from capture.lockstep import Pair
from capture.logits import can_shift, sampled_logits, separate, shifted_logits, tile_logits
from capture.replay import Recording, record
from capture.sublayer import sublayer_bytes
from capture.topk import Vocabulary
from capture.unembed import SAMPLE, SAMPLES, SMALL_VOCABULARY, keeps_space

log = logging.getLogger(__name__)

SMALL, SMALL_PER_TOKEN = 1 << 15, 64  # bytes of ids, positions, masks of rows, and what else is too small to be counted
SAMPLE_ROWS = 8  # rows that the lens statistics are measured on, not on a processor
SAMPLE_STEPS = 3  # likewise on a processor, times what it goes through at once: with fewer, another part takes most
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
        passes: Sequence[ModelPass],
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
        self._tiles: dict[int, tuple[int, int]] = {}

    def activations(self, tile_bytes: int, parts: int = 1) -> Activations:
        """What is needed with lens tiles of at most tile_bytes, and batches in so many parts."""
        walk = replace(self.walk, batch_tokens=-(-self.walk.batch_tokens // parts))
        element = walk.element
        batch = footprint.state_bytes(replace(walk, tokens=self.walk.batch_tokens))
        padded = 2 * batch if any(b.keep_BT is not None for b in self.batches) else 0  # rows() copies
        forward = max(self.forward(c, parts) for c in self.calls)
        spectra = self._spectra()
        probe = [b for b in self.batches if b.probe]
        probed = (
            sum(b.ids_BT.numel() for b in probe) * len(self.passes) * self.hidden * element
        )  # its rows, in its batch
        kept = sum(self._kept(tile_bytes))
        waiting, left = self._waiting(tile_bytes)
        beside = probed + waiting + kept + SMALL + SMALL_PER_TOKEN * self.walk.tokens
        tail = 4 * self.walk.batch_tokens * self.hidden * max(4, element)
        products, lens = self._lens_stages(tile_bytes)
        more = padded // 2 + spectra - kept - (waiting - left)
        return Activations(
            states=footprint.state_bytes(walk),
            batch=batch,
            calls=sum(self._call_bytes(b) for b in self.batches) + beside,
            batch_calls=max(c.nbytes for c in self.calls) + beside,
            opening=max(max(c.opening for c in self.calls), self.lens_bytes(tile_bytes, rows=8)) - kept - waiting,
            forward=forward,
            statistics=max(footprint.statistics_bytes(self.walk) + padded, tail) + spectra,
            products=products + more if self.lens.layers else 0,
            lens=lens + more if self.lens.layers else 0,
        )

    def _spectra(self) -> int:
        """float64 differences of all tokens for each comparison, and one of them with its Gram matrix at work."""
        if not self.n_spectra:
            return 0
        whole, small = self.walk.tokens * self.hidden, min(self.walk.tokens, self.hidden)
        return 8 * ((self.n_spectra + 2) * whole + 4 * small * small)

    def _sizes(self) -> Walk:
        config = self.pair.models["base"].config
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
            head_dim=getattr(config, "head_dim", None) or self.hidden // heads,
            vocab=self.lens.n_vocab,
            element=self.dtype.itemsize,
            lens=bool(self.lens.layers),
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

    # -- the lens ------------------------------------------------------------------------------------------------------

    def lens_bytes(self, tile_bytes: int, rows: int | None = None) -> int:
        """One tile of the lens at work, at most."""
        return max(self._lens_stages(tile_bytes, rows))

    def _lens_stages(self, tile_bytes: int, rows: int | None = None) -> tuple[int, int]:
        """The same while its logits are made, which rows of the unembedding are read for, and while they are looked at."""
        tile = min(rows or self._rows_at_once(), self.lens.tile_rows(len(self.passes), tile_bytes))
        if tile not in self._tiles:
            self._tiles[tile] = self._lens(tile, tile_bytes)
        return self._tiles[tile]

    def _kept(self, tile_bytes: int) -> tuple[int, int]:
        """What stays in memory while layers run: logits of the largest tile, and the plain lens's memory for statistics."""
        if not self.lens.layers:
            return 0, 0
        tile = min(self._rows_at_once(), self.lens.tile_rows(len(self.passes), tile_bytes))
        shards = {o: self.pair.models[o].head_shard()[1].shape[0] for o in self.pair.owners}
        kept = {o for o, shard in shards.items() if keeps_space(shard, self.device)}
        logits = sum(tile * shards[p.unembedding] * 4 for p in self.passes if p.unembedding in kept)
        return logits, self._workspaces(tile, min(shards.values())) if kept and self.lens.kernel is None else 0

    def _workspaces(self, tile: int, n_vocab: int) -> int:
        slots = len(self.passes)
        searches = slots + 2 * (slots - 1 + self.n_pairs)  # lens_sums.compared has the leading pairs too
        rows, v = min(tile, self.lens.statistics_rows()), self.lens.vocabulary
        of_one = space_bytes(slots, searches, n_vocab, v.n, rows=rows, at_once=min(rows, self.lens.at_once))
        return of_one * (min(tile, torch.get_num_threads()) if v.group.size == 1 else 1)

    def _rows_at_once(self) -> int:
        """Rows that may share a tile of the lens."""
        return sum(b.ids_BT.numel() for b in self.batches if not b.probe) * self.lens.layers_at_once

    def _waiting(self, tile_bytes: int) -> tuple[int, int]:
        """States of rows that wait for the lens while layers run: less than a tile, and what one batch brings; and never those of
        the batch behind which all that waits is worked off. And of those that are there beside a tile that is worked off: a batch of
        which the tile has a part, or none, stays whole."""
        if not self.lens.layers:
            return 0, 0
        tile = self.lens.tile_rows(len(self.passes), tile_bytes)
        last = [b for b in self.batches if not b.probe][-1].ids_BT.numel()
        most, of_row = self._rows_at_once(), len(self.passes) * self.hidden * self.dtype.itemsize
        waiting = min(most - last, tile + self.walk.batch_tokens)
        beside = self.walk.batch_tokens if most > self.walk.batch_tokens else max(0, most - tile)
        return waiting * of_row, beside * of_row

    def _lens(self, tile: int, tile_bytes: int) -> tuple[int, int]:
        by_formula = footprint.lens_bytes(replace(self.walk, batch_tokens=tile, lens=True), tile_bytes)
        if not self.exact or not self.lens.layers:
            return by_formula, by_formula
        heads = [p.unembedding for p in self.passes]
        states = [torch.empty(tile, self.hidden, dtype=self.dtype, device=META) for _ in heads]
        normed = (
            tile * self.hidden * (2 * len(heads) * self.dtype.itemsize + 2 * 4)
        )  # as they wait, and those chosen of them
        try:
            with torch.no_grad(), Live(META) as products:
                logits = tile_logits(self.pair, states, heads)
                kept = products.live
                del logits
            logits_kept, space = self._kept(tile_bytes)
            again, shifted, sampled = 0, 0, 0
            if can_shift_without_data(self.pair, heads):
                with torch.no_grad(), Live(META) as glance:
                    some = sampled_logits(self.pair, states, heads)
                    sampled = max(glance.peak, glance.live + 3 * tile * 4 * some[0].shape[1])
                    del some
                few = self.lens.refine_rows(tile, len(heads))
                beside = min(few, self.lens.beside_rows(tile))
                of_many = self._refined(heads, states, few)
                of_few = [logits_kept + x for x in self._refined(heads, states, beside)] if beside else of_many
                again, shifted = (max(both) for both in zip(of_many, of_few, strict=True))
        except Exception as error:
            log.info("the lens is planned by formula, it cannot run without data: %s", str(error)[:200])
            return by_formula, by_formula
        lists = self._lists() * (2 * self.walk.batch_tokens + (self.walk.tokens if self.lens.final_norm else 0))
        rows_kept = SAMPLES * SAMPLE * len(self.pair.unique()) if self.lens.n_vocab > SMALL_VOCABULARY else 0
        samples = rows_kept * self.hidden * self.dtype.itemsize
        beside_work = normed + samples + lists
        made = max(products.peak + space, again, logits_kept + space + sampled)
        return beside_work + made, beside_work + max(kept + self.statistics(tile), shifted)

    def _refined(self, heads: Sequence[Owner], states: Sequence[torch.Tensor], rows: int) -> tuple[int, int]:
        """Rows whose shifts are products of their own: while these are made; with their statistics."""
        with torch.no_grad(), Live(META) as again:
            shifts = shifted_logits(self.pair, [s[:rows] for s in states], heads)
            found = again.peak, again.live + self.statistics(rows, exact=True)
            del shifts
        return found

    def _lists(self) -> int:
        """What is found out about one token: kept until its batch is through, and of layer L-1 for all that is left of it."""
        slots, k = len(self.passes), self.lens.vocabulary.k
        return slots * (24 + 4 * len(self.lens.tracked) + 12 * k) + self.n_pairs * (16 + 24 * k)

    def statistics(self, tile: int, *, exact: bool = False) -> int:
        """The lens statistics of a tile beside its logits: what rows take that differ much, or little, measured on a few."""
        if self.lens.kernel is not None:
            return self._compiled(tile, self.lens.kernel)
        rows = min(tile, self.lens.statistics_rows(exact=exact))
        on_cpu = self.device.type == "cpu"
        v, heads = self.lens.vocabulary, len(self.passes)
        at_once = (
            self.lens.at_once if on_cpu else 2 * SAMPLE_ROWS if exact else None
        )  # of these the exact way takes half

        fused = self.lens.fused is not None and not exact

        def of(sample: int) -> Sequence[int]:
            return _of_statistics(sample, heads, self.n_pairs, self.lens.n_vocab, v.n, v.k, at_once, exact, fused)

        if (
            not on_cpu
        ):  # a row takes as much, however many there are; rows that go the plain way behind the kernels go in pieces
            sample = PLAIN_PIECES if fused else SAMPLE_ROWS
            most = -(-max(of(sample)) // sample) * rows
        elif rows <= SAMPLE_STEPS * self.lens.at_once:
            most = max(of(rows))
        else:  # each more takes as much as the one before
            step = self.lens.at_once
            of_few, of_fewer = of(SAMPLE_STEPS * step), of((SAMPLE_STEPS - 1) * step)
            more = rows - SAMPLE_STEPS * step
            most = max(few - (fewer - few) * more // step for few, fewer in zip(of_few, of_fewer, strict=True))
        made = 4 * heads * self.lens.n_vocab * rows if exact else 0  # sums of products, where these were there before
        threads = min(tile, torch.get_num_threads()) if on_cpu else 1
        return (most + made) * threads + self._found(tile)

    def _found(self, tile: int) -> int:
        """Results of a tile, while its last rows are worked on; on a device once more, put together to be copied."""
        n_slots, lists = len(self.passes), len(self.passes) + 2 * self.n_pairs
        return (
            (1 if self.device.type == "cpu" else 2)
            * tile
            * (lists * self.lens.vocabulary.k * (8 + 4) + 64 * (n_slots + self.n_pairs))
        )

    def _compiled(self, tile: int, kernel: Kernel) -> int:
        """The same where the kernel does it: room for each thread, and results for each row."""
        threads = min(tile, torch.get_num_threads())
        return threads * kernel.space_bytes(len(self.passes), self.n_pairs, self.lens.n_vocab) + self._found(tile)


def can_shift_without_data(pair: Pair, heads: Sequence[Owner]) -> bool:
    """As logits.can_shift, or True where that cannot be said yet."""
    try:
        return can_shift(pair, heads)
    except Exception:
        return True


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


@cache
def _of_statistics(
    rows: int,
    n_slots: int,
    n_pairs: int,
    n_vocab: int,
    listed: int,
    k: int,
    at_once: int | None,
    exact: bool,
    fused: bool,
) -> Sequence[int]:
    """Bytes that the plain lens makes of so many rows, at most, where they hardly differ and where they differ much: measured once
    for all pairs that this process captures, since with a large vocabulary it takes longer than opening the models. fused: by way of
    the kernels of a device."""
    pairs = [(a, b) for a in range(n_slots) for b in range(a)][:n_pairs]
    nothing = torch.zeros(0, dtype=torch.long)
    most = []
    for spread in (1e-3, 300.0):
        generator = torch.Generator().manual_seed(0)
        first = torch.randn(rows, n_vocab, generator=generator)
        slots = [first + spread * first.roll(1 + s, 1) for s in range(n_slots)]
        with Live(torch.device("cpu")) as live:
            lens_tile(
                separate(slots), pairs, torch.zeros(rows, dtype=torch.long), nothing, Vocabulary(listed, k),
                rows=rows, at_once=at_once, exact=exact, fused=_AsFused() if fused else None,
            )  # fmt: skip
        most.append(live.peak)
    return most


class _AsFused:
    """Takes the memory that the kernels of a device take; what they would find is made by plain operations, which are not counted."""

    def takes(self, logits: Sequence[Tensor]) -> bool:
        return True

    def one_pass(self, logits: Sequence[Tensor], shifts: Pairs, listed: int, group: Group) -> Pass:
        with _disable_current_modes():
            plain = one_pass(logits, shifts, listed, group, at_once=logits[0].shape[0], space=Space())
        beside = torch.empty(logits[0].shape[0] * fused_bytes(len(logits), logits[0].shape[1]), dtype=torch.uint8)
        found = Pass(plain.maxima_NRB.clone(), plain.largest_SR.clone(), plain.sums)
        del beside
        return found
