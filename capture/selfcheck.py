"""Two self-checks that run with every capture.

Of the layers: on a tiny model of the same class, walking layer by layer through recorded arguments must give, bit for bit, what the
model's own forward gives. Of the lens: what its fast ways (sums of shifts, kernels) found for some of the first rows must be what
float64 makes of the logits that the model's own code gives for these rows.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from capture.checkpoint import StreamedModel
from capture.errors import SelfCheckError, UnsupportedModelError
from capture.lens import Statistics
from capture.replay import record, run_layer, run_tail
from capture.topk import TopK, Vocabulary

log = logging.getLogger(__name__)

# What a config is cut to. Keys that a config lacks are skipped; ratios that architectures rely on stay whole numbers.
TINY: dict[str, Any] = {
    "num_hidden_layers": 2, "n_layer": 2, "hidden_size": 64, "n_embd": 64, "intermediate_size": 96, "ffn_dim": 96,
    "n_inner": 96, "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97,
    "moe_intermediate_size": 32, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "word_embed_proj_dim": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "sliding_window": 4, "layer_types": 2, "query_pre_attn_scalar": 16, "rotary_dim": 8,
    "d_model": 64, "n_layers": 2, "num_layers": 2, "n_heads": 4, "layers_block_type": 2, "attention_hidden_size": 128,
    "attention_head_dim": 32,
    # Mamba-2's: heads x their width = expand x hidden size
    "num_heads": 8, "mamba_n_heads": 8, "n_mamba_heads": 8, "mamba_d_head": 16, "mamba_headdim": 16, "mamba_d_ssm": 128,
    "expand": 2, "mamba_expand": 2,
}  # fmt: skip
KINDS = ("layer_types", "layers_block_type")  # of which each is kept once
# What is cut where a class does not take the above.
SHALLOW = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "vocab_size",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    *KINDS,
)
MOST_WEIGHTS = 1 << 26  # of a model that is made to be checked
# Of the largest logit: what a float32 logit may differ by, made in another product, as a sum or through TF32.
ROUNDED = 2e-5
PART = 1 << 14  # entries of the vocabulary in float64 at a time


def tiny_config(config: Any, keys: Collection[str] = tuple(TINY)) -> Any:
    """A copy of a config, cut to two narrow layers; everything that is not a size stays. keys: what is cut, of TINY."""
    small = copy.deepcopy(config)
    for name in getattr(config, "sub_configs", ()):  # of a text model in a wrapper for images
        if getattr(small, name, None) is not None:
            setattr(small, name, tiny_config(getattr(config, name), keys))
    for key in keys:
        value = TINY[key]
        current = _of_all_layers(small, key)
        if current is None or key in getattr(small, "attribute_map", {}):
            continue
        if key in KINDS:
            kinds = list(dict.fromkeys(current))
            value = (kinds * 2)[:2]
        if key == "num_key_value_heads" and getattr(config, "num_attention_heads", None) == current:
            value = 4
        with contextlib.suppress(AttributeError):  # derived from others, as Mamba's layer_types
            setattr(small, key, value)
    if getattr(small, "hybrid_layer_ids", None) is not None:
        small.hybrid_layer_ids = [i for i, kind in enumerate(small.layers_block_type) if kind == "hybrid"]
    if (
        "head_dim" in keys and getattr(small, "qk_rope_head_dim", None) is not None
    ):  # latent attention rotates only this part of a head
        small.head_dim, small.qk_head_dim = small.qk_rope_head_dim, small.qk_nope_head_dim + small.qk_rope_head_dim
    return small


def _of_all_layers(config: Any, key: str) -> Any:
    """What a config says; None where it does not, or names none for all of its layers (head_dim in Gemma 4)."""
    try:
        return getattr(config, key, None)
    except RuntimeError:
        return None


class _Whole:
    """A fully loaded model behind the few attributes of StreamedModel that the replay needs."""

    def __init__(self, model: Any, layers_name: str) -> None:
        self.model, self.base = model, model.base_model
        self.layers: nn.ModuleList = model.get_submodule(layers_name)
        self.n_layers = len(self.layers)


def replay_check(streamed: StreamedModel) -> str:
    """Build the tiny model, run it both ways, compare; where this class cannot be so narrow, a model of two layers as wide as the
    real one's. Returns "bitwise", or why it could not be run.

    Raises SelfCheckError where the two differ: the layers of this class are not what the replay takes them for.
    """
    reason = ""
    for keys in (tuple(TINY), SHALLOW):
        state = torch.random.get_rng_state()
        try:
            torch.manual_seed(0)
            plain, hidden = _both_ways(streamed, tiny_config(streamed.model.config, keys))
        except UnsupportedModelError:
            raise
        except Exception as error:  # a size that this class cannot be cut to says nothing about the real model
            reason = reason or f"{type(error).__name__}: {error}"
            continue
        finally:
            torch.random.set_rng_state(state)
        if not torch.equal(hidden, plain):
            raise SelfCheckError(
                f"{type(streamed.model).__name__}: layer by layer differs from the model's own forward by "
                f"{float((hidden - plain).abs().max()):.3g} on a tiny model of this class; this architecture is not supported"
            )
        return "bitwise"
    reason = f"not run: a tiny {type(streamed.model).__name__} could not be made ({reason})"
    log.warning("self-check of the replay %s", reason)
    return reason


def _both_ways(streamed: StreamedModel, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states [2, 6, D] of a model with this config and random weights: by its own forward, and layer by layer."""
    with torch.device("meta"):
        n_weights = sum(p.numel() for p in type(streamed.model)(config).parameters())
    if n_weights > MOST_WEIGHTS:
        raise ValueError(f"it would have {n_weights} weights")
    with torch.device("cpu"):
        model = type(streamed.model)(config).float().eval()
    whole = _Whole(model, streamed.layers_name)
    ids = torch.arange(3, 15).reshape(2, 6) % config.get_text_config().vocab_size
    with torch.no_grad():
        plain = model.base_model(input_ids=ids, use_cache=False)[0]
        recording = record(whole, model.get_input_embeddings()(ids))  # type: ignore[arg-type]
    hidden = recording.entry_BTD
    for layer, call in zip(whole.layers, recording.calls, strict=True):
        hidden = run_layer(layer, hidden, call)
    return plain, run_tail(recording.tail, hidden)


