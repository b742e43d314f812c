"""Prompts: texts, their variants, their ids under the one declared tokenizer, and the tokens that are tracked."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capture.errors import CheckpointError, PromptError, UnsupportedModelError
from capture.fields import near
from capture.identity import tokenizer_hash
from capture.variants import make_variant

if TYPE_CHECKING:
    from capture.entries import Entry

log = logging.getLogger(__name__)

TRACKED = ("tracked_token_ids", "tracked_token_strings", "interesting_token_map")


@dataclass(frozen=True)
class Prompt:
    """One variant of one prompt. `ids` go to both models; `source` says where the prompt stands (FILE:LINE or key)."""

    prompt_idx: int
    variant: str
    text: str
    ids: tuple[int, ...]
    n_tokens_before_trimming: int
    source: str


@dataclass(frozen=True)
class Prompts:
    """All prompts of a capture, by prompt and then by variant in the config's order.

    `trimmed_to` is the common length after trimming, None where nothing was to be trimmed.
    `tokens` maps every id in use to its text (the id decoded alone); `special_ids` are the tokenizer's special ones.
    """

    items: tuple[Prompt, ...]
    trimmed_to: int | None
    tokens: Mapping[int, str]
    special_ids: frozenset[int]

    @property
    def n_tokens(self) -> int:
        return sum(len(p.ids) for p in self.items)

    @property
    def longest(self) -> int:
        return max(len(p.ids) for p in self.items)


def load_tokenizer(entry: Entry, directory: str | None = None) -> Any:
    """The entry's tokenizer, from `directory` where its files have been resolved, else as transformers finds it.

    Code that comes with a checkpoint runs only where tokenizer_kwargs says `trust_remote_code: true`; without that
    transformers would ask on the terminal. Raises CheckpointError in one line, UnsupportedModelError for remote code.
    """
    from transformers import AutoTokenizer

    kwargs = {"trust_remote_code": False} | dict(entry.tokenizer_kwargs)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory or entry.tokenizer, **kwargs)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # of any kind: the library that parses it has errors, and panics, of its own
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise UnsupportedModelError(
                f"the tokenizer '{entry.tokenizer}' runs code of its own; read it, then allow it with "
                "tokenizer_kwargs: {trust_remote_code: true}"
            ) from error
        if _has_none(Path(directory or entry.tokenizer)):  # transformers would have sentencepiece installed
            reason = "no file of a tokenizer is there; name one with `tokenizer:`, as the other model's, or put its files there"
        raise CheckpointError(f"the tokenizer '{entry.tokenizer}' cannot be loaded: {reason[:500]}") from error
    # It would warn of prompts beyond its own idea of the longest, in words that are not true here: the models' lengths are looked at.
    known = getattr(tokenizer, "deprecation_warnings", None)
    if isinstance(known, dict):
        known["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _has_none(folder: Path) -> bool:
    """Whether no file of a folder looks like a tokenizer's, as where only a fine-tune's weights were saved."""
    known = ("tokenizer", "tiktoken", "vocab", "merges", "spiece", "sentencepiece", "tekken")
    return folder.is_dir() and not any(part in p.name.lower() for p in folder.iterdir() for part in known)


def tokenize(entry: Entry, tokenizer: Any) -> Prompts:
    """Make every variant of every prompt from the full text, tokenise each, and trim them if the entry says so.

    Trimming cuts ids at the end, so that every (prompt, variant) is as long as the shortest of them; no text is cut or
    decoded. `text` stays the full text. Raises PromptError for no prompts and for a prompt of zero tokens.
    """
    if not entry.prompts:
        raise PromptError(f"entry '{entry.name}' has no prompts; give prompts or prompt_file")
    sources = entry.prompt_sources or tuple(f"prompt {i}" for i in range(len(entry.prompts)))
    items = []
    for i, (prompt, source) in enumerate(zip(entry.prompts, sources, strict=True)):
        if not prompt:
            raise PromptError(f"prompt {i} ({source}) is empty; take it out, or write a prompt there")
        if (odd := _half_pair(prompt)) is not None:
            raise PromptError(
                f"prompt {i} ({source}): character {odd} is half of a surrogate pair, which is no text; write the whole character"
            )
        for variant in entry.prompt_variants:
            text = make_variant(prompt, variant, entry.prompt_variant_options)
            try:
                ids = tuple(tokenizer(text, add_special_tokens=entry.add_special_tokens)["input_ids"])
                blank = not text.strip() and not tokenizer(text, add_special_tokens=False)["input_ids"]
            except (TypeError, ValueError, LookupError) as error:
                # of what its files say; a text itself is never refused
                raise CheckpointError(
                    f"the tokenizer '{entry.tokenizer}' does not work ({' '.join(str(error).split())[:300]}); fetch it again"
                ) from error
            if blank:
                raise PromptError(
                    f"prompt {i} ({source}), variant {variant}: only white space, of which this tokenizer makes no tokens; write a prompt there"
                )
            if not ids:
                raise PromptError(
                    f"prompt {i} ({source}), variant {variant}: no tokens; the text is {text[:60]!r}. Take the prompt out, or use another tokenizer"
                )
            items.append(Prompt(i, variant, text, ids, len(ids), source))
    trimmed_to = None
    if entry.trim_prompts:
        lengths = [len(p.ids) for p in items]
        trimmed_to = min(lengths)
        items = [Prompt(p.prompt_idx, p.variant, p.text, p.ids[:trimmed_to], n, p.source)
                 for p, n in zip(items, lengths, strict=True)]  # fmt: skip
        log.info("Normalized %d prompts to %d tokens (longest was %d)", len(items), trimmed_to, max(lengths))
    used = {i for p in items for i in p.ids}
    special = frozenset(tokenizer.all_special_ids) & used
    return Prompts(tuple(items), trimmed_to, token_texts(tokenizer, used), special)


def other_ids(entry: Entry, prompts: Prompts, owner: str, directory: str, declared: str) -> str | None:
    """What to warn of where a model's own tokenizer makes other ids of a prompt than the declared one, whose ids the model gets:
    a text, or None where it makes the same, is the same (by its files), is not there, or cannot be loaded.

    owner: base or sft; directory: the model's files; declared: the hash of the declared tokenizer's files.
    """
    names = {p.name for p in Path(directory).iterdir()}
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}:
        return None
    if tokenizer_hash(directory, code=bool(entry.tokenizer_kwargs.get("trust_remote_code"))) == declared:
        return None
    try:
        asked = {
            k: v for k, v in entry.tokenizer_kwargs.items() if k != "trust_remote_code"
        }  # that was for another's code
        own = load_tokenizer(entry.model_copy(update={"tokenizer_kwargs": asked}), directory)
        for prompt in prompts.items:
            ids = tuple(own(prompt.text, add_special_tokens=entry.add_special_tokens)["input_ids"])[: len(prompt.ids)]
            if ids == prompt.ids:
                continue
            at = next((i for i, (a, b) in enumerate(zip(ids, prompt.ids, strict=False)) if a != b), len(ids))
            mine = f"{ids[at]} ({token_text(own, ids[at])!r})" if at < len(ids) else "the end"
            return (
                f"the {owner} model's own tokenizer makes other ids of prompt {prompt.prompt_idx} ({prompt.source}), from token "
                f"{at} on: {mine} there, {prompt.ids[at]} ({prompts.tokens.get(prompt.ids[at], '')!r}) by '{entry.tokenizer}', "
                "which both models get. Where an id is not the same word to both, their numbers do not compare"
            )
    except Exception as error:  # of any kind: this is a second look, and not what the capture needs
        log.info("the %s model's own tokenizer was not compared: %s", owner, " ".join(str(error).split())[:300])
    return None


def _half_pair(text: str) -> int | None:
    """Where a lone surrogate stands, as `"\\ud800"` in YAML or JSON makes it; None where the text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def token_text(tokenizer: Any, token_id: int) -> str:
    """The id decoded alone; bytes that are no text on their own show as U+FFFD."""
    return token_texts(tokenizer, [token_id])[token_id]


