"""Masks and positions against their slow, obvious twins."""

import pytest
import torch
from conftest import make_model, random_ids, relative_error
from torch.nn import functional as F

from uiollms.model.attention import (
    decoder_mask,
    decoder_positions,
    encoder_mask,
    encoder_positions,
    slot_mask,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("l, m", [(8, 2), (8, 8), (8, 1), (6, 3)])
def test_encoder_mask_is_the_definition(l, m):
    mask = encoder_mask(l, m, CPU)[0, 0]
    for query in range(l + m):
        for key in range(l + m):
            if query < l:
                pattern = key <= query
            else:
                pattern = key < (query - l + 1) * (l // m) or key == query
            assert mask[query, key] == pattern, (query, key)
    assert torch.equal(slot_mask(l, m, CPU)[0, 0], mask[l:])
    positions = encoder_positions(l, m, CPU)[0].tolist()
    assert positions == [*range(l), *((i + 1) * (l // m) for i in range(m))]


@pytest.mark.parametrize(
    "slots, past, length",
    [([1, 2], 0, 2), ([0, 3], 0, 3), ([2, 2], 3, 2), ([0], 2, 3), ([4], 0, 1)],
)
def test_decoder_mask_is_the_definition(slots, past, length):
    for window in (None, 1, 2, 3, 100):
        check_decoder_mask(slots, past, length, window)
    assert decoder_positions(slots, length, CPU).tolist() == [
        [s + i for i in range(length)] for s in slots
    ]


def check_decoder_mask(slots, past, length, window):
    mask = decoder_mask(slots, past, length, CPU, window)
    reach = past + length if window is None else window
    widest = max(slots)
    if mask is None:  # a single token sees all
        assert length == 1
        mask = torch.ones(1, 1, 1, widest + past + 1, dtype=torch.bool)
    mask = mask.expand(len(slots), 1, length, widest + past + length)[:, 0]
    for row, visible in enumerate(slots):
        for query in range(length):
            for key in range(widest + past + length):
                behind = past + query - (key - widest)  # by how many tokens
                pattern = key < visible if key < widest else 0 <= behind < reach
                assert mask[row, query, key] == pattern, (row, query, key)


def test_without_memory_the_kernels_own_causal_path_is_used():
    assert decoder_mask([0, 0], 0, 5, CPU) is None


def test_decoder_behind_memory_is_dense_attention(family):
    """One layer's attention output with a memory prefix, grouped-query heads included, against a
    float64 softmax written out. (An attention function without a mask function of its own would
    be wrong here by tenths.)"""
    model = make_model(family)
    layer, attention = model.base.model.layers[0], model.base.model.layers[0].self_attn
    caught = {}
    hook = attention.register_forward_hook(
        lambda module, args, kwargs, output: caught.update(kwargs, out=output[0]), with_kwargs=True
    )
    with torch.no_grad():
        ids = random_ids(1, 13)
        model(ids[:, :8])
        state = model(ids[:, :8]).past_key_values
        model(ids[:, 8:], state)
    hook.remove()

    x = caught["hidden_states"]
    shape = (*x.shape[:2], -1, attention.head_dim)
    norm_q, norm_k = (getattr(attention, n, lambda t: t) for n in ("q_norm", "k_norm"))
    q, k, v = (
        norm_q(attention.q_proj(x).view(shape)),
        norm_k(attention.k_proj(x).view(shape)),
        attention.v_proj(x).view(shape),
    )
    cos, sin = caught["position_embeddings"]

    def rotate(t):
        a, b = t.chunk(2, -1)
        return t * cos[:, :, None] + torch.cat([-b, a], -1) * sin[:, :, None]

    k = torch.cat([state.memory_keys[0].transpose(1, 2), rotate(k)], 1)
    v = torch.cat([state.memory_values[0].transpose(1, 2), v], 1)
    groups = q.shape[2] // k.shape[2]
    scores = (
        torch.einsum("bqhd,bkhd->bhqk", rotate(q), k.repeat_interleave(groups, 2))
        * attention.head_dim**-0.5
    )
    slots, length = state.num_slots, x.shape[1]
    hidden_keys = torch.ones(length, slots + length, dtype=torch.bool).triu(slots + 1)
    weights = F.softmax(scores.masked_fill(hidden_keys, -torch.inf), -1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(groups, 2)).flatten(2)
    assert relative_error(caught["out"], attention.o_proj(out)) < 1e-12  # float64 rounding
    assert layer.self_attn is attention
