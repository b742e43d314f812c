"""The files of residual comparisons, walked cell by cell: `format_version: 2`, and the older single comparison."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from analysis.json_stream import BrokenJson, JsonStream

TOO_FAR = (
    1 << 20
)  # tokens of one prompt; every position up to the last has a row, so a number alone could fill the memory
HERE = {"cells": "here"}  # stands in a header where runs, pairwise or layers stand in the file


@dataclass
class Part:
    """A pass or a comparison of a record. header: its keys but the cells; kind: run or pairwise; legacy: no part of its own."""

    kind: str
    number: int
    header: dict[str, Any] = field(default_factory=dict)
    legacy: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind} {self.number}"


@dataclass
class Record:
    """One prompt. header: its keys but the parts, in order; complete: false where the file broke off in it."""

    number: int
    header: dict[str, Any] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    last_position: int = -1
    complete: bool = False

    @property
    def legacy(self) -> bool:
        return any(p.legacy for p in self.parts)


@dataclass(frozen=True)
class Cell:
    """One cell: layer and position as the file numbers them, and what it says."""

    record: Record
    part: Part
    layer: int
    position: int
    content: dict[str, Any]


class JsonFile:
    """A walk through a file. records: those seen so far; whole_layers: the highest layer of a `layers` read to its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self.stream = JsonStream(file)
        self.records: list[Record] = []
        self.whole_layers = -1

    def cells(self) -> Iterator[Cell]:
        """All cells in the file's order. Raises BrokenJson where it is cut or no such file; what came before stands."""
        first = self.stream.peek()
        if first == "{":
            yield from self._record()
        elif first == "[":
            for _ in self.stream.items():
                yield from self._record()
        else:
            raise BrokenJson("a list of records should be here", self.stream.position)
        if self.stream.peek():
            raise BrokenJson("something follows the list of records", self.stream.position)

    def _record(self) -> Iterator[Cell]:
        record = Record(len(self.records))
        self.records.append(record)
        for key in self.stream.members():
            kind = {"runs": "run", "pairwise": "pairwise"}.get(key)
            if kind and self.stream.peek() == "[":
                record.header[key] = HERE
                for number in self.stream.items():
                    part = Part(kind, number)
                    record.parts.append(part)
                    for name in self.stream.members():
                        yield from self._member(record, part, part.header, name)
            elif key == "layers" and self.stream.peek() == "{":
                part = Part("pairwise", 0, legacy=True)
                record.parts.append(part)
                yield from self._member(record, part, record.header, key)
            else:
                record.header[key] = self.stream.value()
        record.complete = True

    def _member(self, record: Record, part: Part, header: dict[str, Any], key: str) -> Iterator[Cell]:
        if key != "layers" or self.stream.peek() != "{":
            header[key] = self.stream.value()
            return
        header[key] = HERE
        highest = -1
        for layer_key in self.stream.members():
            layer = self._number(layer_key, 1 << 15)
            highest = max(highest, layer)
            for position_key in self.stream.members():
                position = self._number(position_key, TOO_FAR)
                content = self.stream.value()
                if not isinstance(content, dict):
                    raise BrokenJson(f"layer {layer}, position {position} is no object", self.stream.position)
                record.last_position = max(record.last_position, position)
                yield Cell(record, part, layer, position, content)
        self.whole_layers = max(self.whole_layers, highest)

    def _number(self, key: str, too_large: int) -> int:
        if not key.isascii() or not key.isdigit() or len(key) > 10 or int(key) >= too_large:
            raise BrokenJson(f"'{key}' is no number of a layer or position", self.stream.position)
        return int(key)
