"""A whole capture against the oracle: what is in the Parquet files is what float64 says, on every architecture."""

import json
import shutil

import agree
import numpy as np
import pyarrow.parquet as pq
import pytest
import reference
import tiny
import torch
from reference_statistics import statistics

from capture.config import Batching, Entry, Lens, LocalRun, Output
from capture.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    DeviceMemoryError,
    PromptError,
    SelfCheckError,
    UnsupportedModelError,
)
from capture.layout import RunDir
from capture.progress import Progress
from capture.run import capture_pair, resolve

TRACKED = (5, 11, 290)


def entry_of(paths, **changes):
    settings = {
        "name": "tiny",
        "base_model": str(paths.base),
        "sft_model": str(paths.sft),
        "tokenizer": str(paths.tokenizer),
        "dtype": "auto",
        "device": "cpu",
        "prompts": tiny.PROMPTS,
        "top_k": 6,
        "tracked_token_ids": TRACKED,
    }
    return Entry(**(settings | changes))


def expected(pair, prompts, passes=reference.FOUR, **options):
    """The oracle's tables, from states at the engine's batch shapes: one prompt, passes of the same blocks together."""
    states = []
    for ids in prompts:
        found = reference.residuals(pair, torch.tensor([ids]), passes)
        states.append({name: {layer: s[0] for layer, s in by_layer.items()} for name, by_layer in found.items()})
    settings = {"top_k": 6, "tracked": TRACKED, "n_tokens": tiny.TOKENIZER_SIZE} | options
    return statistics(pair, prompts, states, passes=passes, **settings)


def captured(entry, out):
    result = capture_pair(entry, str(out))
    return result, json.loads((out / f"captures/pair=tiny/capture={result.capture}/capture.json").read_text())


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_every_statistic_agrees_with_float64(arch, pairs, loaded, tmp_path):
    result, document = captured(entry_of(pairs(arch)), tmp_path)
    want = expected(loaded(arch), tiny.encode(tiny.PROMPTS))
    assert agree.disagreements(want, agree.read_tables(result.path)) == []
    assert document["self_checks"]["base_replay"] == "bitwise"
    assert document["self_checks"]["sft_logits_relative_error"] < 1e-5


def test_a_model_without_attention_is_measured_like_any_other(pairs, loaded, tmp_path):
    result, document = captured(entry_of(pairs("mamba")), tmp_path)
    want = expected(loaded("mamba"), tiny.encode(tiny.PROMPTS))
    assert agree.disagreements(want, agree.read_tables(result.path)) == []
    assert document["self_checks"]["base_replay"] == "bitwise"


def test_without_a_lens_no_logits_are_made(pairs, loaded, tmp_path, monkeypatch):
    from capture import lens_queue

    monkeypatch.setattr(lens_queue.LensQueue, "_by", lambda *_: pytest.fail("the lens was to be left out"))
    result, _ = captured(entry_of(pairs("llama"), lens=Lens(enabled=False)), tmp_path)
    want = expected(loaded("llama"), tiny.encode(tiny.PROMPTS), lens_layers=())
    assert agree.disagreements(want, agree.read_tables(result.path)) == []


def test_a_prompt_beyond_what_a_model_was_made_for_is_told_in_our_words_alone(pairs, tmp_path, caplog, capfd):
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(pairs("llama").tokenizer, tokenizer)
    file = tokenizer / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 8}))
    paths = pairs("llama", max_position_embeddings=8)
    captured(entry_of(paths, tokenizer=str(tokenizer)), tmp_path)
    assert "tokens; the base model was made for 8" in caplog.text
    assert "longer than the specified maximum" not in caplog.text + capfd.readouterr().err


