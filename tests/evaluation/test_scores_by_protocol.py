"""Compares the protocols of other papers with slow twins: an oracle in float64 that reads the text
again for every scored token, and means that are summed by hand."""

import math
from pathlib import Path

import pytest
import torch
from conftest import MEMORY, SHAPE, make_model, random_ids, relative_error
from oracle import Oracle, Variant
from test_evaluator import entry, tiny  # noqa: F401  a fixture

import uiollms
from uiollms.data.protocols import segment_sample, sliding_samples
from uiollms.evaluation.evaluator import Evaluation
from uiollms.evaluation.results import ScoredTask, TaskScores
from uiollms.evaluation.scoring import scored_positions, token_losses
from uiollms.evaluation.statistics import DocumentScore
from uiollms.files.errors import ConfigError

CLOSE = 1e-8  # transformers computes the angles of RoPE in float32, the oracle in float64


def make_oracle(model) -> Oracle:
    weights = model.memory_state_dict()
    return Oracle(Variant("llama"), SHAPE, model.base.state_dict(), weights, model.memory_config)


def nll_after(logits: torch.Tensor, token: torch.Tensor) -> float:
    """The NLL in nats of a token that is predicted from the last of logits [T, V]."""
    return -logits[-1].log_softmax(-1)[token].item()


def read_before(oracle: Oracle, ids: torch.Tensor, start: int, token: int, mode: str):
    """Logits of what is read before `token`, in the window of ids [T] that begins at `start`."""
    before, l = ids[start:token], MEMORY.chunk_size
    if mode == "raw":
        return oracle.read(before)
    chunk = (len(before) - 1) // l * l  # start of the chunk of the token before
    slots = oracle.slots(before[:chunk].split(l)) if chunk and mode == "memory" else None
    return oracle.read(before[chunk:], slots)


@pytest.mark.parametrize("mode", ["memory", "window", "raw"])
def test_sliding_windows_equal_the_twin(mode):
    """In the twin, every token is predicted from the first window that contains it."""
    model, ids = make_model(), random_ids(41)
    oracle, length, stride = make_oracle(model), 20, 12
    found = {}
    for sample in sliding_samples(ids, MEMORY.chunk_size, length, stride):
        nll = token_losses(model, sample, mode)[1]
        found |= dict(zip(scored_positions(sample).tolist(), nll.tolist(), strict=True))
    assert sorted(found) == list(range(1, 41))
    for token, nll in found.items():
        start = next(s for s in range(0, 41, stride) if s <= token < s + length)
        expected = nll_after(read_before(oracle, ids, start, token, mode), ids[token])
        assert nll == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("mode", ["memory", "window", "raw"])
@pytest.mark.parametrize("length", [24, 30])
def test_a_segment_equals_the_twin(mode, length):
    """In the twin, the raw tokens after the compressed chunks are read again for every token."""
    model, ids = make_model(), random_ids(length)
    oracle, l, count = make_oracle(model), MEMORY.chunk_size, 12
    sample = segment_sample(ids, l, count)
    compressed = (length - count) // l * l
    slots = oracle.slots(ids[:compressed].split(l)) if mode == "memory" else None
    start = 0 if mode == "raw" else compressed
    expected = [
        nll_after(oracle.read(ids[start:token], slots), ids[token])
        for token in range(length - count + 1, length)
    ]
    found = token_losses(model, sample, mode)[1]
    assert relative_error(found, torch.tensor(expected, dtype=torch.float64)) < CLOSE
    assert scored_positions(sample).tolist() == list(range(length - count + 1, length))


@pytest.mark.parametrize("mode", ["memory", "window", "raw"])
def test_the_last_tokens_are_those_of_protocol_document(mode):
    model, ids = make_model(), random_ids(29)
    every = uiollms.score(model, ids, "document", mode)
    last = uiollms.score(model, ids, "last.11", mode)
    assert last.positions.tolist() == list(range(18, 29))
    assert relative_error(last.nll, every.nll[-11:]) < 1e-12


