"""The rivals find what plain transformers finds, and the bench runs, on a pair that says nothing about speed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))

import bench_rivals
import pairs
import pytest
import rivals
import torch
from measured import Bench, wrong_result

SHAPE = pairs.SMOL | {"vocab": 400, "tokenizer_size": 400, "num_hidden_layers": 3, "hidden_size": 72}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return pairs.make_pair(tmp_path_factory.mktemp("rivals") / "pair", SHAPE)


@pytest.mark.slow
def test_all_parts_run_and_what_is_not_installed_is_named(small, capsys):
    bench = Bench("rivals", "make bench-rivals", threads=1)
    bench_rivals.run(bench, small, bench_rivals.PARTS, rounds=1, depths=(4,), n_tokens=8, shape=SHAPE)
    result = bench.result()
    assert wrong_result(result) == []
    names = {f["name"] for f in result["figures"]}
    assert {"transformers, batched", "transformers, four forwards", "transformers, disk offload", "naive", "memory 4", "json bytes"} <= names  # fmt: skip
    said = capsys.readouterr().out
    for package, name in (("nnsight", "nnsight"), ("transformer_lens", "TransformerLens"), ("airllm", "AirLLM")):
        assert (name in names) != (f"{name} is left out: No module named '{package}'" in said)


def test_the_naive_program_and_ours_say_the_same(small, tmp_path):
    stage = bench_rivals.Stage(small, tmp_path, 6)
    rival = rivals.plain(small, stage.ids, tmp_path)
    states = rival.states()
    naive = rivals.naive_record(rival, states, stage.tokens, top_k=5)
    lenses, residuals = rivals.our_statistics(rival, states, stage.ids, len(stage.tokenizer), top_k=5)
    norms, differences = (torch.cat([getattr(r, n) for r in residuals], 1) for n in ("norm", "difference"))
    for layer, (slots, both) in enumerate(lenses):
        rows = slice(layer * len(stage.ids), (layer + 1) * len(stage.ids))
        for p, run in enumerate(naive["runs"]):
            cells = list(run["layers"][str(layer)].values())
            torch.testing.assert_close(slots[p].entropy, torch.tensor([c["entropy"] for c in cells], dtype=torch.float64), rtol=1e-4, atol=1e-4)  # fmt: skip
            torch.testing.assert_close(norms[p, rows], torch.tensor([c["norm"] for c in cells], dtype=torch.float64), rtol=1e-5, atol=1e-5)  # fmt: skip
        for k, pair in enumerate(rivals.PAIRS):
            cells = list(naive["pairwise"][k]["layers"][str(layer)].values())
            kl = torch.tensor([c["kl_div"] for c in cells], dtype=torch.float64)
            torch.testing.assert_close(both[pair].kl_ba, kl, rtol=2e-2, atol=1e-4)
            assert both[pair].increased.ids.tolist() == [c["top_k_increased"]["indices"] for c in cells]
            torch.testing.assert_close(differences[k, rows], torch.tensor([c["norm_diff"] for c in cells], dtype=torch.float64), rtol=1e-4, atol=1e-4)  # fmt: skip
