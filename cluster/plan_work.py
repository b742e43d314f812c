"""What an entry asks of a machine, whatever the machine: tokens, passes, products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from capture.entries import Entry
from capture.footprint import DTYPE_BYTES, Walk, waiting
from cluster.plan_sizes import ModelSizes

BYTES_PER_TOKEN = 3  # of UTF-8; English has 4 to 5 in most vocabularies, so the estimate is high rather than low


@dataclass(frozen=True)
class Work:
    """prompts (with their variants) and tokens a prompt at most; batches: of prompts; walk: the sizes that memory follows from. Products:
    layer_flop and lens_flop, floating-point operations of all passes; half: operands of 16 bits."""

    prompts: int
    longest: int
    walk: Walk
    batches: int
    layer_flop: float
    lens_flop: float
    half: bool


def token_counts(entry: Entry, prompts: int | None = None, tokens: int | None = None) -> list[int]:
    """Tokens of every prompt and variant: as told, else estimated from the texts' bytes, as no tokenizer is loaded here."""
    texts = entry.prompts if prompts is None else (entry.prompts * prompts)[:prompts]
    counts = [tokens or -(-len(text.encode()) // BYTES_PER_TOKEN) for text in texts for _ in entry.prompt_variants]
    return [min(counts)] * len(counts) if entry.trim_prompts else counts


def work_of(entry: Entry, models: Sequence[ModelSizes], counts: Sequence[int]) -> Work:
    """The work of one entry. models: base and sft. counts: tokens of every prompt.

    A pass of a token through a layer costs 2 operations an element used, and 4 x tokens x heads x head_dim for attention over
    its prompt; its lens 2 x hidden x vocabulary for every layer read, the entering state among them. Prompts of equal length
    share batches up to the entry's batching.max_tokens. Halvings where both models agree are not counted.
    """
    base, sft = models[0], models[-1]
    by_owner = {"base": base, "sft": sft}
    tokens = sum(counts)
    layer_flop = 0.0
    for one in entry.passes:
        model = by_owner[one.model]
        attention = 4.0 * sum(n * n for n in counts) * model.heads * model.head_dim * model.n_layers
        layer_flop += 2.0 * tokens * sum(model.active) + attention
    n_lens = _lens_layers(entry, base.n_layers)
    n_batches = _batches(entry, counts)
    vocab = min(base.vocab, sft.vocab)
    lens_flop = 2.0 * base.hidden * vocab * tokens * len(entry.passes) * n_lens
    walk = Walk(
        tokens=tokens,
        batch_tokens=_largest_batch(entry, counts),
        passes=len(entry.passes),
        passes_of_one=max(sum(p.model == owner for p in entry.passes) for owner in by_owner),
        hidden=base.hidden,
        ffn=max(base.ffn, sft.ffn),
        heads=base.heads,
        kv_heads=base.kv_heads,
        head_dim=base.head_dim,
        vocab=vocab,
        element=DTYPE_BYTES[base.dtype],
        lens=n_lens > 0,
        waits=waiting([-(-tokens // n_batches) * base.hidden], base.n_layers),
    )
    return Work(len(counts), max(counts), walk, n_batches, layer_flop, lens_flop, DTYPE_BYTES[base.dtype] == 2)


def _largest_batch(entry: Entry, counts: Sequence[int]) -> int:
    """Tokens of the largest batch, padding included: capture/batches.py puts prompts of one length together, or pads."""
    cap, most = entry.batching.max_tokens, 0
    for length in set(counts):
        together = counts.count(length) if entry.batching.padding == "none" else sum(n <= length for n in counts)
        most = max(most, length * min(together, max(1, cap // length)))
    return most


def _batches(entry: Entry, counts: Sequence[int]) -> int:
    """How many batches there are, as capture/batches.py makes them; with padding as if prompts were of one length."""
    cap, longest = entry.batching.max_tokens, max(counts)
    if entry.batching.padding != "none":
        return -(-len(counts) // max(1, cap // longest))
    return sum(-(-counts.count(n) // max(1, cap // n)) for n in set(counts))


def _lens_layers(entry: Entry, n_layers: int) -> int:
    """How many layers the lens multiplies out: -1 to L, where L with the final norm is that of layer L-1 and costs nothing."""
    lens, every = entry.lens, range(-1, n_layers + 1)
    if not lens.enabled:
        return 0

    def named(layers: str | int | tuple[int, ...]) -> set[int]:
        if isinstance(layers, str):
            return set(every)
        return {*range(0, n_layers, layers), n_layers} if isinstance(layers, int) else set(layers) & set(every)

    chosen = named(lens.layers) & named(entry.layers)
    free = lens.norm == "final" and {n_layers - 1, n_layers} <= chosen
    return len(chosen) - free
