"""flash-attn 2 for the base's attention on CUDA, in place of masks that it cannot take.

A base with `attn_implementation="flash_attention_2"` hands a mask of padding to flash-attn and no other; what encoder and decoder
hide is not padding. So our calls of its layers use an attention function of our own, registered with the library, which is told
who sees whom (`Rows`, `Chunks`) instead of getting a mask. Layers on other devices compute the same with SDPA and the dense mask.
flash-attn aligns causality at the bottom right: the last query sees all of its row's keys.

Shapes: B rows, T new tokens of a row, M memory slots, S = M + past + T keys, l chunk_size, m num_memory, C chunks,
N attention heads, H key/value heads, K head size.
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
from transformers.utils import is_flash_attn_2_available

from uiollms.attention import decoder_mask, sdpa, slot_mask
from uiollms.config import ConfigError
from uiollms.devices import moved

ASKED = "flash_attention_2"  # what the user says to transformers
DEVICE_TYPES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256


def asked(base: Any) -> bool:
    return base.config._attn_implementation == ASKED


# ---- can it run ----------------------------------------------------------------------------------------------------------


def unfit(dtype: torch.dtype, config: Any = None) -> str | None:
    """Why flash-attn cannot compute in `dtype` (a base of this transformers config, if given); None if it can."""
    if dtype not in DTYPES:
        return f"flash-attn computes in bfloat16 and float16, found {str(dtype).removeprefix('torch.')}"
    if config is None:
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"flash-attn takes heads of at most {LARGEST_HEAD} numbers, found {head}" if head > LARGEST_HEAD else None


def missing() -> str | None:
    """Why flash-attn cannot run on this machine; None if it can."""
    try:
        importlib.import_module("flash_attn")
    except ModuleNotFoundError:
        return "the package flash-attn is not installed; run: pip install --no-build-isolation flash-attn"
    except ImportError as error:  # built against another torch
        return f"the package flash-attn cannot be imported ({' '.join(str(error).split())}); install it again for this torch"
    if not torch.cuda.is_available():
        return "flash-attn needs a CUDA device, this machine has none"
    return None if is_flash_attn_2_available() else "flash-attn is too old or not version 2; install flash-attn>=2.3.3,<3"


def check_request(implementation: str | None, where: str, dtype: torch.dtype, device_map: Any, config: Any = None) -> None:
    """Raises ConfigError, one line, if flash-attn is asked for in the field `where` and cannot be used for a base in `dtype` (of
    this transformers config, if it is known). Without the package transformers would raise ImportError or ask the hub."""
    if implementation != ASKED:
        return
    fault = unfit(dtype, config) or missing()
    if fault is None and device_map == "cpu":
        fault = 'flash-attn needs a CUDA device, device_map is "cpu"'
    if fault:
        raise ConfigError(f'{where}: "{ASKED}": {fault}; or use "sdpa"')


# ---- who sees whom -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """The decoder's: row b sees its first `num_slots[b]` of the M = max(num_slots) slots in front, `local_past` tokens of its
    chunk, and is causal among its `length` new tokens; with a `window` it sees only so many tokens
    of its chunk, the last.

    starts: where each row's queries and keys begin when rows lie packed behind each other, [B + 1] int32 each; None where all
    rows see equally many keys, so that nothing needs packing.
    """

    num_slots: tuple[int, ...]
    local_past: int
    length: int
    device: torch.device
    starts: tuple[Tensor, Tensor] | None
    window: int | None = None

    @classmethod
    def of(
        cls,
        num_slots: Sequence[int],
        local_past: int,
        length: int,
        device: torch.device,
        window: int | None = None,
    ) -> Rows:
        starts = None
        if len(set(num_slots)) > 1:
            keys = list(accumulate((slots + local_past + length for slots in num_slots), initial=0))
            queries = range(0, (len(num_slots) + 1) * length, length)
            starts = moved(torch.tensor(queries, dtype=torch.int32), device), moved(torch.tensor(keys, dtype=torch.int32), device)
        return cls(tuple(num_slots), local_past, length, device, starts, window)

    def to(self, device: torch.device) -> Rows:
        if device == self.device:
            return self  # with the mask that it may have built
        starts = self.starts and (moved(self.starts[0], device), moved(self.starts[1], device))
        return replace(self, device=device, starts=starts)

    @cached_property
    def mask(self) -> Tensor | None:
        return decoder_mask(self.num_slots, self.local_past, self.length, self.device, self.window)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
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
        """[B, H, S, K] -> what each row sees, row behind row: [sum of the rows' keys, H, K]. Cut with views and joined once:
        an index of places would make the CPU wait, and its backward would add up in no fixed order."""
        widest, own = max(self.num_slots), self.local_past + self.length
        parts = []
        for row, slots in zip(kv.transpose(1, 2).unbind(), self.num_slots, strict=True):
            seen, _, last = row.split([slots, widest - slots, own])
            parts += [seen, last]
        return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class Chunks:
    """The encoder's: a chunk's tokens are causal, without a mask, by flash-attn or (`plain`) by SDPA; its slots see what `slots`
    [1, 1, m, l + m] bool says (`slot_mask`). So no kernel computes the half of the pairs that causality hides."""

    slots: Tensor
    plain: bool

    @classmethod
    def of(cls, chunk_size: int, num_memory: int, device: torch.device, plain: bool = False) -> Chunks:
        return cls(slot_mask(chunk_size, num_memory, device), plain)

    def to(self, device: torch.device) -> Chunks:
        return Chunks(moved(self.slots, device), self.plain)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """[C, N, l + m or m, K], twice [C, H, l + m, K] -> [C, l + m or m, N, K]; m queries are the slots'."""
        m = self.slots.shape[2]
        tokens = query.shape[2] - m
        of_slots = sdpa(module, query[:, :, tokens:], key, value, self.slots, scaling)
        if not tokens:
            return of_slots
        ordinary = query[:, :, :tokens], key[:, :, :tokens], value[:, :, :tokens]
        by_sdpa = self.plain or not can(query)
        of_tokens = sdpa(module, *ordinary, None, scaling) if by_sdpa else causal(*ordinary, scaling)
        return torch.cat([of_tokens, of_slots], dim=1)


def can(query: Tensor) -> bool:
    """Whether flash-attn takes tensors from where this one is."""
    return query.device.type in DEVICE_TYPES


def causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """[B, N, T, K], twice [B, H, S, K] -> [B, T, N, K]; query i of T sees the keys up to S - T + i,
    with a `window` the last so many of them."""
    before = -1 if window is None else window - 1  # keys before a query's own, -1: all
    return importlib.import_module("flash_attn").flash_attn_func(
        *(t.transpose(1, 2) for t in (query, key, value)),
        softmax_scale=scaling,
        causal=True,
        window_size=(before, -1 if window is None else 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
