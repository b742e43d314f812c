"""The spectrum of the differences: formulas on matrices whose answer is known, and whole captures against a plain SVD."""

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import reference
import tiny
import torch

from capture.config import Comparison, Entry
from capture.run import capture_pair
from capture.spectrum import Spectra, effective_rank, mean_shift_share, participation_ratio, singular_values

TEXTS = (*tiny.PROMPTS, tiny.PROMPTS[0][::-1])


def spectrum(paths, out, **settings):
    """The rows of a capture's spectrum by (variant, base_run, sft_run, layer)."""
    entry = Entry(
        name="tiny", base_model=str(paths.base), tokenizer=str(paths.tokenizer), prompts=TEXTS, device="cpu",
        **{"spectrum": True, "sft_model": str(paths.sft)} | settings,
    )  # fmt: skip
    path = capture_pair(entry, str(out)).path
    rows = pq.read_table(Path(path) / "spectrum.parquet", partitioning=None).to_pylist()
    return {(r["variant"], r["base_run"], r["sft_run"], r["layer"]): r for r in rows}


def test_measures_of_matrices_that_are_known():
    one_way = torch.ones(5, 1, dtype=torch.float64) @ torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    s = singular_values(one_way)
    assert s.tolist() == pytest.approx([5 * math.sqrt(5), 0], abs=1e-6)
    assert effective_rank(s) == pytest.approx(1, abs=1e-6)
    assert participation_ratio(s) == pytest.approx(1)
    assert mean_shift_share(one_way) == pytest.approx(1)

    even = torch.eye(4, 7, dtype=torch.float64)
    s = singular_values(even)
    assert s.tolist() == pytest.approx([1] * 4)
    assert effective_rank(s) == pytest.approx(4)
    assert participation_ratio(s) == pytest.approx(4)
    assert mean_shift_share(even) == pytest.approx(4 * 4 / 16 / 4)

    uneven = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert effective_rank(uneven) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert participation_ratio(uneven) == pytest.approx((9 + 1) ** 2 / (81 + 1))
    for small in (1e-3, 1e-160):  # whose fourth powers are none
        assert effective_rank(uneven * small) == pytest.approx(effective_rank(uneven))
        assert participation_ratio(uneven * small) == pytest.approx(participation_ratio(uneven))
    assert math.isnan(participation_ratio(0 * uneven))


@pytest.mark.parametrize("shape", [(9, 40), (40, 9), (1, 5)])
def test_singular_values_are_those_of_an_svd(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(singular_values(x), torch.linalg.svdvals(x), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_spectra_of_a_capture_are_those_of_the_reference_states(arch, pairs, tmp_path):
    paths = pairs(arch)
    found = spectrum(paths, tmp_path, spans={"layers": 1})
    pair, prompts = reference.load_pair(paths), tiny.encode(TEXTS)
    states = reference.residuals_one_by_one(pair, prompts)
    layers = states[0]["BB"]
    assert len(found) == 6 * len(layers)
    for (_, base_run, sft_run, layer), row in found.items():
        x = torch.cat([s[sft_run][layer].double() - s[base_run][layer].double() for s in states])
        want = torch.linalg.svdvals(x)
        got = np.array(row["singular_values"])
        assert got.shape == want.shape
        assert got == pytest.approx(want.numpy(), rel=1e-3, abs=1e-5 * float(want[0]) + 1e-6)
        if want[0] == 0:
            assert row["effective_rank"] is row["participation_ratio"] is row["mean_shift_share"] is None
            continue
        p = want / want.sum()
        assert row["effective_rank"] == pytest.approx(float(torch.exp(-torch.special.xlogy(p, p).sum())), rel=1e-3)
        assert row["participation_ratio"] == pytest.approx(
            float(want.square().sum() ** 2 / want.pow(4).sum()), rel=1e-3
        )
        share = x.shape[0] * x.mean(0).square().sum() / x.square().sum()
        assert row["mean_shift_share"] == pytest.approx(float(share), rel=1e-3, abs=1e-6)


def test_each_variant_has_a_spectrum_of_its_own_and_nothing_differs_from_itself(pairs, tmp_path):
    paths = pairs("llama")
    found = spectrum(paths, tmp_path, prompt_variants=("identity", "mirror_halves"), sft_model=str(paths.base))
    assert {key[0] for key in found} == {"identity", "mirror_halves"}
    for row in found.values():
        assert set(row["singular_values"]) == {0.0}
        assert row["effective_rank"] is None
        assert row["participation_ratio"] is None
        assert row["mean_shift_share"] is None


def test_a_variants_spectrum_is_of_its_own_tokens_wherever_they_stand_and_none_where_one_overflowed():
    generator = torch.Generator().manual_seed(2)
    base, sft = (torch.randn(7, 4, generator=generator) for _ in range(2))
    variant_of = np.array([0, 1, 1, 0, 1, 2, 2])
    sft[5, 0] = torch.inf
    both = [Comparison(base_run=a, sft_run=b) for a, b in (("BB", "SS"), ("SS", "BB"))]
    found = Spectra(both, 1, 4, variant_of, 3)
    for last, where in ((False, [4, 0, 5]), (True, [1, 2, 3, 6])):  # two batches
        found.take(0, [base[where], sft[where]], {"BB": 0, "SS": 1}, np.array(where), last=last)
    values = found.arrays["singular_values"]
    assert values.shape == (2, 3, 3, 3), "comparisons, layers, variants, tokens of the longest variant"
    for v, tokens in ((0, [0, 3]), (1, [1, 2, 4])):
        want = torch.linalg.svdvals((sft[tokens] - base[tokens]).double())
        for c in range(2):
            assert values[c, 1, v, : len(want)] == pytest.approx(want.numpy(), rel=1e-5)
            assert found.arrays["effective_rank"][c, 1, v] == pytest.approx(effective_rank(want), rel=1e-5)
    assert np.isnan(values[:, 1, 0, 2]).all()
    assert np.isnan(values[:, 1, 2]).all(), "one of its states overflowed"
    assert np.isnan(values[:, [0, 2]]).all(), "layers that were not taken"


def test_no_spectrum_unless_it_is_asked_for(pairs, tmp_path):
    with pytest.raises(FileNotFoundError):
        spectrum(pairs("llama"), tmp_path, spectrum=False)
