"""Compares rows that read chosen raw tokens with the base on these tokens, and passages with BM25
written out."""

import math

import pytest
import torch
from conftest import MEMORY, make_model, random_ids, relative_error
from torch.nn import functional as F

import uiollms
from uiollms.alternatives.raw_tokens import (
    PASSAGE,
    best_passages,
    bm25_scores,
    sinks_and_recent,
    with_raw_tokens,
)
from uiollms.data.sample import Sample
from uiollms.evaluation.scoring import token_losses

L, M = MEMORY.chunk_size, MEMORY.num_memory


def test_worked_example_of_recent_tokens():
    config = MEMORY.model_copy(update=dict(chunk_size=4, num_memory=2))
    sample = with_raw_tokens(Sample.document(torch.arange(10), 4), config, "recent")
    read = [row.input_ids.tolist() for row in sample.rows]
    assert read == [[0, 1, 2, 3], [2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 8, 9]]
    assert [row.start for row in sample.rows] == [0, 2, 4] and not len(sample.chunks)
    scored = [row.targets[row.scored].tolist() for row in sample.rows]
    assert scored == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]


@pytest.mark.parametrize("length, slots", [(10, 6), (10, 9), (10, 10), (10, 12), (10, 3), (10, 0)])
def test_streaming_reads_sinks_and_the_last_tokens(length, slots):
    found = sinks_and_recent(torch.arange(length), slots, torch.arange(0)).tolist()
    expected = [t for t in range(length) if t < min(4, slots) or t >= length - max(0, slots - 4)]
    assert found == (expected if slots < length else list(range(length)))
    assert len(found) == min(slots, length)


@torch.no_grad()
@pytest.mark.parametrize("recent", [0, 3])
def test_mode_streaming_equals_the_base_on_the_same_tokens(family, recent):
    """The base reads each row's tokens as one text. The tolerance 1e-12 in float64 allows for
    another order of summation."""
    config = MEMORY.model_copy(update=dict(recent_tokens=recent))
    model, ids = make_model(family, config=config), random_ids(6 * L)
    expected = []
    for t in range(6):
        start = t * L - (recent if t else 0)  # of what the row reads in every mode
        slots = t * M
        if slots < start:
            sinks = min(4, slots)
            before = [*range(sinks), *range(start - slots + sinks, start)]
        else:
            before = [*range(start)]
        read = torch.cat([ids[before], ids[start : (t + 1) * L]])
        logits = model.base(read[None]).logits[0, -L:-1]
        expected.append(F.cross_entropy(logits, ids[t * L + 1 : (t + 1) * L], reduction="none"))
    found = uiollms.score(model, ids, "paper", "streaming").nll
    assert relative_error(found, torch.cat(expected)) < 1e-12
    other = uiollms.score(model, ids, "paper", "recent").nll
    assert relative_error(found[-L:], other[-L:]) > 1e-3


def test_bm25_equals_its_formula():
    """The twin is the formula of Lucene's BM25 in float64. The package computes in float32, whose
    relative error is 6e-8 an operation."""
    passages = list(
        torch.randint(0, 30, (200,), generator=torch.Generator().manual_seed(1)).split(16)
    )
    question = torch.tensor([3, 4, 4, 17, 99])
    count, average = len(passages), sum(map(len, passages)) / len(passages)
    expected = []
    for passage in passages:
        score = 0.0
        for term in question.tolist():
            containing = sum(term in other.tolist() for other in passages)
            frequency = passage.tolist().count(term)
            idf = math.log(1 + (count - containing + 0.5) / (containing + 0.5))
            length = 1 - 0.75 + 0.75 * len(passage) / average
            score += idf * frequency / (frequency + 1.5 * length)
        expected.append(score)
    assert relative_error(bm25_scores(passages, question), torch.tensor(expected)) < 1e-6


def test_the_best_passages_are_read_in_their_order():
    """Passage 3 has the question twice, passage 1 once. 1.5 passages fit."""
    context = torch.full((5 * PASSAGE,), 5)
    context[PASSAGE + 7] = context[3 * PASSAGE + 2] = context[3 * PASSAGE + 40] = 9
    found = best_passages(context, PASSAGE + PASSAGE // 2, torch.tensor([9]))
    first, second = context[PASSAGE : PASSAGE + PASSAGE // 2], context[3 * PASSAGE : 4 * PASSAGE]
    assert torch.equal(found, torch.cat([first, second]))
    # No passage has the question's tokens: the first ones are read.
    assert torch.equal(best_passages(context, 10, torch.tensor([11])), context[:10])
    assert torch.equal(best_passages(context, 5 * PASSAGE, torch.tensor([9])), context)


@torch.no_grad()
def test_mode_bm25_finds_the_answer_in_a_long_context():
    """The question resembles passage 2 of 6. The row reads it in place of 6 memories."""
    size = dict(chunk_size=PASSAGE, num_memory=PASSAGE // 8)
    model = make_model(config=MEMORY.model_copy(update=size))
    model.base.config.max_position_embeddings = 8 * PASSAGE
    context = random_ids(8 * PASSAGE) % 30
    question, answer = torch.tensor([50, 51, 52, 53]), torch.tensor([54])
    context[2 * PASSAGE + 5 : 2 * PASSAGE + 9] = question
    sample = Sample.questions(context, [(question, answer)], PASSAGE)
    found = token_losses(model, sample, "bm25")[1]
    read = torch.cat([context[2 * PASSAGE : 3 * PASSAGE], question])
    expected = F.cross_entropy(model.base(read[None]).logits[0, -1:], answer, reduction="none")
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("mode", ["recent", "streaming", "bm25"])
def test_copies_are_refused(mode):
    with pytest.raises(ValueError, match=f"mode '{mode}': a copy is generated from memory alone"):
        token_losses(make_model(), Sample.copy(random_ids(L), L), mode)
