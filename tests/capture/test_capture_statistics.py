"""Every number in the tables of a whole capture agrees with the float64 reference, to the tolerances of agree.py."""

import json

import agree
import pytest
import reference
import reference_statistics as rs
import tiny
import torch

from capture import unembed
from capture.config import Entry
from capture.passes import EmbeddingVariant, Pass, single_comparisons
from capture.run import capture_pair

TEXTS = (*tiny.PROMPTS, tiny.PROMPTS[0][::-1])  # unequal lengths
TRACKED = (5, 299)


def capture(paths, out, **settings):
    """Capture the texts in this process; the tables by name."""
    entry = Entry(
        name="tiny", base_model=str(paths.base), sft_model=str(paths.sft), tokenizer=str(paths.tokenizer),
        prompts=TEXTS, device="cpu", **{"top_k": 7, "tracked_token_ids": TRACKED} | settings,
    )  # fmt: skip
    return agree.read_tables(capture_pair(entry, str(out)).path)


def reference_of(paths, *, passes=reference.FOUR, comparisons=rs.SIX, padding="none", **options):
    """The reference at the batch shapes of the capture: equal lengths together, longest first, or all in one batch."""
    pair, prompts = reference.load_pair(paths), tiny.encode(TEXTS)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    lengths = dict.fromkeys(len(prompts[i]) for i in order)
    groups = [order] if padding != "none" else [[i for i in order if len(prompts[i]) == n] for n in lengths]
    states = {}
    for group in groups:
        ids, mask = reference.pad([prompts[i] for i in group], "right" if padding == "none" else padding)
        run = reference.residuals(pair, ids, passes, attention_mask=mask, halve=True)
        states |= dict(zip(group, reference.unpad(run, mask), strict=True))
    return rs.statistics(
        pair, prompts, [states[i] for i in range(len(prompts))], passes=passes, comparisons=comparisons,
        **{"top_k": 7, "tracked": TRACKED, "n_tokens": tiny.TOKENIZER_SIZE} | options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "mode"),
    [(arch, "streamed") for arch in (*tiny.ARCHS, "phi3_longrope")]
    + [(arch, "resident") for arch in ("gpt2", "gemma2", "mixtral")],  # the states are the same bits in both modes
)
def test_all_statistics_agree_with_the_float64_reference(arch, mode, pairs, tmp_path):
    assert agree.disagreements(reference_of(pairs(arch)), capture(pairs(arch), tmp_path, mode=mode)) == []


@pytest.mark.parametrize("arch", ["llama", "gemma2", "cohere", "granite"])
def test_the_lens_without_a_norm_reads_the_raw_state(arch, pairs, tmp_path):
    found = capture(pairs(arch), tmp_path, lens={"norm": "none"})
    assert agree.disagreements(reference_of(pairs(arch), norm="none"), found) == []


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("arch", ["gpt2", "gemma3", "phi3_longrope"])
def test_padding_leaves_no_trace_in_the_tables(arch, padding, pairs, tmp_path):
    found = capture(pairs(arch), tmp_path, batching={"padding": padding})
    assert agree.disagreements(reference_of(pairs(arch), padding=padding), found) == []


@pytest.mark.parametrize("arch", ["llama", "gpt2", "granite"])
@pytest.mark.parametrize(
    ("seed", "perturb"), [(0, 0.01), (1, 0.3), (2, 1.0), (3, 1e-3), (4, 5e-3)]
)  # the last two: a KL of 1e-6 and of 1e-5 to 1e-3
def test_small_and_large_differences_are_as_exact(arch, seed, perturb, pairs, tmp_path):
    paths = pairs(arch, seed=seed, perturb=perturb)
    assert agree.disagreements(reference_of(paths), capture(paths, tmp_path)) == []


