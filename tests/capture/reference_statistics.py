"""The oracle, second half: every statistic of given states, in float64, by the definition and nothing faster.

The columns mean what capture/schema.py says. Formulas: KL(p || q) = sum p (log p - log q), entropy = -sum p log p, both
from log_softmax of float64 logits; 1 - cosine = ||a/|a| - b/|b|||^2 / 2, which equals 1 - a.b/(|a||b|) and is exactly 0
for equal vectors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from reference import FOUR, LoadedPair, States, Way, final_norm_of
from torch import Tensor
from transformers import PreTrainedModel

SIX = tuple(combinations(FOUR, 2))

# column -> values, one row per entry of axis 0, float64 with NaN for null; lists are [rows, length]
Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Reference:
    """What the tables must hold, and the logits from which to judge whether two ids tie.

    tables: runs, pairwise, and with a lens runs_topk and pairwise_topk. Rows are sorted by prompt, pass or comparison
    (in the order given), layer, position. logits: (prompt, pass, layer) -> [T, V], only rows that top-k may name.
    """

    tables: dict[str, Rows]
    logits: dict[tuple[int, str, int], np.ndarray]


@torch.no_grad()
def statistics(
    pair: LoadedPair,
    prompts: Sequence[Sequence[int]],
    states: Sequence[States],
    *,
    passes: Mapping[str, Way] = FOUR,
    comparisons: Sequence[tuple[str, str]] = SIX,
    norm: str = "final",
    lens_layers: Collection[int] | None = None,
    top_k: int = 20,
    tracked: Sequence[int] = (),
    n_tokens: int | None = None,
) -> Reference:
    """All statistics of the states [T, H] of each prompt.

    norm: what stands before the head, `final` or `none`. lens_layers: layers with a lens; None is all, () is none.
    tracked: ids whose logits are kept. n_tokens: top-k and top-1 name only smaller ids; None is the whole vocabulary.
    Of two vocabularies only the common rows count, in the softmax as well.
    """
    common = min(pair.base.get_output_embeddings().out_features, pair.sft.get_output_embeddings().out_features)
    logits: dict[tuple[int, str, int], Tensor] = {}
    for p, by_pass in enumerate(states):
        for name, by_layer in by_pass.items():
            for layer, state in by_layer.items():
                if lens_layers is None or layer in lens_layers:
                    found = lens_logits(pair, passes[name], state, layer, norm=norm)
                    logits[p, name, layer] = found[:, :common]
    named = {key: value[:, :n_tokens] for key, value in logits.items()}
    parts: dict[str, list[Rows]] = {"runs": [], "pairwise": [], "runs_topk": [], "pairwise_topk": []}
    for p, ids in enumerate(prompts):
        for name, layer in _cells(passes, states[p]):
            keys = _keys(p, layer, len(ids), run=name)
            parts["runs"].append(keys | _run_rows(states[p][name], layer, logits.get((p, name, layer)), ids, tracked))
            if (p, name, layer) in named:
                top = _top(named[p, name, layer], top_k, "ids", "logits")
                parts["runs_topk"].append(keys | top)
        for (first, second), layer in _cells(comparisons, states[p]):
            keys = _keys(p, layer, len(ids), base_run=first, sft_run=second)
            a, b = states[p][first][layer], states[p][second][layer]
            la, lb = (logits.get((p, name, layer)) for name in (first, second))
            na, nb = (named.get((p, name, layer)) for name in (first, second))
            parts["pairwise"].append(keys | _pair_rows(a, b, la, lb, na, nb))
            if na is not None and nb is not None:
                up, down = _top(nb - na, top_k, "increased_ids", "increased"), _top(na - nb, top_k, "ids", "falls")
                parts["pairwise_topk"].append(keys | up | {"decreased_ids": down["ids"], "decreased": -down["falls"]})
    tables = {table: _stack(rows) for table, rows in parts.items() if rows}
    return Reference(tables, {key: value.numpy() for key, value in named.items()})


@torch.no_grad()
def lens_logits(pair: LoadedPair, way: Way, state: Tensor, layer: int, *, norm: str = "final") -> Tensor:
    """Float64 logits [T, V] of one pass's states [T, H] at a layer.

    The final norm is the blocks' own module at the model's own precision; at layer L the state has been through it
    already. The head, and what the architecture does to its logits, is the head's owner's, done in float64.
    """
    if norm == "final" and layer < pair.n_layers:
        blocks = pair.model(way.blocks)
        state = final_norm_of(blocks)(state.to(blocks.dtype))
    return head_logits(pair.model(way.head), state)


def head_logits(model: PreTrainedModel, state: Tensor) -> Tensor:
    """Float64 logits [T, V] of normed states [T, H]: unembedding, then scale (cohere, granite) or soft cap (gemma2)."""
    head = model.get_output_embeddings()
    logits = state.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    config = model.config
    if config.model_type == "cohere":
        logits = logits * config.logit_scale
    if config.model_type == "granite":
        logits = logits / config.logits_scaling
    if getattr(config, "final_logit_softcapping", None) is not None:
        logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
    return logits


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine of the vectors [T, H], in float64."""
    ua, ub = (v.double() / v.double().norm(dim=-1, keepdim=True) for v in (a, b))
    return (ua - ub).square().sum(-1) / 2


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) [T] in nats of the softmaxes of float64 logits [T, V]."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _run_rows(
    states: dict[int, Tensor], layer: int, logits: Tensor | None, ids: Sequence[int], tracked: Sequence[int]
) -> Rows:
    state = states[layer].double()
    nothing = torch.full((len(ids),), torch.nan, dtype=torch.float64)
    rows = {
        "norm": state.norm(dim=-1),
        "norm_delta": nothing if layer == -1 else state.norm(dim=-1) - states[layer - 1].double().norm(dim=-1),
        "cosine_distance_prev": nothing if layer == -1 else cosine_distance(state, states[layer - 1]),
        "entropy": nothing,
        "next_token_logprob": nothing,
        "tracked_logits": nothing[:, None].expand(-1, len(tracked)),
    }
    if logits is not None:
        log_p = logits.log_softmax(-1)
        rows["entropy"] = -(log_p.exp() * log_p).sum(-1)
        rows["next_token_logprob"] = nothing.clone()
        for t, following in enumerate(ids[1:]):
            rows["next_token_logprob"][t] = log_p[t, following]
        rows["tracked_logits"] = logits[:, list(tracked)]
    return {name: value.numpy() for name, value in rows.items()}


