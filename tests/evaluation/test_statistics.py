"""Tests the comparison of memory with its controls: modes, intervals, sizes, tables and plots."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MEMORY, make_model, random_ids, relative_error
from test_commands import call
from test_evaluator import entry, scores_of

import uiollms
from uiollms.build import check_env, load_memory_lm
from uiollms.config.load import load_env_config
from uiollms.data.sample import Sample
from uiollms.evaluation import statistics
from uiollms.evaluation.evaluator import Evaluation
from uiollms.evaluation.results import Comparison, ScoredTask, TaskScores, TaskSummary
from uiollms.evaluation.scoring import exact_match, token_losses
from uiollms.evaluation.statistics import DRAWS, difference, recovered_fraction
from uiollms.reports.curves import bound_lines, plot_training
from uiollms.reports.tables import rows_of
from uiollms.runs.metrics import scalars

L, M = MEMORY.chunk_size, MEMORY.num_memory
nll_of = torch.nn.functional.cross_entropy


@pytest.fixture
def tiny(workspace):
    """(model, tokenizer) of the tiny folder: chunks of 16 into 2 slots, 128 positions."""
    return load_memory_lm(load_env_config("env.json"), "env.json")


# ---- Intervals ---------------------------------------------------------------------------------


def documents(count: int, seed: int, difficulty: float = 2.0) -> dict[str, dict[int, torch.Tensor]]:
    """NLLs in four modes of documents that differ in length and difficulty."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 60, (count,), generator=rng).tolist()
    base = [torch.rand(n, generator=rng) + difficulty * i for i, n in enumerate(lengths)]
    shifts = dict(window=0.8, shuffled=0.6, memory=0.3, raw=0.1)
    noise = {mode: 0.3 * torch.rand(count, generator=rng) for mode in shifts}
    found: dict[str, dict[int, torch.Tensor]] = {}
    for mode, shift in shifts.items():
        found[mode] = {i: nll + shift + noise[mode][i] for i, nll in enumerate(base)}
    return found


def slow_estimate(
    modes: list[dict[int, torch.Tensor]], numerator, denominator
) -> tuple[float, ...]:
    """Computes `estimate` with loops over tokens and documents, with the same draws: its slow
    twin."""
    drawn = np.random.default_rng(0).integers(0, len(modes[0]), (DRAWS, len(modes[0])))
    found = []
    for picks in [range(len(modes[0])), *drawn.tolist()]:
        tokens = sum(len(modes[0][i]) for i in picks)
        sums = [sum(float(x) for i in picks for x in mode[i]) for mode in modes]
        found.append(numerator(*sums, tokens) / denominator(*sums, tokens))
    ordered = sorted(found[1:])

    def quantile(fraction: float) -> float:
        index = fraction * (DRAWS - 1)
        low = math.floor(index)
        return ordered[low] + (index - low) * (ordered[low + 1] - ordered[low])

    return found[0], quantile(0.025), quantile(0.975)


@pytest.mark.parametrize("count", [2, 7])
def test_intervals_equal_those_of_a_slow_bootstrap(count):
    """The sums are float64 in another order, so the tolerance is 1e-9."""
    nlls = documents(count, seed=count)
    value, interval = difference(nlls["shuffled"], nlls["memory"])
    pair = [nlls["shuffled"], nlls["memory"]]
    expected = slow_estimate(pair, lambda a, b, n: a - b, lambda a, b, n: n)
    assert (value, *interval) == pytest.approx(expected, rel=1e-9)
    value, interval = recovered_fraction(nlls["window"], nlls["memory"], nlls["raw"])
    three = [nlls["window"], nlls["memory"], nlls["raw"]]
    expected = slow_estimate(three, lambda w, m, r, n: w - m, lambda w, m, r, n: w - r)
    assert (value, *interval) == pytest.approx(expected, rel=1e-9)
    assert interval[0] < value < interval[1]


def test_intervals_are_paired():
    """A difficult document is difficult in both modes. So a difference that all documents have has
    an interval without width."""
    memory = documents(9, seed=0, difficulty=5.0)["memory"]
    shuffled = {i: nll + 0.25 for i, nll in memory.items()}
    value, interval = difference(shuffled, memory)
    # The NLLs are float32.
    assert (value, *interval) == pytest.approx((0.25, 0.25, 0.25), abs=1e-5)


