"""Compares the studies (gradients of all pairs and their Gram matrix) with gradient steps."""

import json
import random

import pytest
import torch
from conftest import MEMORY as MEMORY_CONFIG
from conftest import gradients, make_base, make_model, random_ids, relative_error

import uiollms
from uiollms.cli.study import as_preset
from uiollms.cli.study import main as study
from uiollms.config.sections import TrainSection
from uiollms.files.errors import ConfigError
from uiollms.kernels.peak_memory import PeakMemory
from uiollms.study.cost import study_cost
from uiollms.study.gradients import (
    draw_weights,
    estimators_of,
    gram,
    pair_gradients,
    statistics_of,
    study_gradients,
)
from uiollms.study.learning import compare, summarise
from uiollms.study.recall import MEMORY, VOCABULARY, draw_documents, recall_sample, recall_samples
from uiollms.study.tables import markdown_table
from uiollms.training.estimators import Importance, make_estimator
from uiollms.training.step import chunk_norms

SAMPLE = uiollms.Sample.language_modeling(random_ids(38), 8)


def encoder_gradient(model, **settings) -> torch.Tensor:
    uiollms.gradient_step(model, SAMPLE, **settings)
    found = gradients(model)
    names = [name for name in found if name.startswith("encoder") and "layers.2" not in name]
    return torch.cat([found[name].flatten() for name in names])


@pytest.mark.parametrize("slot_input", ["token", "last"])
def test_pair_gradients_add_up_to_the_gradients_of_a_step(monkeypatch, slot_input):
    model = make_model(config=MEMORY_CONFIG.model_copy(update={"slot_input": slot_input}))
    pairs, vectors, norms = pair_gradients(model, SAMPLE)
    assert sorted(pairs) == [(t, s) for t in range(5) for s in range(t)]
    weights = torch.rand(5, 5, dtype=torch.float64).tril(-1)
    expected = encoder_gradient(model, weights=weights)
    t, s = (torch.tensor(x) for x in zip(*pairs, strict=True))
    assert relative_error(weights[t, s] @ vectors, expected) < 1e-10

    norms_of_step = []
    monkeypatch.setattr(
        "uiollms.training.step.chunk_norms",
        lambda grads: norms_of_step.append(chunk_norms(grads)) or norms_of_step[0],
    )
    encoder_gradient(model, estimator=Importance(2), rng=0)
    assert norms == pytest.approx(norms_of_step[0], rel=1e-10)


def test_statistics_equal_those_of_drawn_gradients():
    model = make_model()
    pairs, vectors, norms = pair_gradients(model, SAMPLE)
    estimator, draws = make_estimator("uio", 2), 12
    weights = draw_weights(estimator, pairs, 5, norms, draws, seed=3)
    found = statistics_of(weights, gram(vectors, block=100), pairs)
    rng = random.Random(3)
    exact = encoder_gradient(model)
    drawn = torch.stack(
        [encoder_gradient(model, weights=estimator.weight_matrix(5, rng)) for _ in range(draws)]
    )
    mean, size = drawn.mean(0), exact.norm()
    expected = dict(
        norm_ratio=(drawn.norm(dim=1) / size).mean(),
        cosine=torch.cosine_similarity(drawn, exact[None]).mean(),
        relative_error=((drawn - exact).norm(dim=1) / size).mean(),
        bias=(mean - exact).norm() / size,
        variance=(drawn - mean).pow(2).sum(1).mean() / size**2,
    )
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item()), name


def test_the_table_distinguishes_biased_from_unbiased_estimators():
    found = study_gradients(make_model(), [random_ids(38)], [1, 9], draws=4000)
    rows = {(row["estimator"], row["S"]): row for row in found}
    assert rows["exact", 10**6]["relative_error"] < 1e-6 and rows["uio", 9]["relative_error"] < 1e-6
    for name in ("uio", "importance"):
        assert rows[name, 1]["bias"] < 4 * rows[name, 1]["bias_noise"], name
    for name in ("tbptt", "uio, no factor"):
        assert rows[name, 1]["bias"] > 10 * rows[name, 1]["bias_noise"] + 0.05, name
    table = markdown_table(list(rows.values()))
    assert table.count("\n") == len(rows) + 2 and "| inf |" in table


def test_cost_counts_the_chunks_encoded_again():
    model = make_model()
    rows = {(row["estimator"], row["S"]): row for row in study_cost(model, random_ids(38), [1])}
    assert rows["exact", 10**6]["encoder_backwards"] == 4
    assert rows["importance", 1]["encoder_backwards"] <= 2
    assert all(row["seconds"] > 0 for row in rows.values()) and len(rows) == len(estimators_of([1]))
    chosen = study_cost(model, random_ids(38), [1, 2], repeats=2, names=["uio"])
    assert [(r["estimator"], r["S"]) for r in chosen] == [("uio", 1), ("uio", 2)]


def test_peak_memory_includes_a_large_tensor():
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(64 * 2**20, dtype=torch.uint8).sum()
    assert peak.bytes > 50 * 2**20


