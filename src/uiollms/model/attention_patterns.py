"""The attention patterns of encoder and decoder: which tokens and slots a pass attends to.

A pattern travels with the hidden states, and the attention function of the layers calls its
`attend` (`attention.AttentionPattern`).

    SharedMemoryPattern   decoder rows that read a document's memory in place. Where no kernel
                          supports that, layers get joined keys, and SDPA a dense mask.
    PackedRowsPattern     decoder rows for flash-attn 2 on CUDA, which takes no mask except for
                          padding. It aligns causality at the bottom right: the last query sees
                          all keys of its row.
    EncoderPattern        chunks with their slots.

Layers on devices that flash-attn does not support compute the same with SDPA and the dense mask.

Shapes: B rows, T new tokens of a row, M memory slots, S = M + past + T keys, l chunk_size, m
num_memory, C chunks, N attention heads, H key/value heads, K head size.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from uiollms.kernels.devices import to_device
from uiollms.kernels.flash_attention import causal, supports_device_of
from uiollms.kernels.memory_attention import MemoryLayout, memory_attention
from uiollms.model.attention import decoder_mask, sdpa, slot_mask
from uiollms.model.state import SharedPrefix


@dataclass(frozen=True, eq=False)
class SharedMemoryPattern:
    """Row b sees `num_slots[b]` slots of `prefix` from slot `first_slots[b]` on. Its `length`
    tokens are causal; with a sliding window each token sees the last `sliding_window` of them."""

    prefix: SharedPrefix
    num_slots: tuple[int, ...]
    first_slots: tuple[int, ...]
    length: int
    device: torch.device
    sliding_window: int | None = None

    def to(self, device: torch.device) -> SharedMemoryPattern:
        # On its own device the pattern stays the same object, with what it has cached.
        return self if device == self.device else replace(self, device=device)

    @cached_property
    def layout(self) -> MemoryLayout:
        return MemoryLayout(self.num_slots, self.first_slots, self.length, self.device)

    @cached_property
    def mask(self) -> Tensor | None:
        return decoder_mask(
            self.num_slots, 0, self.length, self.device, self.sliding_window, self.first_slots
        )

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Attends from queries [B, N, T, K] to the rows' own keys and values [B, H, T, K], or,
        where the prefix is not read in place, [B, H, M + T, K]. Returns [B, T, N, K]."""
        layer, in_place = module.layer_idx, self.prefix.reads_in_place(query)
        if in_place and self.sliding_window is None:
            memory = self.prefix.keys[layer], self.prefix.values[layer]
            sink = self.prefix.sink(layer)
            return memory_attention(query, key, value, *memory, self.layout, scaling, sink)
        if in_place:  # `memory_attention` has no sliding window
            key, value = self.prefix.join(key, value, layer)
        return sdpa(module, query, key, value, self.mask, scaling)


@dataclass(frozen=True, eq=False)
class PackedRowsPattern:
    """Row b sees `num_slots[b]` of the M slots from slot `first_slots[b]` on, and `local_past`
    earlier tokens of its chunk. Its `length` new tokens are causal; with a sliding window each
    token sees the last `sliding_window` tokens of its chunk.

    starts: where the queries and the keys of each row begin when rows are packed one after
    another, [B + 1] int32 each; None where all rows see the same keys and need no packing.
    """

    num_slots: tuple[int, ...]
    first_slots: tuple[int, ...]
    local_past: int
    length: int
    device: torch.device
    starts: tuple[Tensor, Tensor] | None
    sliding_window: int | None = None

    @classmethod
    def of(
        cls,
        num_slots: Sequence[int],
        first_slots: Sequence[int],
        local_past: int,
        length: int,
        device: torch.device,
        sliding_window: int | None = None,
    ) -> PackedRowsPattern:
        starts = None
        if len(set(num_slots)) > 1 or any(first_slots):
            keys = list(accumulate((slots + local_past + length for slots in num_slots), initial=0))
            queries = range(0, (len(num_slots) + 1) * length, length)
            starts = (
                to_device(torch.tensor(queries, dtype=torch.int32), device),
                to_device(torch.tensor(keys, dtype=torch.int32), device),
            )
        return cls(
            tuple(num_slots), tuple(first_slots), local_past, length, device, starts, sliding_window
        )

    def to(self, device: torch.device) -> PackedRowsPattern:
        if device == self.device:
            return self  # with the mask that it may have built
        starts = self.starts and (
            to_device(self.starts[0], device),
            to_device(self.starts[1], device),
        )
        return replace(self, device=device, starts=starts)

    @cached_property
    def mask(self) -> Tensor | None:
        return decoder_mask(
            self.num_slots,
            self.local_past,
            self.length,
            self.device,
            self.sliding_window,
            self.first_slots,
        )

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Attends from queries [B, N, T, K] to keys and values [B, H, S, K]. Returns [B, T, N,
        K]."""
        # flash-attn would apply a sliding window to the slots too.
        hides_slots = self.sliding_window is not None and max(self.num_slots) > 0
        if hides_slots or not supports_device_of(query):
            return sdpa(module, query, key, value, self.mask, scaling)
        if self.starts is None:
            return causal(query, key, value, scaling, self.sliding_window)
        packed = importlib.import_module("flash_attn").flash_attn_varlen_func(
            query.transpose(1, 2).flatten(0, 1),  # [B * T, N, K]
            self.pack_visible(key),
            self.pack_visible(value),
            *self.starts,
            self.length,
            max(self.num_slots) + self.local_past + self.length,
            softmax_scale=scaling,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return packed.unflatten(0, (len(query), self.length))

    def pack_visible(self, kv: Tensor) -> Tensor:
        """Packs the entries of kv [B, H, S, K] that each row sees, row after row: [sum of the
        rows' keys, H, K]. It concatenates views, because gathering by an index would make the CPU
        wait for the GPU, and its backward would add in no fixed order."""
        num_local = self.local_past + self.length
        parts = []
        for row, first, slots in zip(
            kv.transpose(1, 2).unbind(), self.first_slots, self.num_slots, strict=True
        ):
            parts += [row[first : first + slots], row[len(row) - num_local :]]
        return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class EncoderPattern:
    """The tokens of a chunk are causal, and its slots see what `slots` [1, 1, m, l + m] bool
    allows (see `slot_mask`). Tokens and slots attend in separate calls, so no kernel computes the
    half of the pairs that causality hides.

    with_sdpa: tokens attend with SDPA; else with flash-attn, where it supports the device.
    """

    slots: Tensor
    with_sdpa: bool

    @classmethod
    def of(
        cls, chunk_size: int, num_memory: int, device: torch.device, with_sdpa: bool = False
    ) -> EncoderPattern:
        return cls(slot_mask(chunk_size, num_memory, device), with_sdpa)

    def to(self, device: torch.device) -> EncoderPattern:
        return EncoderPattern(to_device(self.slots, device), self.with_sdpa)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Attends from queries [C, N, l + m or m, K] to keys and values [C, H, l + m, K]. If there
        are m queries, they are those of the slots. Returns [C, l + m or m, N, K]."""
        m = self.slots.shape[2]
        num_tokens = query.shape[2] - m
        of_slots = sdpa(module, query[:, :, num_tokens:], key, value, self.slots, scaling)
        if not num_tokens:
            return of_slots
        tokens = query[:, :, :num_tokens], key[:, :, :num_tokens], value[:, :, :num_tokens]
        if self.with_sdpa or not supports_device_of(query):
            of_tokens = sdpa(module, *tokens, None, scaling)
        else:
            of_tokens = causal(*tokens, scaling)
        return torch.cat([of_tokens, of_slots], dim=1)