def _pair_rows(
    a: Tensor, b: Tensor, la: Tensor | None, lb: Tensor | None, na: Tensor | None, nb: Tensor | None
) -> Rows:
    """One comparison's rows. a is base_run's state, b sft_run's; l? their logits, n? those that top-1 may name."""
    nothing = torch.full((len(a),), torch.nan, dtype=torch.float64)
    rows = {
        "cosine_distance": cosine_distance(a, b),
        "norm_diff": (b.double() - a.double()).norm(dim=-1),
        "kl_divergence": nothing,
        "kl_reverse": nothing,
        "top1_agree": nothing,
    }
    if la is not None and lb is not None and na is not None and nb is not None:
        rows["kl_divergence"], rows["kl_reverse"] = kl(lb, la), kl(la, lb)
        rows["top1_agree"] = torch.from_numpy(na.numpy().argmax(1) == nb.numpy().argmax(1)).double()
    return {name: value.numpy() for name, value in rows.items()}


def _order(values: Tensor) -> Tensor:
    """Indices [T, V] by falling value; a stable sort leaves equal values by rising index."""
    return values.sort(dim=-1, descending=True, stable=True).indices


def _top(values: Tensor, k: int, ids_name: str, values_name: str) -> Rows:
    ids = _order(values)[:, :k]
    return {ids_name: ids.numpy(), values_name: values.gather(-1, ids).numpy()}


def _cells(outer: Collection, states: States) -> Iterator[tuple]:
    """Every (pass or comparison, layer), in order."""
    layers = sorted(next(iter(states.values())))
    return ((item, layer) for item in outer for layer in layers)


def _keys(prompt: int, layer: int, length: int, **names: str) -> Rows:
    return {
        "prompt_idx": np.full(length, prompt),
        **{column: np.full(length, name, dtype=object) for column, name in names.items()},
        "layer": np.full(length, layer),
        "position": np.arange(length),
    }


def _stack(parts: list[Rows]) -> Rows:
    return {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}
