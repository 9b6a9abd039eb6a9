"""Attention to a shared memory where it lies, beside one softmax over joined keys under a dense mask.

1e-12 relative leaves room for another order of summation in float64, and for nothing else.
"""

import pytest
import torch
from conftest import make_model, random_ids, relative_error
from torch.nn import functional as F

import uiollms
from uiollms.apart import SharedPrefix, behind
from uiollms.attention import decoder_mask
from uiollms.tasks import Sample

EXACT = 1e-12


def inputs(heads=4, kv_heads=2, rows=3, length=9, slots=8, size=8):
    torch.manual_seed(0)
    shapes = [(rows, heads, length, size), *2 * [(rows, kv_heads, length, size)], *2 * [(1, kv_heads, slots, size)]]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def joined(query, key, value, memory_key, memory_value, num_slots, scaling):
    """The slow twin: every row its own copy of the memory, one attention over all keys, a mask."""
    rows, groups = len(query), query.shape[1] // key.shape[1]
    keys, values = (
        torch.cat([memory[:, :, : max(num_slots)].expand(rows, -1, -1, -1), own], dim=2).repeat_interleave(groups, dim=1)
        for memory, own in ((memory_key, key), (memory_value, value))
    )
    mask = decoder_mask(num_slots, 0, query.shape[2], query.device)
    return F.scaled_dot_product_attention(query, keys, values, mask, scale=scaling)


@pytest.mark.parametrize("num_slots", [(8, 8, 8), (2, 5, 8), (0, 3, 6), (1, 0, 0)])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
def test_values_and_gradients_are_those_of_one_softmax(num_slots, heads):
    tensors = inputs(*heads)
    expected, found = joined(*tensors, num_slots, 0.3), behind(*tensors, num_slots, 0.3)
    assert relative_error(found, expected) < EXACT
    arriving = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(out, tensors, arriving) for out in (found, expected)), strict=True):
        assert relative_error(a, b) < EXACT


def test_a_receiver_gets_every_rows_gradient_and_autograd_none():
    *own, memory_key, memory_value = inputs()
    num_slots, received = (2, 0, 8), {}
    out = behind(*own, memory_key, memory_value, num_slots, 0.3, lambda row, *grads: received.update({row: grads}))
    arriving = torch.randn_like(out)
    assert torch.autograd.grad(out, [memory_key], arriving, allow_unused=True, retain_graph=True) == (None,)
    assert sorted(received) == [0, 2]
    for row, grads in received.items():
        part = slice(row, row + 1)
        alone = joined(*(t[part] for t in own), memory_key, memory_value, [num_slots[row]], 0.3)
        for found, memory in zip(grads, (memory_key, memory_value), strict=True):
            (expected,) = torch.autograd.grad(alone, memory, arriving[part], retain_graph=True)
            assert relative_error(found, expected[:, :, : num_slots[row]]) < EXACT


def test_where_only_the_memory_has_gradients_nothing_else_is_computed():
    query, key, value, memory_key, memory_value = (t.detach() for t in inputs())
    memory_key.requires_grad_()
    (found,) = torch.autograd.grad(behind(query, key, value, memory_key, memory_value, (2, 5, 8), 0.3).sum(), memory_key)
    (expected,) = torch.autograd.grad(joined(query, key, value, memory_key, memory_value, (2, 5, 8), 0.3).sum(), memory_key)
    assert relative_error(found, expected) < EXACT


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("chunk_batch", [1, 3])
def test_a_step_and_a_score_are_those_of_joined_keys(family, chunk_batch, monkeypatch):
    model = make_model(family)
    model.chunk_batch = chunk_batch
    ids = random_ids(1, 5 * model.memory_config.chunk_size - 3)[0]

    def run():
        model.zero_grad()
        uiollms.gradient_step(model, Sample.document(ids, model.memory_config.chunk_size), estimator="uio", S=2, rng=1)
        found = [p.grad.clone() for p in model.trainable_parameters().values() if p.grad is not None]
        return [uiollms.score(model, ids, "document").nll, *found]

    apart = run()
    monkeypatch.setattr(SharedPrefix, "lies_apart", lambda self, device: False)
    for a, b in zip(apart, run(), strict=True):
        assert relative_error(a, b) < 1e-10  # many layers: rounding adds up


def test_no_graph_holds_the_memory_joined_to_a_rows_keys(monkeypatch):
    model = make_model()
    l, m = model.memory_config.chunk_size, model.memory_config.num_memory
    saved = []
    monkeypatch.setattr("uiollms.base._packed", lambda kept: saved.append(kept.shape) or kept)
    uiollms.gradient_step(model, Sample.language_modeling(random_ids(1, 4 * l)[0], l))
    lengths = {shape[2] for shape in saved if len(shape) == 4}
    assert l in lengths and not lengths & {l + m * count for count in range(2, 4)}  # l + m: the encoder's tokens and slots
