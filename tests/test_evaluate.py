"""Scores and perplexities: against the streaming model, a uniform model, and each other."""

import math

import pytest
import torch
from conftest import make_model, random_ids, relative_error
from torch.nn import functional as F

import uiollms
from uiollms.evaluate import PerplexityResult, evaluate_perplexity, score


def nll_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")


@pytest.mark.parametrize("protocol", ["paper", "document"])
@pytest.mark.parametrize("length", [2, 8, 9, 30])
def test_scores_are_the_streaming_models(family, protocol, length):
    model, ids = make_model(family), random_ids(1, length)
    model.chunk_batch = 2
    with torch.no_grad():
        expected = nll_of(model(ids).logits, ids)
    found = uiollms.score(model, ids, protocol)
    assert relative_error(found.nll, expected[found.positions - 1]) < 1e-12
    firsts = set(range(0, length, 8)) if protocol == "paper" else {0}
    assert found.positions.tolist() == [p for p in range(length) if p not in firsts]
    assert found.perplexity == pytest.approx(math.exp(found.nll.mean()))


def test_window_and_raw_are_the_base_model():
    model, ids = make_model(), random_ids(1, 30)
    with torch.no_grad():
        raw = nll_of(model.base(ids).logits, ids)
        alone = [nll_of(model.base(part).logits, part) for part in ids.split(8, 1)]
    found = score(model, ids, "paper", "raw")
    assert relative_error(found.nll, raw[found.positions - 1]) < 1e-12
    window = score(model, ids, "paper", "window")
    assert relative_error(window.nll, torch.cat(alone)) < 1e-12
    assert torch.equal(window.positions, found.positions)


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    model = make_model()
    torch.nn.init.zeros_(model.base.lm_head.weight)
    assert score(model, random_ids(1, 30)).perplexity == pytest.approx(61)


def test_documents_do_not_leak_into_each_other():
    """The release scores document 2 behind document 1's memories (6-faults-of-the-release.md, 2)."""
    model = make_model()
    a, b = random_ids(30, seed=1), random_ids(25, seed=2)
    both = evaluate_perplexity(model, [a, b], "x", None).per_document["memory"]
    alone = evaluate_perplexity(model, [b], "x", None).per_document["memory"]
    assert both[1] == alone[0] and both[1][1] == len(score(model, b).nll)


def test_evaluation_leaves_no_trace_in_training():
    model = make_model()
    sample = uiollms.Sample.language_modeling(random_ids(30), 8)
    uiollms.gradient_step(model, sample)
    before = {n: p.grad.clone() for n, p in model.trainable_parameters().items() if p.grad is not None}
    score(model, random_ids(30, seed=5))
    for p in model.trainable_parameters().values():
        p.grad = None
    uiollms.gradient_step(model, sample)
    assert all(torch.equal(p.grad, before[n]) for n, p in model.trainable_parameters().items() if n in before)


def test_too_long_documents_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="240 tokens, the capacity is 232"):
        score(model, random_ids(240))
    with pytest.raises(ValueError, match="raw context has 65 tokens, the base 64 positions"):
        score(model, random_ids(65), mode="raw")
    result = evaluate_perplexity(model, [random_ids(65)], "x", None, ["memory", "window", "raw"])
    assert set(result.per_document) == {"memory", "window"} and result.recovered is None


def test_summary_numbers():
    two = {"memory": [(math.log(10), 30), (math.log(20), 10)], "window": [(math.log(40), 40)], "raw": [(math.log(5), 40)]}
    result = PerplexityResult("x", 100, two)
    weighted = math.exp((30 * math.log(10) + 10 * math.log(20)) / 40)
    assert result.perplexity() == pytest.approx(weighted)
    summary = result.summary()
    assert (summary["mean"], summary["max"], summary["min"]) == pytest.approx((15, 20, 10))
    assert summary["scored_tokens"] == 40 and summary["recovered"] == pytest.approx((40 - weighted) / 35)
    low, high = result.interval()
    assert low == pytest.approx(10) and high == pytest.approx(20) and low <= weighted <= high
