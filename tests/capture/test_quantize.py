"""Weights of few bits through model_kwargs.quantization_config: the library's own numbers, resident, and on record."""

import json
import logging

import pytest
import reference
import tiny
import torch
import yaml
from test_capture import entry_of
from transformers import AutoModelForCausalLM
from walked import CPU, walk

from analysis.captures import captures_table
from capture import checkpoint, opening, quantize
from capture.checkpoint import StreamedModel, layers_equal
from capture.config import FOUR_PASSES, load_config
from capture.errors import CheckpointError, ConfigError, UnsupportedModelError
from capture.group import Group
from capture.identity import capture_id
from capture.layout import RunDir
from capture.ledger import Ledger
from capture.lockstep import Pair
from capture.quantize import Quantization, asked_for, check_asked, quantization_of
from capture.run import capture_pair, resolve

IDS = tiny.random_ids(3, 12)
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}
PLAIN = {"dtype": torch.bfloat16, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def _quiet():
    """bitsandbytes says for every product that it casts."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def opened(paths, config, label="base"):
    path = getattr(paths, label)
    kwargs = {"quantization_config": config}
    return StreamedModel(str(path), label=label, dtype="auto", device=CPU, model_kwargs=kwargs, ledger=Ledger())


@pytest.mark.parametrize(
    "config", [EIGHT, FOUR, INT8], ids=lambda c: c["quant_method"] + str(c.get("load_in_4bit", ""))
)
def test_states_equal_plain_transformers_with_the_same_config_bitwise(config, pairs):
    pytest.importorskip(config["quant_method"])
    paths = pairs("llama", **PLAIN)
    got = walk(Pair(opened(paths, config), opened(paths, config, "sft"), FOUR_PASSES), IDS.tolist(), mode="resident")
    library = quantization_of(str(paths.base), {"quantization_config": config}, "base").kwargs
    models = [AutoModelForCausalLM.from_pretrained(p, dtype="auto", **library).eval() for p in (paths.base, paths.sft)]
    for name, by_layer in reference.residuals(reference.LoadedPair(*models), IDS).items():
        for layer, state in by_layer.items():
            assert torch.equal(torch.stack(got[name][layer]), state), (name, layer)
    plain = reference.residuals(reference.load_pair(paths), IDS)["BB"][1]
    assert reference.relative_error(torch.stack(got["BB"][1]), plain) > 1e-3  # it is not the plain model


def test_a_capture_says_so_everywhere_and_has_an_id_of_its_own(pairs, tmp_path):
    pytest.importorskip("bitsandbytes")
    paths = pairs("llama", **PLAIN)
    plain, entry = entry_of(paths), entry_of(paths, model_kwargs={"quantization_config": FOUR})
    files = resolve(entry)
    ids = [capture_id(e, files.base, files.sft, files.tokenizer_hash) for e in (plain, entry)]
    assert ids[0] != ids[1]
    done = capture_pair(entry, str(tmp_path))
    assert done.capture == ids[1]
    assert done.mode == "resident, bitsandbytes 4-bit"
    run = RunDir(str(tmp_path))
    (row,) = captures_table(run, list(run.captures())).to_pylist()
    assert json.loads(row["quantization"])["sft"] == {"in_memory": "bitsandbytes"} | FOUR
    document = json.loads((tmp_path / f"captures/pair=tiny/capture={ids[1]}/capture.json").read_text())
    assert document["self_checks"]["base_logits_relative_error"] < 0.03  # through the unembedding, which is plain
    assert document["mode"] == "resident"


def test_the_weights_are_counted_as_they_stand(pairs):
    pytest.importorskip("bitsandbytes")
    paths = pairs("llama", **PLAIN)
    four, plain = opened(paths, FOUR), opened(paths, None)
    assert 0.25 < four.group_bytes(("layer", 0)) / plain.group_bytes(("layer", 0)) < 0.35
    assert not layers_equal(four, opened(paths, FOUR), [("layer", 0)])  # packed numbers alone prove nothing


def test_a_package_that_is_not_installed_is_named_with_the_line_that_installs_it(pairs, monkeypatch):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"asks for bitsandbytes, which is not installed\. Run: pip install bitsandbytes"
    ):
        opened(pairs("llama", **PLAIN), FOUR)


@pytest.mark.parametrize(("config", "says"), [
    ("int4", "must be a block with quant_method, not 'int4'"),
    ({"quant_method": "gptq"}, "quant_method is 'gptq'; expected bitsandbytes or torchao"),
    ({"load_in_4bit": True}, "quant_method is None; expected bitsandbytes or torchao"),
    ({"quant_method": "bitsandbytes"}, "exactly one of load_in_4bit: true and load_in_8bit: true"),
    ({"quant_method": "torchao"}, "quant_type must name a class of torchao.quantization"),
])  # fmt: skip
def test_a_block_that_makes_no_sense_is_told_before_anything_is_opened(config, says):
    with pytest.raises(ConfigError, match=says):
        asked_for({"quantization_config": config})


def test_the_librarys_own_keys_are_checked(pairs):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match="BitsAndBytesConfig has no 'nf4'; it has bnb_4bit_compute_dtype"):
        opened(pairs("llama", **PLAIN), FOUR | {"nf4": True})


def test_old_keys_are_pointed_to_their_place():
    with pytest.raises(ConfigError, match=r"load_in_4bit goes into quantization_config: \{quant_method: bitsandbytes"):
        asked_for({"load_in_4bit": True})


@pytest.mark.parametrize(("keys", "says"), [
    ({"mode": "streamed"}, "weights quantized by bitsandbytes are loaded whole; set mode: resident, not streamed"),
    ({"tensor_parallel": 2}, "stay on one GPU; set tensor_parallel: 1"),
])  # fmt: skip
def test_streamed_and_divided_models_are_refused_by_the_config(keys, says, pairs, tmp_path):
    paths = pairs("llama", **PLAIN)
    block = {
        "base_model": str(paths.base), "sft_model": str(paths.sft), "prompts": ["Why?"],
        "model_kwargs": {"quantization_config": FOUR},
    }  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"residual_compare": block | keys}))
    with pytest.raises(ConfigError, match=rf"config\.yaml: residual_compare\.model_kwargs: .*{says}"):
        load_config(file).entries()
    file.write_text(yaml.safe_dump({"residual_compare": block}))
    assert load_config(file).entries()[0].model_kwargs["quantization_config"] == FOUR
    check_asked({"quantization_config": FOUR}, "resident", 1)


def standing_in(monkeypatch, spoil=lambda model: None):
    """A backend that leaves weights as they are, so that what surrounds it can be seen without one."""
    monkeypatch.setattr(checkpoint, "quantization_of", lambda *_: Quantization("fake", {"bits": 16}))
    opener = opening.AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args, device_map, **kwargs):
        assert device_map == {"": CPU}
        model, found = opener(*args, **kwargs)
        spoil(model)
        return model, found

    monkeypatch.setattr(opening.AutoModelForCausalLM, "from_pretrained", from_pretrained)


def test_a_quantized_model_is_loaded_whole_and_never_freed(pairs, monkeypatch):
    standing_in(monkeypatch)
    model = opened(pairs("llama"), None)
    assert model.whole
    for group in model.groups():
        model.free(group)
    assert not any(p.is_meta for p in model.model.parameters())
    assert model.quantization.record == {"in_memory": "fake", "bits": 16}


def test_a_quantized_unembedding_is_refused(pairs, monkeypatch):
    def spoil(model):
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(307, 48, dtype=torch.int8), requires_grad=False)

    standing_in(monkeypatch, spoil)
    with pytest.raises(UnsupportedModelError, match=r"its unembedding is quantized too.*modules_to_not_convert"):
        opened(pairs("llama"), None)


def test_a_quantized_model_is_not_divided(pairs, monkeypatch):
    standing_in(monkeypatch)
    with pytest.raises(UnsupportedModelError, match="quantized by fake, which stay on one GPU; set tensor_parallel: 1"):
        StreamedModel(str(pairs("llama").base), label="base", dtype="auto", device=CPU, model_kwargs={},
                      ledger=Ledger(), group=Group(0, 2))  # fmt: skip


def test_what_a_backend_cannot_make_is_told(pairs, monkeypatch):
    def spoil(model):
        raise RuntimeError("We encountered some issues during automatic conversion of the weights.")

    standing_in(monkeypatch, spoil)
    with pytest.raises(
        CheckpointError, match="fake cannot make weights of this kind on this machine; the log says why"
    ):
        opened(pairs("llama"), None)
