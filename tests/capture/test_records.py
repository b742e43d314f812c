"""What capture.json and the tables say where something is cut off, overflows, or is written in pieces."""

import json
import logging
from pathlib import Path

import agree
import numpy as np
import pyarrow.parquet as pq
import pytest
import reference
import tiny
import torch
from reference_statistics import lens_logits
from safetensors.torch import load_file, save_file
from walked import open_pair, walk

from capture import tables
from capture.config import Entry
from capture.run import capture_pair

LAYERS = range(-1, tiny.LAYERS + 1)


def captured(paths, out, **changes):
    """A whole capture: its directory and its capture.json."""
    settings = {"base_model": str(paths.base), "sft_model": str(paths.sft), "tokenizer": str(paths.tokenizer)}
    fixed = {"name": "tiny", "device": "cpu", "prompts": tiny.PROMPTS, "top_k": 4, "tracked_token_ids": (5,)}
    directory = Path(capture_pair(Entry(**(fixed | settings | changes)), str(out)).path)
    return directory, json.loads((directory / "capture.json").read_text())


@pytest.mark.parametrize(("larger", "sft_vocab"), [("sft", 331), ("base", 301)])
def test_the_mass_of_ids_that_only_one_model_has_is_told(larger, sft_vocab, pairs, loaded, tmp_path):
    paths, common = pairs("llama", sft_vocab=sft_vocab), min(sft_vocab, tiny.VOCAB)
    _, document = captured(paths, tmp_path)
    states = walk(open_pair(paths), tiny.encode(tiny.PROMPTS), streamed=True)
    worst = max(
        float(
            lens_logits(loaded("llama", sft_vocab=sft_vocab), way, state, layer).softmax(-1)[:, common:].sum(-1).max()
        )
        for name, way in reference.FOUR.items()
        if way.head == larger
        for layer in LAYERS
        for state in states[name][layer]
    )
    smaller = "base" if larger == "sft" else "sft"
    assert worst > 0.01
    assert document["lens"]["left_out_mass"] == {larger: pytest.approx(worst, rel=1e-4), smaller: 0.0}


@pytest.mark.parametrize("broken", ["base", "sft"])
def test_an_overflow_is_counted_and_warned_of_and_leaves_nulls_in_its_own_passes_only(
    broken, tmp_path, caplog, monkeypatch
):
    paths = tiny.make_pair("llama", tmp_path / "pair", dtype=torch.float16)
    file = getattr(paths, broken) / "model.safetensors"
    weights = load_file(file)
    for name, factor in (("gate", 1000), ("up", 1000), ("down", 60000)):
        weights[f"model.layers.2.mlp.{name}_proj.weight"] *= factor
    save_file(weights, file, {"format": "pt"})
    monkeypatch.setattr(logging.getLogger("capture"), "propagate", True)
    directory, document = captured(paths, tmp_path / "out")
    rows = pq.read_table(directory / "runs.parquet", partitioning=None).to_pylist()
    lost = 0
    for row in rows:
        whole = reference.FOUR[row["run"]].blocks != broken or row["layer"] < 2
        lost += not whole and row["layer"] < 4  # layer 4 is layer 3 behind the final norm: the same logits
        assert np.isfinite(row["norm"]) == whole or row["layer"] == 4, row
        assert (row["entropy"] is not None) == whole, row
        assert (row["tracked_logits"] is not None) == whole, row
    assert document["numerics"]["nonfinite_lens_rows"] == lost > 0
    assert f"{lost} rows of logits are not finite" in caplog.text
    for row in pq.read_table(directory / "pairwise.parquet", partitioning=None).to_pylist():
        sides = [reference.FOUR[row[side]].blocks for side in ("base_run", "sft_run")]
        whole = broken not in sides or row["layer"] < 2
        assert (row["kl_divergence"] is not None) == (row["kl_reverse"] is not None) == whole, row


def test_a_head_that_masks_an_id_is_warned_of_where_it_takes_the_entropies(tmp_path, caplog, monkeypatch):
    paths = tiny.make_pair("gptj", tmp_path / "pair")
    weights = load_file(paths.sft / "model.safetensors")
    weights["lm_head.bias"][305] = -torch.inf  # an id that the tokenizer has not
    save_file(weights, paths.sft / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(logging.getLogger("capture"), "propagate", True)
    directory, document = captured(paths, tmp_path / "out")
    rows = pq.read_table(directory / "runs.parquet", partitioning=None).to_pylist()
    lost = sum(row["entropy"] is None for row in rows if row["layer"] < 4)  # layer 4 has the logits of layer 3
    assert document["numerics"]["nonfinite_lens_rows"] == lost > 0
    assert f"{lost} rows of logits are not finite" in caplog.text


def test_tables_written_in_many_chunks_hold_the_rows_of_one(pairs, tmp_path, monkeypatch):
    changes = {"prompts": tiny.PROMPTS * 2, "prompt_variants": ("identity", "mirror_halves")}
    whole, _ = captured(pairs("llama"), tmp_path / "whole", **changes)
    # room for two or three of the sixteen prompts: chunks end between prompts and between variants
    monkeypatch.setattr(tables, "ROW_GROUP", 1500)
    parts, _ = captured(pairs("llama"), tmp_path / "parts", **changes)
    for file in sorted(whole.glob("*.parquet")):
        one, many = (pq.ParquetFile(directory / file.name) for directory in (whole, parts))
        assert one.read().equals(many.read()), file.name
        if file.name.startswith(("runs", "pairwise")):
            assert one.num_row_groups == 1
            assert many.num_row_groups >= 4, file.name
    assert agree.read_tables(parts).keys() == agree.KEYS.keys()
