"""The texts that the demo pairs are made from: both ship with Python, so nothing is downloaded.

`topics` is the language reference that `help("for")` prints (pydoc_data.topics); `docstrings` are those of the standard
library's own source files, read with `ast` and never imported. A tenth of both is held out from training: of the topics
by paragraph, since they quote each other; of the docstrings by file. Which, depends on the paragraph or the path alone.
"""

from __future__ import annotations

import ast
import sysconfig
import zlib
from pathlib import Path
from pydoc_data.topics import topics as _topics
from typing import Any

# Not the library itself, or not always shipped with it.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
SHORTEST_DOCSTRING = 40  # characters; shorter ones are mostly a lone phrase


def is_held_out(text: str) -> bool:
    """True for the tenth of paragraphs or paths that no model is trained on."""
    return zlib.crc32(text.encode()) % 10 == 0


def topics(*, held_out: bool) -> list[str]:
    """The topics of Python's built-in help by name, each with its held-out paragraphs only, or without them.

    A held-out paragraph is given once, where it comes first.
    """
    seen: set[str] = set()
    texts = []
    for _, text in sorted(_topics.items()):
        paragraphs = [p for p in text.split("\n\n") if is_held_out(p.strip()) == held_out]
        if held_out:
            paragraphs = [p for p in paragraphs if p.strip() not in seen]
            seen.update(p.strip() for p in paragraphs)
        if paragraphs:
            texts.append("\n\n".join(paragraphs))
    return texts


def docstrings(*, held_out: bool) -> list[str]:
    """Docstrings of modules, classes and functions of the standard library, from the files held out or the others.

    In the order of path, in a file the outer ones first; cleaned of their indentation as `inspect.getdoc` does; each
    text once.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(name.parts) or is_held_out(name.as_posix()) != held_out:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a distribution may hold templates, or files that are wrong on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= SHORTEST_DOCSTRING:
                    found[text] = None
    return list(found)


def token_stream(tokenizer: Any, texts: list[str]) -> list[int]:
    """All texts as one row of token ids, the tokenizer's end-of-text token before each and after the last."""
    end = tokenizer.eos_token_id
    ids = [end]
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], end]
    return ids
