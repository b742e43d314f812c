"""Turn the walk's states into table columns: residual statistics of every cell, lens statistics of the chosen layers.

Shapes: P passes, C comparisons, N tokens of the whole capture (prompt after prompt), L+2 layers, K top-k.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capture import statistics
from capture.batches import Batch
from capture.checkpoint import free_memory
from capture.config import Comparison, Owner, Pass
from capture.ledger import is_out_of_memory
from capture.lens import PairStats, SlotStats, join, lens_tile
from capture.lens_plan import LensPlan
from capture.lockstep import Pair, State
from capture.logits import Logits, PlainLogits, can_shift, shifted_logits, tile_logits
from capture.replay import run_tail
from capture.spectrum import Spectra

log = logging.getLogger(__name__)

LensSlot = tuple[int, Owner | None, Owner]  # state, whose final norm (None: as it is), whose unembedding
SMALL_KL = 1e-4  # nats: below this, differences of float32 logits may cost a KL its third digit


class Collector:
    """Takes states, keeps columns. `topk[layer]` holds the lists of one layer until the store takes them."""

    def __init__(
        self, pair: Pair, batches: Sequence[Batch], lengths: Sequence[int], ids: Sequence[Sequence[int]],
        passes: Sequence[Pass], comparisons: Sequence[Comparison], lens: LensPlan, spectra: Spectra | None = None,
        layers: frozenset[int] | None = None, stage: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """layers: whose statistics are wanted; None is all. stage: told "lens" and "layers" when one of them begins."""
        self.pair, self.batches, self.lens, self.spectra = pair, batches, lens, spectra
        self.last_batch = max(i for i, b in enumerate(batches) if not b.probe)
        self.passes, self.comparisons = list(passes), list(comparisons)
        self.layers = frozenset(range(-1, pair.n_layers + 1)) if layers is None else layers
        self.stage = stage
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        # where the rows of each batch stand among the N tokens of the capture
        self.where = [np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in b.items]) for b in batches]
        flat = [[*list(one[1:]), -1] for one in ids]
        self.next_ids = [torch.tensor([t for i in b.items for t in flat[i]]) for b in batches]
        self.n = int(offsets[-1])
        shape = (pair.n_layers + 2, self.n)
        runs = ("norm", "norm_delta", "cosine_distance_prev", "entropy", "next_token_logprob")
        pairs = ("cosine_distance", "norm_diff", "kl_divergence", "kl_reverse", "top1_agree")
        self.runs = {m: np.full((len(passes), *shape), np.nan, np.float32) for m in runs}
        self.pairwise = {m: np.full((len(comparisons), *shape), np.nan, np.float32) for m in pairs}
        self.tracked = np.full((len(passes), *shape, len(lens.tracked)), np.nan, np.float32)
        self.topk: dict[int, dict[tuple[str, str], tuple[Any, Any]]] = {}
        self.nonfinite = 0
        self.left_out_mass = {"base": 0.0, "sft": 0.0}
        self.noise: dict[str, dict[str, list[float]]] = {}
        self._last_lens: dict[int, tuple[list[SlotStats], dict[tuple[int, int], PairStats], dict[str, int]]] = {}
        self._probed: list[Tensor] | None = None

    def topk_bytes(self) -> int:
        """Bytes of the top-k lists that wait to be written."""
        return sum(ids.nbytes + values.nbytes for lists in self.topk.values() for ids, values in lists.values())

    # -- spans ---------------------------------------------------------------------------------------------------------

    def columns(self, first: int, last: int) -> dict[str, Any]:
        """What was collected of layers first..last: "table/column" -> [P or C, layers, N(, ...)]; lists by layer."""
        layers = slice(first + 1, last + 2)
        found = {f"runs/{name}": array[:, layers] for name, array in self.runs.items()}
        found |= {f"pairwise/{name}": array[:, layers] for name, array in self.pairwise.items()}
        found["tracked/logits"] = self.tracked[:, layers]
        if self.spectra is not None:
            found |= {f"spectrum/{name}": array[:, layers] for name, array in self.spectra.arrays.items()}
        for layer, lists in self.topk.items():
            for (table, name), (ids, values) in lists.items():
                found |= {f"topk/{layer}/{table}/{name}/ids": ids, f"topk/{layer}/{table}/{name}/values": values}
        return found

    def restore(self, first: int, last: int, columns: dict[str, Any]) -> None:
        """Put the scalar columns of layers first..last back; top-k lists are `restore_lists`."""
        layers = slice(first + 1, last + 2)
        for key, array in columns.items():
            table, _, name = key.partition("/")
            if table == "spectrum" and self.spectra is not None:
                self.spectra.arrays[name][:, layers] = array
            elif table != "topk":
                whole = self.tracked if table == "tracked" else getattr(self, table)[name]
                whole[:, layers] = array

    def restore_lists(self, columns: dict[str, Any]) -> None:
        """Put the top-k lists of a span back, for the store to write."""
        for key, ids in columns.items():
            if key.startswith("topk/") and key.endswith("/ids"):
                _, layer, table, name, _ = key.split("/")
                self.topk.setdefault(int(layer), {})[(table, name)] = (ids, columns[key.removesuffix("ids") + "values"])

    def found(self) -> dict[str, Any]:
        """What the walk found out besides columns, as JSON values."""
        return {"nonfinite": self.nonfinite, "left_out_mass": self.left_out_mass, "noise": self.noise}

    def restore_found(self, found: dict[str, Any]) -> None:
        self.nonfinite, self.left_out_mass, self.noise = found["nonfinite"], found["left_out_mass"], found["noise"]

    # -- one state -----------------------------------------------------------------------------------------------------

    def take(self, state: State) -> None:
        """Compute and keep everything about one batch at one layer."""
        batch = self.batches[state.batch]
        rows = [batch.rows(s) for s in state.slots]
        if batch.probe:
            self._noise(state, rows)
            return
        self._keep_probed(state)
        if state.layer not in self.layers:
            return
        at = (state.layer + 1, self.where[state.batch])
        self._residuals(state, batch, rows, at)
        if self.spectra is not None:
            self.spectra.take(state.layer, rows, state.slot_of, at[1], last=state.batch == self.last_batch)
        if state.layer in self.lens.layers:
            self.stage("lens")
            self._lens(state, rows, at)
            self.stage("layers")

    def _residuals(self, state: State, batch: Batch, rows: list[Tensor], at: tuple[int, Any]) -> None:
        norms = [_numpy(statistics.norm(r)) for r in rows]
        previous = None if state.previous is None else [batch.rows(s) for s in state.previous]
        turned: dict[tuple[int, int], Any] = {}
        for p, one in enumerate(self.passes):
            slot = state.slot_of[one.name]
            self.runs["norm"][p][at] = norms[slot]
            if previous is None:
                continue
            key = (state.previous_slot_of[one.name], slot)
            if key not in turned:
                a, b = previous[key[0]], rows[slot]
                turned[key] = (
                    _numpy(statistics.norm(b) - statistics.norm(a)),
                    _numpy(statistics.cosine_distance(a, b)),
                )
            self.runs["norm_delta"][p][at], self.runs["cosine_distance_prev"][p][at] = turned[key]
        found: dict[tuple[int, int], Any] = {}
        for c, comparison in enumerate(self.comparisons):
            key = (state.slot_of[comparison.base_run], state.slot_of[comparison.sft_run])
            if key not in found:
                a, b = rows[key[0]], rows[key[1]]
                same = key[0] == key[1]
                found[key] = (
                    (0.0, 0.0) if same
                    else (_numpy(statistics.cosine_distance(a, b)), _numpy(statistics.norm_of_difference(a, b)))
                )  # fmt: skip
            self.pairwise["cosine_distance"][c][at], self.pairwise["norm_diff"][c][at] = found[key]

    # -- the lens ------------------------------------------------------------------------------------------------------

    def _lens_slots(self, state: State) -> tuple[list[LensSlot], dict[str, int]]:
        """Distinct (slot, whose norm, whose head) of the passes, and each pass's index among them."""
        keys: dict[str, LensSlot] = {}
        for p in self.passes:
            norm: Owner | None = None
            if self.lens.final_norm and state.layer < self.pair.n_layers:
                norm = self.pair.owners[0] if self.pair.same_tail else p.model
            head: Owner = "base" if self.pair.same_head else p.unembedding
            keys[p.name] = (state.slot_of[p.name], norm, head)
        order = list(dict.fromkeys(keys.values()))
        return order, {name: order.index(key) for name, key in keys.items()}

    def _lens(self, state: State, rows: list[Tensor], at: tuple[int, Any]) -> None:
        order, slot_of = self._lens_slots(state)
        is_last = state.layer == self.pair.n_layers
        if is_last and self.lens.final_norm and state.batch in self._last_lens:
            self._store_lens(*self._last_lens.pop(state.batch), state, at)  # norm + head of layer L-1 is layer L's lens
            return
        pairs = {(slot_of[c.base_run], slot_of[c.sft_run]) for c in self.comparisons}
        wanted = sorted(p for p in pairs if p[0] != p[1])
        parts: list[tuple[list[SlotStats], dict[tuple[int, int], PairStats]]] = []
        heads = [head for _, _, head in order]
        can_refine = bool(wanted) and can_shift(self.pair, heads)
        following = self.next_ids[state.batch].to(rows[0].device)
        tracked = torch.tensor(self.lens.tracked, dtype=torch.long, device=rows[0].device)

        def tile(part: slice) -> tuple[list[SlotStats], dict[tuple[int, int], PairStats]]:
            some = [rows[slot][part] for slot, _, _ in order]
            some = [run_tail(self.pair.tails[k[1]], r) if k[1] else r for k, r in zip(order, some, strict=True)]
            found = lens_tile(
                self._logits(some, heads),
                wanted,
                following[part],
                tracked,
                self.lens.vocabulary,
                rows=self.lens.statistics_rows(),
            )
            if can_refine:
                self._refine(found[1], some, heads, following[part], tracked)
            return found

        start, n_rows = 0, rows[0].shape[0]
        while start < n_rows:
            part = slice(start, min(n_rows, start + self.lens.tile_rows(len(order))))
            if (one := self._or_smaller(tile, part, len(order))) is not None:
                parts.append(one)
                start = part.stop
        slots = [join([p[0][s] for p in parts]) for s in range(len(order))]
        compared = {key: join([p[1][key] for p in parts]) for key in wanted}
        self.nonfinite += sum(int((~torch.isfinite(s.logsumexp)).sum()) for s in slots)
        if self.lens.final_norm and state.layer == self.pair.n_layers - 1:
            self._last_lens[state.batch] = (slots, compared, slot_of)
        self._store_lens(slots, compared, slot_of, state, at)

    def _or_smaller(self, tile: Callable[[slice], Any], part: slice, n_slots: int) -> Any:
        """A tile; or None where memory ran out: all tiles have half as many rows from now on.

        Ranks of a group cannot do this: they reduce over the vocabulary together, tile by tile.
        """
        try:
            return tile(part)
        except RuntimeError as error:
            rows = part.stop - part.start
            if not is_out_of_memory(error) or rows == 1 or self.lens.vocabulary.group.size > 1:
                raise
            why = str(error).splitlines()[0]
        free_memory()  # outside of the handler: the traceback holds what the tile had made
        log.warning("lens: %s; going on with tiles of %d rows instead of %d", why, rows // 2, rows)
        self.lens.tile_bytes = rows // 2 * n_slots * self.lens.n_vocab * 4
        return None

    def _refine(
        self, found: dict[tuple[int, int], PairStats], rows: list[Tensor], heads: list[Owner], following: Tensor,
        tracked: Tensor,
    ) -> None:  # fmt: skip
        """Compute the comparisons of rows with a small KL again, from shifts that are products of their own."""
        small = torch.stack([(s.kl_ba < SMALL_KL) | (s.kl_ab < SMALL_KL) for s in found.values()]).any(0)
        finite = torch.stack([r.isfinite().all(1) for r in rows]).all(
            0
        )  # else one slot's overflow would take all others
        where = (small & finite).nonzero().flatten()
        if not len(where):
            return
        pairs = list(found)
        for some in where.split(self.lens.refine_rows(rows[0].shape[0], len(rows))):
            logits = shifted_logits(self.pair, [r[some] for r in rows], heads)
            _, better = lens_tile(
                logits, pairs, following[some], tracked, self.lens.vocabulary,
                rows=self.lens.statistics_rows(exact=True), exact=True,
            )  # fmt: skip
            for key in pairs:
                found[key].put(some, better[key])

    def _logits(self, rows: list[Tensor], heads: list[Owner]) -> Logits:
        """Logits of each slot's rows, over the rows that both vocabularies have."""
        logits = tile_logits(self.pair, rows, heads)
        if (
            all(self.pair.models[o].head_shard()[1].shape[0] == self.lens.n_vocab for o in heads)
            or self.pair.same_scaling
        ):
            return logits
        common = []
        for s, owner in enumerate(heads):
            x = logits.slot(s, slice(None))
            if x.shape[1] > self.lens.n_vocab:
                mass = (x[:, self.lens.n_vocab :].logsumexp(1) - x.logsumexp(1)).exp().max()
                self.left_out_mass[owner] = max(self.left_out_mass[owner], float(mass))
            common.append(x[:, : self.lens.n_vocab])
        return PlainLogits(common)

    def _store_lens(
        self, slots: list[SlotStats], compared: dict[tuple[int, int], PairStats], slot_of: dict[str, int],
        state: State, at: tuple[int, Any],
    ) -> None:  # fmt: skip
        for p, one in enumerate(self.passes):
            stats = slots[slot_of[one.name]]
            self.runs["entropy"][p][at] = _numpy(stats.entropy)
            self.runs["next_token_logprob"][p][at] = _numpy(stats.next_logprob)
            self.tracked[p][at] = _numpy(stats.tracked)
            self._list("runs", state.layer, p, at[1], "", stats.top)
        for c, comparison in enumerate(self.comparisons):
            key = (slot_of[comparison.base_run], slot_of[comparison.sft_run])
            a, b = slots[key[0]], slots[key[1]]
            agree = (a.top.ids[:, 0] == b.top.ids[:, 0]).double()
            known = a.logsumexp.isfinite() & b.logsumexp.isfinite()
            self.pairwise["top1_agree"][c][at] = _numpy(agree.where(known, torch.nan))
            if key[0] == key[1]:
                self.pairwise["kl_divergence"][c][at] = self.pairwise["kl_reverse"][c][at] = 0.0
                self._list("pairwise", state.layer, c, at[1], "increased", None)
                self._list("pairwise", state.layer, c, at[1], "decreased", None)
                continue
            both = compared[key]
            self.pairwise["kl_divergence"][c][at] = _numpy(both.kl_ba)
            self.pairwise["kl_reverse"][c][at] = _numpy(both.kl_ab)
            self._list("pairwise", state.layer, c, at[1], "increased", both.increased)
            self._list("pairwise", state.layer, c, at[1], "decreased", both.decreased)

    def _list(self, table: str, layer: int, index: int, where: Any, name: str, top: Any) -> None:
        """Keep one top-k list; None is that of two equal slots: no shift anywhere, so the smallest ids."""
        if not self.lens.keep_topk:
            return
        k = self.lens.vocabulary.k
        arrays = self.topk.setdefault(layer, {})
        key = (table, name)
        if key not in arrays:
            count = len(self.passes) if table == "runs" else len(self.comparisons)
            arrays[key] = (np.zeros((count, self.n, k), np.int32), np.zeros((count, self.n, k), np.float32))
        ids, values = arrays[key]
        if top is None:
            ids[index][where] = np.arange(k, dtype=np.int32)
            values[index][where] = 0.0
        else:
            ids[index][where] = top.ids.cpu().numpy()
            values[index][where] = top.values.cpu().numpy()

    # -- noise floor ---------------------------------------------------------------------------------------------------

    def _keep_probed(self, state: State) -> None:
        """Remember the states, in its batch, of the prompt that the probe runs alone."""
        probe = self.batches[-1]
        batch = self.batches[state.batch]
        if probe.probe and probe.items[0] in batch.items:
            row = batch.items.index(probe.items[0])
            keep = slice(None) if batch.keep_BT is None else batch.keep_BT[row]
            self._probed = [s[row][keep].clone() for s in state.slots]  # a view would keep the whole batch

    def _noise(self, state: State, rows: list[Tensor]) -> None:
        assert self._probed is not None
        for p in self.passes:
            alone, batched = rows[state.slot_of[p.name]], self._probed[state.slot_of[p.name]]
            difference = statistics.norm_of_difference(batched, alone)
            found = {
                "norm_diff": float(difference.max()),
                "norm_diff_relative": float((difference / statistics.norm(batched).clamp(min=1e-300)).max()),
                "cosine_distance": float(statistics.cosine_distance(batched, alone).max()),
            }
            for name, value in found.items():
                self.noise.setdefault(p.name, {}).setdefault(name, []).append(value)


def _numpy(x: Tensor) -> Any:
    return x.cpu().numpy()