def test_intervals_have_the_expected_width():
    """The differences of 200 documents of one length are normal with mean 0.1 and deviation 1. So
    the interval reaches 1.96 standard errors of 1/sqrt(200) to either side."""
    rng = torch.Generator().manual_seed(0)
    memory = {i: torch.zeros(1) for i in range(200)}
    drawn = torch.randn(200, generator=rng)
    drawn = (drawn - drawn.mean()) / drawn.std() + 0.1
    value, (low, high) = difference({i: drawn[i : i + 1] for i in memory}, memory)
    assert value == pytest.approx(0.1, abs=1e-6)
    assert high - value == pytest.approx(1.96 / math.sqrt(200), rel=0.1)
    assert value - low == pytest.approx(1.96 / math.sqrt(200), rel=0.1)


def test_many_documents_are_drawn_block_by_block(monkeypatch):
    """The draws differ, so the ends of the interval move by at most a tenth of its width."""
    nlls = documents(40, seed=3, difficulty=0.0)
    whole = difference(nlls["shuffled"], nlls["memory"])
    monkeypatch.setattr(statistics, "BLOCK", 1000)
    parts = difference(nlls["shuffled"], nlls["memory"])
    assert parts.value == whole.value
    width = whole.interval_95[1] - whole.interval_95[0]
    assert parts.interval_95 == pytest.approx(whole.interval_95, abs=width / 10)


def test_missing_or_infinite_values_give_no_estimate():
    nlls = documents(3, seed=1)
    memory, window = nlls["memory"], nlls["window"]
    assert difference(memory, {}) is None
    assert difference({0: memory[0]}, {1: memory[1]}) is None
    # The fraction would be 0 / 0.
    assert recovered_fraction(window, memory, window) is None
    infinite = memory | {0: torch.tensor([math.inf])}
    assert difference(infinite, memory) is None


def test_documents_that_one_mode_lacks_are_left_out_of_both():
    nlls = documents(4, seed=2)
    shuffled = {i: nlls["shuffled"][i] for i in (0, 2, 3)}
    memory = {i: nlls["memory"][i] for i in (0, 2, 3)}
    assert difference(shuffled, nlls["memory"]) == difference(shuffled, memory)


# ---- Results -----------------------------------------------------------------------------------


def result_of(*modes: str) -> TaskScores:
    """Returns the scores of two documents of 30 and 10 tokens in the given modes."""
    nlls = dict(shuffled=(4.0, 2.5), memory=(3.5, 2.0), window=(5.0, 3.0), raw=(3.0, 1.0))
    scores = {m: scores_of((nlls[m][0], 30), (nlls[m][1], 10)) for m in modes}
    return TaskScores(ScoredTask("x", "perplexity", 100, 8, "paper", 2), scores)


def test_a_result_reports_bound_and_recovered_of_its_nlls():
    result = result_of("shuffled", "memory", "window", "raw").summarize()
    summary = json.loads(json.dumps(result.as_json()))
    nll = {mode: summary[mode]["nll"] for mode in ("shuffled", "memory", "window", "raw")}
    assert summary["bound"] == pytest.approx(nll["shuffled"] - nll["memory"])
    recovered = (nll["window"] - nll["memory"]) / (nll["window"] - nll["raw"])
    assert summary["recovered"] == pytest.approx(recovered) == pytest.approx(55 / 80)
    assert summary["bound_interval_95"] == pytest.approx([0.5, 0.5])
    # The ends of the interval are the fractions of one document alone.
    assert summary["recovered_interval_95"] == pytest.approx([0.5, 0.75])
    assert (summary["chunk_size"], summary["num_memory"]) == (8, 2)
    again = TaskSummary.from_json(summary)
    assert again.comparison == result.comparison
    assert again.task.size == "8 / 2"
    assert rows_of(again) == rows_of(result)
    cells = " ".join(cell for row in rows_of(result) for cell in row)
    below = summary["below_window"]
    assert below == pytest.approx(nll["window"] - nll["memory"])
    assert f"bound 0.500 (0.500 .. 0.500) nats, {below:.3f} (" in cells and "below window" in cells
    assert "69% (50% .. 75%)" in cells and summary["below_recent"] is None
    assert "may serve as well" not in cells


def test_a_result_without_controls_has_no_bound_and_no_recovered():
    summary = result_of("memory").summarize().as_json()
    for name in ("bound", "recovered"):
        assert summary[name] is None and summary[f"{name}_interval_95"] is None
    older = {key: value for key, value in summary.items() if key not in ("num_memory", "bound")}
    # In older results, `recovered` was of perplexities and had no interval.
    result = TaskSummary.from_json(older | dict(recovered=0.7))
    assert (result.comparison, result.task.size) == (Comparison(), "8")
    with pytest.raises(ValueError, match="bound is 'x'"):
        TaskSummary.from_json(summary | dict(bound="x", bound_interval_95=[0, 1]))
    with pytest.raises(ValueError, match="num_memory is 0"):
        TaskSummary.from_json(summary | dict(num_memory=0))


