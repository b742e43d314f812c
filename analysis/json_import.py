"""Files of residual comparisons become captures of a run directory: streamed, whole or not at all, and resumable by file."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.errors import QueryError
from analysis.json_cells import plain
from analysis.json_file import Cell, JsonFile, Record
from analysis.json_stage import Stage
from analysis.json_stream import BrokenJson
from analysis.json_tables import Shape, write_capture
from capture.errors import StoreError
from capture.layout import RunDir
from capture.schema import SCHEMA_VERSION

Progress = Callable[[int, int], Any]  # bytes read, bytes of the file


@dataclass(frozen=True)
class Imported:
    """What became of a file. state: imported, there (it was already) or broken; broken: where and why it breaks off."""

    file: str
    pair: str
    capture: str
    state: str
    records: int = 0
    cells: int = 0
    broken: str | None = None


@dataclass
class Prompt:
    """A record as the tables know it. runs, pairs: name (or names) of each part, by its number; last_layer: as the file
    numbers the state after the final norm, where it says so."""

    record: int
    prompt_idx: int
    variant: str
    text: str
    tokens: list[str]
    runs: dict[int, str] = field(default_factory=dict)
    pairs: dict[int, tuple[str, str]] = field(default_factory=dict)
    complete: bool = True
    last_layer: int | None = None


def import_json(
    file: str, out: str, *, pair: str | None = None, force: bool = False, progress: Progress | None = None
) -> Imported:
    """Read one file into the run directory `out` as a capture of `pair` (by default from the file's name).

    The capture's id is a hash of the file's bytes: the same file is imported once, unless `force`. Memory does not grow with
    the file. A file that breaks off or is broken gives what could be read before that place, and state "broken".

    Raises QueryError for a file that is missing, or of which nothing could be read; StoreError where nothing can be written.
    """
    path = Path(file).expanduser()
    if path.is_dir():
        raise QueryError(f"'{file}' is a directory: name the files in it, such as {file.rstrip('/')}/*.json")
    if not path.is_file():
        raise QueryError(f"there is no file '{file}'")
    size = path.stat().st_size
    name = pair or pair_of(path.name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):  # as in a config
        raise QueryError(
            f"'{name}' is no name of a pair: a letter or digit, then letters, digits and . _ + -; name it with --pair"
        )
    digest = _sha256(path)
    capture = hashlib.sha256(f"imported {SCHEMA_VERSION} {digest}".encode()).hexdigest()[:16]
    run = RunDir(out)
    if not force and run.is_complete(name, capture):
        document = run.read_bytes(f"{run.capture_path(name, capture)}/capture.json")
        if b'"cut_short": null' in document:
            return Imported(file, name, capture, "there")
    directory = Path(tempfile.mkdtemp(prefix="pairscope-import-"))
    try:
        prompts, stage, walk, broken = _read(path, size, directory, progress)
        if not prompts or stage.last_layer < 0:
            why = broken or "it holds no cell"
            raise QueryError(f"'{file}' is no file of residual comparisons: {why}; nothing was imported")
        last = walk.whole_layers if walk.whole_layers >= 0 else None
        said = {p.last_layer for p in prompts}
        if len(said) == 1 and (only := said.pop()) is not None and stage.last_layer <= only:
            last = only
        shape = Shape(name, capture, prompts, last, tuple(stage.tracked_ids))
        found: dict[str, Any] = {
            "file": path.name, "sha256": digest, "bytes": size, "records": len(prompts),
            "cells": stage.counts["run"] + stage.counts["pairwise"], "cut_short": broken,
            "incomplete_prompts": [
                {"prompt_idx": p.prompt_idx, "variant": p.variant} for p in prompts if not p.complete
            ],
            "format": "single comparison" if not any(p.runs for p in prompts) else "format_version 2",
        }  # fmt: skip
        write_capture(run, shape, stage, found)
    except OSError as error:
        raise StoreError(f"cannot import '{file}': {error}") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    state = "imported" if broken is None else "broken"
    return Imported(file, name, capture, state, found["records"], found["cells"], broken)


def pair_of(name: str) -> str:
    """The pair that a file's name speaks of: without its ending, a leading word of the format, and times."""
    stem = re.sub(r"\.json$", "", name)
    stem = re.sub(r"^(residual_compare|multi_pass)_", "", stem)
    stem = re.sub(r"^\d{8}_\d{6}_", "", stem)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", stem).strip("-.").lstrip("-._+") or "imported"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read(
    path: Path, size: int, directory: Path, progress: Progress | None
) -> tuple[list[Prompt], Stage, JsonFile, str | None]:
    """Put down all cells; the prompts in order, and why the file breaks off where it does."""
    prompts: list[Prompt] = []
    broken: str | None = None
    with path.open("rb") as source, Stage(directory) as stage:
        walk = JsonFile(source)
        done = 0
        cells = walk.cells()
        try:
            for cell in _told(cells, source, size, progress):
                while done < cell.record.number:
                    _finish(walk.records[done], prompts, stage)
                    done += 1
                stage.cell(cell)
        except BrokenJson as error:
            broken = str(error)
        for record in walk.records[done:]:
            _finish(record, prompts, stage)
    return prompts, stage, walk, broken


