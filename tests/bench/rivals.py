"""Other programs that can give the hidden states of the four passes of a pair, each by its own public means, and two that go on
to statistics: one with ours, and the plain loop over positions.

Each maker takes (paths, ids [T], scratch directory) and returns a Rival, whose `states()` runs all passes. Models are loaded, and
checkpoints split, by the maker: that does not count. Shapes: P the passes BB, BS, SB, SS; T tokens; D hidden; V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PASSES = ("BB", "BS", "SB", "SS")
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
States = list[
    Tensor
]  # [P, T, D]: what enters block 0, what leaves each block but the last, the last after the final norm


@dataclass(frozen=True)
class Rival:
    """models: base and sft, for their norm and head. complete: whether `states` gives all four passes."""

    states: Callable[[], States]
    models: tuple[Any, Any]
    complete: bool = True


def _load(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()


def _embeddings(models: Sequence[Any], ids_T: Tensor) -> Tensor:
    """What base's and sft's embedding give: [2, T, D]."""
    with torch.no_grad():
        return torch.cat([model.get_input_embeddings()(ids_T[None]) for model in models])


def _in_order(of_base: Sequence[Tensor], of_sft: Sequence[Tensor]) -> States:
    """From each model's states of both embeddings [2, T, D] to BB, BS, SB, SS."""
    return [torch.stack([a[0], b[0], a[1], b[1]]) for a, b in zip(of_base, of_sft, strict=True)]


def plain(paths: Any, ids_T: Tensor, scratch: Path) -> Rival:
    """transformers with output_hidden_states, two passes in one batch: the strongest plain program."""
    models = (_load(paths.base), _load(paths.sft))

    @torch.no_grad()
    def states() -> States:
        both = _embeddings(models, ids_T)
        return _in_order(*(_hidden(m, both) for m in models))

    return Rival(states, models)


def four_forwards(paths: Any, ids_T: Tensor, scratch: Path) -> Rival:
    """transformers with output_hidden_states, each pass by itself."""
    models = (_load(paths.base), _load(paths.sft))

    @torch.no_grad()
    def states() -> States:
        both = _embeddings(models, ids_T)
        each = [[_hidden(m, both[e : e + 1]) for e in (0, 1)] for m in models]
        return _in_order(*([torch.cat(pair) for pair in zip(*one, strict=True)] for one in each))

    return Rival(states, models)


