"""Turn the walk's states into table columns: residual statistics of every cell, lens statistics of the chosen layers.

Shapes: P passes, C comparisons, N tokens of the whole capture (prompt after prompt), L+2 layers, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capture import statistics
from capture.batches import Batch
from capture.config import Comparison, Owner, Pass
from capture.download import download_from
from capture.lens import Statistics, statistics_of, tensors_of
from capture.lens_plan import LensPlan
from capture.lens_queue import Kind, LensQueue, Waiting
from capture.lockstep import Pair, State
from capture.logits import leads_of
from capture.replay import run_tail
from capture.residual_queue import ResidualQueue
from capture.spectrum import Spectra
from capture.topk import TopK

NOISE = ("norm_diff", "norm_diff_relative", "cosine_distance")
LensSlot = tuple[int, Owner | None, Owner]  # state, whose final norm (None: as it is), whose unembedding


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
        self.columns_of = [_run(where) for where in self.where]
        flat = [[*list(one[1:]), -1] for one in ids]
        device = pair.models["base"].device
        self.next_ids = [torch.tensor([t for i in b.items for t in flat[i]], device=device) for b in batches]
        self.n = int(offsets[-1])
        shape = (pair.n_layers + 2, self.n)
        runs = ("norm", "norm_delta", "cosine_distance_prev", "entropy", "next_token_logprob")
        pairs = ("cosine_distance", "norm_diff", "kl_divergence", "kl_reverse", "top1_agree")
        self.runs = {m: np.full((len(passes), *shape), np.nan, np.float32) for m in runs}
        self.pairwise = {m: np.full((len(comparisons), *shape), np.nan, np.float32) for m in pairs}
        self.tracked = np.full((len(passes), *shape, len(lens.tracked)), np.nan, np.float32)
        self.topk: dict[int, dict[tuple[str, str], tuple[Any, Any]]] = {}
        self.nonfinite = 0
        self.download = download_from(device)
        tracked = torch.tensor(lens.tracked, dtype=torch.long, device=device)
        self.queue = LensQueue(pair, lens, tracked, self._found)
        self.residuals = ResidualQueue(passes, comparisons, self.runs, self.pairwise, self.download, lens.kernel)
        self.noise: dict[str, dict[str, list[float]]] = {}
        self._probed: list[Tensor] | None = None

    def topk_bytes(self) -> int:
        """Bytes of the top-k lists that wait to be written."""
        return sum(ids.nbytes + values.nbytes for lists in self.topk.values() for ids, values in lists.values())

    def forget_lists(self) -> None:
        """The lists collected so far are in a span."""
        self.download.settle()
        self.topk.clear()

    # -- spans ---------------------------------------------------------------------------------------------------------

    def columns(self, first: int, last: int) -> dict[str, Any]:
        """What was collected of layers first..last: "table/column" -> [P or C, layers, N(, ...)]; lists by layer."""
        self.residuals.flush()
        self.download.settle()
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
        """Put the scalar columns of layers first..last back; top-k lists are `restore_lists`. Raises ValueError where they are not
        all that `columns` gives of these layers, lists included, or not of its shapes and dtypes."""
        wanted, found = self._kinds(first, last), {n: (a.shape, a.dtype) for n, a in columns.items()}
        if odd := sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n)):
            raise ValueError(f"{odd[0]}: {found.get(odd[0])} instead of {wanted.get(odd[0])}")
        for name, ids in columns.items():
            if name.endswith("/ids") and not 0 <= ids.min(initial=0) <= ids.max(initial=0) < self.lens.n_tokens:
                raise ValueError(f"{name}: tokens beyond the {self.lens.n_tokens} that there are")
        layers = slice(first + 1, last + 2)
        for key, array in columns.items():
            table, _, name = key.partition("/")
            if table == "spectrum" and self.spectra is not None:
                self.spectra.arrays[name][:, layers] = array
            elif table != "topk":
                whole = self.tracked if table == "tracked" else getattr(self, table)[name]
                whole[:, layers] = array

    def _kinds(self, first: int, last: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of each of `columns`, once the lens is through with layers first..last, none of which is the last."""
        found = {n: (a.shape, a.dtype) for n, a in self.columns(first, last).items() if not n.startswith("topk/")}
        lists = (
            ("runs", "", self.passes),
            ("pairwise", "increased", self.comparisons),
            ("pairwise", "decreased", self.comparisons),
        )
        for layer in self.lens.layers & frozenset(range(first, last + 1)) if self.lens.keep_topk else ():
            for table, name, of in lists:
                if of:
                    shape, at = (len(of), self.n, self.lens.vocabulary.k), f"topk/{layer}/{table}/{name}"
                    found |= {f"{at}/ids": (shape, np.dtype(np.int32)), f"{at}/values": (shape, np.dtype(np.float32))}
        return found

    def restore_lists(self, columns: dict[str, Any]) -> None:
        """Put the top-k lists of a span back, for the store to write."""
        for key, ids in columns.items():
            if key.startswith("topk/") and key.endswith("/ids"):
                _, layer, table, name, _ = key.split("/")
                self.topk.setdefault(int(layer), {})[(table, name)] = (ids, columns[key.removesuffix("ids") + "values"])

    def found(self) -> dict[str, Any]:
        """What the walk found out besides columns, as JSON values."""
        self.download.settle()
        return {"nonfinite": self.nonfinite, "left_out_mass": self.queue.left_out_mass, "noise": self.noise}

    def restore_found(self, found: dict[str, Any], last: int) -> None:
        """Put back what was found out up to layer `last`. Raises ValueError where it is of another walk."""
        nonfinite, mass, noise = found["nonfinite"], found["left_out_mass"], found["noise"]
        passes = [p.name for p in self.passes] if self.batches[-1].probe else []
        floats = [float] * (last + 2)  # one of each layer
        kinds = {p: {name: list(map(type, values)) for name, values in by_name.items()} for p, by_name in noise.items()}
        fits = kinds == {p: dict.fromkeys(NOISE, floats) for p in passes} and type(nonfinite) is int
        if not fits or {owner: type(value) for owner, value in mass.items()} != {"base": float, "sft": float}:
            raise ValueError("what another walk had found out")
        self.nonfinite, self.noise, self.queue.left_out_mass = nonfinite, noise, mass

    # -- one state -----------------------------------------------------------------------------------------------------

    def take(self, state: State) -> None:
        """Compute and keep everything about one batch at one layer."""
        batch = self.batches[state.batch]
        if batch.probe:
            self._noise(state, [batch.rows(s) for s in state.slots])
            return
        self._keep_probed(state)
        if state.layer in self.layers:
            self._measure(state, batch)
        ends = state.batch == self.last_batch and self.lens.ends_group(state.layer, self.pair.n_layers)
        if ends and len(self.queue):
            self.stage("lens")
            self.queue.flush()
            self.stage("layers")

    def finish(self) -> None:
        """Work off all that waits; what was collected is then to be read."""
        self.queue.flush()
        self.residuals.flush()
        self.download.settle()

    def _measure(self, state: State, batch: Batch) -> None:
        self.residuals.put(state, batch, self.columns_of[state.batch])
        if self.spectra is None and state.layer not in self.lens.layers:
            return
        rows = [batch.rows(s) for s in state.slots]
        if self.spectra is not None:
            where = self.where[state.batch]
            self.spectra.take(state.layer, rows, state.slot_of, where, last=state.batch == self.last_batch)
        if state.layer in self.lens.layers:
            self.stage("lens")
            self._lens(state, rows)
            self.stage("layers")

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

    def _models(self, order: Sequence[LensSlot], slot_of: dict[str, int]) -> list[Owner]:
        """Whose blocks each lens slot went through; of two passes' the first one's."""
        return [next(p.model for p in self.passes if slot_of[p.name] == i) for i in range(len(order))]

    def _lens(self, state: State, rows: list[Tensor]) -> None:
        """Let the rows of one batch at one layer wait for their lens."""
        n_layers = self.pair.n_layers
        follows = self.lens.final_norm and n_layers - 1 in self.lens.layers
        if not (
            follows and state.layer == n_layers
        ):  # norm + head of layer L-1 is layer L's lens: `_store` keeps it twice
            order, slot_of = self._lens_slots(state)
            pairs = {(slot_of[c.base_run], slot_of[c.sft_run]) for c in self.comparisons}
            heads = tuple(head for _, _, head in order)
            kind = Kind(
                heads,
                leads_of(heads, self._models(order, slot_of)),
                tuple(sorted(p for p in pairs if p[0] != p[1])),
                tuple(slot_of.items()),
            )
            where = self.where[state.batch]
            states = [run_tail(self.pair.tails[norm], rows[s]) if norm else rows[s] for s, norm, _ in order]
            dtype = self.pair.models["base"].model.dtype
            states = [s.to(dtype) for s in states]  # what a head is given: Mamba's layers go on in float32
            self.queue.put(Waiting(kind, states, self.next_ids[state.batch], np.full(len(where), state.layer), where))

    def _found(self, rows: Waiting, found: Statistics) -> None:
        """The statistics of one tile, made."""
        of = replace(rows, states=())
        tensors = tensors_of(found)
        shells = statistics_of(found, len(tensors) * [torch.empty(0)])
        self.download.put(tensors, lambda here: self._store(of, statistics_of(shells, here)))

    def _store(self, rows: Waiting, found: Statistics) -> None:
        """Put the statistics of one tile into the columns."""
        # a logit of -inf, of a head that masks an id, leaves the sum finite and takes the entropy
        self.nonfinite += sum(int((~(s.logsumexp.isfinite() & s.entropy.isfinite())).sum()) for s in found[0])
        self._put(rows, found, slice(None), rows.layer)
        last = rows.layer == self.pair.n_layers - 1
        if self.lens.final_norm and last.any() and self.pair.n_layers in self.lens.layers:
            self._put(rows, found, np.flatnonzero(last), rows.layer[last] + 1)

    def _put(self, rows: Waiting, found: Statistics, some: Any, layer: np.ndarray) -> None:
        """The statistics of some of a tile's rows, as those of the given layers [R]."""
        slots, compared = found
        slot_of = dict(rows.kind.slot_of)
        at = (layer + 1, rows.where[some])
        for p, one in enumerate(self.passes):
            stats = slots[slot_of[one.name]]
            self.runs["entropy"][p][at] = stats.entropy.numpy()[some]
            self.runs["next_token_logprob"][p][at] = stats.next_logprob.numpy()[some]
            self.tracked[p][at] = stats.tracked.numpy()[some]
            self._list("runs", "", p, at, stats.top, some)
        for c, comparison in enumerate(self.comparisons):
            key = (slot_of[comparison.base_run], slot_of[comparison.sft_run])
            a, b = slots[key[0]], slots[key[1]]
            agree = (a.top.ids[:, 0] == b.top.ids[:, 0]).double()
            known = a.logsumexp.isfinite() & b.logsumexp.isfinite()
            self.pairwise["top1_agree"][c][at] = agree.where(known, torch.nan).numpy()[some]
            if key[0] == key[1]:
                self.pairwise["kl_divergence"][c][at] = self.pairwise["kl_reverse"][c][at] = 0.0
                self._list("pairwise", "increased", c, at, None, some)
                self._list("pairwise", "decreased", c, at, None, some)
                continue
            both = compared[key]
            self.pairwise["kl_divergence"][c][at] = both.kl_ba.numpy()[some]
            self.pairwise["kl_reverse"][c][at] = both.kl_ab.numpy()[some]
            self._list("pairwise", "increased", c, at, both.increased, some)
            self._list("pairwise", "decreased", c, at, both.decreased, some)

    def _list(self, table: str, name: str, index: int, at: Any, top: TopK | None, some: Any) -> None:
        """Keep one top-k list; None is that of two equal slots: no shift anywhere, so the smallest ids."""
        if not self.lens.keep_topk:
            return
        k = self.lens.vocabulary.k
        layers, where = at
        for column in np.unique(layers):
            mine = layers == column
            arrays = self.topk.setdefault(int(column) - 1, {})
            if (table, name) not in arrays:
                count = len(self.passes) if table == "runs" else len(self.comparisons)
                arrays[table, name] = (np.zeros((count, self.n, k), np.int32), np.zeros((count, self.n, k), np.float32))
            ids, values = arrays[table, name]
            if top is None:
                ids[index][where[mine]] = np.arange(k, dtype=np.int32)
                values[index][where[mine]] = 0.0
            else:
                ids[index][where[mine]] = top.ids.numpy()[some][mine]
                values[index][where[mine]] = top.values.numpy()[some][mine]

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
            relative = difference / statistics.norm(batched).clamp(min=1e-300)
            turned = statistics.cosine_distance(batched, alone)
            self.download.put([x.max() for x in (difference, relative, turned)], partial(self._keep_noise, p.name))

    def _keep_noise(self, name: str, largest: Sequence[Tensor]) -> None:
        for measure, value in zip(NOISE, largest, strict=True):
            self.noise.setdefault(name, {}).setdefault(measure, []).append(float(value))


def _run(indices: np.ndarray) -> Any:
    """Indices that follow each other as a slice, which numpy writes to in a fraction of the time; others as they are."""
    first, n = int(indices[0]), len(indices)
    return slice(first, first + n) if (indices == np.arange(first, first + n)).all() else indices
