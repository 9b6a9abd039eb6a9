"""Who sees whom in a pass of encoder or decoder, as objects that the layers' attention function
asks.

Apart: rows behind a document's shared memory, where it lies (a CPU; other devices get joined
keys and a dense mask). Rows: rows behind memory that is joined to their own keys, for flash-attn
2 on CUDA, which takes no mask but padding. Chunks: the encoder's chunks with their slots.
flash-attn aligns causality at the bottom right: the last query sees all of its row's keys.
Layers on devices that it does not know compute the same with SDPA and the dense mask.

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
from uiollms.kernels.flash_attention import can, causal
from uiollms.kernels.memory_attention import memory_attention
from uiollms.model.attention import decoder_mask, sdpa, slot_mask
from uiollms.model.state import SharedPrefix


@dataclass(frozen=True, eq=False)
class SharedMemoryPattern:
    """Row b sees `num_slots[b]` slots of `prefix` from number `first_slots[b]` on, causal among
    its `length` own tokens; with a `window` it sees only so many tokens, the last (an
    `attention.AttentionPattern`)."""

    prefix: SharedPrefix
    num_slots: tuple[int, ...]
    first_slots: tuple[int, ...]
    length: int
    device: torch.device
    window: int | None = None

    def to(self, device: torch.device) -> SharedMemoryPattern:
        return (
            self if device == self.device else replace(self, device=device)
        )  # itself keeps the mask it may have built

    @cached_property
    def mask(self) -> Tensor | None:
        return decoder_mask(
            self.num_slots, 0, self.length, self.device, self.window, self.first_slots
        )

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """[B, N, T, K], twice [B, H, T, K] (where the memory does not lie apart [B, H, M + T,
        K]) -> [B, T, N, K]"""
        layer, in_place = module.layer_idx, self.prefix.reads_in_place(query.device)
        if in_place and self.window is not None:  # which the kernel does not know
            key, value = self.prefix.joined(key, value, layer)
        if not in_place or self.window is not None:
            return sdpa(module, query, key, value, self.mask, scaling)
        memory = self.prefix.keys[layer], self.prefix.values[layer]
        sink = self.prefix.sink(layer)
        return memory_attention(
            query, key, value, *memory, self.num_slots, scaling, sink, self.first_slots
        ).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class PackedRowsPattern:
    """The decoder's: row b sees `num_slots[b]` of the M slots in front from number
    `first_slots[b]` on, `local_past` tokens of its chunk, and is causal among its `length` new
    tokens; with a `window` it sees only so many tokens of its chunk, the last.

    starts: where each row's queries and keys begin when rows lie packed behind each other, [B +
    1] int32 each; None where all rows see equally many keys, so that nothing needs packing.
    """

    num_slots: tuple[int, ...]
    first_slots: tuple[int, ...]
    local_past: int
    length: int
    device: torch.device
    starts: tuple[Tensor, Tensor] | None
    window: int | None = None

    @classmethod
    def of(
        cls,
        num_slots: Sequence[int],
        first_slots: Sequence[int],
        local_past: int,
        length: int,
        device: torch.device,
        window: int | None = None,
    ) -> PackedRowsPattern:
        starts = None
        if len(set(num_slots)) > 1 or any(first_slots):
            keys = list(accumulate((slots + local_past + length for slots in num_slots), initial=0))
            queries = range(0, (len(num_slots) + 1) * length, length)
            starts = (
                to_device(torch.tensor(queries, dtype=torch.int32), device),
                to_device(torch.tensor(keys, dtype=torch.int32), device),
            )
        return cls(tuple(num_slots), tuple(first_slots), local_past, length, device, starts, window)

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
            self.num_slots, self.local_past, self.length, self.device, self.window, self.first_slots
        )

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """[B, N, T, K], twice [B, H, S, K] -> [B, T, N, K]"""
        # Behind a window flash-attn would hide the slots.
        hidden = self.window is not None and max(self.num_slots) > 0
        if not can(query) or hidden:
            return sdpa(module, query, key, value, self.mask, scaling)
        if self.starts is None:
            return causal(query, key, value, scaling, self.window)
        packed = importlib.import_module("flash_attn").flash_attn_varlen_func(
            query.transpose(1, 2).flatten(0, 1),  # [B * T, N, K]
            self.visible(key),
            self.visible(value),
            *self.starts,
            self.length,
            max(self.num_slots) + self.local_past + self.length,
            softmax_scale=scaling,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return packed.unflatten(0, (len(query), self.length))

    def visible(self, kv: Tensor) -> Tensor:
        """[B, H, S, K] -> what each row sees, row behind row: [sum of the rows' keys, H, K]. Cut
        with views and joined once: an index of places would make the CPU wait, and its backward
        would add up in no fixed order."""
        own = self.local_past + self.length
        parts = []
        for row, first, slots in zip(
            kv.transpose(1, 2).unbind(), self.first_slots, self.num_slots, strict=True
        ):
            parts += [row[first : first + slots], row[len(row) - own :]]
        return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class EncoderPattern:
    """The encoder's: a chunk's tokens are causal, without a mask, by flash-attn or (`plain`) by
    SDPA; its slots see what `slots` [1, 1, m, l + m] bool says (`slot_mask`). So no kernel
    computes the half of the pairs that causality hides."""

    slots: Tensor
    plain: bool

    @classmethod
    def of(
        cls, chunk_size: int, num_memory: int, device: torch.device, plain: bool = False
    ) -> EncoderPattern:
        return cls(slot_mask(chunk_size, num_memory, device), plain)

    def to(self, device: torch.device) -> EncoderPattern:
        return EncoderPattern(to_device(self.slots, device), self.plain)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """[C, N, l + m or m, K], twice [C, H, l + m, K] -> [C, l + m or m, N, K]; m queries are
        the slots'."""
        m = self.slots.shape[2]
        tokens = query.shape[2] - m
        of_slots = sdpa(module, query[:, :, tokens:], key, value, self.slots, scaling)
        if not tokens:
            return of_slots
        ordinary = query[:, :, :tokens], key[:, :, :tokens], value[:, :, :tokens]
        by_sdpa = self.plain or not can(query)
        of_tokens = (
            sdpa(module, *ordinary, None, scaling) if by_sdpa else causal(*ordinary, scaling)
        )
        return torch.cat([of_tokens, of_slots], dim=1)