def test_score_reads_the_windows_of_the_other_document():
    model = make_model()
    ids, other = random_ids(600), random_ids(600, seed=1)
    model.base.config.max_position_embeddings = 1024
    found = uiollms.score(model, ids, "sliding.300", "shuffled", other)
    assert found.positions.tolist() == list(range(1, 600))
    second = sliding_samples(ids, 8, 300)[1]
    chunks = other[256:][: 8 * len(second.chunks)].view(-1, 8)
    expected = token_losses(model, second, "shuffled", chunks)[1]
    assert relative_error(found.nll[299:555], expected) < 1e-12
    unshuffled = uiollms.score(model, ids, "sliding.300")
    assert relative_error(unshuffled.nll, found.nll) > 1e-3


def test_beacon_weighs_documents_equally():
    """Two documents of 2 and 6 tokens: the token mean is 2.5 nats, the mean of the means 2."""

    def document(nll: float, count: int) -> DocumentScore:
        values = torch.full((count,), nll)
        return DocumentScore(values, values, torch.arange(1, count + 1))

    own, other = ({0: document(1 + x, 2), 1: document(3 + 2 * x, 6)} for x in (0, 1))
    numbers, bounds = {}, {}
    for protocol in ("document", "beacon"):
        task = ScoredTask("x", "perplexity", 8, 4, protocol, 1)
        scores = TaskScores(task, {"memory": own, "shuffled": other})
        numbers[protocol] = scores.summarize().modes["memory"]
        bounds[protocol] = scores.comparison.bound
    assert numbers["document"]["nll"] == pytest.approx(2.5)
    assert numbers["beacon"]["nll"] == pytest.approx(2)
    assert numbers["beacon"]["perplexity"] == pytest.approx(math.exp(2))
    assert numbers["beacon"]["interval_95"] == pytest.approx((math.exp(1), math.exp(3)))
    assert bounds["document"].value == pytest.approx((2 * 1 + 6 * 2) / 8)
    assert bounds["beacon"].value == pytest.approx(1.5)
    assert bounds["beacon"].interval_95 == pytest.approx((1, 2))


def test_an_evaluation_has_a_result_for_every_protocol(workspace, tiny):  # noqa: F811
    for i in range(3):
        Path(f"long{i}.txt").write_text("".join(chr(97 + (i + n * n) % 23) for n in range(580)))
    protocols = ["paper", "beacon", "sliding.512", "last.256", "segment.64"]
    task = entry(task_name="files:long*.txt", truncation=560, protocols=protocols)
    task = task.model_copy(update=dict(compare=("window", "shuffled", "raw")))
    results = Evaluation(*tiny, [task]).run()
    assert [result.task.protocol for result in results] == protocols
    counts = [[len(d.nll) for d in r.scores["memory"].values()] for r in results]
    assert counts == [[525, 525], [559, 559], [559, 559], [256, 256], [63, 63]]
    for result in results:
        assert result.scores.keys() == {"memory", "window", "shuffled"}  # raw is past 128 positions
        numbers = result.summarize().modes["memory"]
        assert math.isfinite(numbers["perplexity"])
        by_chunk = result.task.protocol in ("paper", "beacon", "last.256")
        assert ("by_chunk" in numbers) == by_chunk


def test_a_segment_past_the_positions_is_refused_before_anything_is_scored(workspace, tiny):  # noqa: F811
    Path("long.txt").write_text("x" * 400)
    task = entry(task_name="files:long.txt", truncation=400, protocols=["segment.120"])
    message = "files:long.txt: protocol segment.120: 17 memories of num_memory 2 slots and the 128"
    with pytest.raises(ConfigError, match=message):
        Evaluation(*tiny, [task])
    Path("long.txt").write_text("x" * 100)
    message = "has no document for perplexity that is long enough for memory"
    task = entry(task_name="files:long.txt", truncation=130, protocols=["segment.120"])
    with pytest.raises(ConfigError, match=message):
        Evaluation(*tiny, [task])
