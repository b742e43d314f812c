import torch

from capture import statistics
from capture.statistics import cosine_distance, norm, norm_of_difference, residuals

GENERATOR = torch.Generator().manual_seed(0)
A = torch.randn(6, 512, generator=GENERATOR)


def test_norm_is_that_of_float64():
    assert torch.allclose(norm(A), A.double().square().sum(1).sqrt(), rtol=1e-12)


def test_norm_of_a_small_difference_keeps_its_digits():
    b = A + torch.full_like(A, 1e-3)
    exact = (b.double() - A.double()).square().sum(1).sqrt()
    assert torch.allclose(norm_of_difference(A, b), exact, rtol=1e-12)
    assert (norm_of_difference(A, A) == 0).all()


def test_cosine_distance_keeps_its_digits_near_zero():
    direction = torch.zeros(512, dtype=torch.float64)
    direction[3] = 1.0
    other = direction.clone()
    other[4] = 1e-5  # an angle of atan(1e-5): 1 - cos = 5e-11
    exact = 1e-10 / 2 * (1 - 3 / 4 * 1e-10)
    assert abs(cosine_distance(direction[None], other[None]).item() / exact - 1) < 1e-9
    assert (cosine_distance(A, A) == 0).all()
    assert torch.allclose(cosine_distance(A, -A), torch.tensor(2.0, dtype=torch.float64))


def test_a_cosine_distance_does_not_depend_on_how_long_vectors_are():
    b = A.flip(0)
    for short in (1.0, 1e-4, 1e-30):
        for x, y in ((A * short, b), (A, b * short), (A * short, b * short)):
            assert torch.allclose(cosine_distance(x, y), cosine_distance(A, b), rtol=1e-5)


def test_a_zero_vector_is_at_distance_one_from_others_and_zero_from_itself():
    zero = torch.zeros(1, 512)
    assert cosine_distance(zero, A[:1]).item() == 1
    assert cosine_distance(zero, zero).item() == 0


def test_all_at_once_is_what_each_is_alone(monkeypatch):
    states = [A, A + 0.1, torch.zeros_like(A)]
    before = [A * 2, torch.zeros_like(A)]
    turns, pairs = [(0, 0), (1, 1), (1, 2)], [(0, 1), (1, 2), (0, 0)]
    monkeypatch.setattr(statistics, "STATISTICS_CELLS_ON_CPU", 1024)  # two rows at a time
    found = residuals(
        [([x[some] for x in states], [x[some] for x in before]) for some in (slice(1), slice(1, 6))], turns, pairs
    )
    for i, x in enumerate(states):
        assert torch.equal(found.norm[i], norm(x))
    for i, (a, b) in enumerate(turns):
        assert torch.equal(found.norm_delta[i], norm(states[b]) - norm(before[a]))
        assert torch.equal(found.turned[i], cosine_distance(before[a], states[b]))
    for i, (a, b) in enumerate(pairs):
        assert torch.equal(found.distance[i], cosine_distance(states[a], states[b]))
        assert torch.equal(found.difference[i], norm_of_difference(states[a], states[b]))
    assert residuals([([A], [])], [], []).turned.shape == (0, 6)
