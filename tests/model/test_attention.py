"""Masks and positions of encoder and decoder against their definitions, computed slowly."""

import pytest
import torch
from conftest import make_model, random_ids, relative_error
from torch.nn import functional as F

from uiollms.model.attention import (
    decoder_mask,
    encoder_mask,
    slot_mask,
)
from uiollms.model.positions import decoder_positions, encoder_positions, slot_positions

CPU = torch.device("cpu")


@pytest.mark.parametrize("l, m", [(8, 2), (8, 8), (8, 1), (6, 3)])
def test_encoder_mask_and_positions_follow_their_definitions(l, m):
    mask = encoder_mask(l, m, CPU)[0, 0]
    for query in range(l + m):
        for key in range(l + m):
            if query < l:
                expected = key <= query
            else:
                expected = key < (query - l + 1) * (l // m) or key == query
            assert mask[query, key] == expected, (query, key)
    assert torch.equal(slot_mask(l, m, CPU)[0, 0], mask[l:])
    positions = encoder_positions(l, m, CPU)[0].tolist()
    assert positions == [*range(l), *((i + 1) * (l // m) for i in range(m))]


@pytest.mark.parametrize(
    "slots, past, length",
    [([1, 2], 0, 2), ([0, 3], 0, 3), ([2, 2], 3, 2), ([0], 2, 3), ([4], 0, 1)],
)
def test_decoder_mask_and_positions_follow_their_definitions(slots, past, length):
    for sliding_window in (None, 1, 2, 3, 100):
        check_decoder_mask(slots, past, length, sliding_window)
    assert decoder_positions(slots, past, length, CPU).tolist() == [
        [s + past + i for i in range(length)] for s in slots
    ]


def test_slots_of_a_chunk_follow_those_of_the_chunks_before_it():
    assert slot_positions([0, 1, 3], 2, CPU).tolist() == [[0, 1], [2, 3], [6, 7]]


def check_decoder_mask(slots, past, length, sliding_window):
    mask = decoder_mask(slots, past, length, CPU, sliding_window)
    reach = past + length if sliding_window is None else sliding_window
    num_slots = max(slots)
    if mask is None:  # a single token sees all keys
        assert length == 1
        mask = torch.ones(1, 1, 1, num_slots + past + 1, dtype=torch.bool)
    mask = mask.expand(len(slots), 1, length, num_slots + past + length)[:, 0]
    for row, visible in enumerate(slots):
        for query in range(length):
            for key in range(num_slots + past + length):
                distance = past + query - (key - num_slots)  # from key to query, in tokens
                expected = key < visible if key < num_slots else 0 <= distance < reach
                assert mask[row, query, key] == expected, (row, query, key)


def test_without_memory_no_mask_is_built():
    assert decoder_mask([0, 0], 0, 5, CPU) is None


def test_decoder_attention_to_memory_equals_dense_attention(family):
    """Compares one layer's attention output with a memory prefix, also with grouped-query heads,
    with a softmax in float64. An attention function without the right mask would differ by
    tenths."""
    model = make_model(family)
    layer, attention = model.base.model.layers[0], model.base.model.layers[0].self_attn
    captured = {}
    hook = attention.register_forward_hook(
        lambda module, args, kwargs, output: captured.update(kwargs, out=output[0]),
        with_kwargs=True,
    )
    with torch.no_grad():
        ids = random_ids(1, 13)
        model(ids[:, :8])
        state = model(ids[:, :8]).past_key_values
        model(ids[:, 8:], state)
    hook.remove()

    x = captured["hidden_states"]
    shape = (*x.shape[:2], -1, attention.head_dim)
    norm_q, norm_k = (getattr(attention, n, lambda t: t) for n in ("q_norm", "k_norm"))
    q, k, v = (
        norm_q(attention.q_proj(x).view(shape)),
        norm_k(attention.k_proj(x).view(shape)),
        attention.v_proj(x).view(shape),
    )
    cos, sin = captured["position_embeddings"]

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
    assert relative_error(captured["out"], attention.o_proj(out)) < 1e-12  # float64 rounding
    assert layer.self_attn is attention
