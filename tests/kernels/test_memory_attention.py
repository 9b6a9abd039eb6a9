"""Attention to a shared memory where it lies, beside one softmax over joined keys under a dense
mask.

1e-12 relative leaves room for another order of summation in float64, and for nothing else.
"""

from dataclasses import replace

import pytest
import torch
from conftest import (
    MEMORY,
    gradients,
    make_base,
    make_model,
    random_ids,
    relative_error,
    worst_error,
)
from torch.nn import functional as F

import uiollms
from uiollms import MemoryLM
from uiollms.data.sample import Row, Sample
from uiollms.evaluation.scoring import token_losses
from uiollms.kernels import memory_attention as kernel
from uiollms.kernels.memory_attention import kernel_calls, memory_attention
from uiollms.model.attention import decoder_mask
from uiollms.model.state import KVPrefix, SharedPrefix, join_slots

EXACT = 1e-12


def inputs(heads=4, kv_heads=2, rows=3, length=9, slots=8, size=8):
    torch.manual_seed(0)
    shapes = [
        (rows, heads, length, size),
        *2 * [(rows, kv_heads, length, size)],
        *2 * [(1, kv_heads, slots, size)],
    ]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def joined(query, key, value, memory_key, memory_value, num_slots, scaling, first_slots=None):
    """The slow twin: every row its own copy of the memory, one attention over all keys, a mask."""
    rows, groups = len(query), query.shape[1] // key.shape[1]
    last = max(
        first + count for first, count in zip(first_slots or [0] * rows, num_slots, strict=True)
    )
    keys, values = (
        torch.cat([memory[:, :, :last].expand(rows, -1, -1, -1), own], dim=2).repeat_interleave(
            groups, dim=1
        )
        for memory, own in ((memory_key, key), (memory_value, value))
    )
    mask = decoder_mask(num_slots, 0, query.shape[2], query.device, first_slots=first_slots)
    return F.scaled_dot_product_attention(query, keys, values, mask, scale=scaling)


@pytest.fixture(params=[1, 3, 128])
def together(request, monkeypatch):
    """From how many common slots on rows read them in one call."""
    monkeypatch.setattr(kernel, "MIN_COMMON_SLOTS", request.param)
    return request.param


@pytest.mark.parametrize(
    "num_slots", [(128, 136, 144), (136, 128, 128), (130,), (0, 8), (0, 0), (100, 200), (300, 300)]
)
def test_every_row_reads_every_slot_that_it_sees_once(num_slots):
    parts_of_all = list(kernel_calls(num_slots, [0] * len(num_slots)))
    seen = [
        [slots for rows, slots in parts_of_all if row in range(rows.start, rows.stop)]
        for row in range(len(num_slots))
    ]
    for count, parts in zip(num_slots, seen, strict=True):
        assert [slot for part in parts for slot in range(part.start, part.stop)] == list(
            range(count)
        )
    alike = len(num_slots) > 1 and min(num_slots) >= 128
    assert any(rows.stop - rows.start == len(num_slots) for rows, _ in parts_of_all) == (
        alike or num_slots == (130,)
    )


DOCUMENTS = [
    ((4, 4, 2), (0, 0, 6)),
    ((3, 4, 4), (0, 4, 4)),
    ((2, 0, 3), (1, 5, 5)),
]  # num_slots, first_slots


def test_rows_of_several_documents_share_calls_within_their_own():
    slots, first = (128, 136, 8, 130, 130), (0, 0, 136, 144, 144)
    found = [
        (rows.start, rows.stop, part.start, part.stop) for rows, part in kernel_calls(slots, first)
    ]
    shared = [(0, 2, 0, 128), (1, 2, 128, 136), (2, 3, 136, 144), (3, 5, 144, 274)]
    assert found == shared


@pytest.mark.parametrize(
    "num_slots, first_slots",
    [*((n, None) for n in [(8, 8, 8), (2, 5, 8), (0, 3, 6), (1, 0, 0)]), *DOCUMENTS],
)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
def test_values_and_gradients_are_those_of_one_softmax(num_slots, first_slots, heads, together):
    tensors = inputs(*heads)
    expected = joined(*tensors, num_slots, 0.3, first_slots)
    found = memory_attention(*tensors, num_slots, 0.3, first_slots=first_slots)
    assert relative_error(found, expected) < EXACT
    arriving = torch.randn_like(expected)
    for a, b in zip(
        *(torch.autograd.grad(out, tensors, arriving) for out in (found, expected)), strict=True
    ):
        assert relative_error(a, b) < EXACT


class Recorded:
    """A sink that sums all gradients and records those of some slots of some rows."""

    def __init__(self, like, wanted):
        self.total, self.wanted, self.rows = [torch.zeros_like(t) for t in like], wanted, {}

    def add_rows(self, slots, *grads):
        for total, grad in zip(self.total, grads, strict=True):
            total[:, :, slots] += grad

    def slots_wanted(self, row):
        return self.wanted.get(row)

    def add_row(self, row, *grads):
        self.rows[row] = grads


