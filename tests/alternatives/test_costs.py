"""Compares tokens that are decoded one by one, whose cost is measured, with rows that are scored."""

import pytest
import torch
from conftest import MEMORY, make_model, random_ids, relative_error

from uiollms.alternatives.costs import (
    MEASURED_MODES,
    Steps,
    measure_cost,
    measured_row,
    read_context,
)
from uiollms.data.sample import Sample
from uiollms.evaluation.scoring import scored_hidden

L, M = MEMORY.chunk_size, MEMORY.num_memory


@torch.no_grad()
@pytest.mark.parametrize("recent", [0, 3])
@pytest.mark.parametrize("mode", MEASURED_MODES)
def test_decoded_tokens_equal_the_scored_row(mode, recent):
    """The tolerance 1e-12 in float64 allows for another order of summation."""
    model = make_model("qwen3", config=MEMORY.model_copy(update=dict(recent_tokens=recent)))
    sample = Sample.later(random_ids(4 * L), L)
    row = measured_row(sample.with_recent(recent))
    assert row.num_memories == 3
    prefix, num_slots = read_context(model, sample.with_recent(recent), row, mode)
    steps = Steps(model, prefix, num_slots, len(row.input_ids))
    found = torch.cat([steps.read(token) for token in row.input_ids.split(1)], 1)[0, row.scored]
    hidden = torch.cat([hidden for _, hidden, _ in scored_hidden(model, sample, mode)])
    assert relative_error(found, hidden[-len(row.scored) :]) < 1e-12


@pytest.mark.parametrize("mode", MEASURED_MODES)
def test_the_cost_of_a_mode(mode):
    model, sample = make_model(), Sample.later(random_ids(4 * L), L)
    cost = measure_cost(model, sample, mode)
    assert cost.slots == {"window": 0, "raw": 3 * L}.get(mode, 3 * M)
    assert (cost.context, cost.process) == (3 * L, "uiollms")
    assert cost.token_seconds > 0 and cost.peak_bytes >= 0
    assert cost.compress_seconds > 0


def test_a_sample_without_a_row_to_decode_has_no_cost():
    model, sample = make_model(), Sample.later(random_ids(L + 2), L)
    assert measured_row(sample) is None or len(measured_row(sample).input_ids) > 1
    one_token = Sample.document(random_ids(1), L)
    assert measure_cost(model, one_token, "memory") is None
