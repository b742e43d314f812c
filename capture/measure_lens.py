"""What the lens needs on its device, found by running a tile of it without data, and its statistics on a few rows with data."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch.utils._python_dispatch import _disable_current_modes

from capture import footprint
from capture.batches import Batch
from capture.config import Owner, Pass
from capture.divergence import PLAIN_PIECES, Pairs
from capture.footprint import Walk
from capture.group import Group
from capture.lens import lens_tile
from capture.lens_kernel import Kernel
from capture.lens_plan import LensPlan
from capture.lens_sums import FUSED_SLOTS, Space, fused_bytes, one_pass, space_bytes
from capture.lens_sums import Pass as OnePass
from capture.live import META, Live
from capture.lockstep import Pair
from capture.logits import Logits, can_shift, leads_of, led_logits, sampled_logits, separate, tile_logits
from capture.topk import Vocabulary
from capture.unembed import SAMPLE, SAMPLES, SMALL_VOCABULARY, head_copies, keeps_space

log = logging.getLogger(__name__)

SAMPLE_ROWS = 8  # rows that the statistics are measured on, not on a processor
SAMPLE_STEPS = 3  # likewise on a processor, times what it goes through at once: with fewer, another part takes most


class LensMeasure:
    """Measures the lens of one pair on its batches; the `rest` of both models is loaded. walk: its sizes."""

    def __init__(
        self, pair: Pair, batches: Sequence[Batch], lens: LensPlan, passes: Sequence[Pass], n_pairs: int, walk: Walk
    ) -> None:
        self.pair, self.batches, self.lens, self.walk = pair, list(batches), lens, walk
        self.passes, self.n_pairs, self.hidden = list(passes), n_pairs, walk.hidden
        base = pair.models["base"]
        self.device, self.dtype = base.device, base.model.dtype
        self.exact = base.group.size == 1  # else a rank's forward means talking to the others
        self._tiles: dict[int, tuple[int, int]] = {}

    def most(self, tile_bytes: int, rows: int | None = None) -> int:
        """One tile of the lens at work, at most."""
        return max(self.stages(tile_bytes, rows))

    def stages(self, tile_bytes: int, rows: int | None = None) -> tuple[int, int]:
        """The same while its logits are made, which rows of the unembedding are read for, and while they are looked at."""
        tile = min(rows or self._rows_at_once(), self.lens.tile_rows(len(self.passes), tile_bytes))
        if tile not in self._tiles:
            self._tiles[tile] = self._lens(tile, tile_bytes)
        return self._tiles[tile]

    def kept(self, tile_bytes: int) -> tuple[int, int]:
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
        of_one = space_bytes(slots, slots - 1, searches, n_vocab, v.n, rows=rows, at_once=min(rows, self.lens.at_once))
        return of_one * (min(tile, torch.get_num_threads()) if v.group.size == 1 else 1)

    def _rows_at_once(self) -> int:
        """Rows that may share a tile of the lens."""
        return sum(b.ids_BT.numel() for b in self.batches if not b.probe) * self.lens.layers_at_once

    def waiting(self, tile_bytes: int) -> tuple[int, int]:
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
        # as they wait, and those chosen of them
        normed = tile * self.hidden * 2 * len(heads) * self.dtype.itemsize
        models, sampled, exact = [p.model for p in self.passes], 0, False
        # Both unembeddings may turn out to be one, and then all rows go through one product.
        either = [heads] if self.pair.owners[0] not in heads else [heads, len(heads) * self.pair.owners[:1]]
        ways = [partial(tile_logits, self.pair, states, of) for of in either]
        try:
            if can_shift_without_data(self.pair, heads):
                for of in either:
                    led = partial(led_logits, self.pair, states, of, leads_of(of, models))
                    ways += [led, partial(led, shifted=True)]
                exact = True
                with torch.no_grad(), Live(META) as glance:
                    some = sampled_logits(self.pair, states, heads)
                    sampled = max(glance.peak, glance.live + 3 * tile * 4 * some[0].shape[1])
                    del some
            made = [self._made(way) for way in ways]
        except Exception as error:
            log.info("the lens is planned by formula, it cannot run without data: %s", str(error)[:200])
            return by_formula, by_formula
        lists = self._lists() * (2 * self.walk.batch_tokens + (self.walk.tokens if self.lens.final_norm else 0))
        rows_kept = SAMPLES * SAMPLE * len(self.pair.unique()) if self.lens.n_vocab > SMALL_VOCABULARY else 0
        samples = rows_kept * self.hidden * self.dtype.itemsize
        beside_work = normed + samples + lists
        logits_kept, space = self.kept(tile_bytes)
        peak, kept = (max(both) for both in zip(*made, strict=True))
        if logits_kept and any(map(head_copies, self.pair.unique())):
            kept += logits_kept
        statistics = max(self.statistics(tile, exact=way) for way in {False, exact})
        return beside_work + space + max(peak, logits_kept + sampled), beside_work + kept + statistics

    def _made(self, way: Callable[[], Logits]) -> tuple[int, int]:
        """Bytes while the logits of a tile are made, at most, and of what they then are."""
        with torch.no_grad(), Live(META) as products:
            logits = way()
            found = products.peak, products.live
            del logits
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
        # of these the exact way takes half
        at_once = self.lens.at_once if on_cpu else 2 * SAMPLE_ROWS if exact else None
        fused = self.lens.fused is not None and not exact and heads <= FUSED_SLOTS

        def of(sample: int) -> Sequence[int]:
            return _of_statistics(sample, heads, self.n_pairs, self.lens.n_vocab, v.n, v.k, at_once, exact, fused)

        if (
            not on_cpu
        ):  # a row takes as much, however many there are; behind the kernels, rows go the plain way in pieces
            sample = PLAIN_PIECES if fused else SAMPLE_ROWS
            most = -(-max(of(sample)) // sample) * rows
        elif rows <= SAMPLE_STEPS * self.lens.at_once:
            most = max(of(rows))
        else:  # each more takes as much as the one before
            step = self.lens.at_once
            of_few, of_fewer = of(SAMPLE_STEPS * step), of((SAMPLE_STEPS - 1) * step)
            more = rows - SAMPLE_STEPS * step
            most = max(few - (fewer - few) * more // step for few, fewer in zip(of_few, of_fewer, strict=True))
        threads = min(tile, torch.get_num_threads()) if on_cpu else 1
        return most * threads + self._found(tile)

    def _found(self, tile: int) -> int:
        """Results of a tile, while its last rows are worked on; on a device once more, put together to be copied."""
        n_slots, lists = len(self.passes), len(self.passes) + 2 * self.n_pairs
        of_row = lists * self.lens.vocabulary.k * (8 + 4) + 64 * (n_slots + self.n_pairs)
        return tile * of_row * (1 if self.device.type == "cpu" else 2)

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
    for spread, summed in itertools.product((1e-3, 300.0), (False,) if fused else (False, True)):
        generator = torch.Generator().manual_seed(0)
        first = torch.randn(rows, n_vocab, generator=generator)
        tensors = [first, *(first.roll(1 + s, 1).mul_(spread) for s in range(1, n_slots))]
        if summed:
            logits = Logits(tensors, [(1,), *((1, 1 + s) for s in range(1, n_slots))])
        else:
            logits = separate([first, *(x.add_(first) for x in tensors[1:])])
        with Live(torch.device("cpu")) as live:
            lens_tile(
                logits, pairs, torch.zeros(rows, dtype=torch.long), nothing, Vocabulary(listed, k),
                rows=rows, at_once=at_once, exact=exact, fused=_AsFused() if fused else None,
            )  # fmt: skip
        most.append(live.peak)
    return most


class _AsFused:
    """Takes the memory that the kernels of a device take; what they would find is made by plain operations, which are not counted."""

    def takes(self, logits: Logits) -> bool:
        return True

    def one_pass(self, logits: Logits, shifts: Pairs, listed: int, group: Group) -> OnePass:
        rows, size = logits.tensors[0].shape
        with _disable_current_modes():
            plain = one_pass(logits, shifts, listed, group, at_once=rows, space=Space())
        beside = torch.empty(rows * fused_bytes(logits.n_slots, size), dtype=torch.uint8)
        found = OnePass(plain.maxima_NRB.clone(), plain.largest_SR.clone(), plain.sums)
        del beside
        return found
