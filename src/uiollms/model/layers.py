"""What is asked of the frozen base: that it fits, one of its layers run, its keys rotated; and
the LoRA of a role on it.

Nothing of a model's own code is copied: layers, norms, rotary functions and attention are the
library's. Shapes: B rows, T tokens, D hidden size, H key/value heads, m memory slots, K head
size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from uiollms.config.sections import MemoryConfig
from uiollms.kernels import flash_attention
from uiollms.kernels.devices import device_of, to_device
from uiollms.model.attention import (
    AttentionPattern,
    MaskPattern,
    decoder_mask,
    decoder_positions,
    encoder_positions,
)
from uiollms.model.attention_patterns import EncoderPattern, PackedRowsPattern, SharedMemoryPattern
from uiollms.model.lora import LoRA, dropout_seeds
from uiollms.model.positions import (
    describe_positions,
    find_long_rows,
    num_positions,
    rope_fault,
    rotary_tables,
)
from uiollms.model.skeleton import sharded
from uiollms.model.state import KVPrefix, SharedPrefix
from uiollms.weights.base_files import FAMILIES
from uiollms.weights.fitness import eos_fault, narrow_window, smallest_window, wide_rank, window_of

AnyPrefix = KVPrefix | SharedPrefix  # what is in front of a decoder call's own tokens
PROJECTIONS = {"encoder": ("q_proj", "v_proj"), "decoder": ("k_proj", "v_proj")}


class Role(nn.Module):
    """The trained tensors of one role: a LoRA pair for two projections of every layer (for none,
    where the decoder has no transfer head), and one token embedding, where `token_name` names
    it; all in the dtype of `token`."""

    def __init__(
        self, name: str, base: Any, config: MemoryConfig, token_name: str | None, token: Tensor
    ) -> None:
        super().__init__()
        salts = iter(range(2 * len(base.model.layers)))
        offset = 0 if name == "encoder" else 2 * len(base.model.layers)
        adapted = PROJECTIONS[name] if name == "encoder" or config.transfer_head else ()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    projection: LoRA(
                        getattr(layer.self_attn, projection),
                        config.lora_rank,
                        config.lora_alpha,
                        config.lora_dropout,
                        salt=offset + next(salts),
                        dtype=token.dtype,
                    )
                    for projection in adapted
                }
            )
            for layer in base.model.layers
        )
        if token_name:
            self.register_parameter(token_name, nn.Parameter(token.clone()))


def check_base(base: Any, config: MemoryConfig) -> None:
    """Raises ValueError if `base` cannot carry memory with `config`."""
    family = base.config.model_type
    if family not in FAMILIES:
        raise ValueError(
            f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    if sharded(base):
        raise ValueError(
            "whole layers of the base are sharded by FSDP; shard its linear layers only, or give a "
            "device_map"
        )
    faults = (
        narrow_window(base.config, config.chunk_size),
        rope_fault(base.config, config.chunk_size, config.recent_tokens),
        eos_fault(base.config),
        wide_rank(base.config, config.lora_rank),
    )
    if any(faults):
        raise ValueError(next(filter(None, faults)))
    if config.chunk_size > num_positions(base.config):
        said = describe_positions(base.config)
        raise ValueError(f"chunk_size {config.chunk_size} is past the base's {said}")
    if flash_attention.asked(base) and (fault := flash_attention.unfit(base.dtype, base.config)):
        raise ValueError(
            f'{fault}; load the base in another dtype, or with attn_implementation="sdpa"'
        )


def layer_device(layer: Any) -> torch.device:
    return device_of(layer.input_layernorm)


class LayerInputs(NamedTuple):
    """What all layers read beside their hidden states; it travels with them, copied once where
    the device changes. seen: who sees whom; sliding: the same in layers with a sliding window,
    where it differs."""

    positions: Tensor
    rotary: tuple[Tensor, ...]
    pattern: AttentionPattern
    sliding: AttentionPattern | None = None

    def to(self, device: torch.device) -> LayerInputs:
        sliding = None if self.sliding is None else self.sliding.to(device)
        rotary = tuple(to_device(r, device) for r in self.rotary)
        return LayerInputs(
            to_device(self.positions, device), rotary, self.pattern.to(device), sliding
        )

    def pattern_in(self, layer: Any) -> AttentionPattern:
        """Who sees whom in one of the layers."""
        attention = layer.self_attn
        if self.sliding is None or window_of(attention.config, attention.layer_idx) is None:
            return self.pattern
        return self.sliding


def encoder_inputs(base: Any, hidden: Tensor, config: MemoryConfig) -> LayerInputs:
    """For encoder layers on [C, l + m, D]."""
    size = config.chunk_size, config.num_memory, hidden.device
    positions = encoder_positions(*size)
    pattern = EncoderPattern.of(*size, plain=not flash_attention.asked(base))
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
    """For decoder layers on [B, T, D] behind `num_slots` slots, from number `first_slots` on (by
    default 0), and `local_past` tokens of the same chunk, in `prefix`. seen: in place of the
    usual one."""
    first_slots = first_slots or [0] * len(num_slots)
    length, device = hidden.shape[1], hidden.device
    positions = decoder_positions(num_slots, length, device) + local_past
    far = find_long_rows(base.config, num_slots, local_past + length)
    rotary = rotary_tables(base, hidden, positions, far)

    def usual(window: int | None) -> AttentionPattern:
        if flash_attention.asked(base):
            return PackedRowsPattern.of(num_slots, first_slots, local_past, length, device, window)
        if isinstance(prefix, SharedPrefix) and prefix.in_place:
            return SharedMemoryPattern(
                prefix, tuple(num_slots), tuple(first_slots), length, device, window
            )
        return MaskPattern(decoder_mask(num_slots, local_past, length, device, window, first_slots))

    if pattern is not None:
        return LayerInputs(positions, rotary, pattern)
    window = smallest_window(base.config)  # of all layers that have one
    sliding = usual(window) if window is not None and window < local_past + length else None
    return LayerInputs(positions, rotary, usual(None), sliding)


def run_layer(
    layer: Any, hidden: Tensor, inputs: LayerInputs, prefix: AnyPrefix | None = None
) -> Tensor:
    """One layer of a skeleton on [B, T, D]; all inputs are where it lives."""
    return layer(
        hidden,
        position_ids=inputs.positions,
        past_key_values=prefix,
        use_cache=prefix is not None,
        position_embeddings=inputs.rotary,
        pattern=inputs.pattern_in(layer),
    )


def run_last_rows(layer: Any, hidden: Tensor, rows: int, inputs: LayerInputs) -> Tensor:
    """As `run_layer` on [B, T, D], but only the last `rows` positions go through it, [B, rows,
    D]: the others are no more than keys and values in front of them. beside: of all positions,
    for encoder layers."""
    positions, rotary, pattern, _ = inputs
    attention = layer.self_attn
    front = slice(0, hidden.shape[1] - rows)
    back = slice(hidden.shape[1] - rows, None)
    normed = layer.input_layernorm(hidden[:, front])
    shape = (*normed.shape[:2], -1, attention.head_dim)
    keys, values = attention.k_proj(normed).view(shape), attention.v_proj(normed).view(shape)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    keys = rotate(attention, keys.transpose(1, 2), [r[:, front] for r in rotary])
    number = attention.layer_idx
    prefix = KVPrefix({number: [keys]}, {number: [values.transpose(1, 2)]})
    last = LayerInputs(positions[:, back], tuple(r[:, back] for r in rotary), pattern)
    return run_layer(layer, hidden[:, back], last, prefix)


def run_encoder_layer(
    layer: Any,
    hidden: Tensor,
    seeds: Sequence[int] | None,
    inputs: LayerInputs,
    rows: int | None = None,
) -> Tensor:
    """As `run_layer`, or with `rows` as `run_last_rows`; `seeds`, one a row of [B, T, D], switch
    the LoRA's dropout on."""
    with dropout_seeds(seeds):
        return (
            run_layer(layer, hidden, inputs)
            if rows is None
            else run_last_rows(layer, hidden, rows, inputs)
        )