def test_small_divergences_keep_their_digits_where_the_configs_differ_in_what_changes_no_logit(tmp_path):
    paths = tiny.make_pair("llama", tmp_path / "pair", vocab=4001, perturb=1e-3)
    config = json.loads((paths.sft / "config.json").read_text())
    (paths.sft / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    assert agree.disagreements(reference_of(paths), capture(paths, tmp_path / "out")) == []


def test_two_vocabularies_are_compared_on_their_common_rows(pairs, tmp_path):
    paths = pairs("llama", sft_vocab=331)
    assert agree.disagreements(reference_of(paths), capture(paths, tmp_path)) == []


@pytest.mark.parametrize("sizes", [(4001, 4021), (4021, 4001)])
def test_small_divergences_keep_their_digits_between_two_vocabularies(sizes, tmp_path):
    paths = tiny.make_pair("llama", tmp_path / "pair", vocab=sizes[0], sft_vocab=sizes[1], perturb=1e-3)
    assert agree.disagreements(reference_of(paths), capture(paths, tmp_path / "out")) == []


def test_equal_embeddings_and_frozen_layers_give_equal_passes(pairs, tmp_path):
    paths = pairs("qwen2", same_embeddings=True, frozen_layers=(0, 1))
    found = capture(paths, tmp_path)
    assert agree.disagreements(reference_of(paths), found) == []
    zero = [row["norm_diff"] == 0 for row in found["pairwise"].to_pylist() if row["layer"] < 2]
    assert zero
    assert all(zero)


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "deepseek_v3"])
def test_a_pair_of_equal_weights_differs_by_exactly_nothing(arch, pairs, tmp_path):
    paths = pairs(arch, identical=True)
    found = capture(paths, tmp_path)
    assert agree.disagreements(reference_of(paths), found) == []
    for column in ("norm_diff", "cosine_distance", "kl_divergence", "kl_reverse"):
        assert set(found["pairwise"][column].to_pylist()) == {0.0}
    assert set(found["pairwise"]["top1_agree"].to_pylist()) == {True}
    for ids, values in (("increased_ids", "increased"), ("decreased_ids", "decreased")):
        assert all(row == list(range(7)) for row in found["pairwise_topk"][ids].to_pylist())
        assert all(row == [0.0] * 7 for row in found["pairwise_topk"][values].to_pylist())


@pytest.mark.parametrize(("layers", "chosen"), [(2, (0, 2, 4)), ((-1, 3), (-1, 3))])
def test_lens_layers_choose_the_layers_that_are_read(layers, chosen, pairs, tmp_path):
    found = capture(pairs("llama"), tmp_path, lens={"layers": layers})
    assert agree.disagreements(reference_of(pairs("llama"), lens_layers=chosen), found) == []


def test_without_a_lens_the_residual_statistics_stay(pairs, tmp_path):
    found = capture(pairs("llama"), tmp_path, lens={"enabled": False})
    assert agree.disagreements(reference_of(pairs("llama"), lens_layers=()), found) == []


def test_passes_may_take_the_other_models_unembedding(pairs, tmp_path):
    passes = (
        Pass(name="BB", model="base"),
        Pass(name="SSB", model="sft", unembedding_source="base"),
        Pass(name="BBS", model="base", unembedding_source="sft"),
    )
    ways = {p.name: reference.Way(p.embeddings, p.model, p.unembedding) for p in passes}
    comparisons = [("BB", "SSB"), ("BBS", "BB")]
    found = capture(
        pairs("llama"), tmp_path, passes=passes, comparisons=[{"base_run": a, "sft_run": b} for a, b in comparisons]
    )
    assert agree.disagreements(reference_of(pairs("llama"), passes=ways, comparisons=comparisons), found) == []


def test_the_single_comparison_is_base_against_sft(pairs, tmp_path):
    passes, comparisons, _ = single_comparisons((EmbeddingVariant(name="default"),))
    ways = {name: reference.FOUR[name] for name in ("BB", "SS")}
    found = capture(pairs("llama"), tmp_path, passes=passes, comparisons=comparisons)
    assert agree.disagreements(reference_of(pairs("llama"), passes=ways, comparisons=[("BB", "SS")]), found) == []


@pytest.mark.parametrize("arch", ["llama", "gemma2", "deepseek_v3"])
def test_bfloat16_states_are_read_in_float64_and_unembedded_in_float32(arch, pairs, tmp_path):
    paths = pairs(arch, dtype=torch.bfloat16)
    assert agree.disagreements(reference_of(paths), capture(paths, tmp_path)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_unembedding_larger_than_one_chunk_of_the_upcast_is_read_to_its_end(dtype, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(unembed, "HEAD_CHUNK", 100)  # of 307 rows
    paths = pairs("llama", dtype=dtype)
    assert agree.disagreements(reference_of(paths), capture(paths, tmp_path)) == []


def test_equal_weights_that_compute_otherwise_share_nothing(tmp_path):
    paths = tiny.make_pair("llama", tmp_path, identical=True)
    file = paths.sft / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.3}))
    found = capture(paths, tmp_path / "out")
    assert agree.disagreements(reference_of(paths), found) == []
    rows = [r for r in found["pairwise"].to_pylist() if (r["base_run"], r["sft_run"]) == ("BB", "SS")]
    assert all((row["norm_diff"] == 0) == (row["layer"] == -1) for row in rows)
    assert all(row["kl_divergence"] > 0 for row in rows)  # the final norm is of another kind too
