"""Columns of the tables from a collector's arrays, in chunks of about ROW_GROUP rows, rows sorted by the schema's keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from capture.collector import Collector
from capture.prompts import Prompt
from capture.spectrum import Spectra
from capture.store import ROW_GROUP, category

Columns = dict[str, Any]


class Rows:
    """Which rows a capture has: its prompts' order and offsets, and the names of its passes and comparisons."""

    def __init__(
        self, pair: str, capture: str, items: Sequence[Prompt], collector: Collector, *, rounded: bool = False
    ) -> None:
        """rounded: values of top-k lists to float16's significant bits."""
        self.rounded = rounded
        self.pair, self.capture, self.items, self.collector = pair, capture, items, collector
        self.variants = list(dict.fromkeys(i.variant for i in items))
        self.offsets = np.concatenate([[0], np.cumsum([len(i.ids) for i in items])])
        self.runs = [p.name for p in collector.passes]
        self.listed: set[int] = set()  # ids of all top-k lists made so far

    def prompts(self) -> Iterator[Columns]:
        items = self.items
        yield {
            **self._prompt_keys(np.arange(len(items))),
            "text": np.array([i.text for i in items], object),
            "n_tokens": np.array([len(i.ids) for i in items], np.int32),
            "n_tokens_before_trimming": np.array([i.n_tokens_before_trimming for i in items], np.int32),
        }

    def tokens(self, text_of: dict[int, str], special: set[int]) -> Iterator[Columns]:
        """text_of: token id -> decoded text; special: ids of special tokens."""
        item = np.repeat(np.arange(len(self.items)), np.diff(self.offsets))
        ids = np.concatenate([np.array(i.ids, np.int32) for i in self.items])
        yield {
            **self._prompt_keys(item),
            "position": (np.arange(len(ids)) - self.offsets[item]).astype(np.int32),
            "token_id": ids,
            "token": np.array([text_of[i] for i in ids.tolist()], object),
            "is_special": np.array([i in special for i in ids.tolist()]),
        }

    def vocabulary(self, text_of: dict[int, str]) -> Iterator[Columns]:
        """text_of: token id -> decoded text."""
        ids = sorted(text_of)
        yield {
            "pair": category(np.zeros(len(ids)), [self.pair]),
            "capture": category(np.zeros(len(ids)), [self.capture]),
            "token_id": np.array(ids, np.int32),
            "token": np.array([text_of[i] for i in ids], object),
        }

    def tracked_tokens(self, tracked: Sequence[tuple[int, str, str]]) -> Iterator[Columns]:
        n = len(tracked)
        yield {
            "pair": category(np.zeros(n), [self.pair]),
            "capture": category(np.zeros(n), [self.capture]),
            "slot": np.arange(n, dtype=np.int16),
            "token_id": np.array([t[0] for t in tracked], np.int32),
            "token": np.array([t[1] for t in tracked], object),
            "label": np.array([t[2] for t in tracked], object),
        }

    def scalars(self, table: str) -> Iterator[Columns]:
        """Rows of `runs` or `pairwise`, of all layers whose statistics were wanted."""
        source: dict[str, Any] = dict(self.collector.runs if table == "runs" else self.collector.pairwise)
        if table == "runs":
            source["tracked_logits"] = self.collector.tracked
        layers = sorted(self.collector.layers)
        stacks = {name: _LayerStack([array[:, x + 1] for x in layers]) for name, array in source.items()}
        for keys, pick in self._cells(table, np.array(layers)):
            yield keys | {name: pick(stack) for name, stack in stacks.items()}

    def lists(self, table: str, layers: Sequence[int]) -> Iterator[Columns]:
        """Rows of `runs_topk` or `pairwise_topk`, of some layers that the lens read."""
        kind = table.removesuffix("_topk")
        names = {"runs": {"": ("ids", "logits")}, "pairwise": {
            "increased": ("increased_ids", "increased"), "decreased": ("decreased_ids", "decreased")}}[kind]  # fmt: skip
        for keys, pick in self._cells(kind, np.array(layers)):
            columns = {}
            for name, (ids, values) in names.items():
                for column, which in ((ids, 0), (values, 1)):
                    columns[column] = pick(
                        _LayerStack([self.collector.topk[int(x)][(kind, name)][which] for x in layers])
                    )
            for _, values in names.values() if self.rounded else ():
                columns[values] = round_to_half(columns[values])
            for ids, _ in names.values():
                self.listed.update(np.flatnonzero(np.bincount(columns[ids].reshape(-1))).tolist())
            yield keys | columns

    def spectrum(self, spectra: Spectra) -> Iterator[Columns]:
        """Rows of `spectrum`, a chunk for each variant: variants with few tokens have fewer singular values."""
        sides = self.collector.comparisons
        layers = np.array(sorted(self.collector.layers)) + 1
        c, layer = (g.reshape(-1) for g in np.meshgrid(np.arange(len(sides)), layers, indexing="ij"))
        for v, variant in enumerate(self.variants):
            arrays = {name: array[c, layer, v] for name, array in spectra.arrays.items()}
            n = sum(len(i.ids) for i in self.items if i.variant == variant)
            yield {
                "pair": category(np.zeros(len(c)), [self.pair]),
                "capture": category(np.zeros(len(c)), [self.capture]),
                "variant": category(np.full(len(c), v), self.variants),
                "base_run": category([self.runs.index(sides[i].base_run) for i in c], self.runs),
                "sft_run": category([self.runs.index(sides[i].sft_run) for i in c], self.runs),
                "layer": (layer - 1).astype(np.int16),
                **arrays,
                "singular_values": arrays["singular_values"][:, :n],
            }

    def _cells(self, kind: str, layers: Any) -> Iterator[tuple[Columns, Any]]:
        """Chunks of whole prompts: their key columns, and a function that picks the chunk's cells from [P or C, L, N, ...]."""
        count = len(self.runs) if kind == "runs" else len(self.collector.comparisons)
        per_token = count * len(layers)
        start = 0 if count else len(self.items)  # passes may be measured and none compared
        while start < len(self.items):
            stop = start + 1
            while stop < len(self.items) and (self.offsets[stop + 1] - self.offsets[start]) * per_token <= ROW_GROUP:
                stop += 1
            yield self._chunk(kind, count, layers, range(start, stop))
            start = stop

    def _chunk(self, kind: str, count: int, layers: Any, items: range) -> tuple[Columns, Any]:
        grids = [np.meshgrid(np.arange(count), layers, np.arange(len(self.items[i].ids)), indexing="ij") for i in items]
        what, layer, position = (np.concatenate([g[axis].reshape(-1) for g in grids]) for axis in range(3))
        item = np.repeat(np.array(items), [g[0].size for g in grids])
        keys = self._prompt_keys(item) | {"layer": layer.astype(np.int16), "position": position.astype(np.int32)}
        if kind == "runs":
            keys["run"] = category(what, self.runs)
        else:
            sides = self.collector.comparisons
            keys["base_run"] = category(np.array([self.runs.index(c.base_run) for c in sides])[what], self.runs)
            keys["sft_run"] = category(np.array([self.runs.index(c.sft_run) for c in sides])[what], self.runs)

        def pick(array: Any) -> Any:
            parts = [array[:, :, self.offsets[i] : self.offsets[i + 1]] for i in items]
            return np.concatenate([p.reshape(p.shape[0] * p.shape[1] * p.shape[2], *p.shape[3:]) for p in parts])

        return keys, pick

    def _prompt_keys(self, item: Any) -> Columns:
        zeros = np.zeros(len(item), np.int32)
        return {
            "pair": category(zeros, [self.pair]),
            "capture": category(zeros, [self.capture]),
            "prompt_idx": np.array([i.prompt_idx for i in self.items], np.int32)[item],
            "variant": category(np.array([self.variants.index(i.variant) for i in self.items])[item], self.variants),
        }


def round_to_half(values: Any) -> Any:
    """float32 to the nearest number of 11 significant bits, ties to even, as float16 has them but with float32's range.

    They stay float32: the bytes that are zero then take no room in the files, and no reader needs to know. IEEE 754-2008, 4.3.1.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


class _LayerStack:
    """[count, N, K] arrays of several layers, sliced as one [count, layers, N, K] without being copied into one."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def __getitem__(self, key: Any) -> Any:
        return np.stack([layer[:, key[2]] for layer in self.layers], axis=1)