def test_the_table_reports_a_memory_that_is_only_a_prefix():
    scores = result_of("memory")
    same = dict(memory=scores.scores["memory"], shuffled=scores.scores["memory"])
    result = TaskScores(scores.task, same).summarize()
    cells = " ".join(cell for row in rows_of(result) for cell in row)
    assert "bound 0.000 (0.000 .. 0.000) nats, another document's memory may serve as well" in cells


def test_every_evaluation_in_training_reports_the_bound(workspace, capsys):
    task = entry(compare=["window", "raw", "shuffled", "recent"], num_instance=3)
    tasks = json.dumps([task.model_dump(), task.model_dump() | dict(compare=["window"])])
    settings = [f"--set=train.tasks={tasks}", "--set=train.eval=1"]
    assert call("train.py", "--env_conf", "env.json", *settings) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "bound" in table and "recovered" in table
    assert "chunks of 16 tokens in 2 slots" in table
    text = Path("out/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    evaluations = [line for line in lines if line.get("eval")]
    assert len(evaluations) == 3
    for line in evaluations:
        first, second = line["eval"]
        low, high = first["bound_interval_95"]
        assert low <= first["bound"] <= high and second["bound"] is None
        expected = first["shuffled"]["nll"] - first["memory"]["nll"]
        assert first["bound"] == pytest.approx(expected)
        assert first["recent"]["documents"] == 3
        logged = dict(scalars(line, "paper"))
        (name,) = [n for n in logged if n.endswith("/bound")]
        assert logged[name] == first["bound"]
    (points,) = bound_lines(lines).values()
    assert [point[0] for point in points] == [line["iteration"] for line in evaluations]
    assert [point[1] for point in points] == [line["eval"][0]["bound"] for line in evaluations]
    assert taller(plot_training(lines, Path("with.png")), plot_training(lines[:1], Path("no.png")))
    assert call("test.py", "--env_conf", "env.json", "--use_env_conf_tasks", *settings) == 0
    tested = json.loads(Path("out/test.json").read_text())["results"]
    assert tested == evaluations[-1]["eval"]


def taller(picture: Path, other: Path) -> bool:
    """Compares the heights in the headers of two PNG files."""
    heights = [int.from_bytes(path.read_bytes()[20:24]) for path in (picture, other)]
    return heights[0] > heights[1]


# ---- Modes -------------------------------------------------------------------------------------


def recent_nll(model, ids: torch.Tensor, start: int, stop: int, first: int) -> torch.Tensor:
    """NLL of tokens first .. stop of a document, if the base reads tokens start .. stop only."""
    logits = model.base(ids[None, start:stop]).logits[0]
    return nll_of(logits[first - start - 1 : -1], ids[first:stop], reduction="none")


@torch.no_grad()
@pytest.mark.parametrize("protocol", ["paper", "document"])
@pytest.mark.parametrize("length", [3 * L, 4 * L + 3, 5])
def test_mode_recent_equals_the_base_on_the_tokens_before(family, protocol, length):
    """The base reads row by row. The tolerance 1e-12 in float64 allows for another order of
    summation. In the document protocol the row before, with other recent tokens, predicts the first
    token of a chunk."""
    model, ids = make_model(family), random_ids(length)
    found = uiollms.score(model, ids, protocol, "recent")
    expected, positions = [], []
    for t, chunk in enumerate(ids.split(L)):
        start, last = t * L, t * L + len(chunk)
        first_read = max(0, start - t * M)
        # The row also predicts the first token of the next chunk.
        predicts_next = protocol == "document" and last < length
        stop = last + 1 if predicts_next else last
        if stop - start > 1:
            if predicts_next:
                logits = model.base(ids[None, first_read:last]).logits[0, start - first_read :]
                expected.append(nll_of(logits, ids[start + 1 : stop], reduction="none"))
            else:
                expected.append(recent_nll(model, ids, first_read, stop, start + 1))
            positions += range(start + 1, stop)
    assert found.positions.tolist() == positions
    assert relative_error(found.nll, torch.cat(expected)) < 1e-12
    window = uiollms.score(model, ids, protocol, "window").nll
    # No token precedes chunk 0, so both modes read the same there.
    assert relative_error(found.nll[: L - 1], window[: L - 1]) < 1e-12
    assert length < 2 * L or relative_error(found.nll, window) > 1e-3


@torch.no_grad()
def test_recent_precedes_the_recent_tokens_that_all_modes_read():
    """Every row reads m tokens per chunk before it and w recent tokens, in one piece. The tolerance
    1e-12 allows for another order of summation."""
    w, count = 3, 4
    model = make_model(config=MEMORY.model_copy(update=dict(recent_tokens=w)))
    ids = random_ids(count * L)
    expected = []
    for t in range(count):
        first_read = max(0, t * L - (t * M + w if t else 0))
        expected.append(recent_nll(model, ids, first_read, (t + 1) * L, t * L + 1))
    found = uiollms.score(model, ids, "paper", "recent")
    assert relative_error(found.nll, torch.cat(expected)) < 1e-12


@torch.no_grad()
def test_protocol_later_scores_the_tokens_that_read_memory():
    model, ids = make_model(), random_ids(3 * L + 2)
    whole, later = (uiollms.score(model, ids, protocol) for protocol in ("document", "later"))
    assert later.positions.tolist() == list(range(L + 1, len(ids)))
    assert torch.equal(later.nll, whole.nll[L:])
    weights = torch.cat([row.token_weights[row.scored] for row in Sample.later(ids, L).rows])
    assert weights.sum().item() == pytest.approx(1) and len(weights) == 2 * L + 1


def test_with_one_slot_per_token_recent_reads_the_whole_context():
    """At 1 : 1, the largest memory, mode "recent" reads the same tokens as mode "raw"."""
    config = MEMORY.model_copy(update=dict(num_memory=L))
    model, ids = make_model(config=config), random_ids(3 * L)
    recent, raw = (uiollms.score(model, ids, "document", mode).nll for mode in ("recent", "raw"))
    assert relative_error(recent, raw) < 1e-12


@torch.no_grad()
def test_recent_of_questions_and_of_distilled_documents():
    model, context = make_model(), random_ids(2 * L, seed=1)
    questions = [(random_ids(3, seed=2), random_ids(2, seed=3)), (random_ids(2), random_ids(4))]
    found = token_losses(model, Sample.questions(context, questions, L), "recent")[1]
    expected = []
    for question, answer in questions:
        whole = torch.cat([context, question, answer])
        first = 2 * L + len(question)
        expected.append(recent_nll(model, whole, 2 * L - 2 * M, len(whole), first))
    assert relative_error(found, torch.cat(expected)) < 1e-12
    ids = random_ids(3 * L)
    loss, nll = token_losses(model, Sample.document(ids, L).distilled(1.0), "recent")
    plain = uiollms.score(model, ids, "document", "recent").nll
    assert relative_error(nll, plain) < 1e-12
    teacher = model.base(ids[None]).logits[0].log_softmax(-1)
    rows = [model.base(ids[None, max(0, t * (L - M)) : (t + 1) * L]) for t in range(3)]
    student = torch.cat([row.logits[0, -L:] for row in rows]).log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1)[:-1]
    assert relative_error(loss, kl) < 1e-12


