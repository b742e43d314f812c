"""The oracle is itself checked: against the library's public outputs, against closed forms, and by what it must catch."""

import math

import agree
import numpy as np
import pyarrow as pa
import pytest
import reference
import reference_statistics as rs
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ALL = (*tiny.ARCHS, "phi3_longrope")
IDS = tiny.random_ids(2, 12)


def weights(directory):
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


# -- the pairs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ALL)
def test_every_tensor_is_random_and_differs_between_base_and_sft(arch, pairs):
    base, sft = weights(pairs(arch).base), weights(pairs(arch).sft)
    assert base.keys() == sft.keys()
    for name, tensor in base.items():
        assert tensor.std() > 0.01, name
        assert not torch.equal(tensor, sft[name]), name


def test_options_keep_equal_what_they_name(pairs):
    identical = pairs("llama", identical=True)
    base, sft = weights(identical.base), weights(identical.sft)
    assert all(torch.equal(base[name], sft[name]) for name in base)
    shared = pairs("qwen2", same_embeddings=True, frozen_layers=(0, 1))
    base, sft = weights(shared.base), weights(shared.sft)
    equal = {name for name in base if torch.equal(base[name], sft[name])}
    assert equal == {n for n in base if n.startswith(("model.embed_tokens", "model.layers.0.", "model.layers.1."))}