def _hidden(model: Any, embeds: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = model.model(
        inputs_embeds=embeds, use_cache=False, output_hidden_states=True
    ).hidden_states
    return found


def disk_offload(paths: Any, ids_T: Tensor, scratch: Path) -> Rival:
    """transformers with every layer offloaded to the disk: each forward reads all of them."""

    def model(path: Path, name: str) -> Any:
        from transformers import AutoConfig

        n = AutoConfig.from_pretrained(path).num_hidden_layers
        ends = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        where = ends | {f"model.layers.{i}": "disk" for i in range(n)}
        return _load(path, device_map=where, offload_folder=str(scratch / name))

    models = (model(paths.base, "base"), model(paths.sft, "sft"))

    @torch.no_grad()
    def states() -> States:
        both = _embeddings(models, ids_T)
        return _in_order(*(_hidden(m, both) for m in models))

    return Rival(states, models)


def nnsight(paths: Any, ids_T: Tensor, scratch: Path) -> Rival:
    """nnsight: one trace per model, with every layer's output saved."""
    from nnsight import LanguageModel
    from transformers import AutoTokenizer

    models = (_load(paths.base), _load(paths.sft))
    tokenizer = AutoTokenizer.from_pretrained(paths.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = [LanguageModel(m, tokenizer=tokenizer) for m in models]

    def traced(model: Any, both: Tensor) -> list[Tensor]:
        with torch.no_grad(), model.trace({"inputs_embeds": both, "use_cache": False, "logits_to_keep": 1}):
            found = list().save()  # noqa: C408  the library traces this very call
            for layer in model.model.layers:
                found.append(layer.output)
            found.append(model.model.norm.output)
        each = [x[0] if isinstance(x, tuple) else x for x in found]
        return [both, *each[:-2], each[-1]]

    def states() -> States:
        both = _embeddings(models, ids_T)
        return _in_order(*(traced(m, both) for m in wrapped))

    return Rival(states, models)


def transformer_lens(paths: Any, ids_T: Tensor, scratch: Path) -> Rival:
    """TransformerLens: its bridge with a cache of every block's output; embeddings are put in by a hook."""
    from transformer_lens import TransformerBridge

    models = (_load(paths.base), _load(paths.sft))
    bridges = [TransformerBridge.boot_transformers(str(p), device="cpu", dtype=torch.float32) for p in (paths.base, paths.sft)]  # fmt: skip
    n = len(models[0].model.layers)
    names = [f"blocks.{i}.hook_out" for i in range(n - 1)] + ["ln_final.hook_out"]

    @torch.no_grad()
    def states() -> States:
        both = _embeddings(models, ids_T)

        def put_in(x: Tensor, hook: Any) -> Tensor:
            return both

        found = []
        for bridge in bridges:
            with bridge.hooks(fwd_hooks=[("embed.hook_out", put_in)]):
                _, cache = bridge.run_with_cache(ids_T.repeat(2, 1), names_filter=names, return_type=None)
            found.append([both, *(cache[name] for name in names)])
        return _in_order(*found)

    return Rival(states, models)


def airllm(paths: Any, ids_T: Tensor, scratch: Path) -> Rival:
    """AirLLM: each model streamed from a checkpoint that it splits layer by layer. It takes ids only, so there are no passes with
    swapped embeddings: BB and SS alone, half of the work."""
    from airllm import AutoModel

    streams = [
        AutoModel.from_pretrained(str(path), device="cpu", dtype=torch.float32, layer_shards_saving_path=str(scratch / name))
        for path, name in ((paths.base, "base"), (paths.sft, "sft"))
    ]  # fmt: skip

    @torch.no_grad()
    def states() -> States:
        found = []
        for stream in streams:
            out = stream(input_ids=ids_T[None], use_cache=False, output_hidden_states=True, return_dict=True)
            found.append([h[0] if isinstance(h, tuple | list) else h for h in out.hidden_states])
        return [torch.cat(pair) for pair in zip(*found, strict=True)]

    return Rival(states, (streams[0].model, streams[1].model), complete=False)


MAKERS: dict[str, Callable[[Any, Tensor, Path], Rival]] = {
    "transformers, batched": plain,
    "transformers, four forwards": four_forwards,
    "nnsight": nnsight,
    "TransformerLens": transformer_lens,
    "transformers, disk offload": disk_offload,
    "AirLLM": airllm,
}


@torch.no_grad()
def our_statistics(
    rival: Rival, found: States, ids_T: Tensor, n_tokens: int, top_k: int = 20, *, lens: bool = True
) -> tuple[list[Any], list[Any]]:
    """Our statistics of a rival's states: the lens with all entropies, KLs, shifts and lists, a layer at a time, and the norms,
    cosines and differences of consecutive rows, as many layers at a time as a capture has them. Nothing is written."""
    from capture.lens_kernel import Kernel, load_kernel

    compiled = load_kernel()  # as a capture would take it
    kernel = compiled if isinstance(compiled, Kernel) else None
    lenses = _lenses(rival, found, ids_T, n_tokens, top_k, kernel) if lens else []
    return lenses, _residuals(found, kernel)


def _residuals(found: States, kernel: Any) -> list[Any]:
    from capture import statistics
    from capture.footprint import WAITING_CELLS

    turns, pairs = [(p, p) for p in range(4)], list(PAIRS)
    done = [statistics.residuals([(list(found[0]), [])], [], pairs, kernel)]
    blocks = [(list(now), list(before)) for before, now in pairwise(found)]
    together = max(1, WAITING_CELLS // found[0][0].numel())
    for first in range(0, len(blocks), together):
        done.append(statistics.residuals(blocks[first : first + together], turns, pairs, kernel))
    return done


def _lenses(rival: Rival, found: States, ids_T: Tensor, n_tokens: int, top_k: int, kernel: Any) -> list[Any]:
    from capture.lens import lens_tile
    from capture.lens_plan import statistics_rows
    from capture.lens_sums import Space
    from capture.logits import separate
    from capture.topk import Vocabulary

    base, sft = rival.models
    n_vocab = base.lm_head.weight.shape[0]
    vocabulary = Vocabulary(n_tokens, top_k)
    next_T = torch.cat([ids_T[1:], torch.tensor([-1])])
    tracked = torch.tensor([5, 299])
    spaces = [Space() for _ in range(torch.get_num_threads())]
    done = []
    kept = [torch.empty(2 * len(ids_T), n_vocab) for _ in rival.models]  # as a capture keeps it
    for layer, states_PTD in enumerate(found):
        states = [
            _normed(m, x, last=layer == len(found) - 1) for m, x in zip((base, sft, base, sft), states_PTD, strict=True)
        ]
        a, b = (
            torch.mm(torch.cat(two), m.lm_head.weight.T, out=out).chunk(2)
            for m, two, out in zip((base, sft), (states[0::2], states[1::2]), kept, strict=True)
        )
        logits = separate([a[0], b[0], a[1], b[1]])
        rows, at_once = statistics_rows(n_vocab, on_cpu=True, alone=True)
        how = {"rows": rows, "at_once": at_once, "kernel": kernel, "spaces": spaces}
        done.append(lens_tile(logits, PAIRS, next_T, tracked, vocabulary, **how))
    return done


def _normed(model: Any, x_TD: Tensor, *, last: bool) -> Tensor:
    normed: Tensor = x_TD if last else model.model.norm(x_TD)
    return normed


@torch.no_grad()
def naive_record(rival: Rival, found: States, tokens: Sequence[str], top_k: int = 20, tracked: Sequence[int] = (5, 299)) -> dict[str, Any]:  # fmt: skip
    """The plain program: for each layer, position, pass and comparison one cell, each number fetched with .item(), as a record of
    format_version 2."""
    base, sft = rival.models
    models = (base, sft, base, sft)
    runs: list[dict[str, Any]] = [{"name": p, "layers": {}} for p in PASSES]
    pairs: list[dict[str, Any]] = [{"name": f"{PASSES[i]}-{PASSES[j]}", "layers": {}} for i, j in PAIRS]
    cosine = torch.nn.functional.cosine_similarity
    for layer, states_PTD in enumerate(found):
        for one in (*runs, *pairs):
            one["layers"][str(layer)] = {}
        for t, token in enumerate(tokens):
            h = list(states_PTD[:, t])
            before = list(found[layer - 1][:, t]) if layer else None
            logits = [
                m.lm_head(_normed(m, x[None], last=layer == len(found) - 1))[0] for m, x in zip(models, h, strict=True)
            ]
            logp = [x.log_softmax(-1) for x in logits]
            cells = []
            for p in range(4):
                top = logits[p].topk(top_k)
                cells.append({
                    "token": token, "entropy": -(logp[p].exp() * logp[p]).sum().item(), "norm": h[p].norm().item(),
                    "norm_delta": (h[p].norm() - before[p].norm()).item() if before else None,
                    "cosine_prev": cosine(h[p], before[p], dim=0).item() if before else None,
                    "top_k_logits": {"indices": top.indices.tolist(), "values": top.values.tolist()},
                    "tracked_token_logits": {str(i): logits[p][i].item() for i in tracked},
                })  # fmt: skip
                runs[p]["layers"][str(layer)][str(t)] = cells[p]
            for k, (i, j) in enumerate(PAIRS):
                shift = logits[j] - logits[i]
                up, down = shift.topk(top_k), shift.topk(top_k, largest=False)
                pairs[k]["layers"][str(layer)][str(t)] = {
                    "token": token, "entropy_base": cells[i]["entropy"], "entropy_sft": cells[j]["entropy"],
                    "kl_div": (logp[j].exp() * (logp[j] - logp[i])).sum().item(), "cosine_sim": cosine(h[i], h[j], dim=0).item(),
                    "norm_base": cells[i]["norm"], "norm_sft": cells[j]["norm"], "norm_diff": (h[j] - h[i]).norm().item(),
                    "base_cosine_prev": cells[i]["cosine_prev"], "base_norm_delta": cells[i]["norm_delta"],
                    "sft_cosine_prev": cells[j]["cosine_prev"], "sft_norm_delta": cells[j]["norm_delta"],
                    "top_k_increased": {"indices": up.indices.tolist(), "values": up.values.tolist()},
                    "top_k_decreased": {"indices": down.indices.tolist(), "values": down.values.tolist()},
                    "tracked_token_logits": {str(n): {"base": cells[i]["tracked_token_logits"][str(n)],
                                                      "sft": cells[j]["tracked_token_logits"][str(n)]} for n in tracked},
                }  # fmt: skip
    return {"format_version": 2, "prompt": "".join(tokens), "tokens": list(tokens), "metadata": {"prompt_idx": 0},
            "runs": runs, "pairwise": pairs}  # fmt: skip


def weight_bytes(models: Sequence[Any]) -> int:
    """Bytes of all parameters and buffers of modules, each storage once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
             for m in models for t in (*m.parameters(), *m.buffers()) if not t.is_meta}  # fmt: skip
    return sum(found.values())
