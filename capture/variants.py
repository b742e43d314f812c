"""Prompt variants: plain functions from one text to another, and the options that each takes."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from typing import Any

Options = Mapping[str, Any]


def identity(text: str, options: Options) -> str:
    """The prompt itself."""
    return text


def mirror_halves(text: str, options: Options) -> str:
    """The second half of the characters before the first; the middle character of an odd length goes with the second."""
    half = len(text) // 2
    return text[half:] + text[:half]


def reverse_sentences(text: str, options: Options) -> str:
    """The sentences in reverse order, joined by one space."""
    return " ".join(reversed(sentences(text)))


def shuffle_sentences(text: str, options: Options) -> str:
    """The sentences in an order drawn from `seed`, joined by one space. The same seed and text give the same order."""
    parts = sentences(text)
    random.Random(options["seed"]).shuffle(parts)
    return " ".join(parts)


def symmetric_concat(text: str, options: Options) -> str:
    """The prompt, `separator`, then the prompt reversed character by character."""
    return text + str(options["separator"]) + text[::-1]


def base_prefixed(text: str, options: Options) -> str:
    """`prefix`, then the prompt."""
    return str(options["prefix"]) + text


def sft_prefixed(text: str, options: Options) -> str:
    """`prefix`, then the prompt."""
    return str(options["prefix"]) + text


def dual_channel(text: str, options: Options) -> str:
    """The prompt twice, behind `base_prefix` and behind `sft_prefix`, with a blank line between; `order` says which first."""
    sections = [str(options["base_prefix"]) + text, str(options["sft_prefix"]) + text]
    if options["order"] == "sft_first":
        sections.reverse()
    return "\n\n".join(sections)


def sentences(text: str) -> list[str]:
    """Split after `.`, `!` or `?` (and closing quotes or brackets) where white space follows. No text is lost but that space."""
    return [s for s in re.split(r"""(?<=[.!?])\s+|(?<=[.!?]["')\]])\s+""", text.strip()) if s]


VARIANTS: dict[str, Callable[[str, Options], str]] = {
    "identity": identity,
    "mirror_halves": mirror_halves,
    "reverse_sentences": reverse_sentences,
    "shuffle_sentences": shuffle_sentences,
    "symmetric_concat": symmetric_concat,
    "base_prefixed": base_prefixed,
    "sft_prefixed": sft_prefixed,
    "dual_channel": dual_channel,
}

# variant -> option -> default. An option's type is its default's; a tuple lists the values allowed, the default first.
OPTIONS: dict[str, dict[str, Any]] = {
    "shuffle_sentences": {"seed": 0},
    "symmetric_concat": {"separator": " "},
    "base_prefixed": {"prefix": "[BASE] "},
    "sft_prefixed": {"prefix": "[SFT] "},
    "dual_channel": {
        "base_prefix": "[BASE] ",
        "sft_prefix": "[SFT] ",
        "order": ("base_first", "sft_first"),
    },
}


def resolved_options(variant: str, given: Mapping[str, Options]) -> dict[str, Any]:
    """All options of one variant: what the config gives, defaults for the rest."""
    defaults = {k: v[0] if isinstance(v, tuple) else v for k, v in OPTIONS.get(variant, {}).items()}
    return defaults | dict(given.get(variant, {}))


def make_variant(text: str, variant: str, given: Mapping[str, Options]) -> str:
    """One variant of one prompt. `given` is the config's prompt_variant_options."""
    return VARIANTS[variant](text, resolved_options(variant, given))


def option_error(option: str, value: Any, allowed: Any) -> str | None:
    """What is wrong with an option's value, or None. `allowed` is its item of OPTIONS."""
    if isinstance(allowed, tuple):
        return None if value in allowed else f"expected {' or '.join(allowed)}"
    if type(value) is not type(allowed):  # not isinstance: True is no seed
        return "expected a whole number" if isinstance(allowed, int) else "expected text"
    return None
