"""Cells of the JSON files and rows of the tables: what the one says as the other, both ways.

The tables hold float32. What a file says beyond that (more digits, other keys, a token that is not the prompt's) is a cell's
*rest*: `rest_of` finds it when a file is read, `with_rest` puts it back when one is written, so that nothing is lost.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

# key in the file -> is it kept as 1 - value in the tables (cosines)
RUN_NUMBERS = {"norm": False, "norm_delta": False, "cosine_prev": True, "entropy": False}
PAIR_NUMBERS = {"norm_diff": False, "cosine_sim": True, "kl_div": False}
# key in the file -> (which side, key of that pass): these are numbers of the two passes, not of the comparison
SIDE_NUMBERS: dict[str, tuple[str, str]] = {
    "entropy_base": ("base", "entropy"),
    "entropy_sft": ("sft", "entropy"),
    "norm_base": ("base", "norm"),
    "norm_sft": ("sft", "norm"),
    "base_cosine_prev": ("base", "cosine_prev"),
    "base_norm_delta": ("base", "norm_delta"),
    "sft_cosine_prev": ("sft", "cosine_prev"),
    "sft_norm_delta": ("sft", "norm_delta"),
}
ALL_PAIR_NUMBERS = PAIR_NUMBERS | {key: RUN_NUMBERS[name] for key, (_, name) in SIDE_NUMBERS.items()}
_MISSING = object()
_ALONE = re.compile("[\ud800-\udfff]")


def plain(text: str) -> str:
    """The text as the tables can hold it: half of a surrogate pair, which JSON can say and UTF-8 cannot, becomes U+FFFD."""
    return text if text.isascii() else _ALONE.sub("\ufffd", text)


def float32(value: Any) -> float | None:
    """The number as a float32 holds it; None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        held: float = array("f", (value,))[0]
    except OverflowError:
        return None
    return held if held - held == 0 else None  # infinities and NaN are not kept


def kept(value: Any, one_minus: bool) -> float | None:
    """What the tables keep of a number: float32, of 1 - value for cosines."""
    if one_minus and not isinstance(value, bool) and isinstance(value, int | float):
        try:
            return float32(1.0 - value)
        except OverflowError:  # a whole number that no float holds
            return None
    return float32(value)


def kept_all(cell: Mapping[str, Any], numbers: Mapping[str, bool]) -> dict[str, float | None]:
    """What the tables keep of several numbers of a cell, by key; `numbers` says which are kept as 1 - value."""
    try:
        values = [1.0 - cell[key] if one_minus else cell[key] for key, one_minus in numbers.items()]
        held = array("f", values).tolist()  # all at once: many times quicker than one by one
        if (total := sum(held)) - total == 0:
            return dict(zip(numbers, held, strict=True))
    except (KeyError, TypeError, OverflowError):
        pass
    return {key: kept(cell.get(key), one_minus) for key, one_minus in numbers.items()}


def said(held: float | None, one_minus: bool) -> float | None:
    """The number that the tables give back."""
    return None if held is None else 1.0 - held if one_minus else held


def short(values: Sequence[float]) -> list[float]:
    """float32 values, each with six decimals where those mean the same float32: how top-k values are written."""
    rounded = [round(v, 6) for v in values]
    back = array("f", rounded).tolist()
    return [r if b == v else v for r, b, v in zip(rounded, back, values, strict=True)]


def topk(cell: Mapping[str, Any], key: str) -> tuple[list[int], list[float]]:
    """The ids and values of a top-k list as the tables keep them: empty where it is no such list."""
    found = cell.get(key)
    if not isinstance(found, Mapping):
        return [], []
    ids, values = found.get("indices"), found.get("values")
    if not isinstance(ids, list) or not isinstance(values, list) or len(ids) != len(values):
        return [], []
    if bool in {*map(type, ids), *map(type, values)}:  # arrays take them for 1 and 0
        return [], []
    try:
        held = array("f", values).tolist()
        whole = array("i", ids).tolist() == ids
    except (TypeError, OverflowError):
        return [], []
    total = sum(held)
    return (ids, held) if whole and total - total == 0 else ([], [])


