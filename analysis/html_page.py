"""One HTML file that shows a run directory: shell, style, script and data in it, and a policy that forbids all network."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import QueryError
from analysis.html_data import (
    FACTS,
    PairData,
    Sheet,
    choose_pairs,
    keep_prompts,
    keep_top_prompts,
    parse_prompts,
    read_lists,
    read_sheet,
    read_spectrum,
    scalars,
)
from analysis.tables import jsonable, written
from analysis.views import BY_VIEW
from capture.errors import StoreError

if TYPE_CHECKING:
    import duckdb

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("data.js", "scale.js", "sql.js", "grid.js", "charts.js", "panels.js", "page.js")
JOINED = ("norm_diff_relative", "norm_delta", "entropy_delta")  # the page makes them from the norms and entropies
MAX_MB = 40.0
TOP_K = 5
_FRAME = 150  # bytes around a block and its names


@dataclass(frozen=True)
class Written:
    """What was written. prompts: in the page; total: in the captures; lists: prompts with top-k lists; no_lists: pairs whose
    captures have none; not_there: by pair, what of the list of prompts another pair alone has."""

    path: Path
    bytes: int
    pairs: int
    prompts: int
    total: int
    lists: int
    texts_missing: tuple[str, ...]
    no_lists: tuple[str, ...]
    lists_cut: bool  # some did not fit
    not_there: dict[str, list[str]]


def write_page(
    con: duckdb.DuckDBPyConnection,
    file: str | Path,
    *,
    entries: tuple[str, ...] = (),
    prompts: str | None = None,
    top_prompts: int | None = None,
    top_k: int = TOP_K,
    max_mb: float = MAX_MB,
    progress: Callable[[str], None] = lambda line: None,
) -> Written:
    """Write the page of the captures in `con`, whole or not at all; `-` is stdout.

    entries: pairs, default all. prompts: `0,3,5:9`. top_prompts: so many of largest mean KL. top_k: length of the lists.
    max_mb: the file's size at most, in 10^6 bytes; first go the grids of all prompts in turn over the pairs, then the lists.

    Raises QueryError where nothing is asked for that is there, or not even one prompt fits; StoreError for the file.
    """
    path = Path(file) if str(file) == "-" else Path(file).expanduser().absolute()
    if os.path.isdir(path):  # a name that is too long is told when it is written
        raise StoreError(f"cannot write the page '{path}': it is a directory")
    pairs = choose_pairs(con, entries)
    not_there: dict[str, list[str]] = {}
    for pair in pairs:
        if prompts is not None:
            not_there[pair.name] = keep_prompts(pair, parse_prompts(prompts))
    if nowhere := [part for part in next(iter(not_there.values()), []) if all(part in m for m in not_there.values())]:
        raise QueryError(f"--prompts: no prompt {', '.join(nowhere)} here")
    for pair in pairs:
        if top_prompts is not None:
            keep_top_prompts(pair, top_prompts)
    spectra = [read_spectrum(pair) for pair in pairs]
    code = _code()

    def page(sheets: list[list[Sheet]], known: list[dict[int, str]]) -> str:
        return _document(code, pairs, sheets, known, spectra)

    nothing: list[dict[int, str]] = [{} for _ in pairs]
    room = int(max_mb * 1e6) - len(page([[] for _ in pairs], nothing).encode(errors="replace"))
    sheets, room = _read_sheets(pairs, room, max_mb, progress)
    known = _read_all_lists(pairs, sheets, top_k, room, progress) if top_k else nothing
    text = page(sheets, known)
    size = _write(path, text)
    cut = top_k > 0 and any(s.lists is None for p, mine in zip(pairs, sheets, strict=True) if p.has_lists for s in mine)
    missing = tuple(p.name for p, mine in zip(pairs, sheets, strict=True) if not _all_spelled(p, mine))
    return Written(path, size, len(pairs), sum(map(len, sheets)), sum(p.total for p in pairs),
                   sum(s.lists is not None for mine in sheets for s in mine), missing,
                   tuple(p.name for p in pairs if not p.has_lists), cut, {k: v for k, v in not_there.items() if v})  # fmt: skip


def _all_spelled(pair: PairData, sheets: list[Sheet]) -> bool:
    """Whether the capture has the text of every listed token: an imported one has not."""
    return all(i in pair.stored for sheet in sheets if sheet.lists is not None for i in sheet.ids.tolist())


def _read_sheets(
    pairs: list[PairData], room: int, max_mb: float, progress: Callable[[str], None]
) -> tuple[list[list[Sheet]], int]:
    """The sheets that fit, by pair; the first prompt of each pair, then the second of each, until one does not fit."""
    sheets: list[list[Sheet]] = [[] for _ in pairs]
    bare = max_mb - room / 1e6
    turns = sorted((n, i) for i, pair in enumerate(pairs) for n in range(len(pair.prompts)))
    for turn, (n, i) in enumerate(turns):
        pair, prompt = pairs[i], pairs[i].prompts[n]
        progress(f"grids: prompt {turn + 1} of {len(turns)}")
        sheet = read_sheet(pair, prompt)
        size = len(sheet.block) + _size(sheet.index) + _FRAME
        if size > room:
            if any(not mine for mine in sheets):
                raise QueryError(
                    f"prompt {prompt.prompt_idx} of pair '{pair.name}' takes {size / 1e6:.2g} MB and does not fit into --max-mb "
                    f"{max_mb:g} (a page without numbers takes {bare:.2g}): raise it, or choose with --entries and --prompts so that each pair has room for one prompt"
                )
            break
        room -= size
        sheets[i].append(sheet)
    return sheets, room


def _read_all_lists(
    pairs: list[PairData], sheets: list[list[Sheet]], k: int, room: int, progress: Callable[[str], None],
) -> list[dict[int, str]]:  # fmt: skip
    """Add top-k lists to as many sheets as fit; returns the texts of their ids, by pair."""
    known: list[dict[int, str]] = [{} for _ in pairs]
    turns = sorted(((n, i) for i, mine in enumerate(sheets) for n in range(len(mine))))
    for turn, (n, i) in enumerate(turns):
        progress(f"top-k lists: prompt {turn + 1} of {len(turns)}")
        sheet = sheets[i][n]
        before = sheet.index.copy()
        read_lists(pairs[i], sheet, k)
        stored = pairs[i].stored
        new = {t: stored[t] for t in sheet.ids.tolist() if t in stored and t not in known[i]}
        size = len(sheet.lists or "") + _size(sheet.index.get("lists")) + _size(new) + _FRAME
        if size > room:
            sheet.index, sheet.lists = before, None
            break
        room -= size
        known[i] |= new
    return known


def _pair_index(
    pair: PairData, sheets: list[Sheet], known: dict[int, str], spectrum: tuple[dict[str, Any], str] | None,
    number: int, blocks: list[tuple[str, str]],
) -> dict[str, Any]:  # fmt: skip
    """What the page reads first of one pair; its blocks are appended to `blocks` as (id, base64)."""
    for n, sheet in enumerate(sheets):
        sheet.index["block"] = f"b{number}-{n}"
        blocks.append((sheet.index["block"], sheet.block))
    for n, sheet in enumerate(sheets):
        if sheet.lists is not None:
            sheet.index["list_block"] = f"l{number}-{n}"
            blocks.append((sheet.index["list_block"], sheet.lists))
    if spectrum:
        blocks.append((f"s{number}", spectrum[1]))
    return {
        "name": pair.name,
        "capture": pair.capture,
        "facts": {name: pair.facts[name] for name in FACTS},
        "noise": pair.noise_floor,
        "tracked": pair.tracked,
        "runs": pair.runs,
        "comparisons": pair.comparisons,
        "prompts_total": pair.total,
        "has_lists": pair.has_lists,
        "texts": known,
        "spectrum": spectrum[0] | {"block": f"s{number}"} if spectrum else None,
        "sheets": [sheet.index for sheet in sheets],
    }


def _code() -> dict[str, str]:
    """Template, style and script of the page."""
    read = {name: (PAGE / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *SCRIPTS)}
    script = '"use strict";\n' + "\n".join(read[name] for name in SCRIPTS)
    return {"html": read["page.html"], "css": read["page.css"], "js": script}


def _document(
    code: dict[str, str], pairs: list[PairData], sheets: list[list[Sheet]], known: list[dict[int, str]],
    spectra: list[tuple[dict[str, Any], str] | None],
) -> str:  # fmt: skip
    """The page. Only this very script and style may run, and nothing may be fetched: a policy by hashes."""
    blocks: list[tuple[str, str]] = []
    index = {
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "metrics": {table: [asdict(c) for c in scalars(table)] for table in ("runs", "pairwise")}
        | {"joined": [asdict(c) for c in BY_VIEW["pairwise_full"].columns if c.name in JOINED]},
        "pairs": [_pair_index(pair, sheets[i], known[i], spectra[i], i, blocks) for i, pair in enumerate(pairs)],
    }
    policy = (
        f"default-src 'none'; script-src {_hash(code['js'])}; style-src {_hash(code['css'])}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    data = [f'<script type="application/octet-stream" id="{name}">{text}</script>' for name, text in blocks]
    parts = {
        "POLICY": policy,
        "STYLE": code["css"],
        "INDEX": _json(index),
        "FIRST": "".join(data[:1]),  # before the script, so that it can draw while the rest is still being read
        "SCRIPT": code["js"],
        "REST": "\n".join(data[1:]),
    }
    shell = code["html"].split("@@")  # text, name, text, name, ..., text: what is put in is never searched again
    return "".join(parts[part] if i % 2 else part for i, part in enumerate(shell))


def _json(value: Any) -> str:
    """JSON for a script element: written as escapes are the characters that alone could end it or start a comment."""
    said = json.dumps(jsonable(value), ensure_ascii=False, separators=(",", ":"))
    return said.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _size(value: Any) -> int:
    """Bytes of the same in the file."""
    return len(_json(value).encode(errors="replace"))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _write(path: Path, text: str) -> int:
    """Returns how many bytes it is."""
    data = text.encode(
        "utf-8", errors="replace"
    )  # a lone surrogate in a token cannot be UTF-8: it is shown as a question mark
    try:
        with written(path) as stream:
            stream.write(data)
    except BrokenPipeError:  # the reader went, as `head` does
        raise
    except OSError as error:
        raise StoreError(f"cannot write the page '{path}': {error.strerror or error}") from error
    return len(data)
