"""Put one weight together, in place, from the tensors that a checkpoint stores for it.

A fused weight of experts is allocated once and filled expert by expert; an FP8 weight is multiplied with its scales a strip
of rows at a time. So a weight never needs more than itself and one piece, where transformers collects all pieces first and
joins them then. The numbers are the library's, bit for bit.

FP8 (DeepSeek-V3 technical report, section 3.3.2): weight[r, c] = float32(stored[r, c]) x scale[r // m, c // n], rounded once
to the weight's dtype; blocks of m x n, the last ones of a row or column cut off by the weight's edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from capture.ledger import Ledger
from capture.upload import Upload

STRIP = 1 << 22  # elements of an FP8 weight that are multiplied with their scales at a time
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
FP8 = frozenset({"F8_E4M3", "F8_E5M2"})  # as safetensors names them

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Part:
    """One stored tensor of a weight, by file and key.

    expert: its place on the weight's first axis; None where it has all of that axis. column: its place among those that
    are joined along the recipe's axis. scale: file and key of its FP8 scales.
    """

    file: str
    key: str
    expert: int | None = None
    column: int = 0
    scale: tuple[str, str] | None = None


@dataclass(frozen=True)
class Recipe:
    """How one weight is put together.

    axis: of the weight, along which columns lie one behind the other; None where there is one column. by_library: why this
    project does not do it itself; `keys` (file, key) then go to the library.
    """

    parts: tuple[Part, ...] = ()
    axis: int | None = None
    by_library: str | None = None
    keys: tuple[tuple[str, str], ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether it is one stored tensor as it is."""
        return len(self.parts) == 1 and self.parts[0].expert is None and self.parts[0].scale is None

    def sources(self) -> Iterator[tuple[str, str]]:
        """File and key of every tensor that will be read."""
        yield from self.keys
        for part in self.parts:
            yield part.file, part.key
            if part.scale is not None:
                yield part.scale


