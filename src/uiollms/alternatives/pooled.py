"""Mean-pooled keys and values: the base reads the raw context, and each group of neighbouring
tokens becomes one slot without any training.

Shapes: T tokens, C chunks, l chunk_size, m num_memory, L layers, H key/value heads, K head size, D
hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from uiollms.data.limits import check_ids
from uiollms.kernels.devices import locked_if_offloaded, to_device
from uiollms.model.layers import decoder_inputs, layer_device, project_kv, run_layer
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.passes import empty_prefix
from uiollms.model.positions import slot_positions
from uiollms.model.rope import rotary_tables, uses_long_factors


@torch.no_grad()
@locked_if_offloaded
def pool_context(model: MemoryLM, chunks: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Returns keys and values, L x [1, H, C * m, K] each, that rows read as they read memory.

    The base reads the chunks [C, l] as one raw text. In every layer the keys, before rotation, and
    the values of l/m neighbouring tokens are averaged. A pooled key is then rotated to the position
    of its slot. Raises ValueError if the text is longer than the base's positions.
    """
    if not len(chunks):
        return [], []
    config, num_chunks = model.memory_config, len(chunks)
    text, m = chunks.flatten()[None], config.num_memory
    check_ids(text, model.limits.vocab_size)
    if text.shape[1] > model.limits.positions:
        raise ValueError(
            f"mode 'pooled': the base reads {text.shape[1]} raw tokens, "
            f"{model.limits.positions_text}; cut the document with `truncation`"
        )
    hidden = model.base.model.embed_tokens(to_device(text, model.device))
    inputs = decoder_inputs(model.base, hidden, [0], 0, empty_prefix(model))
    positions = slot_positions(range(num_chunks), m, model.device).view(1, -1)
    long_factors = uses_long_factors(model.base.config, [m], 0)  # as for every row that reads slots
    rotary = rotary_tables(model.base, hidden, positions, long_factors)
    execution, last = model.execution(text.shape[1], as_base=True), len(model.decoder_layers) - 1
    keys, values = [], []
    for i, layer in enumerate(model.decoder_layers):
        hidden = to_device(hidden, layer_device(layer))
        inputs = inputs.to(layer_device(layer))
        k, v = unrotated_kv(layer, hidden)
        # [1, H, T, K] -> the mean over each group of l/m tokens, [1, H, C * m, K]
        pooled_k, pooled_v = (x.unflatten(2, (num_chunks * m, -1)).mean(3) for x in (k, v))
        keys.append(rotated(layer, pooled_k, [to_device(t, pooled_k.device) for t in rotary]))
        values.append(pooled_v)
        if i < last:
            hidden = execution.run(layer, partial(run_layer, layer, inputs=inputs), hidden)
    return keys, values


def unrotated_kv(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the keys before rotation and the values, [1, H, T, K] each, that a layer computes
    from hidden states [1, T, D]."""
    attention = layer.self_attn
    shape = (*hidden.shape[:2], attention.head_dim)
    # A rotation by the angle 0 changes nothing.
    no_rotation = hidden.new_ones(shape), hidden.new_zeros(shape)
    return project_kv(attention, layer.input_layernorm(hidden), no_rotation)


def rotated(layer: Any, keys: Tensor, rotary: Sequence[Tensor]) -> Tensor:
    """Returns keys [1, H, S, K], rotated by the family's own function with the cosines and sines
    `rotary` [1, S, K]."""
    rotate = sys.modules[type(layer.self_attn).__module__].apply_rotary_pos_emb
    return rotate(keys, keys, *rotary)[1]