def _told(cells: Iterator[Cell], source: Any, size: int, progress: Progress | None) -> Iterator[Cell]:
    for i, cell in enumerate(cells):
        if progress is not None and i % 1024 == 0:
            progress(source.tell(), size)
        yield cell
    if progress is not None:
        progress(size, size)


def _finish(record: Record, prompts: list[Prompt], stage: Stage) -> None:
    """A record's end: give it its place among the prompts, put its headers down and let go of them."""
    if not record.parts:
        return
    header = record.header
    metadata = header.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    index = metadata.get("prompt_idx")
    index = index if type(index) is int and 0 <= index < 2**31 else record.number
    tokens = header.get("tokens")
    texts = [plain(str(t)) for t in tokens] if isinstance(tokens, list) else []
    texts += [""] * (record.last_position + 1 - len(texts))
    text = next((plain(str(h["prompt"])) for h in (header, *(p.header for p in record.parts)) if "prompt" in h), "")
    taken = {(p.prompt_idx, p.variant) for p in prompts}
    last = metadata.get("last_layer")
    last = last if type(last) is int and 0 <= last < (1 << 15) - 1 else None
    variant = _variant(metadata, index, taken)
    prompt = Prompt(record.number, index, variant, text, texts, complete=record.complete, last_layer=last)
    stage.rest(record, "record", {"number": record.number, "header": header, "complete": record.complete})
    for part in record.parts:
        if not part.legacy:
            stage.rest(record, part.name, {"header": part.header})
        if part.kind == "run":
            prompt.runs[part.number] = unique(str(part.header.get("name") or f"run{part.number}"), prompt.runs.values())
        else:
            prompt.pairs[part.number] = unique_sides(header if part.legacy else part.header, prompt.pairs.values())
    prompts.append(prompt)
    record.header = {}
    record.parts = []


def _variant(metadata: dict[str, Any], index: int, taken: set[tuple[int, str]]) -> str:
    """variant_name; where that prompt has one of the same name already, with the embedding variant, then with a number."""
    name = plain(str(metadata.get("variant_name") or "identity"))
    choices = [name]
    if metadata.get("embedding_variant"):
        choices.append(plain(f"{name}+{metadata['embedding_variant']}"))
    for choice in choices:
        if (index, choice) not in taken:
            return choice
    return next(f"{choices[-1]}#{n}" for n in range(2, len(taken) + 3) if (index, f"{choices[-1]}#{n}") not in taken)


def unique(name: str, others: Any) -> str:
    """The name as the tables have it; with a number where one of the others has it already."""
    name, known = plain(name), set(others)
    return (
        name
        if name not in known
        else next(f"{name}#{n}" for n in range(2, len(known) + 3) if f"{name}#{n}" not in known)
    )


def unique_sides(header: dict[str, Any], others: Any) -> tuple[str, str]:
    """The two passes of a comparison as the tables have them; sft_run with a number where one of the others is of the same two."""
    base, sft = sides_of(header)
    return base, unique(sft, [s for b, s in others if b == base])


def sides_of(header: dict[str, Any]) -> tuple[str, str]:
    """The two passes of a comparison: as it names them, else by whose embeddings each side has."""
    if header.get("base_run") and header.get("sft_run"):
        return plain(str(header["base_run"])), plain(str(header["sft_run"]))
    options = header.get("swap_options")
    options = options if isinstance(options, dict) else {}
    names = []
    for side, blocks in (("base", "B"), ("sft", "S")):
        chosen = options.get(side)
        source = chosen.get("embedding_source") if isinstance(chosen, dict) else None
        names.append(("S" if source == "sft" else "B" if source == "base" else blocks) + blocks)
    return names[0], names[1]
