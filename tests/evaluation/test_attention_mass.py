"""Compares attention mass with a softmax that is computed by hand from queries and keys."""

import math

import pytest
import torch
from conftest import make_model, random_ids
from transformers.models.llama.modeling_llama import repeat_kv

from uiollms.evaluation.attention_mass import AttentionMass, RecordingPattern, attention_fractions
from uiollms.model.attention import decoder_mask


def store_output(outputs: dict, key: tuple[int, str]):
    return lambda module, arguments, output: outputs.__setitem__(key, output)


def fractions_by_hand(model, ids) -> torch.Tensor:
    """The slow twin of `attention_fractions`. Hooks store the queries and keys of every layer, and
    the weights are softmax(q k^T / sqrt(K)), token by token, over the memories and the chunk's
    tokens up to it. The keys of the memories come from the state of a stream."""
    l, m = model.memory_config.chunk_size, model.memory_config.num_memory
    layers = model.base.model.layers
    count = -(-len(ids) // l)
    fractions = torch.zeros(len(layers), count - 1, count, dtype=torch.float64)
    for r in range(1, count):
        state = model(ids[None, : r * l]).past_key_values  # r memories
        outputs: dict[tuple[int, str], torch.Tensor] = {}
        hooks = []
        for i, layer in enumerate(layers):
            for name in ("q", "k"):
                module = getattr(layer.self_attn, f"{name}_norm", None) or getattr(
                    layer.self_attn, f"{name}_proj"
                )
                hooks.append(module.register_forward_hook(store_output(outputs, (i, name))))
        row = ids[r * l : (r + 1) * l]
        prefix = state.prefix(r * m, with_local=False)
        model.decode(row[None], prefix, [r * m])
        for hook in hooks:
            hook.remove()
        positions = r * m + torch.arange(len(row))[None]
        cos, sin = model.base.model.rotary_emb(torch.zeros(0, dtype=model.dtype), positions)
        for i, layer in enumerate(layers):
            attention = layer.self_attn
            q, k = (
                outputs[i, name].reshape(1, len(row), -1, attention.head_dim).transpose(1, 2)
                for name in ("q", "k")
            )
            half = attention.head_dim // 2
            q, k = (x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin for x in (q, k))
            keys = torch.cat([state.memory_keys[i][:, :, : r * m], k], dim=2)[0]
            keys = repeat_kv(keys[None], q.shape[1] // len(keys))[0]
            for head in range(q.shape[1]):
                for t in range(len(row)):
                    visible = keys[head, : r * m + t + 1]
                    weights = torch.softmax(
                        visible @ q[0, head, t] / math.sqrt(attention.head_dim), 0
                    )
                    weight = 1 / (q.shape[1] * len(row))
                    fractions[i, r - 1, 0] += weight * weights[r * m :].sum()
                    for age in range(1, r + 1):
                        first = (r - age) * m
                        fractions[i, r - 1, age] += weight * weights[first : first + m].sum()
    return fractions


@torch.no_grad()
def test_attention_mass_equals_a_softmax_by_hand(family):
    model, ids = make_model(family), random_ids(29)
    fractions = attention_fractions(model, ids)
    assert fractions.shape == (3, 3, 4)
    assert torch.allclose(fractions.sum(2), torch.ones(3, 3), atol=1e-6)
    # The softmax of eager attention is float32.
    assert torch.allclose(fractions.double(), fractions_by_hand(model, ids), atol=1e-6)
    for r in range(3):
        assert (fractions[:, r, r + 2 :] == 0).all() and (fractions[:, r, : r + 2] > 0).all()


@torch.no_grad()
def test_recording_does_not_change_attention():
    """The attention is compared with memories, and without a mask, which means causal attention.
    The settings of the base do not change."""
    model, ids = make_model(), random_ids(29)
    usual, layers = model.base.config._attn_implementation, []
    for num_slots, mask in ((4, decoder_mask([4], 0, 5, model.device)), (0, None)):
        state = model.new_state()
        if num_slots:
            state = model(ids[None, : num_slots * 4]).past_key_values
        prefix = state.prefix(num_slots, with_local=False)
        expected = model.decode(ids[None, :5], prefix, [num_slots])
        pattern = RecordingPattern(mask, lambda layer, weights: layers.append(layer))
        prefix = state.prefix(num_slots, with_local=False)
        found = model.decode(ids[None, :5], prefix, [num_slots], pattern=pattern)
        # The softmax of eager attention is float32.
        assert torch.allclose(found, expected, atol=1e-5)
    assert layers == [0, 1, 2, 0, 1, 2] and model.base.config._attn_implementation == usual
    with pytest.raises(ValueError, match="8 tokens fit one chunk of 8"):
        attention_fractions(model, ids[:8])


def test_averages_are_over_the_rows_that_read_the_memory(tmp_path):
    """Two layers, of which the second attends to the oldest memory only."""
    first = [[0.5, 0.5, 0, 0], [0.4, 0.4, 0.2, 0], [0.1, 0.3, 0.2, 0.4]]
    second = [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    fractions = torch.tensor([first, second], dtype=torch.float32)
    AttentionMass(fractions, {"tokens": "29"}).save(tmp_path / "attention.safetensors")
    mass = AttentionMass.load(tmp_path / "attention.safetensors")
    assert mass.about == {"tokens": "29"} and torch.equal(mass.fractions, fractions)
    assert torch.allclose(mass.by_age, torch.tensor([[0.4, 0.2, 0.4], [1 / 3, 1 / 2, 1]]))
    assert torch.allclose(mass.on_memory, torch.tensor([[0.5, 0.6, 0.9], [1, 1, 1]]))
