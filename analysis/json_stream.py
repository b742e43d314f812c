"""Read a JSON file of any size without holding it: objects and lists are walked, only small values are decoded whole.

Python's own decoder does the values, so numbers are exact, and NaN and Infinity, which Python writes, are read.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

CHUNK = 1 << 20  # bytes read at a time
LARGEST = 1 << 26  # characters of one value: cells and lists of tokens are far smaller
_NEAR_END = 16  # characters: a cut word, number or escape shows as an error this close to the end
_DECODER = json.JSONDecoder()
_SPACE = " \t\n\r"


class BrokenJson(Exception):
    """The text ends in the middle, or is no JSON, at character `at`."""

    def __init__(self, why: str, at: int) -> None:
        super().__init__(f"{why} at character {at}")
        self.at = at


class JsonStream:
    """A place in a JSON text. Whoever asks for members or items must consume each value before the next."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._before, self._ended = "", 0, 0, False

    @property
    def position(self) -> int:
        """Characters consumed so far."""
        return self._before + self._at

    def _fill(self) -> None:
        block = self._file.read(CHUNK)
        self._ended = len(block) < CHUNK
        try:
            more = self._decode.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            if self._ended and error.reason == "unexpected end of data":
                more = block[: error.start].decode(errors="ignore")
            else:
                raise BrokenJson("this is no UTF-8", self.position) from error
        self._before += self._at
        self._text = self._text[self._at :] + more
        self._at = 0

    def peek(self) -> str:
        """The next character that is no space; empty at the end of the text."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._fill()

    def _expect(self, one_of: str) -> str:
        found = self.peek()
        if not found or found not in one_of:
            said = f"found {found!r}" if found else "the file ends"
            raise BrokenJson(f"{said} where {' or '.join(repr(c) for c in one_of)} should be", self.position)
        self._at += 1
        return found

    def value(self) -> Any:
        """Decode the next value whole."""
        self.peek()
        if len(self._text) - self._at < CHUNK // 16 and not self._ended:
            self._fill()
        while True:
            try:
                found, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._text) - _NEAR_END or error.msg.startswith("Unterminated")
                if self._ended or not cut or len(self._text) - self._at > LARGEST:
                    why = "the file ends in the middle" if self._ended and cut else f"no JSON ({error.msg})"
                    raise BrokenJson(why, self._before + error.pos) from None
                self._fill()
                continue
            except RecursionError:
                raise BrokenJson("values are nested too deeply", self.position) from None
            except ValueError:  # Python turns down whole numbers of thousands of digits
                raise BrokenJson("a number has too many digits", self.position) from None
            if len(self._text) - end < 4 and not self._ended and not isinstance(found, dict | list | str):
                self._fill()  # a number may go on: 2 or 2.5e-7
                continue
            self._at = end
            return found

    def members(self) -> Iterator[str]:
        """The keys of the next object, in order; after each the stream stands before its value."""
        self._expect("{")
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() not in ('"', ""):
                raise BrokenJson("a key should be here", self.position)
            key = self.value()
            self._expect(":")
            yield key
            if self._expect(",}") == "}":
                return

    def items(self) -> Iterator[int]:
        """The places of the next list, from 0; at each the stream stands before the item."""
        self._expect("[")
        if self.peek() == "]":
            self._at += 1
            return
        place = 0
        while True:
            yield place
            place += 1
            if self._expect(",]") == "]":
                return