def test_a_preset_is_reset_afterwards():
    model = make_model()
    config = model.memory_config
    with as_preset(model, dict(chunk_size=4, num_memory=1)):
        assert model.encode(random_ids(2, 4)).shape == (3, 2, 1, 32)
    assert model.memory_config is config


def test_the_comparison_reads_curves_at_equal_iterations_and_at_equal_seconds():
    """`exact` needs 2 s per iteration and `tbptt` 1 s, so after 10 s they have done 5 and 10."""
    curves = [
        dict(estimator=name, S=1, seed=seed, iterations=[0, 10], nll=[4.0, end + seed])
        for name, end in (("exact", 2.0), ("tbptt", 3.0))
        for seed in (0, 1)
    ]
    exact, tbptt = summarise(curves, {("exact", 1): 2.0, ("tbptt", 1): 1.0})
    assert exact["equal iterations"] == "2.500 +- 6.353"
    assert tbptt["equal iterations, to exact"] == "1.000 +- 0.000"
    assert exact["equal seconds"].startswith("3.250")
    assert tbptt["equal seconds, to exact"].startswith("0.250")
    assert exact["equal iterations, to exact"] == ""


def test_recall_queries_facts_of_distance_chunks_before():
    ids, answers = draw_documents(torch.Generator().manual_seed(0), torch.tensor([3, 0]))
    for document, distance in zip(ids.view(2, 16, 8), (3, 0), strict=True):
        facts = [{pair // 8: pair % 8 for pair in chunk[:4].tolist()} for chunk in document]
        assert len(set().union(*facts)) == 64, "a key is there twice"
        for t, chunk in enumerate(document):
            source = facts[t - distance if t >= distance else t]
            for query, answer in chunk[4:].view(2, 2).tolist():
                assert source[query - 512] == answer - 576
    sample = recall_sample(ids[0], answers[0], 3)
    assert answers.sum() == 64 and sample.num_scored == 2 * 13
    assert all(len(row.scored) == 0 for row in sample.rows[:3])


def test_a_truncated_gradient_cannot_learn_distant_facts():
    """At distance 3 an answer depends on the memory of 3 chunks before only. tbptt with S = 1 sends
    no gradient there."""
    model, sample = make_recall_model(), next(recall_samples(3, seed=0))
    weights = make_estimator("tbptt", S=1).weight_matrix(16, random.Random(0))
    distant = torch.ones(16, 16).tril(-3).triu(-3)
    assert (weights * distant).sum() == 0
    uiollms.gradient_step(model, sample, weights=distant)
    assert model.encoder.get_parameter("retrieval_token").grad.norm() > 0


def make_recall_model():
    base = make_base(dtype=torch.float32, vocab_size=VOCABULARY, max_position_embeddings=128)
    return uiollms.MemoryLM(base, MEMORY)


def test_learn_returns_a_curve_that_the_seed_determines():
    train = TrainSection.model_validate(
        dict(
            tbptt=1,
            train_iters=4,
            max_lr=1e-2,
            eval=2,
            save=4,
            corpus=(dict(name="recall", partition=1),),
        )
    )
    stream = recall_samples(1, seed=9)
    held_out = [next(stream) for _ in range(2)]

    def start(seed):
        torch.manual_seed(seed)
        return make_recall_model(), recall_samples(1, seed)

    curves = []
    estimators = [e for e in estimators_of([1]) if e[0] in ("uio", "exact")]
    compare(estimators, [0], start, held_out, train, [], curves.append)
    assert [curve["estimator"] for curve in curves] == ["uio", "exact"]
    assert curves[0]["iterations"] == [0, 2, 4]
    assert curves[0]["nll"][0] == curves[1]["nll"][0] and curves[0]["nll"] != curves[1]["nll"]
    again = []
    done = curves[:1]
    compare(estimators, [0], start, held_out, train, done, again.append)
    assert [curve["estimator"] for curve in again] == ["exact"]
    assert again[0]["nll"] == curves[1]["nll"]
    nll = sum(float(uiollms.gradient_step(start(0)[0], sample).nll) for sample in held_out)
    expected = nll / sum(sample.num_scored for sample in held_out)
    assert curves[0]["nll"][0] == pytest.approx(expected, rel=1e-5)


def test_the_learning_study_trains_compares_and_continues(workspace, capsys):
    arguments = ["learning", "--env_conf", "env.json", "--seeds", "2", "--out", "out/study"]
    arguments += ["--set", "train.eval=3"]
    study(arguments)
    curves = (workspace / "out/study/curves.jsonl").read_text()
    rows = json.loads((workspace / "out/study/results.json").read_text())["rows"]
    assert curves.count("\n") == 1 + 5 * 2 and {row["seeds"] for row in rows} == {2}
    assert (workspace / "out/study/plot.png").stat().st_size > 0
    # The second call finds all curves and trains nothing.
    study(arguments)
    assert (workspace / "out/study/curves.jsonl").read_text() == curves
    message = "curves.jsonl: its curves were trained with other settings"
    with pytest.raises(ConfigError, match=message):
        study([*arguments, "--set", "train.max_lr=5e-3"])