def test_checkpoints_can_be_sharded_rounded_tied_and_of_two_vocabularies(tmp_path):
    shards = tiny.make_pair("mixtral", tmp_path / "a", sharded=True, dtype=torch.bfloat16)
    assert len(list(shards.base.glob("*.safetensors"))) > 2
    assert {t.dtype for t in weights(shards.sft).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(shards.base, dtype="auto").dtype == torch.bfloat16
    tied = tiny.make_pair("llama", tmp_path / "b", tie=True)
    assert "lm_head.weight" not in weights(tied.base)
    larger = tiny.make_pair("llama", tmp_path / "c", sft_vocab=320)
    rows = {owner: weights(getattr(larger, owner))["lm_head.weight"].shape[0] for owner in ("base", "sft")}
    assert rows == {"base": tiny.VOCAB, "sft": 320}


def test_the_same_seed_makes_the_same_pair_and_another_does_not(pairs, tmp_path):
    first, again = weights(pairs("llama").sft), weights(tiny.make_pair("llama", tmp_path / "a").sft)
    other = weights(tiny.make_pair("llama", tmp_path / "b", seed=1).sft)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_the_tokenizer_round_trips_any_text_and_fits_the_vocabulary(pairs):
    tokenizer = AutoTokenizer.from_pretrained(pairs("llama").tokenizer)
    assert len(tokenizer) == tiny.TOKENIZER_SIZE < tiny.VOCAB
    for text in (*tiny.PROMPTS, "Grüße, 日本 \n\t🙂"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("arch", "sees"), [("mistral", False), ("gemma3", False), ("gemma2", True), ("qwen2", True), ("qwen3", True)]
)
def test_sliding_windows_are_shorter_than_prompts(arch, sees, loaded):
    """Block 0 of mistral and gemma3 slides, so its output behind the window does not know the first token; in the others
    it sees all, and the block after it slides."""
    model = loaded(arch).base
    if arch != "mistral":
        assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
    changed = IDS.clone()
    changed[:, 0] += 1
    first, second = (
        reference.run_states(model, torch.ones_like(ids), input_ids=ids)[0][0][:, tiny.WINDOW + 1]
        for ids in (IDS, changed)
    )
    assert torch.equal(first, second) != sees


# -- the states --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ALL)
def test_states_are_the_hidden_states_that_the_library_publishes(arch, loaded):
    pair = loaded(arch)
    got = reference.residuals(pair, IDS, {"SS": reference.FOUR["SS"]})["SS"]
    assert list(got) == list(range(-1, pair.n_layers + 1))
    with torch.no_grad():
        published = pair.sft(IDS, attention_mask=torch.ones_like(IDS), output_hidden_states=True).hidden_states
        *before, final = published  # the last is after the final norm; the raw last residual is not among them
        for layer, state in enumerate(before, start=-1):
            assert torch.equal(got[layer], state), layer
        assert torch.equal(got[pair.n_layers], final)
        assert torch.equal(reference.final_norm_of(pair.sft)(got[pair.n_layers - 1]), final)


@pytest.mark.parametrize("arch", ALL)
def test_swapped_passes_equal_a_model_whose_embedding_module_was_replaced(arch, loaded):
    pair = loaded(arch)
    for name in ("BS", "SB"):
        way = reference.FOUR[name]
        alone = reference.residuals(pair, IDS, {name: way})[name]
        replaced = reference.residuals_replaced(pair, IDS, way)
        own = reference.residuals_replaced(pair, IDS, way._replace(embeddings=way.blocks))
        for layer, state in alone.items():
            assert torch.equal(state, replaced[layer]), layer
            assert not torch.equal(state, own[layer]), layer


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_batches_give_the_rows_of_each_prompt_and_pass_alone(arch, loaded):
    pair, prompts = loaded(arch), tiny.encode(tiny.PROMPTS)
    alone = reference.residuals_one_by_one(pair, prompts)
    for side in ("left", "right"):
        ids, mask = reference.pad(prompts, side)
        together = reference.unpad(reference.residuals(pair, ids, attention_mask=mask), mask)
        for one, other in zip(alone, together, strict=True):
            for name, by_layer in one.items():
                for layer, state in by_layer.items():
                    assert reference.relative_error(other[name][layer], state) < 3e-6, (side, name, layer)


def test_equal_embeddings_can_be_run_once(loaded):
    pair = loaded("qwen2", same_embeddings=True, frozen_layers=(0, 1))
    states = reference.residuals(pair, IDS, halve=True)
    assert all(torch.equal(states["BB"][layer], states["SB"][layer]) for layer in states["BB"])
    assert torch.equal(states["BB"][1], states["SS"][1])
    assert not torch.equal(states["BB"][2], states["SS"][2])


# -- the statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ALL)
def test_the_lens_of_the_last_layers_is_the_models_own_logits(arch, loaded):
    pair = loaded(arch)
    for name in ("BB", "SS"):
        way = reference.FOUR[name]
        states, logits = reference.run_states(pair.model(way.blocks), torch.ones_like(IDS), input_ids=IDS)
        for layer in (pair.n_layers - 1, pair.n_layers):
            lens = rs.lens_logits(pair, way, states[layer][0], layer)
            assert lens.dtype == torch.float64
            assert (lens - logits[0]).abs().max() < 1e-5
        raw = rs.lens_logits(pair, way, states[pair.n_layers - 1][0], pair.n_layers - 1, norm="none")
        assert (raw - logits[0]).abs().max() > 0.01


def test_formulas_agree_with_closed_forms():
    p, q = torch.tensor([[0.75, 0.25]], dtype=torch.float64), torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    assert rs.kl(p.log() + 3, q.log() - 1).item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12
    )
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[-8.0, 6.0]])
    assert rs.cosine_distance(a, b).item() == pytest.approx(1)
    assert rs.cosine_distance(a, 7 * a).item() < 1e-15
    near = torch.tensor([[1.0, 1e-4]], dtype=torch.float64)
    assert rs.cosine_distance(near, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(5e-9, rel=1e-7)


def small_reference(loaded, **options):
    pair = loaded("llama")
    prompts = [[1, 40, 41, 42], [1, 50]]
    return rs.statistics(
        pair, prompts, reference.residuals_one_by_one(pair, prompts), top_k=3, tracked=(9, 5), n_tokens=300, **options
    )


def test_statistics_of_one_cell_are_those_computed_by_hand(loaded):
    pair, found = loaded("llama"), small_reference(loaded)
    runs, pairwise = found.tables["runs"], found.tables["pairwise"]
    assert len(runs["layer"]) == 6 * 4 * (pair.n_layers + 2)
    base = reference.run_states(pair.base, torch.ones(1, 4), input_ids=torch.tensor([[1, 40, 41, 42]]))[0]
    with torch.no_grad():
        logits = pair.base.lm_head(pair.base.model.norm(base[1][0, 2]))
    chances = logits.double().softmax(0).numpy()
    at = (runs["prompt_idx"] == 0) & (runs["run"] == "BB") & (runs["layer"] == 1) & (runs["position"] == 2)
    cell = {column: values[at][0] for column, values in runs.items()}
    assert cell["norm"] == pytest.approx(np.linalg.norm(base[1][0, 2].numpy()), rel=1e-6)
    assert cell["norm_delta"] == pytest.approx(float(base[1][0, 2].norm() - base[0][0, 2].norm()), rel=1e-4)
    assert cell["entropy"] == pytest.approx(-(chances * np.log(chances)).sum(), rel=1e-6)
    assert cell["next_token_logprob"] == pytest.approx(math.log(chances[42]), rel=1e-5)
    assert cell["tracked_logits"] == pytest.approx(logits[[9, 5]].numpy(), abs=1e-5)
    top = found.tables["runs_topk"]["ids"][at][0]
    assert list(top) == list(np.argsort(-logits.numpy()[:300])[:3])
    ends = runs["position"] == np.where(runs["prompt_idx"] == 0, 3, 1)
    assert (np.isnan(runs["next_token_logprob"]) == ends).all()
    assert (np.isnan(runs["norm_delta"]) == (runs["layer"] == -1)).all()
    assert list(zip(pairwise["base_run"], pairwise["sft_run"], strict=True))[:: 4 * 6][:3] == list(rs.SIX)[:3]
    up, down = found.tables["pairwise_topk"]["increased"], found.tables["pairwise_topk"]["decreased"]
    assert (np.diff(up) <= 0).all()
    assert (np.diff(down) >= 0).all()
    assert (up > down).all()


def test_layers_without_a_lens_are_null_and_have_no_lists(loaded):
    found = small_reference(loaded, lens_layers=(0, 2))
    for table, column in (("runs", "entropy"), ("pairwise", "kl_divergence")):
        rows = found.tables[table]
        assert (np.isnan(rows[column]) == ~np.isin(rows["layer"], (0, 2))).all()
        assert set(found.tables[f"{table}_topk"]["layer"]) == {0, 2}


def test_equal_values_rank_by_smaller_id():
    assert rs._order(torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]]))[0].tolist() == [1, 2, 4, 0, 3]