def checkpointed(function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """A layer's function of [B, T, D] whose inner activations are not kept but computed again in
    the backward. It draws nothing (dropout has seeds of its own), and is not stopped early
    there: hooks that load weights from disk must see the layer's end."""
    return checkpoint(
        function,
        hidden,
        use_reentrant=False,
        preserve_rng_state=False,
        early_stop=False,
        determinism_check="none",
    )


def recompute_silu(function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """A layer's function of [B, T, D] whose graph does not keep what SiLU gives, [B, T, I], to
    multiply by: its backward has it again from SiLU's own input, which the graph keeps anyway."""
    with torch.autograd.graph.saved_tensors_hooks(_packed, _unpacked):
        return function(hidden)


def _packed(kept: Tensor) -> Tensor | tuple[Tensor]:
    made_by: Any = kept.grad_fn
    return (
        (made_by._saved_self,)
        if made_by is not None and made_by.name() == "SiluBackward0"
        else kept
    )


def _unpacked(kept: Tensor | tuple[Tensor]) -> Tensor:
    return F.silu(kept[0].detach()) if isinstance(kept, tuple) else kept


def keys_and_values(
    attention: Any, pair: Any, slots: Tensor, seeds: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """A layer's memory [C, m, D] -> keys, not rotated yet, and values [C, m, H, K]: the frozen
    projections, plus the decoder's LoRA (`pair`, empty without a transfer head), and the
    family's key norm if it has one."""
    k, v = attention.k_proj(slots), attention.v_proj(slots)
    if pair:
        k, v = k + pair["k_proj"](slots, seeds), v + pair["v_proj"](slots, seeds)
    shape = (*slots.shape[:2], -1, attention.head_dim)
    k, v = k.view(shape), v.view(shape)
    return attention.k_norm(k) if hasattr(attention, "k_norm") else k, v


def rotate(attention: nn.Module, keys: Tensor, rotary: Sequence[Tensor]) -> Tensor:
    """Keys [C, H, m, K] rotated by the family's own rotary function."""
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return apply(keys, keys, *rotary)[1]
