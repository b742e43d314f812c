"""FP8 checkpoints, stored as DeepSeek-V3's are: read layer by layer, multiplied out, equal to the library bit for bit."""

import json

import pytest
import reference
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_parallel import free_ports
from torch import multiprocessing
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from walked import open_pair, walk

from capture import assemble
from capture.errors import CheckpointError, ConfigError
from capture.group import join_group, leave_group, local
from capture.ledger import Ledger
from capture.ranks import Ranks

IDS = tiny.random_ids(3, 12)
# several blocks in both directions, and matrices smaller than a block
WIDE = {"hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128}


def make(arch, directory, *, block=(128, 128), **options):
    paths = tiny.make_pair(arch, directory, dtype=torch.bfloat16, num_hidden_layers=2, **options)
    tiny.store_in_fp8(paths, block=block)
    return paths


@pytest.fixture(scope="module")
def fp8_pairs(tmp_path_factory):
    made = {}

    def get(arch, **options):
        key = f"{arch} {sorted(options.items())}"
        if key not in made:
            made[key] = make(arch, tmp_path_factory.mktemp(arch), **options)
        return made[key]

    return get


def by_the_library(paths):
    options = {"dtype": "auto", "quantization_config": FineGrainedFP8Config(dequantize=True)}
    base, sft = (AutoModelForCausalLM.from_pretrained(p, **options).eval() for p in (paths.base, paths.sft))
    return reference.LoadedPair(base, sft)


def assert_equal_states(got, want):
    for name, by_layer in want.items():
        for layer, state in by_layer.items():
            assert torch.equal(torch.stack(got[name][layer]), state), (name, layer)


CASES = [("deepseek_v3", (128, 128)), ("deepseek_v3", None), ("qwen3_moe", (128, 128)), ("llama", (128, 128))]


@pytest.mark.parametrize("mode", ["streamed", "resident", "sub-layer"])
@pytest.mark.parametrize(("arch", "block"), CASES)
def test_states_equal_plain_transformers_with_dequantize_bitwise(arch, block, mode, fp8_pairs):
    paths = fp8_pairs(arch, block=block, **WIDE)
    pair = open_pair(paths)
    got = walk(pair, IDS.tolist(), mode=mode)
    assert_equal_states(got, reference.residuals(by_the_library(paths), IDS))
    assert not [k for k in pair.models["base"].ledger.reads if ".layers.2." in k]  # the prediction layer
    assert [k for k in pair.models["base"].ignored_keys if ".layers.2." in k]


def test_blocks_that_the_edge_cuts_off_keep_their_size(tmp_path):
    """576 rows in blocks of 128, as in DeepSeek-V3's kv_a_proj_with_mqa, which the library refuses or divides evenly."""
    paths = make("deepseek_v3", tmp_path, **WIDE, kv_lora_rank=136, q_lora_rank=144)
    got = walk(open_pair(paths), IDS.tolist())
    for directory in (paths.base, paths.sft):
        stored = load_file(directory / "model.safetensors")
        plain = {
            k: tiny.from_fp8(t, stored[f"{k}_scale_inv"], (128, 128)).bfloat16() if f"{k}_scale_inv" in stored else t
            for k, t in stored.items()
            if not k.endswith("_scale_inv") and ".layers.2." not in k
        }
        config = json.loads((directory / "config.json").read_text())
        del config["quantization_config"]
        (directory / "config.json").write_text(json.dumps(config))
        save_file(plain, directory / "model.safetensors", metadata={"format": "pt"})
    assert_equal_states(got, reference.residuals(reference.load_pair(paths), IDS))


def test_weights_are_the_same_in_strips_of_any_size(fp8_pairs, monkeypatch):
    paths = fp8_pairs("deepseek_v3", block=(128, 128), **WIDE)
    whole = walk(open_pair(paths), IDS.tolist())
    monkeypatch.setattr(assemble, "STRIP", 1)  # one row of blocks
    strips = walk(open_pair(paths), IDS.tolist())
    for name in whole:
        for layer, states in whole[name].items():
            assert torch.equal(torch.stack(states), torch.stack(strips[name][layer])), (name, layer)


@pytest.mark.parametrize(("start", "rows"), [(0, 20), (3, 17), (8, 8), (5, 1), (7, 9), (2, 3)])
def test_a_share_that_begins_inside_a_block_is_multiplied_with_its_own_scales(start, rows):
    weight = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    stored, scale = tiny.to_fp8(weight, (8, 4))
    want = tiny.from_fp8(stored, scale, (8, 4))[start : start + rows]
    values = stored[start : start + rows].float()
    assemble._multiply(values, scale[:, torch.arange(8) // 4], start, 8)
    assert torch.equal(values, want)


def test_float32_is_the_product_unrounded(tmp_path):
    paths = make("llama", tmp_path)
    model = open_pair(paths, dtype="float32").models["base"]
    model.load(("layer", 1))
    stored = load_file(paths.base / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    want = tiny.from_fp8(stored[key], stored[f"{key}_scale_inv"], (128, 128))
    assert torch.equal(model.layers[1].mlp.up_proj.weight, want)


def test_bytes_scales_are_powers_of_two():
    _, scale = tiny.to_fp8(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), (4, 4))
    exponent = scale.log2().round()
    assert torch.equal(assemble._as_float((exponent + 127).to(torch.uint8)), exponent.exp2())


def test_float32_vectors_of_a_bfloat16_model_count_as_they_stand(fp8_pairs):
    """DeepSeek's e_score_correction_bias stays in float32."""
    model = open_pair(fp8_pairs("deepseek_v3", block=(128, 128), **WIDE)).models["base"]
    planned = {g: model.group_bytes(g) for g in model.groups()}
    for group in model.groups():
        model.load(group)
    assert planned == {g: model.loaded[g] for g in model.groups()}
    bias = model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert model.ledger.live == sum(t.nbytes for t in model.model.state_dict(keep_vars=True).values())


def test_missing_scales_are_named(tmp_path):
    paths = make("llama", tmp_path)
    file = paths.base / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"layer 1: 'model\.layers\.1\.mlp\.up_proj\.weight' is stored in FP8 without"
    ):
        open_pair(paths).models["base"].load(("layer", 1))


def test_scales_that_fit_no_block_are_named(tmp_path):
    paths = make("llama", tmp_path)
    file = paths.base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight_scale_inv"] = torch.ones(3, 5)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight'.*scales of shape \[3, 5\] do not fit .*\[80, 48\]"):
        open_pair(paths).models["base"].load(("layer", 1))


def test_quantizing_what_is_stored_quantized_is_refused(tmp_path):
    from capture.quantize import quantization_of

    paths = make("llama", tmp_path)
    asked = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    with pytest.raises(ConfigError, match=r"stored quantized \(fp8\); remove model_kwargs\.quantization_config"):
        quantization_of(str(paths.base), asked, "base")


def test_a_layer_takes_one_strip_more_while_it_is_read(fp8_pairs):
    model = open_pair(fp8_pairs("deepseek_v3", block=(128, 128), **WIDE)).models["base"]
    model.ledger = Ledger()
    model.load(("layer", 1))
    largest = max(p.numel() for p in model.layers[1].parameters() if p.dim() == 2)
    assert model.group_bytes(("layer", 1)) < model.ledger.peak <= model.group_bytes(("layer", 1)) + 5 * largest


def on_rank(rank, size, port, paths_of, out):
    """Load every weight as one rank of a group; leave the shares and what was read behind."""
    torch.set_num_threads(1)
    group = join_group(Ranks(rank, size, "127.0.0.1", port), torch.device("cpu"), minutes=3)
    for arch, paths in paths_of.items():
        model = open_pair(paths, group=group).models["base"]
        for each in model.groups():
            model.load(each)
        shares = {n: (local(t), places_of(t)) for n, t in model.model.state_dict().items()}
        torch.save((shares, model.ledger.reads, model.ledger.live), out / f"{arch}-{rank}.pt")
    leave_group(group)


def places_of(tensor):
    return [str(p) for p in getattr(tensor, "placements", [])]


def test_each_rank_multiplies_out_its_own_share_and_reads_no_more(tmp_path):
    """Shares of 64 rows begin inside blocks of 128."""
    options = {"num_key_value_heads": 4, "hidden_size": 256, "intermediate_size": 384}
    paths_of = {
        "llama": make("llama", tmp_path / "llama", **options),
        "qwen3_moe": make("qwen3_moe", tmp_path / "moe", moe_intermediate_size=192, **options),
    }
    multiprocessing.spawn(on_rank, (2, *free_ports(1), paths_of, tmp_path), nprocs=2)
    for arch, paths in paths_of.items():
        alone = open_pair(paths).models["base"]
        for group in alone.groups():
            alone.load(group)
        ranks = [torch.load(tmp_path / f"{arch}-{rank}.pt") for rank in range(2)]
        whole = alone.model.state_dict()
        divided = 0
        for name, tensor in whole.items():
            (first, placed), (second, _) = (r[0][name] for r in ranks)
            if placed in ([], ["R"]):
                assert torch.equal(first, tensor), name
                continue
            divided += 1
            axis = next(d for d in range(tensor.dim()) if first.shape[d] != tensor.shape[d])
            if name.endswith("gate_up_proj"):  # gate and up, each divided
                halves = [
                    torch.cat(pair, axis) for pair in zip(first.chunk(2, axis), second.chunk(2, axis), strict=True)
                ]
                assert torch.equal(torch.cat(halves, axis), tensor), name
            else:
                assert torch.equal(torch.cat([first, second], axis), tensor), name
        assert divided >= 8
        for shares, reads, live in ranks:
            assert live == sum(t.nbytes for t in {id(t): t for t, _ in shares.values()}.values())
            assert sum(n for k, n in reads.items() if "proj.weight" in k and "scale" not in k) * 2 == sum(
                n for k, n in alone.ledger.reads.items() if "proj.weight" in k and "scale" not in k
            )