def test_recent_past_the_positions_and_of_copies_is_refused():
    """64 positions and 2 slots per chunk of 8 allow 29 full chunks and 6 tokens, as with memory."""
    model = make_model()
    assert model.capacity == 238
    assert len(uiollms.score(model, random_ids(238), "document", "recent").nll) == 237
    with pytest.raises(ValueError, match="240 tokens|239 tokens|positions"):
        uiollms.score(model, random_ids(240), "document", "recent")
    with pytest.raises(ValueError, match="a copy is generated from memory alone"):
        token_losses(model, Sample.copy(random_ids(L), L), "recent")
    for task_type in ("auto encoding", "longdata copy"):
        with pytest.raises(uiollms.ConfigError, match="compare: recent: .* allowed are window and"):
            entry(task_type, compare=["recent", "window"])


@torch.no_grad()
def test_score_reads_the_memories_of_another_document():
    """In the slow twin, a stream reads the other document and then this document's chunk."""
    model, ids, other = make_model(), random_ids(27, seed=1), random_ids(35, seed=2)
    found = uiollms.score(model, ids, "paper", mode="shuffled", other=other)
    expected = []
    for t, row in enumerate(ids.split(L)):
        state = model(other[None, : t * L]).past_key_values if t else None
        logits = model(row[None], state).logits[0]
        expected.append(nll_of(logits[:-1], row[1:], reduction="none"))
    assert relative_error(found.nll, torch.cat(expected)) < 1e-12
    again = uiollms.score(model, ids, "paper", mode="shuffled", other=other[None, : 3 * L])
    assert torch.equal(found.nll, again.nll) and torch.equal(found.positions, again.positions)
    same = uiollms.score(model, ids, "paper", mode="shuffled", other=ids)
    assert torch.equal(same.nll, uiollms.score(model, ids).nll)


