"""Compares pooled keys and values with a slow twin: every token's keys and values, computed one
group at a time, averaged and read by a dense attention of all heads."""

import sys

import pytest
import torch
from conftest import MEMORY, make_model, random_ids, relative_error
from torch.nn import functional as F

import uiollms
from uiollms.alternatives.pooled import pool_context
from uiollms.data.sample import Sample
from uiollms.evaluation.scoring import token_losses

L, M = MEMORY.chunk_size, MEMORY.num_memory


def hidden_inputs(base, ids):
    """Returns the input [T, D] of every layer's attention, after its norm, from hooks."""
    found = []
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda *args: found.append(args[2][0]))
        for layer in base.model.layers
    ]
    base(ids[None])
    for hook in hooks:
        hook.remove()
    return found


def slow_pool(model, ids):
    """Returns per layer the keys and values [H, slots, K] of the text's full chunks. Keys are those
    of one group of L / M tokens, averaged, then rotated to the position of the slot."""
    base, group = model.base, L // M
    result = []
    for layer, hidden in zip(base.model.layers, hidden_inputs(base, ids), strict=True):
        attention = layer.self_attn
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        keys, values = [], []
        for slot in range(len(ids) // group):
            tokens = hidden[slot * group : (slot + 1) * group]
            k = attention.k_proj(tokens).view(group, -1, attention.head_dim)
            v = attention.v_proj(tokens).view(group, -1, attention.head_dim)
            if hasattr(attention, "k_norm"):
                k = attention.k_norm(k)
            k, v = k.mean(0), v.mean(0)  # [H, K]
            cos, sin = base.model.rotary_emb(k, torch.tensor([[slot]]))
            keys.append(rotate(k[None, :, None], k[None, :, None], cos, sin)[1][0, :, 0])
            values.append(v)
        result.append((torch.stack(keys, 1), torch.stack(values, 1)))
    return result


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 4])
def test_pooled_keys_and_values_equal_the_slow_twin(family, count):
    """The tolerance 1e-12 in float64 allows for another order of summation."""
    model, chunks = make_model(family), random_ids(count, L)
    keys, values = pool_context(model, chunks)
    for k, v, (slow_k, slow_v) in zip(
        keys, values, slow_pool(model, chunks.flatten()), strict=True
    ):
        assert k.shape == (1, model.config.num_key_value_heads, count * M, k.shape[-1])
        assert relative_error(k[0], slow_k) < 1e-12
        assert relative_error(v[0], slow_v) < 1e-12


@torch.no_grad()
def test_one_slot_per_token_reads_the_raw_context(family):
    """With groups of one token, slots are the raw tokens' keys and values at their positions. A
    sliding window, which does not apply to slots, is wider than the text."""
    config = MEMORY.model_copy(update=dict(num_memory=L))
    model, ids = make_model(family, config=config), random_ids(3 * L)
    pooled, raw = (uiollms.score(model, ids, "document", mode).nll for mode in ("pooled", "raw"))
    assert relative_error(pooled, raw) < 1e-12


@torch.no_grad()
def test_rows_read_the_slots_of_the_chunks_before_them():
    """The last row equals a dense attention over pooled slots and its own tokens, in a copy of the
    base's layers written out."""
    model, ids = make_model(), random_ids(3 * L)
    found = uiollms.score(model, ids, "paper", "pooled").nll[-(L - 1) :]
    pooled = slow_pool(model, ids[: 2 * L])
    base, row = model.base, ids[2 * L :]
    hidden = base.model.embed_tokens(row)[None]
    positions = torch.arange(2 * M, 2 * M + L)[None]
    rotary = base.model.rotary_emb(hidden, positions)
    for layer, (pool_k, pool_v) in zip(base.model.layers, pooled, strict=True):
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        size = attention.head_dim
        q, k, v = (
            projection(normed).view(1, L, -1, size).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = rotate(q, k, *rotary)
        k, v = torch.cat([pool_k[None], k], 2), torch.cat([pool_v[None], v], 2)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        mask = torch.ones(L, 2 * M + L, dtype=torch.bool).tril(2 * M)
        weights = (q @ k.transpose(2, 3) / size**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        hidden = hidden + attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits = base.lm_head(base.model.norm(hidden))[0]
    expected = F.cross_entropy(logits[:-1], row[1:], reduction="none")
    assert relative_error(found, expected) < 1e-12


def test_a_context_past_the_positions_is_refused():
    """64 positions: the memories of 9 chunks fit, their 72 raw tokens do not."""
    model, ids = make_model(), random_ids(10 * L)
    assert len(uiollms.score(model, ids[: 8 * L], mode="pooled").nll) == 8 * (L - 1)
    with pytest.raises(ValueError, match="mode 'pooled': the base reads 72 raw tokens"):
        uiollms.score(model, ids, mode="pooled")
    bad = Sample.document(torch.full((2 * L,), 999), L)
    with pytest.raises(ValueError, match="token id 999 has no embedding"):
        token_losses(model, bad, "pooled")