def token_texts(tokenizer: Any, token_ids: Iterable[int]) -> dict[int, str]:
    """Each id decoded alone, as `token_text` does: thousands at once, since a call costs more than a word."""
    from transformers import PreTrainedTokenizerFast

    ids = sorted(set(token_ids))
    if not ids:  # of no lists the library makes one text
        return {}
    lists = [[i] for i in ids]
    if getattr(type(tokenizer), "_decode", None) is PreTrainedTokenizerFast._decode:  # what it would do, list by list
        words = tokenizer.backend_tokenizer.decode_batch(lists, skip_special_tokens=False)
    else:
        words = tokenizer.batch_decode(lists, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return dict(zip(ids, words, strict=True))


def count_ids(tokenizer: Any) -> int:
    """Ids from 0 to the tokenizer's largest: more than it has tokens where there are gaps between them."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def tracked_tokens(entry: Entry, tokenizer: Any, n_ids: int | None = None) -> list[tuple[int, str, str]]:
    """(id, token, label) of every tracked token, each id once: ids first, then strings, then the map. n_ids: count_ids of the
    tokenizer, where that is known already: it takes a tenth of a second of a large one.

    `token` is the tokenizer's own spelling, `label` the name in interesting_token_map, else the spelling. Raises PromptError
    for a string that is not one token of the tokenizer, with what it tokenises to.
    """
    found: dict[int, tuple[str, str]] = {}
    if n_ids is None:
        n_ids = count_ids(tokenizer)
    for token_id in entry.tracked_token_ids:
        found.setdefault(token_id, _spelling(tokenizer, token_id, n_ids))
    for i, token in enumerate(entry.tracked_token_strings):
        token_id = _one_token(tokenizer, token, f"tracked_token_strings[{i}]")
        found.setdefault(token_id, (token, token))
    for label, token in entry.interesting_token_map.items():
        token_id = _one_token(tokenizer, token, f"interesting_token_map.{label}")
        found[token_id] = (token, label)  # an id that is there already keeps its place and gets its name
    return [(token_id, token, label) for token_id, (token, label) in found.items()]


def _spelling(tokenizer: Any, token_id: int, n_ids: int) -> tuple[str, str]:
    """An id's token and label. A row of the embedding table that the tokenizer never uses has no token."""
    token = tokenizer.convert_ids_to_tokens(token_id) if token_id < n_ids else None
    return (str(token), str(token)) if token is not None else ("", str(token_id))


def _one_token(tokenizer: Any, token: str, key: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    unknown = token_id is None or (token_id == tokenizer.unk_token_id and token != tokenizer.unk_token)
    if not unknown:
        return int(token_id)
    pieces = tokenizer.tokenize(token)
    if len(pieces) == 1 and tokenizer.convert_tokens_to_ids(pieces[0]) not in (None, tokenizer.unk_token_id):
        hint = f"; in the tokenizer's spelling it is {pieces[0]!r}"
    else:
        hint = near(token, tokenizer.get_vocab()) + f"; it tokenises to {pieces}"
    raise PromptError(f"{key}: {token!r} is not one token of the tokenizer{hint}")


def check_ids(prompts: Prompts, sizes: Mapping[str, int], tracked: Iterable[tuple[int, str, str]] = ()) -> None:
    """Raise PromptError if an id in use, or a tracked one, is at or above a model's number of embedding rows.

    `sizes` maps "base" and "sft" to their rows.
    """
    for owner, rows in sizes.items():
        for prompt in prompts.items:
            if bad := [i for i in prompt.ids if i >= rows]:
                raise PromptError(
                    f"prompt {prompt.prompt_idx} ({prompt.source}), variant {prompt.variant}: token "
                    f"{prompts.tokens.get(bad[0], '')!r} has id {bad[0]}, but the {owner} model has {rows} embedding rows; "
                    "both models must know every token: name the tokenizer of the model with the smaller vocabulary"
                )
        for token_id, token, label in tracked:
            if token_id >= rows:
                raise PromptError(
                    f"tracked token {label!r} ({token!r}) has id {token_id}, but the {owner} model has {rows} embedding rows; "
                    f"take it out of {', '.join(TRACKED)}"
                )