def test_wrong_arguments_of_score_are_refused():
    model, ids = make_model(), random_ids(27)
    for mode, other, message in (
        ("shuffled", None, "mode 'shuffled' reads, found without one"),
        ("memory", ids, "found with mode 'memory'"),
        ("shuffled", ids[: 3 * L - 1], "3 memories are read, the other document has 2"),
        ("resent", None, "mode 'resent' is unknown; allowed are memory, window, raw, shuffled"),
    ):
        with pytest.raises(ValueError, match=message):
            uiollms.score(model, ids, mode=mode, other=other)
    with pytest.raises(ValueError, match="protocol 'papers' is unknown; allowed are paper, docu"):
        uiollms.score(model, ids, "papers")
    with pytest.raises(ValueError, match="mode 'resent' is unknown"):
        exact_match(model, Sample.document(ids, L), "resent")


# ---- Sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_type", ["perplexity", "auto encoding", "passkey"])
@pytest.mark.parametrize(
    "size",
    [dict(chunk_size=8), dict(num_memory=4), dict(chunk_size=24, num_memory=3)],
)
def test_a_task_of_another_size_equals_a_model_of_that_size(tiny, task_type, size):
    model, tokenizer = tiny
    copies = task_type == "auto encoding"
    compare = ["window", "shuffled"] if copies else ["window", "shuffled", "recent"]
    length = 260 if task_type == "passkey" else 100
    task = entry(task_type, compare=compare, truncation=length)
    before = model.memory_config
    (found,) = Evaluation(model, tokenizer, [task.model_copy(update=size)]).run()
    assert model.memory_config is before
    model.memory_config = before.model_copy(update=size)
    (expected,) = Evaluation(model, tokenizer, [task]).run()
    found, expected = found.summarize(), expected.summarize()
    assert found.modes == expected.modes and found.comparison == expected.comparison
    sizes = dict(chunk_size=16, num_memory=2) | size
    summary = found.as_json()
    assert {name: summary[name] for name in sizes} == sizes


def test_the_size_is_restored_if_scoring_fails(tiny, monkeypatch):
    model, tokenizer = tiny
    evaluation = Evaluation(model, tokenizer, [entry(chunk_size=8)])
    before = model.memory_config
    (measurement,) = evaluation.measurements
    too_long = Sample.document(torch.arange(2000) % 200, 8)
    instances = measurement.instances
    instances[0] = replace(instances[0], samples=(too_long,))
    with pytest.raises(ValueError, match="capacity"):
        evaluation.run()
    assert model.memory_config is before


@pytest.mark.parametrize(
    "size, message",
    [
        (dict(chunk_size=9), "chunk_size 9 must be a multiple of num_memory 2; the other of the"),
        (dict(num_memory=3), "chunk_size 16 must be a multiple of num_memory 3; the other of the"),
        (dict(chunk_size=8, num_memory=3), "chunk_size 8 must be a multiple of num_memory 3$"),
        (dict(chunk_size=256), "chunk_size 256 is past the base's 128 positions"),
        (dict(chunk_size=100, truncation=100), "nothing would read memory, chunk_size is 100"),
        (dict(num_memory=16, truncation=150), "150 tokens is past the capacity 128 .*memory 16"),
    ],
)
def test_an_impossible_size_is_refused_before_a_model_is_loaded(workspace, tiny, size, message):
    task = entry(**size).model_dump()
    with pytest.raises(uiollms.ConfigError, match=message) as caught:
        check_env(load_env_config("env.json", [f"train.tasks={json.dumps([task])}"]), "env.json")
    assert str(caught.value).startswith("env.json: train.tasks[0]") and len(caught.value.args) == 1
    if "multiple" in message or "base's" in message:
        with pytest.raises(uiollms.ConfigError, match=message):
            Evaluation(*tiny, [entry(**size)])


def test_results_name_the_python_version_of_stdlib(tiny):
    task = entry(task_name="stdlib.test.1k", truncation=40)
    (result,) = Evaluation(*tiny, [task]).run()
    version = f"Python {platform.python_version()}"
    assert result.task.corpus_version == version and version in result.task.title
    assert Evaluation(*tiny, [entry()]).run()[0].task.corpus_version is None
