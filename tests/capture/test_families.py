"""Families whose heads or layers are called in ways of their own: what a capture reads of them is what plain transformers says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_capture import captured, entry_of
from transformers import AutoModelForCausalLM, Gemma4Config, Gemma4ForConditionalGeneration, Gemma4VisionConfig
from transformers.utils import logging as transformers_logging
from walked import open_pair

from capture import lockstep, memory
from capture.config import FOUR_PASSES, Batching, MultiPass
from capture.errors import UnsupportedModelError
from capture.replay import record
from capture.settings import Spans
from capture.spanwalk import SpanWalk
from capture.unembed import head_is_linear


@torch.no_grad()
def plain(directory: Path, ids: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Norms [T] of the states at layers -1 .. L-2 and L, and float64 log-probabilities [T, V], by the model's own forward."""
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    out = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return [s[0].double().norm(dim=-1) for s in out.hidden_states], out.logits[0].double().log_softmax(-1)


def agrees(paths: Any, result: Any) -> None:
    """Norms and divergences of BB and SS, in every prompt."""
    runs, pairwise = (pq.read_table(f"{result.path}/{t}.parquet").to_pandas() for t in ("runs", "pairwise"))
    for i, ids in enumerate(tiny.encode(tiny.PROMPTS)):
        (base, p), (sft, q) = (plain(directory, ids) for directory in (paths.base, paths.sft))
        for run, states in (("BB", base), ("SS", sft)):
            rows = runs[(runs.prompt_idx == i) & (runs.run == run)].sort_values(["layer", "position"])
            last = len(states) - 1
            for layer, want in zip([*range(-1, last - 1), last], states, strict=True):
                assert rows[rows.layer == layer].norm.to_numpy() == pytest.approx(want.numpy(), rel=1e-5), (run, layer)
        rows = pairwise[(pairwise.prompt_idx == i) & (pairwise.base_run == "BB") & (pairwise.sft_run == "SS")]
        got = rows[rows.layer == last].sort_values("position").kl_divergence.to_numpy()
        want = (q.exp() * (q - p)).sum(-1).numpy()
        assert np.all(np.abs(got - want) <= 2e-3 * np.maximum(want, 1e-5))


@pytest.mark.parametrize("arch", tiny.OTHERS)
@pytest.mark.parametrize("mode", ["resident", "streamed-2"])
def test_what_is_read_is_what_the_model_says(arch: str, mode: str, pairs: Any, tmp_path: Path) -> None:
    padded = Batching(padding="left") if mode == "streamed-2" else Batching()
    result, document = captured(entry_of(pairs(arch), mode=mode, batching=padded), tmp_path)
    agrees(pairs(arch), result)
    assert document["self_checks"]["base_replay"] == "bitwise"


@pytest.mark.parametrize(("arch", "padding"), [("roberta", "left"), ("roberta", "right"), ("bart", "left")])
def test_a_model_that_counts_positions_in_its_own_way_takes_no_padded_prompts(
    arch: str, padding: str, pairs: Any, tmp_path: Path
) -> None:
    """RoBERTa's positions begin behind that of its padding, and BART's take no heed of any that are given."""
    entry = entry_of(pairs(arch), batching=Batching(padding=padding))
    with pytest.raises(UnsupportedModelError, match=rf"other positions.* padded on the {padding}.*batching.padding"):
        captured(entry, tmp_path / "padded")
    result, _ = captured(entry_of(pairs(arch)), tmp_path / "alone")
    agrees(pairs(arch), result)


def test_padding_that_changes_no_position_is_taken(pairs: Any, tmp_path: Path) -> None:
    result, _ = captured(entry_of(pairs("bart"), batching=Batching(padding="right")), tmp_path)
    agrees(pairs("bart"), result)


@pytest.mark.parametrize("mode", ["resident", "one-at-a-time", "streamed", "streamed-2"])
def test_a_weight_that_layers_share_is_in_every_one_of_them(mode: str, pairs: Any, tmp_path: Path) -> None:
    """Both as one block in two layers, and in a row, where a layer is read while the one that shares its weights computes."""
    for kinds in (["mamba", "hybrid"] * 2, ["hybrid"] * 4):
        paths = pairs(
            "zamba2", layers_block_type=kinds, hybrid_layer_ids=[i for i, k in enumerate(kinds) if k == "hybrid"]
        )
        result, document = captured(entry_of(paths, mode=mode), tmp_path / str(len(set(kinds))))
        assert document["self_checks"]["base_replay"] == "bitwise"
        agrees(paths, result)
        assert result.peak_memory_bytes <= result.planned_memory_bytes