def test_tokens_behind_a_gap_in_the_ids_are_listed(pairs, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(pairs("llama").tokenizer, tokenizer)
    core = json.loads((tokenizer / "tokenizer.json").read_text())
    core["model"]["vocab"] = {t: i + 6 * (i >= 290) for t, i in core["model"]["vocab"].items()}
    (tokenizer / "tokenizer.json").write_text(json.dumps(core))
    entry = entry_of(pairs("llama"), tokenizer=str(tokenizer), top_k=306, prompts=("a b c",), tracked_token_ids=())
    result, _ = captured(entry, tmp_path)
    listed = pq.read_table(result.path + "/runs_topk-00000.parquet")["ids"].to_pylist()
    assert {i for ids in listed for i in ids} == set(range(306))  # the largest is 305; the model has a row more
    words = dict(
        zip(
            *pq.read_table(result.path + "/vocabulary.parquet").select(["token_id", "token"]).to_pydict().values(),
            strict=True,
        )
    )
    assert words[305] == tiny.make_tokenizer().decode([299])


def test_a_model_against_itself_differs_by_exactly_nothing(pairs, tmp_path):
    base = pairs("llama").base
    copy = pairs("llama", identical=True)
    for number, sft in enumerate((base, copy.sft)):  # the same directory; and another one with the same weights
        result, document = captured(entry_of(pairs("llama"), sft_model=str(sft)), tmp_path / str(number))
        rows = pq.read_table(result.path + "/pairwise.parquet")
        for metric in ("norm_diff", "cosine_distance", "kl_divergence", "kl_reverse"):
            assert not rows[metric].to_numpy().any(), metric
        assert all(rows["top1_agree"].to_pylist())
        lists = pq.read_table(result.path + "/pairwise_topk-00000.parquet")
        assert not np.concatenate(lists["increased"].to_numpy()).any()
        assert document["halvings"]["same_embeddings"] is True


def test_streamed_and_resident_write_the_same_bytes(pairs, tmp_path):
    markers = []
    for mode in ("streamed", "resident"):
        result, document = captured(entry_of(pairs("mixtral"), mode=mode), tmp_path / mode)
        assert document["mode"] == result.mode == mode
        markers.append(RunDir(str(tmp_path / mode)).marker(result.path)["files"])
    assert markers[0] == markers[1]


def test_smaller_tiles_and_parts_of_layers_change_no_number(pairs, tmp_path, monkeypatch):
    from capture import spanwalk, work

    whole = capture_pair(entry_of(pairs("llama")), str(tmp_path / "whole"))
    monkeypatch.setattr(spanwalk, "TOPK_BUDGET", 1)
    monkeypatch.setitem(work.TILE_BYTES, "cpu", 4 * 307 * 4 * 8)
    parts = capture_pair(entry_of(pairs("llama")), str(tmp_path / "parts"), tile_divisor=2)
    a, b = agree.read_tables(whole.path), agree.read_tables(parts.path)
    assert len(list((tmp_path / "parts").glob("captures/*/*/runs_topk-*.parquet"))) == 4  # three commits and the rest
    for table, rows in a.items():
        order = [(c, "ascending") for c in agree.KEYS[table]]
        x, y = rows.sort_by(order), b[table].sort_by(order)
        assert x.num_rows == y.num_rows
        for column in x.column_names:
            if column.startswith(("norm", "cosine")) or "ids" in column:
                assert x[column].equals(y[column]), (table, column)


def test_rows_are_sorted_by_the_keys_and_tokens_spell_the_prompt(pairs, tmp_path):
    prompts = (*tiny.PROMPTS[:2],)
    entry = entry_of(pairs("llama"), prompts=prompts, prompt_variants=("identity", "mirror_halves"))
    result, document = captured(entry, tmp_path)
    rows = pq.read_table(result.path + "/runs.parquet")
    runs, variants = ("BB", "BS", "SB", "SS"), ("identity", "mirror_halves")
    keys = [
        (p, variants.index(v), runs.index(r), layer, position)
        for p, v, r, layer, position in zip(
            *(rows[c].to_pylist() for c in ("prompt_idx", "variant", "run", "layer", "position")), strict=True
        )
    ]
    assert keys == sorted(keys)
    lengths = dict(enumerate(pq.read_table(result.path + "/prompts.parquet")["n_tokens"].to_pylist()))
    assert len(keys) == sum(lengths.values()) * 4 * (document["n_layers"] + 2)
    tokens = pq.read_table(result.path + "/tokens.parquet").to_pylist()
    first = [t for t in tokens if t["prompt_idx"] == 0 and t["variant"] == "identity"]
    assert "".join(t["token"] for t in first if not t["is_special"]) == prompts[0]
    assert [t["position"] for t in first] == list(range(len(first)))


def test_tracked_tokens_are_named(pairs, tmp_path):
    entry = entry_of(pairs("llama"), interesting_token_map={"the": "Ġthe"})
    result, _ = captured(entry, tmp_path)
    named = pq.read_table(result.path + "/tracked_tokens.parquet").to_pylist()
    assert [t["token_id"] for t in named[:3]] == list(TRACKED)
    assert named[3]["label"] == "the"


def test_the_noise_floor_is_what_batching_alone_changes(pairs, tmp_path):
    prompts = ("the same length", "the same lengtH", "the same lengTh")
    result, document = captured(entry_of(pairs("llama", dtype=torch.bfloat16), prompts=prompts), tmp_path)
    floor = document["noise_floor"]
    assert floor["measured"] is True
    assert set(floor["by_run_and_layer"]) == {"BB", "BS", "SB", "SS"}
    assert len(floor["by_run_and_layer"]["BB"]["norm_diff"]) == document["n_layers"] + 2
    rows = pq.read_table(result.path + "/runs.parquet")
    assert floor["largest"]["norm_diff"] < max(rows["norm"].to_pylist())
    alone = captured(entry_of(pairs("llama"), prompts=prompts[:1]), tmp_path / "alone")[1]
    assert alone["noise_floor"]["measured"] is False


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_batches_write_what_equal_length_batches_write(padding, pairs, tmp_path):
    plain = agree.read_tables(captured(entry_of(pairs("gpt2")), tmp_path / "plain")[0].path)
    padded, document = captured(entry_of(pairs("gpt2"), batching=Batching(padding=padding)), tmp_path / "padded")
    assert document["batches"][0]["padded"] is True
    got = agree.read_tables(padded.path)
    for column in ("norm", "entropy"):
        a, b = (np.array(t["runs"][column].to_pylist()) for t in (plain, got))
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


def test_what_is_complete_is_skipped_and_force_writes_it_again(pairs, tmp_path):
    entry = entry_of(pairs("llama"))
    first = capture_pair(entry, str(tmp_path))
    again = capture_pair(entry, str(tmp_path))
    assert (first.state, again.state) == ("complete", "skipped")
    before = (tmp_path / f"captures/pair=tiny/capture={first.capture}/_COMPLETE").stat().st_mtime_ns
    assert capture_pair(entry, str(tmp_path), force=True).state == "complete"
    assert (tmp_path / f"captures/pair=tiny/capture={first.capture}/_COMPLETE").stat().st_mtime_ns > before


def test_a_capture_that_is_stopped_leaves_no_tables_and_a_complete_one_stays(pairs, tmp_path):
    entry = entry_of(pairs("llama"))
    with pytest.raises(KeyboardInterrupt):
        capture_pair(entry, str(tmp_path), stop=lambda: True)
    assert not list(tmp_path.rglob("*.parquet"))
    capture_pair(entry, str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        capture_pair(entry, str(tmp_path), force=True, stop=lambda: True)
    assert RunDir(str(tmp_path)).is_complete("tiny", resolve(entry).capture)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_progress_goes_from_files_to_layers_to_tables(pairs, tmp_path):
    seen: list[Progress] = []
    capture_pair(entry_of(pairs("llama")), str(tmp_path), progress=seen.append)
    assert next(p.stage for p in seen) == "open"
    assert seen[-1].stage == "write"
    layers = [p.layer for p in seen if p.stage == "layers"]
    assert layers == sorted(layers)
    assert layers[-1] == 4
    assert seen[-2].seconds_left == 0


def test_passes_can_be_measured_and_none_of_them_compared(pairs, tmp_path):
    result, _ = captured(entry_of(pairs("llama"), comparisons=(), spectrum=True), tmp_path)
    tables = agree.read_tables(result.path)
    assert {name for name, rows in tables.items() if not rows.num_rows} == {"pairwise", "pairwise_topk"}
    assert tables["runs"].num_rows == tables["runs_topk"].num_rows > 0


def test_top_k_tables_can_be_left_out(pairs, tmp_path):
    result, _ = captured(entry_of(pairs("llama"), output=Output(topk=False)), tmp_path)
    tables = agree.read_tables(result.path)
    assert set(tables) == {"runs", "pairwise"}
    assert None not in tables["pairwise"]["top1_agree"].to_pylist()


# -- bad input: one clear error, and nothing is written -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda p: {"sft_model": str(p("qwen2").sft)}, UnsupportedModelError, "differ in architecture: Llama.*Qwen2"),
        (
            lambda p: {"sft_model": str(p("llama", hidden_size=64).sft)},
            UnsupportedModelError,
            "hidden size: 48 against 64",
        ),
        (
            lambda p: {"sft_model": str(p("llama", num_hidden_layers=3).sft)},
            UnsupportedModelError,
            "layers: 4 against 3",
        ),
        (lambda p: {"sft_model": str(p("llama", dtype=torch.bfloat16).sft)}, UnsupportedModelError, "set dtype"),
        (lambda p: {"sft_model": str(p("llama", vocab=80).sft)}, PromptError, "sft model has 80 embedding rows"),
        (lambda p: {"device_memory_gib": 1e-5}, DeviceMemoryError, "for weights alone"),
        (lambda p: {"base_model": "/nowhere/at/all"}, CheckpointError, "/nowhere/at/all"),
    ],
    ids=["architecture", "hidden size", "layers", "dtype", "vocabulary", "memory", "missing"],
)
def test_a_pair_that_cannot_be_compared_is_refused(change, error, says, pairs, tmp_path):
    with pytest.raises(error, match=says):
        capture_pair(entry_of(pairs("llama"), **change(pairs)), str(tmp_path))
    assert not list(tmp_path.rglob("*.parquet"))
    assert not list(tmp_path.rglob("_COMPLETE"))


