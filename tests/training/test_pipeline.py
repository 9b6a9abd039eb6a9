"""Tests that batches of a step take turns on the devices of a model, and that the gradients stay
the same."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import MEMORY, gradients, make_base, make_model, random_ids

import uiollms
from uiollms import MemoryLM, Sample
from uiollms.training import pipeline
from uiollms.training.pipeline import (
    Output,
    Pipeline,
    SegmentedGraph,
    Task,
    estimate_seconds,
    list_tasks,
)


def named(tasks) -> list[str]:
    return [f"{'FB'[not task.forward]}{task.segment}({task.batch})" for task in tasks]


def test_two_segments_alternate():
    expected = """
        F0(0) F1(0)
        F0(1) B1(0) F1(1)
        B0(0) F0(2) B1(1) F1(2)
        B0(1) F0(3) B1(2) F1(3)
        B0(2) B1(3) B0(3)
    """
    assert named(list_tasks(4, 2)) == expected.split()


@pytest.mark.parametrize("num_segments", [1, 2, 3, 8])
@pytest.mark.parametrize("num_batches", [1, 2, 5, 20])
def test_every_task_runs_once_after_what_it_needs(num_batches, num_segments):
    """A segment holds the graphs of at most num_segments - segment batches."""
    order = list(list_tasks(num_batches, num_segments))
    position = {task: i for i, task in enumerate(order)}
    assert len(position) == len(order) == 2 * num_batches * num_segments
    for batch in range(num_batches):
        path = [Task(True, s, batch) for s in range(num_segments)]
        path += [Task(False, s, batch) for s in reversed(range(num_segments))]
        assert all(position[first] < position[second] for first, second in pairwise(path))
    for segment in range(num_segments):
        graphs = 0
        for task in order:
            graphs += (1 if task.forward else -1) * (task.segment == segment)
            assert graphs <= num_segments - segment
        batches = [t.batch for t in order if t.segment == segment and not t.forward]
        assert batches == sorted(batches)  # sums add up in the order of the batches


@pytest.mark.parametrize("num_batches, num_segments", [(1, 1), (4, 1), (1, 3), (2, 3), (7, 3)])
def test_a_pipeline_runs_the_tasks_in_their_order(num_batches, num_segments):
    done = []

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, segment, batch):
            ctx.task = Task(False, segment, batch)
            done.append(Task(True, segment, batch))
            return hidden + 1

        @staticmethod
        def backward(ctx, grad):
            done.append(ctx.task)
            return grad, None, None

    def forward(graph: SegmentedGraph, batch: int) -> list[Output]:
        hidden = torch.ones(2, requires_grad=True)
        for segment in range(num_segments):
            hidden = hidden if segment == 0 else graph.begin_segment(hidden, hidden.device)
            hidden = Marked.apply(hidden, segment, batch)
        return [Output(graph.segment, hidden.sum())]

    batches = Pipeline(torch.autograd.backward, cut=True)
    for batch in range(num_batches):
        batches.run(partial(forward, batch=batch))
    batches.finish()
    assert done == list(list_tasks(num_batches, num_segments)) and not batches.graphs


def cut_before(calls: set[int]) -> type[SegmentedGraph]:
    """Returns a graph that begins a segment at these calls of `move`, as if the device changed
    there: call i is before layer i, and the last call of the decoder before the final norm."""

    class CutGraph(SegmentedGraph):
        def move(self, hidden, device):
            if len(self.segments) in calls:
                hidden = self.begin_segment(hidden, device)
            self.segments.append(self.segment)
            return hidden

    return CutGraph


CUTS = {"two devices": {1}, "embedding and norm alone": {0, 3}, "every layer": {0, 1, 2, 3}}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("estimator", ["exact", "uio", "tbptt", "importance"])
def test_gradients_are_those_of_one_batch_after_another(family, estimator, cuts, monkeypatch):
    """They are equal bit for bit, because every sum has the same order."""
    document = Sample.document(random_ids(8 * 6 + 5), MEMORY.chunk_size)
    assert_same_gradients(make_model(family), document, estimator, cuts, monkeypatch)


@pytest.mark.parametrize(
    "change",
    [dict(lora_dropout=0.3), dict(slot_input="last"), dict(recent_tokens=3), dict()],
    ids=["dropout", "last", "recent tokens", "checkpointing"],
)
def test_gradients_are_the_same_with_every_compressor(change, monkeypatch):
    config = MEMORY.model_copy(update=change)
    model = MemoryLM(make_base(), config).train()
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    model.checkpointing = not change
    document = Sample.document(random_ids(8 * 6 + 5), MEMORY.chunk_size)
    assert_same_gradients(model, document, "uio", {1}, monkeypatch)


@pytest.mark.parametrize(
    "sample",
    [
        Sample.document(random_ids(45), 8).distilled(0.5),
        Sample.copy(random_ids(24), 8),
        Sample.questions(random_ids(24), [(random_ids(3), random_ids(2))], 8, kl_weight=0.9),
        Sample.document(random_ids(45), 8),
    ],
    ids=["distilled", "copy", "questions", "document"],
)
def test_gradients_are_the_same_for_every_kind_of_sample(sample, monkeypatch):
    samples = [sample, Sample.document(random_ids(30, seed=1), 8), sample]
    assert_same_gradients(make_model(), samples, "uio", {2}, monkeypatch)


def assert_same_gradients(model, sample, estimator, cuts, monkeypatch) -> None:
    settings = {} if estimator == "exact" else dict(S=2)
    rng = [3] * len(sample) if isinstance(sample, list) else 3
    model.chunk_batch = 2
    found, begun = [], []
    begin_segment = SegmentedGraph.begin_segment
    monkeypatch.setattr(
        SegmentedGraph,
        "begin_segment",
        lambda *arguments: begun.append(1) or begin_segment(*arguments),
    )
    for model.pipeline in (False, True):
        if model.pipeline:
            monkeypatch.setattr(pipeline, "SegmentedGraph", cut_before(cuts))
        uiollms.gradient_step(model, sample, estimator=estimator, rng=rng, **settings)
        found.append(gradients(model))
    assert begun
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_equal_segments_reach_the_speed_of_their_number():
    """n batches on p devices take as long as n + p - 1 on one of them: 25 batches are 1.92 times
    as fast on 2 devices, and 25 / 32 of 8 times as fast on 8."""
    for p in (1, 2, 8):
        ones = [1.0] * p
        seconds = estimate_seconds(list_tasks(25, p), range(p), ones, ones)
        assert seconds == 2 * (25 + p - 1)


def test_tasks_of_one_device_wait_for_each_other():
    """The third segment is on the first device again, which then works without a break, except
    while the only first or last batch is on the other device."""
    seconds = estimate_seconds(list_tasks(10, 3), [0, 1, 0], [1, 1, 1], [1, 1, 1])
    assert 40 < seconds < 50