def test_a_walk_goes_on_behind_the_layer_that_holds_a_shared_weight(
    pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_of(pairs("zamba2"), mode="resident", spans=Spans(layers=1))
    own = SpanWalk.commit

    def commit(course: Any, state: Any) -> None:
        own(course, state)
        if state.layer == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SpanWalk, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            captured(entry, tmp_path)
    result, _ = captured(entry, tmp_path)
    agrees(pairs("zamba2"), result)


def test_logits_behind_layers_of_the_heads_own_are_no_sums_of_products(pairs: Any, tmp_path: Path) -> None:
    paths = pairs("modernbert")
    model = open_pair(paths).models["base"]
    for group in model.groups():
        model.load(group)
    assert not head_is_linear(model)
    result, _ = captured(entry_of(paths, dtype="bfloat16"), tmp_path / "16 bits")
    assert result.state == "complete"
    result, _ = captured(entry_of(paths), tmp_path / "32 bits")
    runs = pq.read_table(f"{result.path}/runs.parquet").to_pandas()
    for run, directory in (("BB", paths.base), ("SS", paths.sft)):
        _, log_p = plain(directory, tiny.encode(tiny.PROMPTS)[0])
        rows = runs[(runs.prompt_idx == 0) & (runs.run == run) & (runs.layer == tiny.LAYERS)].sort_values("position")
        assert rows.entropy.to_numpy() == pytest.approx(-(log_p.exp() * log_p).sum(-1).numpy(), abs=1e-5)


def test_embeddings_that_both_models_share_are_not_changed_by_the_first_that_is_given_them(
    pairs: Any, tmp_path: Path
) -> None:
    """CTRL multiplies what enters it by a factor, in place."""
    paths = pairs("ctrl", same_embeddings=True)
    result, _ = captured(entry_of(paths), tmp_path)
    agrees(paths, result)


def test_a_batch_is_not_divided_whose_layers_are_called_with_states(
    pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zamba2's layers are given what enters the first one, too: a recording of a part has other states."""
    entry = entry_of(pairs("zamba2"), batching=Batching(padding="left"))
    own, run = memory.Promise.choose, lockstep.run_layer

    def in_parts(*given: Any) -> Any:
        return replace(own(*given), parts=min(2, given[-1]))

    def run_out(layer: Any, hidden: torch.Tensor, call: Any) -> torch.Tensor:
        if len(hidden) > 4:
            raise RuntimeError("can't allocate memory")
        return run(layer, hidden, call)

    with monkeypatch.context() as patched:
        patched.setattr(memory.Promise, "choose", in_parts)
        result, _ = captured(entry, tmp_path / "planned")
    agrees(pairs("zamba2"), result)
    monkeypatch.setattr(lockstep, "run_layer", run_out)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        captured(entry, tmp_path / "met")


def test_passes_that_cannot_share_a_batch_are_refused_where_layers_are_called_with_states(
    pairs: Any, tmp_path: Path
) -> None:
    three = tuple(p for p in FOUR_PASSES if p.name != "BS")
    comparisons = MultiPass(runs=three).comparisons()
    with pytest.raises(UnsupportedModelError, match="gives its layers the states that enter the first one as well"):
        captured(entry_of(pairs("zamba2"), passes=three, comparisons=comparisons), tmp_path)
    two = (three[0], three[-1])
    captured(entry_of(pairs("zamba2"), passes=two, comparisons=MultiPass(runs=two).comparisons()), tmp_path)


@pytest.mark.parametrize("arch", tiny.UNWALKABLE)
def test_a_model_whose_layers_hand_on_more_than_the_residual_is_refused(arch: str, pairs: Any, tmp_path: Path) -> None:
    for prompts in (tiny.PROMPTS, tiny.PROMPTS[:1]):  # two rows of a batch look like a tuple of two
        with pytest.raises(UnsupportedModelError, match=r"\w+ForCausalLM cannot be walked layer by layer: \w+Error: "):
            captured(entry_of(pairs(arch), prompts=prompts), tmp_path)


def test_a_model_whose_end_takes_more_than_the_state_is_refused(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    pair = open_pair(pairs("llama"))
    base = pair.models["base"]
    base.load("rest")
    own = modeling_llama.LlamaRMSNorm.forward
    base.base.norm.forward = lambda hidden, *blocks: own(base.base.norm, hidden) if blocks else hidden.missing
    forward = type(base.base).forward

    def with_more(self: Any, **given: Any) -> Any:
        norm = self.norm.forward
        self.norm.forward = lambda hidden: norm(hidden, hidden)
        try:
            return forward(self, **given)
        finally:
            self.norm.forward = norm

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", with_more)
    with pytest.raises(
        UnsupportedModelError, match=r"follows the last layer \(\['LlamaRMSNorm'\]\) is not a plain chain"
    ):
        record(base, torch.ones(1, 3, tiny.HIDDEN))


def test_a_model_that_runs_out_of_memory_when_it_is_recorded_is_not_refused(
    pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    def forward(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    pair = open_pair(pairs("llama"))
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        record(pair.models["base"], torch.zeros(1, 3, tiny.HIDDEN))


def test_a_pickled_opt_has_the_lens_of_its_own_forward(tmp_path: Path) -> None:
    paths = tiny.make_pair("opt", tmp_path / "pair")
    for directory in (paths.base, paths.sft):
        torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    result, _ = captured(entry_of(paths, allow_pickle=True), tmp_path / "out")
    agrees(paths, result)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_model_that_does_not_ask_its_base_model_is_refused(
    pickled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    paths = tiny.make_pair("llama", tmp_path / "pair", num_hidden_layers=2)
    if pickled:
        for directory in (paths.base, paths.sft):
            torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
            (directory / "model.safetensors").unlink()
    own = modeling_llama.LlamaModel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = own(self.model, *args, **kwargs)
        return modeling_llama.CausalLMOutputWithPast(logits=self.lm_head(found[0]))

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM does not call its base model"):
        captured(entry_of(paths, allow_pickle=True, mode="auto" if pickled else "streamed"), tmp_path / "out")


@pytest.mark.parametrize("mode", ["resident", "streamed"])
def test_an_unembedding_of_another_width_than_the_layers_is_refused(mode: str, tmp_path: Path) -> None:
    paths = tiny.make_pair("opt", tmp_path / "pair", word_embed_proj_dim=24, do_layer_norm_before=False)
    with pytest.raises(UnsupportedModelError, match="takes states of 24 numbers, and its layers have 48"):
        captured(entry_of(paths, mode=mode), tmp_path / "out")


def test_a_text_model_in_a_wrapper_that_looks_for_images_is_read_like_itself(pairs: Any, tmp_path: Path) -> None:
    """Gemma 4's larger checkpoints are such: its wrapper compares what it is given with the embedding of an image's placeholder."""
    paths, inside = pairs("gemma4"), {}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
             "head_dim": 16}  # fmt: skip
    for owner in ("base", "sft"):
        text = AutoModelForCausalLM.from_pretrained(getattr(paths, owner))
        config = Gemma4Config(text_config=text.config, vision_config=Gemma4VisionConfig(**small), audio_config=None)
        config.image_token_id = config.video_token_id = config.audio_token_id = 50  # one that its vocabulary has
        whole = Gemma4ForConditionalGeneration(config)
        whole.model.language_model.load_state_dict(text.model.state_dict())
        whole.lm_head.load_state_dict(text.lm_head.state_dict())
        whole.save_pretrained(tmp_path / owner)
        inside[owner] = tmp_path / owner
    wrapped = tiny.PairPaths(inside["base"], inside["sft"], paths.tokenizer)
    for mode in ("resident", "streamed", "sub-layer"):
        one, two = (captured(entry_of(p, mode=mode), tmp_path / f"{mode}{p is wrapped}")[0] for p in (paths, wrapped))
        for table in ("runs", "pairwise", "runs_topk"):
            mine, theirs = (
                pq.read_table(next(Path(r.path).glob(f"{table}*.parquet"))).drop_columns(["capture"])
                for r in (one, two)
            )
            assert mine.equals(theirs), (mode, table)
