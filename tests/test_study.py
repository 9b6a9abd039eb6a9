"""The study's shortcut (all pair gradients, one Gram matrix) against steps that are really taken."""

import random

import pytest
import torch
from conftest import gradients, make_model, random_ids, relative_error

import uiollms
from uiollms.estimators import Importance, make_estimator
from uiollms.step import chunk_norms
from uiollms.study import (
    PeakMemory,
    as_preset,
    draw_weights,
    estimators_of,
    gram,
    markdown_table,
    pair_gradients,
    statistics_of,
    study_cost,
    study_gradients,
)

SAMPLE = uiollms.Sample.language_modeling(random_ids(38), 8)


def encoder_gradient(model, **settings) -> torch.Tensor:
    uiollms.gradient_step(model, SAMPLE, **settings)
    found = gradients(model)
    return torch.cat([g.flatten() for n, g in found.items() if n.startswith("encoder") and "layers.2" not in n])


def test_pair_gradients_add_up_to_the_steps(monkeypatch):
    model = make_model()
    pairs, vectors, norms = pair_gradients(model, SAMPLE)
    assert sorted(pairs) == [(t, s) for t in range(5) for s in range(t)]
    weights = torch.rand(5, 5, dtype=torch.float64).tril(-1)
    expected = encoder_gradient(model, weights=weights)
    t, s = (torch.tensor(x) for x in zip(*pairs, strict=True))
    assert relative_error(weights[t, s] @ vectors, expected) < 1e-10

    seen = []
    monkeypatch.setattr("uiollms.step.chunk_norms", lambda grads: seen.append(chunk_norms(grads)) or seen[0])
    encoder_gradient(model, estimator=Importance(2), rng=0)
    assert norms == pytest.approx(seen[0], rel=1e-10)


def test_statistics_are_those_of_the_drawn_gradients():
    model = make_model()
    pairs, vectors, norms = pair_gradients(model, SAMPLE)
    estimator, draws = make_estimator("uio", 2), 12
    found = statistics_of(draw_weights(estimator, pairs, 5, norms, draws, seed=3), gram(vectors, block=100), pairs)
    rng = random.Random(3)
    exact = encoder_gradient(model)
    drawn = torch.stack([encoder_gradient(model, weights=estimator.window(5, rng)) for _ in range(draws)])
    size = exact.norm()
    assert found["norm_ratio"] == pytest.approx((drawn.norm(dim=1) / size).mean().item())
    assert found["cosine"] == pytest.approx(torch.cosine_similarity(drawn, exact[None]).mean().item())
    assert found["relative_error"] == pytest.approx(((drawn - exact).norm(dim=1) / size).mean().item())
    assert found["bias"] == pytest.approx(((drawn.mean(0) - exact).norm() / size).item())
    assert found["variance"] == pytest.approx(((drawn - drawn.mean(0)).pow(2).sum(1).mean() / size**2).item())


def test_the_table_tells_the_biased_from_the_unbiased():
    rows = {(r["estimator"], r["S"]): r for r in study_gradients(make_model(), [random_ids(38)], [1, 9], draws=4000)}
    assert rows["exact", 10**6]["relative_error"] < 1e-6 and rows["uio", 9]["relative_error"] < 1e-6
    for name in ("uio", "importance"):
        assert rows[name, 1]["bias"] < 4 * rows[name, 1]["bias_noise"], name
    for name in ("tbptt", "uio, no factor"):
        assert rows[name, 1]["bias"] > 10 * rows[name, 1]["bias_noise"] + 0.05, name
    table = markdown_table(list(rows.values()))
    assert table.count("\n") == len(rows) + 2 and "| inf |" in table


def test_cost_counts_what_is_encoded_again():
    model = make_model()
    rows = {(r["estimator"], r["S"]): r for r in study_cost(model, random_ids(38), [1])}
    assert rows["exact", 10**6]["encoder_backwards"] == 4 and rows["importance", 1]["encoder_backwards"] <= 2
    assert all(row["seconds"] > 0 for row in rows.values()) and len(rows) == len(estimators_of([1]))


def test_peak_memory_sees_a_large_tensor():
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(64 * 2**20, dtype=torch.uint8).sum()
    assert peak.bytes > 50 * 2**20


def test_a_preset_is_left_as_it_was_entered():
    model = make_model()
    own = model.memory_config
    with as_preset(model, dict(chunk_size=4, num_memory=1)):
        assert model.encode(random_ids(2, 4)).shape == (3, 2, 1, 32)
    assert model.memory_config is own
