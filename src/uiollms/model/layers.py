"""The inputs that all layers of a pass share, and the functions that run one layer.

No code of a model is copied: layers, norms, rotary functions and attention are the library's.

Shapes: B rows, T tokens, C chunks, l chunk_size, m num_memory, D hidden size, H key/value heads,
K head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uiollms.config.sections import MemoryConfig
from uiollms.kernels.devices import device_of, to_device
from uiollms.kernels.flash_attention import uses_flash_attention
from uiollms.model.attention import (
    AttentionPattern,
    MaskPattern,
    decoder_mask,
)
from uiollms.model.attention_patterns import EncoderPattern, PackedRowsPattern, SharedMemoryPattern
from uiollms.model.lora import dropout_seeds
from uiollms.model.positions import decoder_positions, encoder_positions
from uiollms.model.rope import rotary_tables, uses_long_factors
from uiollms.model.state import KVPrefix, SharedPrefix
from uiollms.weights.fitness import attention_window, smallest_window

AnyPrefix = KVPrefix | SharedPrefix  # the keys and values that a decoder call reads before its own


def layer_device(layer: Any) -> torch.device:
    return device_of(layer.input_layernorm)


class LayerInputs(NamedTuple):
    """The inputs of all layers besides the hidden states. They are copied once where the device
    changes.

    positions: [B or 1, T]; rotary: cosines and sines [B or 1, T, K]; pattern: what the tokens
    attend to; sliding: the same in layers with a sliding window, None where it does not differ.
    """

    positions: Tensor
    rotary: tuple[Tensor, ...]
    pattern: AttentionPattern
    sliding: AttentionPattern | None = None

    def to(self, device: torch.device) -> LayerInputs:
        return LayerInputs(
            to_device(self.positions, device),
            tuple(to_device(table, device) for table in self.rotary),
            self.pattern.to(device),
            None if self.sliding is None else self.sliding.to(device),
        )

    def pattern_in(self, layer: Any) -> AttentionPattern:
        attention = layer.self_attn
        if self.sliding is None or attention_window(attention.config, attention.layer_idx) is None:
            return self.pattern
        return self.sliding


def encoder_inputs(base: Any, hidden: Tensor, config: MemoryConfig) -> LayerInputs:
    """Returns the inputs of encoder layers for hidden states [C, l + m, D]."""
    size = config.chunk_size, config.num_memory, hidden.device
    positions = encoder_positions(*size)
    pattern = EncoderPattern.of(*size, with_sdpa=not uses_flash_attention(base))
    return LayerInputs(positions, rotary_tables(base, hidden, positions, [False]), pattern)


def decoder_inputs(
    base: Any,
    hidden: Tensor,
    num_slots: Sequence[int],
    local_past: int,
    prefix: AnyPrefix,
    first_slots: Sequence[int] | None = None,
    pattern: AttentionPattern | None = None,
) -> LayerInputs:
    """Returns the inputs of decoder layers for hidden states [B, T, D]. Row b reads
    `num_slots[b]` slots of `prefix`, from slot `first_slots[b]` on (by default 0), and
    `local_past` earlier tokens of its chunk. `pattern` replaces the usual attention pattern."""
    first_slots = first_slots or [0] * len(num_slots)
    length, device = hidden.shape[1], hidden.device
    positions = decoder_positions(num_slots, local_past, length, device)
    long_factors = uses_long_factors(base.config, num_slots, local_past + length)
    rotary = rotary_tables(base, hidden, positions, long_factors)
    if pattern is not None:
        return LayerInputs(positions, rotary, pattern)

    def pattern_with(sliding_window: int | None) -> AttentionPattern:
        rows = tuple(num_slots), tuple(first_slots)
        if uses_flash_attention(base):
            return PackedRowsPattern.of(*rows, local_past, length, device, sliding_window)
        if isinstance(prefix, SharedPrefix) and prefix.in_place:
            return SharedMemoryPattern(prefix, *rows, length, device, sliding_window)
        mask = decoder_mask(num_slots, local_past, length, device, sliding_window, first_slots)
        return MaskPattern(mask)

    sliding_window = smallest_window(base.config)  # the same in all layers that have one
    slides = sliding_window is not None and sliding_window < local_past + length
    sliding = pattern_with(sliding_window) if slides else None
    return LayerInputs(positions, rotary, pattern_with(None), sliding)


def run_layer(
    layer: Any, hidden: Tensor, inputs: LayerInputs, prefix: AnyPrefix | None = None
) -> Tensor:
    """Runs one layer of a skeleton on hidden states [B, T, D]. All inputs are on its device."""
    return layer(
        hidden,
        position_ids=inputs.positions,
        past_key_values=prefix,
        use_cache=prefix is not None,
        position_embeddings=inputs.rotary,
        pattern=inputs.pattern_in(layer),
    )


@cache
def compiled_layer() -> Callable[..., Tensor]:
    """Returns `run_layer` compiled by torch.compile, for the encoder. All layers and batches share
    a few compiled graphs: with and without gradients, for the first number of chunks, for any
    other, and for a single one."""
    return torch.compile(run_layer)


def run_slots(layer: Any, hidden: Tensor, num_memory: int, inputs: LayerInputs) -> Tensor:
    """Runs an encoder layer for the slots alone: hidden states [C, l + m, D] -> [C, m, D]. The
    chunk's tokens become keys and values that the slots attend to, and nothing more. The inputs
    are those of all positions."""
    num_tokens = hidden.shape[1] - num_memory
    tokens, slots = slice(0, num_tokens), slice(num_tokens, None)
    attention = layer.self_attn
    keys, values = project_kv(
        attention,
        layer.input_layernorm(hidden[:, tokens]),
        [table[:, tokens] for table in inputs.rotary],
    )
    prefix = KVPrefix({attention.layer_idx: [keys]}, {attention.layer_idx: [values]})
    slot_inputs = LayerInputs(
        inputs.positions[:, slots],
        tuple(table[:, slots] for table in inputs.rotary),
        inputs.pattern,
    )
    return run_layer(layer, hidden[:, slots], slot_inputs, prefix)


def run_encoder_layer(
    layer: Any,
    hidden: Tensor,
    seeds: Sequence[int] | None,
    inputs: LayerInputs,
    num_memory: int | None = None,
) -> Tensor:
    """Runs `run_layer`, or `run_slots` if `num_memory` is given. `seeds`, one for each chunk,
    switch LoRA dropout on."""
    with dropout_seeds(seeds):
        if num_memory is None:
            return run_layer(layer, hidden, inputs)
        return run_slots(layer, hidden, num_memory, inputs)


def project_kv(
    attention: Any,
    hidden: Tensor,
    rotary: Sequence[Tensor],
    loras: Any = None,
    seeds: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Projects normed hidden states [C, T, D] to rotated keys and values, [C, H, T, K] each.

    The projections are the layer's. The updates of `loras`, the decoder's LoRA, are added to
    them. Then come the family's key norm, if it has one, and RoPE by the family's own function,
    with the cosines and sines `rotary` [C, T, K]. All arguments are on the layer's device.
    """
    keys, values = attention.k_proj(hidden), attention.v_proj(hidden)
    if loras:
        keys = keys + loras["k_proj"](hidden, seeds)
        values = values + loras["v_proj"](hidden, seeds)
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    keys, values = keys.view(shape), values.view(shape)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    keys = keys.transpose(1, 2)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    _, keys = rotate(keys, keys, *rotary)
    return keys, values.transpose(1, 2)
