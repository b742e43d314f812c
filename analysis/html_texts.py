"""The texts of token ids in top-k lists. A capture stores those of its prompts and tracked tokens; others come from the
tokenizer's own file, where this machine has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from analysis.errors import QueryError

_PROBES = 200


class TokenTexts:
    """Text by token id. source: where texts of ids outside the prompts come from; None where they are not known."""

    def __init__(self, stored: Mapping[int, str], tokenizer: Any = None, source: str | None = None) -> None:
        self._stored, self._tokenizer, self.source = stored, tokenizer, source

    def of(self, ids: Iterable[int]) -> dict[int, str]:
        """The texts of those ids that have one."""
        found = {i: self._stored[i] for i in ids if i in self._stored}
        if self._tokenizer is not None:
            found |= {i: text for i in ids if i not in found and (text := _decode(self._tokenizer, i)) is not None}
        return found


def token_texts(stored: Mapping[int, str], capture_json: str | None, given: str | None = None) -> TokenTexts:
    """The texts for one capture.

    stored: text by id as the capture has it. capture_json: names the tokenizer and the models; each is looked for as a folder
    here and in the local cache of the model hub, never on the network. given: a tokenizer.json or its folder, from the user.

    A tokenizer that spells the stored ids otherwise is another one: not used, or a QueryError where it was given.
    """
    if given is not None:
        path = Path(given).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise QueryError(f"there is no tokenizer '{given}': --tokenizer wants a tokenizer.json or its folder")
        tokenizer = _load(path)
        if tokenizer is None:
            raise QueryError(f"'{path}' is no tokenizer.json that can be read")
        if not _agrees(tokenizer, stored):
            raise QueryError(f"'{path}' is another tokenizer: it spells the prompts' tokens otherwise than the capture")
        return TokenTexts(stored, tokenizer, str(path))
    for name in _named(capture_json):
        local = _local_file(name)
        if local and (tokenizer := _load(local)) is not None and _agrees(tokenizer, stored):
            return TokenTexts(stored, tokenizer, name)
    return TokenTexts(stored)


def _named(capture_json: str | None) -> list[str]:
    try:
        said = json.loads(capture_json or "{}")
        names = [said["tokenizer"]["name"], said["models"]["sft"]["model"], said["models"]["base"]["model"]]
    except (ValueError, KeyError, TypeError):
        return []
    return list(dict.fromkeys(n for n in names if isinstance(n, str)))


def _local_file(name: str) -> Path | None:
    folder = Path(name).expanduser() / "tokenizer.json"
    if folder.is_file():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:  # a path, not a hub id
        return None
    return Path(cached) if isinstance(cached, str) else None


def _load(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # the library raises no class of its own
        return None


def _agrees(tokenizer: Any, stored: Mapping[int, str]) -> bool:
    probes = list(stored.items())[:_PROBES]
    return all(_decode(tokenizer, i) in (text, f" {text}") for i, text in probes)


def _decode(tokenizer: Any, token_id: int) -> str | None:
    """The text of one id, with the leading space that some decoders drop at the start of a text; None for no such id."""
    spelling = tokenizer.id_to_token(token_id)
    if spelling is None:
        return None
    text = str(tokenizer.decode([token_id], skip_special_tokens=False))
    return f" {text}" if spelling.startswith("▁") and not text.startswith(" ") else text