@pytest.mark.parametrize(
    "num_slots, first_slots",
    [((2, 0, 8), None), ((3, 3, 6), None), ((8, 8, 8), None), *DOCUMENTS[:2]],
)
def test_a_sink_receives_the_gradients_and_autograd_none(num_slots, first_slots, together):
    *own, memory_key, memory_value = inputs()
    last = first_slots[2] if first_slots else 0
    wanted = {0: torch.tensor([1]), 2: last + torch.tensor([0, 1] if first_slots else [0, 2, 5])}
    sink = Recorded((memory_key, memory_value), wanted)
    out = memory_attention(*own, memory_key, memory_value, num_slots, 0.3, sink, first_slots)
    arriving = torch.randn_like(out)
    assert torch.autograd.grad(
        out, [memory_key], arriving, allow_unused=True, retain_graph=True
    ) == (None,)
    assert sorted(sink.rows) == sorted(wanted)
    total = [torch.zeros_like(memory_key), torch.zeros_like(memory_value)]
    for row in range(3):
        part = slice(row, row + 1)
        alone = joined(
            *(t[part] for t in own),
            memory_key,
            memory_value,
            [num_slots[row]],
            0.3,
            first_slots and [first_slots[row]],
        )
        for i, memory in enumerate((memory_key, memory_value)):
            (expected,) = torch.autograd.grad(alone, memory, arriving[part], retain_graph=True)
            total[i] += expected
            assert (
                row not in wanted
                or relative_error(sink.rows[row][i], expected[0, :, wanted[row]]) < EXACT
            )
    for found, expected in zip(sink.total, total, strict=True):
        assert relative_error(found, expected) < EXACT


def test_where_only_the_memory_has_gradients_nothing_else_is_computed():
    query, key, value, memory_key, memory_value = (t.detach() for t in inputs())
    memory_key.requires_grad_()
    (found,) = torch.autograd.grad(
        memory_attention(query, key, value, memory_key, memory_value, (2, 5, 8), 0.3).sum(),
        memory_key,
    )
    (expected,) = torch.autograd.grad(
        joined(query, key, value, memory_key, memory_value, (2, 5, 8), 0.3).sum(), memory_key
    )
    assert relative_error(found, expected) < EXACT


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("chunk_batch", [1, 3])
def test_a_step_and_a_score_are_those_of_joined_keys(family, chunk_batch, together, monkeypatch):
    model = make_model(family)
    model.chunk_batch = chunk_batch
    ids = random_ids(1, 5 * model.memory_config.chunk_size - 3)[0]

    def run():
        model.zero_grad()
        uiollms.gradient_step(
            model, Sample.document(ids, model.memory_config.chunk_size), estimator="uio", S=2, rng=1
        )
        found = [
            p.grad.clone() for p in model.trainable_parameters().values() if p.grad is not None
        ]
        return [uiollms.score(model, ids, "document").nll, *found]

    where_it_lies = run()
    monkeypatch.setattr(SharedPrefix, "reads_in_place", lambda self, device: False)
    for a, b in zip(where_it_lies, run(), strict=True):
        assert relative_error(a, b) < 1e-10  # many layers: rounding adds up


@pytest.mark.parametrize("estimator", ["exact", "uio"])
def test_rows_longer_than_a_window_behind_memory(estimator, monkeypatch):
    """A sample of one's own: its slots are not behind the window, its tokens are, and gradients
    arrive as where keys are joined anyway; plain autograd says the same of `exact`."""
    model = MemoryLM(make_base("mistral", sliding_window=9), MEMORY)
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    ids, chunks = random_ids(30), random_ids(16, seed=1).view(2, 8)
    targets = torch.cat([ids[1:], torch.tensor([-100])])
    weights = torch.full((30,), 1 / 29, dtype=torch.float64)
    sample = Sample(chunks, tuple(Row(ids, targets, weights, count) for count in (1, 2)))

    def run():
        result = uiollms.gradient_step(model, sample, estimator=estimator, S=1, rng=1)
        return result.nll.sum(), gradients(model)

    (nll, found), _ = run(), monkeypatch.setattr(SharedPrefix, "reads_in_place", lambda *_: False)
    joined_nll, expected = run()
    assert relative_error(nll, joined_nll) < 1e-6  # a report in float32
    assert worst_error(found, expected) < 1e-10
    keys, values = model.project(model.encode_layers(chunks), [0, 1])
    front = KVPrefix(*([[join_slots(kv, 1)] for kv in of] for of in (keys, values)))
    hidden = model.decode(ids[None], front, [4])[0]
    alone = F.cross_entropy(model.logits(hidden)[:-1], ids[1:], reduction="none")
    last = replace(sample, rows=sample.rows[1:])
    assert relative_error(token_losses(model, last)[1], alone) < EXACT


def test_no_graph_holds_the_memory_joined_to_a_rows_keys(monkeypatch):
    model = make_model()
    l, m = model.memory_config.chunk_size, model.memory_config.num_memory
    saved = []
    monkeypatch.setattr(
        "uiollms.kernels.recompute._pack", lambda kept: saved.append(kept.shape) or kept
    )
    uiollms.gradient_step(model, Sample.language_modeling(random_ids(1, 4 * l)[0], l))
    lengths = {shape[2] for shape in saved if len(shape) == 4}
    assert l in lengths and not lengths & {
        l + m * count for count in range(2, 4)
    }  # l + m: the encoder's tokens and slots