def test_a_replay_that_differs_from_the_models_own_forward_stops_the_capture(pairs, tmp_path, monkeypatch):
    from capture import selfcheck

    monkeypatch.setattr(selfcheck, "run_tail", lambda tail, hidden: hidden + 1e-7)
    with pytest.raises(SelfCheckError, match="differs from the model's own forward"):
        capture_pair(entry_of(pairs("llama")), str(tmp_path))
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_lens_layer_that_the_model_has_not_is_refused(pairs, tmp_path):
    with pytest.raises(ConfigError, match=r"lens\.layers names the layer 99; this model has -1 .* to 4"):
        capture_pair(entry_of(pairs("llama"), lens=Lens(layers=(0, 99))), str(tmp_path))


@pytest.mark.parametrize(("layers", "lens"), [(2, (1, 3)), ((1, 3), 2)])
def test_a_lens_that_has_none_of_the_layers_is_refused_where_one_of_both_is_a_number(layers, lens, pairs, tmp_path):
    with pytest.raises(
        ConfigError, match=r"lens\.layers, .*, and layers, .*, have none of this model's layers, -1 to 4"
    ):
        capture_pair(entry_of(pairs("llama"), layers=layers, lens=Lens(layers=lens)), str(tmp_path))
    capture_pair(entry_of(pairs("llama"), layers=layers, lens=Lens(layers=lens, enabled=False)), str(tmp_path))