@dataclass(frozen=True)
class Place:
    """Where a weight is to stand: shape of this process's share, dtype, device; block: of FP8 scales, as the config says.

    share: (shape stored, expert) -> the part of a stored tensor that belongs to the share, or None. first: the expert that
    the share begins with. upload: the way to the device.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    share: Callable[[list[int], int | None], Index | None]
    first: int = 0
    block: tuple[int, int] | None = None
    upload: Upload = field(default_factory=Upload)


class Misshapen(Exception):
    """The stored tensors do not make the weight: shape that they make, shape that it has."""

    def __init__(self, got: list[int], expected: list[int]) -> None:
        super().__init__(got, expected)
        self.got, self.expected = got, expected


@torch.no_grad()
def assemble(recipe: Recipe, place: Place, opened: Callable[[str, str], Any], ledger: Ledger) -> Tensor:
    """One weight. opened: (file, key) -> safetensors slice.

    Raises Misshapen; ValueError where FP8 scales are missing or do not fit.
    """
    sources = [opened(p.file, p.key) for p in recipe.parts]
    shares = [place.share(s.get_shape(), p.expert) for s, p in zip(sources, recipe.parts, strict=True)]
    first = recipe.parts[0]
    if recipe.is_plain:
        (index,) = shares
        assert index is not None
        _require(_sizes(index), list(place.shape))
        if sources[0].get_dtype() in FP8:
            raise ValueError(f"'{first.key}' is stored in FP8 without the scales '{first.key}{'_scale_inv'}'")
        whole = sources[0][index] if index else sources[0][...]
        return place.upload.put(whole, place.dtype, place.device)
    out = torch.empty(place.shape, dtype=place.dtype, device=place.device)
    views = _views(recipe, place, shares, out)
    for part, source, index, view in zip(recipe.parts, sources, shares, views, strict=True):
        if index is None or view is None:
            continue
        if part.scale is None:
            if source.get_dtype() in FP8:
                raise ValueError(f"'{part.key}' is stored in FP8 without the scales '{part.key}{'_scale_inv'}'")
            place.upload.fill(view, source[index] if index else source[...])
        else:
            scale = opened(*part.scale)
            try:
                _fill_fp8(view, source, index, scale, place, ledger)
            except ValueError as error:
                raise ValueError(f"'{part.key}': {error}") from error
    return out


def check(recipe: Recipe, place: Place, opened: Callable[[str, str], Any]) -> None:
    """Raise what `assemble` would for a whole weight, from shapes and dtypes alone: nothing is read. place: on meta."""
    sources = [opened(p.file, p.key) for p in recipe.parts]
    for part, source in zip(recipe.parts, sources, strict=True):
        if part.scale is None and source.get_dtype() in FP8:
            raise ValueError(f"'{part.key}' is stored in FP8 without the scales '{part.key}{'_scale_inv'}'")
        if part.scale is None and place.dtype.is_floating_point and source.get_dtype() not in FLOATS:
            raise ValueError(
                f"'{part.key}' is stored as {source.get_dtype()}, which are codes of a quantized weight and not its numbers, and config.json "
                "does not say how to read them; take a checkpoint whose config.json does, or one that is not quantized"
            )
        if part.scale is not None:
            try:
                block_of(list(source.get_shape()), list(opened(*part.scale).get_shape()), place.block)
            except ValueError as error:
                raise ValueError(f"'{part.key}': {error}") from error
    if recipe.is_plain:
        _require(list(sources[0].get_shape()), list(place.shape))
        return
    shares = [place.share(s.get_shape(), p.expert) for s, p in zip(sources, recipe.parts, strict=True)]
    _views(recipe, place, shares, torch.empty(place.shape, dtype=place.dtype, device=place.device))


def _views(recipe: Recipe, place: Place, shares: list[Index | None], out: Tensor) -> list[Tensor | None]:
    """For every part, the piece of the weight that it fills. Raises Misshapen unless the parts make the whole weight."""
    shift = 0 if recipe.parts[0].expert is None else 1  # a stored expert lacks the weight's first axis
    widths: dict[int, int] = {}  # of each column, along the recipe's axis
    for part, index in zip(recipe.parts, shares, strict=True):
        if index is not None:
            widths.setdefault(part.column, _sizes(index)[recipe.axis - shift] if recipe.axis is not None else 0)
    views: list[Tensor | None] = []
    filled = 0
    for part, index in zip(recipe.parts, shares, strict=True):
        if index is None:
            views.append(None)
            continue
        view = out
        if part.expert is not None:
            if part.expert - place.first >= out.shape[0]:
                raise Misshapen([part.expert + 1, *_sizes(index)], list(place.shape))
            view = out[part.expert - place.first]
        if recipe.axis is not None:
            start = sum(w for column, w in widths.items() if column < part.column)
            got = _sizes(index)
            if start + got[recipe.axis - shift] > view.shape[recipe.axis - shift]:
                raise Misshapen(got, list(place.shape))
            view = view.narrow(recipe.axis - shift, start, got[recipe.axis - shift])
        _require(_sizes(index), list(view.shape))
        filled += view.numel()
        views.append(view)
    if filled != out.numel():
        n = len({p.expert for p in recipe.parts})
        raise Misshapen([n, *(_sizes(next(i for i in shares if i is not None)))], list(place.shape))
    return views


def _fill_fp8(view: Tensor, source: Any, index: Index, scale: Any, place: Place, ledger: Ledger) -> None:
    """Multiply a stored FP8 matrix [R, C] with the scales of its blocks, a strip of rows at a time, into `view`."""
    shape, grid = list(source.get_shape()), list(scale.get_shape())
    m, n = block_of(shape, grid, place.block)
    rows, columns = index
    scales = _as_float(_here(scale[...], place)).reshape(-(-shape[0] // m), -(-shape[1] // n))
    of_column = torch.arange(columns.start, columns.stop, device=place.device) // n
    scales = scales[:, of_column]  # [row blocks, C of this share]
    width = columns.stop - columns.start
    strip = max(1, STRIP // (width * m)) * m
    start = rows.start
    while start < rows.stop:
        stop = min(rows.stop, start - start % m + strip)
        stored = source[start:stop, columns]
        with held(ledger, 5 * stored.numel()):  # as stored, and in float32
            values = _here(stored, place).float()
            _multiply(values, scales, start, m)
            view[start - rows.start : stop - rows.start].copy_(values)
            del stored, values
        start = stop


def _here(x: Tensor, place: Place) -> Tensor:
    return place.upload.put(x, x.dtype, place.device)


def _multiply(values: Tensor, scales: Tensor, start: int, m: int) -> None:
    """values [R, C] begin at row `start` of a weight whose blocks have m rows; scales [row blocks, C]. In place."""
    done, n_rows = 0, values.shape[0]
    if ahead := min(n_rows, -start % m):  # the rest of a block that began before
        values[:ahead] *= scales[start // m]
        done = ahead
    if whole := (n_rows - done) // m:
        first = (start + done) // m
        values[done : done + whole * m].unflatten(0, (whole, m)).mul_(scales[first : first + whole, None])
        done += whole * m
    if done < n_rows:
        values[done:] *= scales[(start + done) // m]


def block_of(shape: list[int], grid: list[int], block: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns that share one scale. Raises ValueError where the scales do not fit the weight.

    block: as the config says; the scales' own shape decides where it does not fit (one scale for all, other blocks).
    """
    if len(shape) != 2:
        raise ValueError(f"an FP8 weight of shape {shape}; only matrices are known")
    rows, columns = [1, 1, *grid][-2:] if all(g == 1 for g in grid[:-2]) else (0, 0)
    if block is not None and [rows, columns] == [-(-shape[0] // block[0]), -(-shape[1] // block[1])]:
        return block
    if rows and columns and shape[0] % rows == 0 and shape[1] % columns == 0:
        return shape[0] // rows, shape[1] // columns
    raise ValueError(f"FP8 scales of shape {grid} do not fit a weight of shape {shape}, blocks of {block}")


def _as_float(scale: Tensor) -> Tensor:
    """Scales in float32. Bytes are exponents of two, as in the microscaling formats (OCP MX specification 1.0, E8M0)."""
    return (scale.float() - 127.0).exp2() if scale.dtype == torch.uint8 else scale.float()


@contextmanager
def held(ledger: Ledger, nbytes: int) -> Iterator[None]:
    """Count bytes as alive for as long as the block takes."""
    ledger.add(nbytes)
    try:
        yield
    finally:
        ledger.add(-nbytes)


def _sizes(index: Index) -> list[int]:
    return [s.stop - s.start for s in index]


def _require(got: list[int], expected: list[int]) -> None:
    if got != expected:
        raise Misshapen(got, expected)