@torch.no_grad()
def lens_check(
    logits_SRV: Sequence[torch.Tensor], found: Statistics, next_R: torch.Tensor, rows: Sequence[int], v: Vocabulary
) -> dict[str, float]:
    """Compare a tile's statistics with float64 ones of some of its rows. logits_SRV: of each slot, for these rows only, [R, V] float32
    (a rank's share of V), each slot's made of its own state by the model's own code; next_R: ids of the tokens that follow them, or -1.

    Entropy -sum p log p, log-probability of the next token, KL(b || a) = sum p_b (log p_b - log p_a) and KL(a || b), in nats; and of
    each top-k list its values at their ids, and that none is larger than its first. With logits e apart the entropy H differs by
    e (1 + 2 H) at most, a KL by 2 e (1 + KL). Rows with logits that are not finite are passed over.

    Returns the largest errors, {"entropy": nats, "kl": nats, "logit": logits}. Raises SelfCheckError where one is beyond what
    rounding explains.
    """
    some = torch.tensor(rows, device=next_R.device)
    largest = v.group.max(torch.stack([x.abs().amax(1) for x in logits_SRV])).amax(0).double()
    finite = largest.isfinite()
    apart = ROUNDED * largest + 1e-6
    logsumexp, entropy = _own_statistics(logits_SRV, v)
    errors = {"entropy": 0.0, "kl": 0.0, "logit": 0.0}

    def compare(kind: str, what: str, ours: torch.Tensor, theirs: torch.Tensor, allowed: torch.Tensor) -> None:
        known = finite.view(-1, *[1] * (ours.dim() - 1)) & ~theirs.isnan()
        off = (ours.double() - theirs.double()).abs().where(known, 0.0)
        wrong = ~(off <= allowed.view(-1, *[1] * (ours.dim() - 1))) & known
        errors[kind] = max(errors[kind], float(off.max()))
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise SelfCheckError(
                f"the lens gives {what} {float(ours[at]):.6g} where the model's own logits have {float(theirs[at]):.6g}; this "
                "architecture is not supported with residual_compare.lens, or the compiled lens is wrong on this machine: "
                "lens.compile: false does without"
            )

    def listed(what: str, ours: TopK, x_RV: torch.Tensor, allowed: torch.Tensor, sign: int = 1) -> None:
        ids, values = ours.ids[some], ours.values[some]
        compare("logit", f"{what} of", values, v.pick(x_RV, ids), allowed)
        best = (sign * x_RV[:, : v.n]).amax(1) if v.n else x_RV.new_full((len(rows),), -torch.inf)
        if values.shape[1]:
            compare("logit", f"{what}, the first of its list, of", values[:, 0], sign * v.group.max(best), allowed)

    for s, stats in enumerate(found[0]):
        compare("entropy", "an entropy of", stats.entropy[some], entropy[s], apart * (1 + 2 * entropy[s]))
        following = v.pick(logits_SRV[s], next_R.clamp(min=0)[:, None])[:, 0].double() - logsumexp[s]
        following = following.where(next_R >= 0, torch.nan)
        compare("logit", "a log-probability of the next token of", stats.next_logprob[some], following, 2 * apart)
        listed("a logit", stats.top, logits_SRV[s], apart)
    for (a, b), pair in found[1].items():
        for what, ours, (p, q) in (("KL", pair.kl_ba, (b, a)), ("reverse KL", pair.kl_ab, (a, b))):
            kl = _own_kl(logits_SRV[p], logits_SRV[q], logsumexp[p], logsumexp[q], v)
            compare("kl", f"a {what} of", ours[some], kl, 2 * apart * (1 + kl))
        shift = logits_SRV[b] - logits_SRV[a]
        listed("a shift", pair.increased, shift, 2 * apart)
        listed("a shift", pair.decreased, shift, 2 * apart, sign=-1)
    return errors


def _own_statistics(logits_SRV: Sequence[torch.Tensor], v: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp and entropy of each slot and row, [S, R] float64, a part of the vocabulary at a time."""
    most = v.group.max(torch.stack([x.amax(1) for x in logits_SRV])).double()
    sums = most.new_zeros(2, *most.shape)
    for s, x in enumerate(logits_SRV):
        for part in x.split(PART, dim=1):
            lower = part.double() - most[s][:, None]
            p = lower.exp()
            sums[0, s] += p.sum(1)
            sums[1, s] += (p * lower).sum(1)
    total, weighted = v.group.sum(sums)
    return most + total.log(), total.log() - weighted / total


def _own_kl(
    p_RV: torch.Tensor, q_RV: torch.Tensor, of_p_R: torch.Tensor, of_q_R: torch.Tensor, v: Vocabulary
) -> torch.Tensor:
    """KL(p || q) [R] float64 of logits and their log-sum-exps."""
    kl = torch.zeros_like(of_p_R)
    for p, q in zip(p_RV.split(PART, dim=1), q_RV.split(PART, dim=1), strict=True):
        log_p = p.double() - of_p_R[:, None]
        kl += (log_p.exp() * (log_p - (q.double() - of_q_R[:, None]))).sum(1)
    return v.group.sum(kl)