@pytest.mark.parametrize("arch", ["opt", "gptj", "codegen", "mpt"])
def test_a_prompt_longer_than_a_table_of_positions_is_refused(arch, pairs, tmp_path):
    paths = pairs(arch, **{"max_seq_len" if arch == "mpt" else "max_position_embeddings": 16})
    capture_pair(entry_of(paths, prompts=("z" * 15,), lens=Lens(enabled=False)), str(tmp_path))
    with pytest.raises(PromptError, match="a prompt has 17 tokens; the base model has positions for 16 only"):
        capture_pair(entry_of(paths, prompts=("z" * 16,)), str(tmp_path))


def test_a_prompt_longer_than_learned_positions_is_refused_and_one_longer_than_rotary_ones_is_said(
    pairs, tmp_path, caplog
):
    long = ("a b c d e f g h " * 40,)
    with pytest.raises(PromptError, match="the base model has positions for 256 only"):
        capture_pair(entry_of(pairs("gpt2"), prompts=long), str(tmp_path))
    capture_pair(entry_of(pairs("llama"), prompts=long, lens=Lens(enabled=False)), str(tmp_path))
    assert "the base model was made for 256" in caplog.text


def test_the_guards_of_a_local_run_come_before_anything_is_read(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("capture.run.resolve", lambda _: pytest.fail("files were looked for first"))
    with pytest.raises(DeviceError, match="CUDA"):
        capture_pair(entry_of(pairs("llama"), local_run=LocalRun(enabled=True)), str(tmp_path))
