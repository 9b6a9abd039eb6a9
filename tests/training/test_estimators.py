"""Tests of the expectation and the bias of the estimators' weight matrices.

Nothing is sampled. The tests enumerate every outcome of the reservoir for a small number of chunks
and weight it with its probability.
"""

import itertools
import random

import pytest
import torch

from uiollms.training.estimators import (
    ESTIMATORS,
    TBPTT,
    UIO,
    Exact,
    Importance,
    all_pairs,
    draw_window,
    inclusion_probabilities,
    make_estimator,
    systematic_sample,
    window_from_draws,
)


def reservoir_outcomes(num_chunks: int, S: int):
    """Yields all draws of one document with their probabilities. Chunk c >= S draws one of the
    numbers 0 .. c with equal probability."""
    ranges = [range(c + 1) for c in range(S, num_chunks)]
    probability = 1.0
    for r in ranges:
        probability /= len(r)
    for draws in itertools.product(*ranges):
        yield list(draws), probability


def expected_weights(num_chunks: int, S: int, compensate: bool) -> torch.Tensor:
    return sum(
        probability * window_from_draws(draws, S, compensate, num_chunks)
        for draws, probability in reservoir_outcomes(num_chunks, S)
    )


def bias(weights: torch.Tensor) -> float:
    """Returns the largest distance of an expected weight below the diagonal from 1."""
    return (weights - all_pairs(len(weights))).abs().max().item()


@pytest.mark.parametrize("S", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("num_chunks", [1, 2, 5, 6])
def test_expected_uio_weights_are_one(num_chunks, S):
    assert bias(expected_weights(num_chunks, S, compensate=True)) < 1e-12


@pytest.mark.parametrize("S", [1, 2, 3])
def test_without_compensation_expected_uio_weights_are_S_over_t(S):
    """The weights of the release are biased by exactly 1 - min(1, S / t)."""
    weights = expected_weights(6, S, compensate=False)
    for t in range(6):
        for s in range(t):
            assert weights[t, s] == pytest.approx(min(1, S / t))
    assert bias(weights) == pytest.approx(1 - S / 5)


def test_tbptt_is_biased():
    weights = TBPTT(2).weight_matrix(6, random.Random(0))
    assert bias(weights) == 1
    for t in range(6):
        assert weights[t].nonzero().flatten().tolist() == list(range(max(0, t - 2), t))


def test_fraction_of_terms_in_the_release():
    """With S = 2 and chunks of 1,024 tokens, the release has 46 % of the terms at 8K tokens and
    4 % at 100K."""

    def fraction(num_chunks: int) -> float:
        terms = [min(1.0, 2 / t) for t in range(1, num_chunks) for _ in range(t)]
        return sum(terms) / len(terms)

    assert fraction(8) == pytest.approx(0.46, abs=0.01)
    assert fraction(97) == pytest.approx(0.04, abs=0.005)


def test_worked_example_of_reservoir_weights():
    assert window_from_draws([1, 0], 1, True).tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
    assert window_from_draws([0, 0], 1, True).tolist() == [[0, 0, 0], [1, 0, 0], [0, 2, 0]]


def test_reservoir_is_uniform_over_subsets():
    """Every set of S among t chunks is equally likely (Vitter 1985), not only every member."""
    counts: dict[tuple[int, ...], float] = {}
    for draws, probability in reservoir_outcomes(6, 2):
        members = tuple(window_from_draws(draws, 2, False, 6)[5].nonzero().flatten().tolist())
        counts[members] = counts.get(members, 0) + probability
    assert set(counts) == set(itertools.combinations(range(5), 2))
    assert all(p == pytest.approx(1 / 10) for p in counts.values())


@pytest.mark.parametrize("name", ["tbptt", "uio"])
def test_a_weight_matrix_with_S_of_the_whole_document_is_exact(name):
    for S in (5, 9):
        assert torch.equal(draw_window(name, 6, 0, S=S), Exact().weight_matrix(6, random.Random(0)))


def test_uio_draws_one_number_for_every_chunk_after_the_first_S():
    class Recorder(random.Random):
        ranges: list = []

        def randint(self, a, b):
            self.ranges.append((a, b))
            return super().randint(a, b)

    UIO(2).weight_matrix(5, Recorder(0))
    assert Recorder.ranges == [(0, 2), (0, 3), (0, 4)]
    assert torch.equal(draw_window("uio", 9, 3), draw_window(UIO(2), 9, random.Random(3)))


@pytest.mark.parametrize(
    "norms", [[1.0, 2, 3, 4], [0.0, 0, 5], [1.0] * 6, [1e-9, 1, 1000, 2, 3], [0.0, 0.0]]
)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_expected_importance_weights_are_one(norms, size):
    """The sample depends on one uniform number and does not change between two breakpoints, so the
    expectation is a finite sum."""
    inclusion = inclusion_probabilities(norms, size, floor=0.1)
    assert sum(inclusion) == pytest.approx(min(size, len(norms)))
    assert all(0 < p <= 1 for p in inclusion)
    ends = list(itertools.accumulate(inclusion))
    breaks = sorted({0.0, 1.0, *(end % 1.0 for end in ends)})
    mean = [0.0] * len(norms)
    for low, high in itertools.pairwise(breaks):
        if high - low < 1e-12:
            continue
        for i, chosen in enumerate(systematic_sample(inclusion, (low + high) / 2)):
            mean[i] += (high - low) * chosen / inclusion[i]
    assert mean == pytest.approx([1.0] * len(norms), abs=1e-9)


def test_importance_prefers_large_gradients_and_includes_every_chunk():
    inclusion = inclusion_probabilities([0.0, 1.0, 9.0], 1, floor=0.3)
    assert inclusion == pytest.approx([0.1, 0.17, 0.73])
    columns = Importance(2).columns([1.0, 5.0, 2.0, 0.5], random.Random(1))
    assert 1 <= sum(c > 0 for c in columns) <= 3


def test_names_and_settings():
    assert make_estimator("uio", 3, False) == UIO(3, False)
    assert make_estimator("tbptt", 3, False) == TBPTT(3)
    assert set(ESTIMATORS) == {"exact", "tbptt", "uio", "importance"}
    message = "'magic' is unknown; known: exact, tbptt, uio, importance"
    with pytest.raises(ValueError, match=message):
        make_estimator("magic")
