"""Each of the 18 models of the hardware table, cut to two layers of its own shape family: exact in every way to walk it."""

import json

import pytest
import reference
import tiny
import torch
import yaml
from shapes import FACTS, facts, make_shape
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from walked import open_pair, walk

IDS = tiny.random_ids(3, 12)
MODELS = facts()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            paths = make_shape(name, tmp_path_factory.mktemp("shape"))
            float8 = MODELS[name]["stored"] == "float8"
            options = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if float8 else {}
            loaded = [
                AutoModelForCausalLM.from_pretrained(p, dtype="auto", **options).eval() for p in (paths.base, paths.sft)
            ]
            made[name] = paths, reference.residuals(reference.LoadedPair(*loaded), IDS)
        return made[name]

    return get


@pytest.mark.parametrize("mode", ["streamed", "resident", "sub-layer"])
@pytest.mark.parametrize("name", MODELS)
def test_states_equal_plain_transformers_bitwise(name, mode, shapes):
    paths, want = shapes(name)
    got = walk(open_pair(paths), IDS.tolist(), mode=mode)
    for run, by_layer in want.items():
        assert got[run].keys() == by_layer.keys()
        for layer, state in by_layer.items():
            assert state.dtype == torch.bfloat16
            assert torch.equal(torch.stack(got[run][layer]), state), (run, layer)


def test_the_shapes_are_those_of_the_hardware_table(shapes):
    table = yaml.safe_load((FACTS.parent / "hardware_table.yaml").read_text())["residual_compare"]["model_sweep"]
    assert len(MODELS) == 18
    assert [e["name"] for e in table] == list(MODELS)
    for name, record in MODELS.items():
        paths, _ = shapes(name)
        config = json.loads((paths.sft / "config.json").read_text())
        assert config["model_type"] == record["model_type"]
        assert config["num_attention_heads"] * record["kv_heads"] == config["num_key_value_heads"] * record["heads"]
        ffn, true = config["intermediate_size"] / config["hidden_size"], record["ffn"] / record["hidden"]
        assert abs(ffn / true - 1) < 0.05, (name, ffn, true)
        assert config["tie_word_embeddings"] == record["tied"]
        stored = "float8" if "quantization_config" in config else config["dtype"]
        assert stored == record["stored"]
        if record["model_type"] != "deepseek_v3":
            head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            ratio = config["hidden_size"] / (config["num_attention_heads"] * head_dim)
            assert ratio == record["hidden"] / (record["heads"] * record["head_dim"])