def tracked_run(cell: Mapping[str, Any]) -> tuple[list[int], list[float | None]]:
    """The tracked tokens of a pass's cell: ids and logits."""
    found = cell.get("tracked_token_logits")
    pairs = [(_id(k), float32(v)) for k, v in found.items()] if isinstance(found, Mapping) else []
    good = [(i, v) for i, v in pairs if i is not None and v is not None]
    return [i for i, _ in good], [v for _, v in good]


def tracked_pair(cell: Mapping[str, Any]) -> tuple[list[int], list[float | None], list[float | None]]:
    """The tracked tokens of a comparison's cell: ids, logits of the base side, logits of the sft side."""
    found = cell.get("tracked_token_logits")
    items = found.items() if isinstance(found, Mapping) else ()
    good = [(_id(k), float32(v.get("base")), float32(v.get("sft"))) for k, v in items if isinstance(v, Mapping)]
    good = [g for g in good if g[0] is not None and g[1] is not None and g[2] is not None]
    return [g[0] for g in good if g[0] is not None], [g[1] for g in good], [g[2] for g in good]


@lru_cache(100_000)
def _id(text: str) -> int | None:
    if not re.fullmatch(r"-?\d{1,10}", text, re.ASCII):
        return None
    return int(text) if str(int(text)) == text and abs(int(text)) < 2**31 else None


def _topk_cell(ids: Sequence[int] | None, values: Sequence[float] | None) -> dict[str, Any]:
    # of what is no finite number JSON knows null alone
    return {"indices": list(ids or ()), "values": [v if v - v == 0 else None for v in short(values or ())]}


def run_cell(
    token: str,
    numbers: Mapping[str, float | None],
    top: tuple[Sequence[int] | None, Sequence[float] | None],
    tracked: Mapping[int, float],
) -> dict[str, Any]:
    """A cell of a pass. numbers: by the keys of RUN_NUMBERS, as the tables keep them."""
    return {
        "token": token,
        "entropy": said(numbers["entropy"], False),
        "norm": said(numbers["norm"], False),
        "norm_delta": said(numbers["norm_delta"], False),
        "cosine_prev": said(numbers["cosine_prev"], True),
        "top_k_logits": _topk_cell(*top),
        "tracked_token_logits": {str(i): v for i, v in tracked.items()},
    }


def pair_cell(
    token: str,
    numbers: Mapping[str, float | None],
    sides: Mapping[str, Mapping[str, float | None]],
    increased: tuple[Sequence[int] | None, Sequence[float] | None],
    decreased: tuple[Sequence[int] | None, Sequence[float] | None],
    tracked: Mapping[int, tuple[float, float]],
) -> dict[str, Any]:
    """A cell of a comparison. numbers: by the keys of PAIR_NUMBERS; sides: base and sft, by those of RUN_NUMBERS."""
    cell: dict[str, Any] = {
        "token": token,
        "top_k_increased": _topk_cell(*increased),
        "top_k_decreased": _topk_cell(*decreased),
    }
    cell |= {key: said(numbers[key], one_minus) for key, one_minus in PAIR_NUMBERS.items()}
    cell |= {key: said(sides[side][name], RUN_NUMBERS[name]) for key, (side, name) in SIDE_NUMBERS.items()}
    cell["tracked_token_logits"] = {str(i): {"base": b, "sft": s} for i, (b, s) in tracked.items()}
    return cell


def rest_of(cell: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any] | None:
    """What of a file's cell the cell written from the tables would not say: {"set": ..., "drop": [...]}, or None."""
    changed = {key: value for key, value in cell.items() if not _same(value, written.get(key, _MISSING))}
    dropped = [key for key in written if key not in cell]
    if not changed and not dropped:
        return None
    return ({"set": changed} if changed else {}) | ({"drop": dropped} if dropped else {})


def _same(a: Any, b: Any) -> bool:
    if type(a) is bool or type(b) is bool:
        return a is b
    return bool(a == b)


def with_rest(cell: dict[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The cell as the file had it. `under` is what it said of its passes where those say other themselves."""
    cell = cell | rest.get("under", {})
    return {k: v for k, v in cell.items() if k not in rest.get("drop", ())} | rest.get("set", {})