# -- the comparison ----------------------------------------------------------------------------------------------------


def as_tables(found):
    """The reference as a capture would have written it: float32, null for NaN, lists as lists."""

    def column(values):
        if values.dtype == object or values.dtype.kind in "iu":
            return pa.array(values.tolist())
        rounded = values.astype(np.float32)
        return pa.array(rounded.tolist() if rounded.ndim > 1 else [None if np.isnan(v) else v for v in rounded])

    return {
        table: pa.table({"variant": ["identity"] * len(rows["layer"])} | {c: column(v) for c, v in rows.items()})
        for table, rows in found.tables.items()
    }


def test_the_reference_agrees_with_itself_in_float32_and_in_any_order_of_rows(loaded):
    found = small_reference(loaded)
    tables = {name: table.take(list(range(len(table)))[::-1]) for name, table in as_tables(found).items()}
    assert agree.disagreements(found, tables) == []


@pytest.mark.parametrize(
    ("table", "column", "factor"),
    [
        ("runs", "norm", 1 + 3e-6),
        ("runs", "norm_delta", 1.001),
        ("runs", "cosine_distance_prev", 1.002),
        ("runs", "entropy", 1 + 1e-5),
        ("runs", "next_token_logprob", 1 + 1e-4),
        ("runs", "tracked_logits", 1 + 1e-4),
        ("runs_topk", "logits", 1 + 1e-4),
        ("pairwise", "cosine_distance", 1.002),
        ("pairwise", "norm_diff", 1 + 3e-6),
        ("pairwise", "kl_divergence", 1.002),
        ("pairwise", "kl_reverse", -1),
        ("pairwise", "top1_agree", 0),
        ("pairwise_topk", "increased", 1.001),
        ("pairwise_topk", "decreased", 1.001),
    ],
)
def test_a_column_that_is_off_is_found(table, column, factor, loaded):
    found = small_reference(loaded)
    wrong = rs.Reference({name: dict(rows) for name, rows in found.tables.items()}, found.logits)
    wrong.tables[table][column] = wrong.tables[table][column] * factor
    problems = agree.disagreements(found, as_tables(wrong))
    assert len(problems) == 1
    assert problems[0].startswith((f"{table}.{column}", f"{table}.{column}_ids", f"{table}.ids"))


@pytest.mark.parametrize("column", ["ids", "increased_ids", "decreased_ids"])
def test_another_id_in_a_list_is_found_but_not_one_that_ties(column, loaded):
    found = small_reference(loaded)
    table = "runs_topk" if column == "ids" else "pairwise_topk"
    wrong = rs.Reference({name: dict(rows) for name, rows in found.tables.items()}, found.logits)
    wrong.tables[table][column] = wrong.tables[table][column][:, ::-1].copy()
    assert agree.disagreements(found, as_tables(wrong))[0].startswith(f"{table}.{column}")
    tied = rs.Reference(found.tables, {key: np.zeros_like(value) for key, value in found.logits.items()})
    values = {"ids": "logits", "increased_ids": "increased", "decreased_ids": "decreased"}
    for name, rows in ((t, found.tables[t]) for t in ("runs_topk", "pairwise_topk")):
        for ids, value in values.items():
            if ids in rows:
                rows[ids], rows[value] = np.tile([0, 1, 2], (len(rows[ids]), 1)), np.zeros_like(rows[value])
                wrong.tables[name][ids] = np.tile([4, 7, 299], (len(rows[ids]), 1))
                wrong.tables[name][value] = np.zeros_like(rows[value])
    assert agree.disagreements(tied, as_tables(wrong)) == []


def test_missing_cells_and_nulls_are_found(loaded):
    found = small_reference(loaded)
    tables = as_tables(found)
    assert "other cells" in agree.disagreements(found, tables | {"runs": tables["runs"].slice(1)})[0]
    nulls = tables["runs"].set_column(
        tables["runs"].schema.get_field_index("entropy"), "entropy", pa.nulls(len(tables["runs"]), pa.float32())
    )
    assert "null" in agree.disagreements(found, tables | {"runs": nulls})[0]
    del tables["pairwise_topk"]
    assert "pairwise_topk" in agree.disagreements(found, tables)[0]
