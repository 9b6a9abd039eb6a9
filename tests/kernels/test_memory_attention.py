"""Attention that reads a shared memory in place, compared with one softmax over joined keys and a
dense mask.

The relative tolerance of 1e-12 allows for another order of summation in float64, and for nothing
else.
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
from flash_stand_in import use_stand_in
from torch.nn import functional as F

import uiollms
from uiollms import MemoryLM
from uiollms.data.sample import Row, Sample
from uiollms.evaluation.scoring import token_losses
from uiollms.kernels import memory_attention as kernel
from uiollms.kernels.memory_attention import MemoryLayout, WantedSlots, memory_attention
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


def joined_attention(
    query, key, value, memory_key, memory_value, num_slots, scaling, first_slots=None
):
    """The slow twin. It copies the memory for every row and computes one attention over all keys
    with a mask."""
    rows, groups = len(query), query.shape[1] // key.shape[1]
    firsts = first_slots or [0] * rows
    last = max(first + count for first, count in zip(firsts, num_slots, strict=True))

    def join(memory, local):
        memories = memory[:, :, :last].expand(rows, -1, -1, -1)
        return torch.cat([memories, local], dim=2).repeat_interleave(groups, dim=1)

    keys, values = join(memory_key, key), join(memory_value, value)
    mask = decoder_mask(num_slots, 0, query.shape[2], query.device, first_slots=first_slots)
    return F.scaled_dot_product_attention(query, keys, values, mask, scale=scaling)


@pytest.fixture(params=[(1, False), (3, False), (128, False), (1, True), (3, True)])
def min_common_slots(request, monkeypatch):
    """The number of common slots from which on rows read them in one call, with the kernels of
    the CPU, or with the code for CUDA and a stand-in for its kernels."""
    count, with_stand_in = request.param
    monkeypatch.setitem(kernel.MIN_COMMON_SLOTS, "cpu", count)
    if with_stand_in:
        use_stand_in(monkeypatch)
    return count


CPU = torch.device("cpu")


def attend(tensors, num_slots, first_slots=None, sink=None):
    layout = MemoryLayout(num_slots, first_slots or [0] * len(num_slots), tensors[0].shape[2], CPU)
    return memory_attention(*tensors, layout, 0.3, sink).transpose(1, 2)


@pytest.mark.parametrize(
    "num_slots", [(128, 136, 144), (136, 128, 128), (130,), (0, 8), (0, 0), (100, 200), (300, 300)]
)
def test_every_row_reads_each_of_its_slots_once(num_slots):
    layout = MemoryLayout(num_slots, [0] * len(num_slots), 4, CPU)
    for row, count in enumerate(num_slots):
        parts = [slots for rows, slots in layout.common if row in range(rows.start, rows.stop)]
        parts.append(layout.further[row])
        read = [slot for part in parts for slot in range(part.start, part.stop)]
        assert read == list(range(count))
    in_common = len(num_slots) > 1 and min(num_slots) >= 128
    assert bool(layout.common) == (in_common or num_slots == (130,))


# The num_slots and first_slots of the rows of several documents.
DOCUMENTS = [
    ((4, 4, 2), (0, 0, 6)),
    ((3, 4, 4), (0, 4, 4)),
    ((2, 0, 3), (1, 5, 5)),
]


def test_only_rows_of_the_same_document_share_a_call():
    """The example of `MemoryLayout`, and another document."""
    layout = MemoryLayout((128, 136, 8, 130, 130), (0, 0, 136, 144, 144), 4, CPU)
    common = [(rows.start, rows.stop, part.start, part.stop) for rows, part in layout.common]
    assert common == [(0, 2, 0, 128), (2, 3, 136, 144), (3, 5, 144, 274)]
    assert [part.stop - part.start for part in layout.further] == [0, 8, 0, 0, 0]
    assert layout.further[1] == slice(128, 136)


@pytest.mark.parametrize(
    "num_slots, first_slots",
    [*((n, None) for n in [(8, 8, 8), (2, 5, 8), (0, 3, 6), (1, 0, 0)]), *DOCUMENTS],
)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
def test_values_and_gradients_equal_those_of_one_softmax(
    num_slots, first_slots, heads, min_common_slots
):
    tensors = inputs(*heads)
    expected = joined_attention(*tensors, num_slots, 0.3, first_slots)
    found = attend(tensors, num_slots, first_slots)
    assert relative_error(found, expected) < EXACT
    out_grad = torch.randn_like(expected)
    found_grads, expected_grads = (
        torch.autograd.grad(out, tensors, out_grad) for out in (found, expected)
    )
    for a, b in zip(found_grads, expected_grads, strict=True):
        assert relative_error(a, b) < EXACT


class RecordingSink:
    """A sink that sums all gradients and records those of some slots of some rows."""

    def __init__(self, like, wanted):
        self.total, self.wanted, self.rows = [torch.zeros_like(t) for t in like], wanted, {}

    def add_rows(self, slots, *grads):
        for total, grad in zip(self.total, grads, strict=True):
            total[:, :, slots] += grad

    def slots_wanted(self, row):
        slots = self.wanted.get(row)
        return None if slots is None else WantedSlots(slots, int(slots[0]))

    def add_row(self, row, *grads):
        self.rows[row] = grads


@pytest.mark.parametrize(
    "num_slots, first_slots",
    [((2, 0, 8), None), ((3, 3, 6), None), ((8, 8, 8), None), *DOCUMENTS[:2]],
)
def test_a_sink_receives_the_memory_gradients_instead_of_autograd(
    num_slots, first_slots, min_common_slots
):
    *local, memory_key, memory_value = inputs()
    memory = (memory_key, memory_value)
    first = first_slots[2] if first_slots else 0
    wanted = {0: torch.tensor([1]), 2: first + torch.tensor([0, 1] if first_slots else [0, 2, 5])}
    sink = RecordingSink(memory, wanted)
    out = attend((*local, *memory), num_slots, first_slots, sink)
    out_grad = torch.randn_like(out)
    by_autograd = torch.autograd.grad(
        out, [memory_key], out_grad, allow_unused=True, retain_graph=True
    )
    assert by_autograd == (None,)
    assert sorted(sink.rows) == sorted(wanted)
    total = [torch.zeros_like(memory_key), torch.zeros_like(memory_value)]
    for row in range(3):
        part = slice(row, row + 1)
        row_inputs = [tensor[part] for tensor in local]
        row_first = first_slots and [first_slots[row]]
        one_row = joined_attention(*row_inputs, *memory, [num_slots[row]], 0.3, row_first)
        for i, half in enumerate(memory):
            (expected,) = torch.autograd.grad(one_row, half, out_grad[part], retain_graph=True)
            total[i] += expected
            if row in wanted:
                recorded = sink.rows[row][i]
                assert relative_error(recorded, expected[0, :, wanted[row]]) < EXACT
    for found, expected in zip(sink.total, total, strict=True):
        assert relative_error(found, expected) < EXACT


def test_the_memory_gradient_needs_no_other_gradient():
    tensors = [tensor.detach() for tensor in inputs()]
    memory_key = tensors[3].requires_grad_()
    in_place = attend(tensors, (2, 5, 8))
    joined = joined_attention(*tensors, (2, 5, 8), 0.3)
    (found,) = torch.autograd.grad(in_place.sum(), memory_key)
    (expected,) = torch.autograd.grad(joined.sum(), memory_key)
    assert relative_error(found, expected) < EXACT


@pytest.mark.parametrize(
    "family, estimator",
    [
        ("llama", "uio"),
        ("llama", "tbptt"),
        ("llama", "importance"),
        ("qwen3", "exact"),
        ("mistral", "uio"),
    ],
)
@pytest.mark.parametrize("chunk_batch", [1, 3])
def test_a_step_and_a_score_equal_those_of_joined_keys(
    family, estimator, chunk_batch, min_common_slots, monkeypatch
):
    model = make_model(family)
    model.chunk_batch = chunk_batch
    ids = random_ids(1, 5 * model.memory_config.chunk_size - 3)[0]
    sample = Sample.document(ids, model.memory_config.chunk_size)

    def run():
        model.zero_grad()
        uiollms.gradient_step(model, sample, estimator=estimator, S=2, rng=1)
        grads = [parameter.grad for parameter in model.trainable_parameters().values()]
        found = [grad.clone() for grad in grads if grad is not None]
        return [uiollms.score(model, ids, "document").nll, *found]

    in_place = run()
    monkeypatch.setattr(SharedPrefix, "reads_in_place", lambda *_: False)
    for a, b in zip(in_place, run(), strict=True):
        # Rounding adds up over the layers.
        assert relative_error(a, b) < 1e-10


@pytest.mark.parametrize("estimator", ["exact", "uio"])
def test_rows_longer_than_a_sliding_window_read_all_slots(estimator, monkeypatch):
    """The rows of this sample have more tokens than the sliding window. They attend to all slots,
    while the window limits which tokens they attend to. Gradients equal those of joined keys, and
    the losses those of plain decoding."""
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

    nll, found = run()
    monkeypatch.setattr(SharedPrefix, "reads_in_place", lambda *_: False)
    joined_nll, expected = run()
    # The NLL is reported in float32.
    assert relative_error(nll, joined_nll) < 1e-6
    assert worst_error(found, expected) < 1e-10
    keys, values = model.project(model.encode_layers(chunks), [0, 1])
    prefix = KVPrefix(*([[join_slots(kv, 1)] for kv in half] for half in (keys, values)))
    hidden = model.decode(ids[None], prefix, [4])[0]
    plain = F.cross_entropy(model.logits(hidden)[:-1], ids[1:], reduction="none")
    last = replace(sample, rows=sample.rows[1:])
    assert relative_error(token_losses(model, last)[1], plain) < EXACT


def test_no_graph_stores_the_memory_joined_to_a_rows_keys(monkeypatch):
    model = make_model()
    l, m = model.memory_config.chunk_size, model.memory_config.num_memory
    shapes = []
    monkeypatch.setattr(
        "uiollms.kernels.recompute.CompactTensors.pack",
        lambda tensors, tensor: shapes.append(tensor.shape) or tensor,
    )
    uiollms.gradient_step(model, Sample.language_modeling(random_ids(1, 4 * l)[0], l))
    lengths = {shape[2] for shape in shapes if len(shape) == 4}
    # The length l + m is left out, because the encoder's tokens and slots have it too.
    assert l in lengths and not lengths & {l + m * count for count in range(2, 4)}
