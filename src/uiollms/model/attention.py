"""Who sees whom, and at which position: the masks and positions of encoder and decoder, and how
the library's layers are told of what is not a mask.

Shapes: B rows, T tokens of a row, M memory slots in front of it, l chunk_size, m num_memory.
Masks are boolean, True = may be seen, broadcastable to [B, heads, queries, keys]; `None` means
plain causal (the kernel's own fast path, which is also what the base model uses, so that without
memory the decoder IS the base model). Every mask with fewer queries than keys is explicit:
`is_causal=True` would be aligned top-left by SDPA and bottom-right by FlashAttention. Source:
UIO-LLMs section 3.1 (encoder), 3.2 (decoder).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from uiollms.kernels.devices import to_device


@lru_cache(maxsize=16)
def encoder_positions(chunk_size: int, num_memory: int, device: torch.device) -> Tensor:
    """[1, l + m] int64: ordinary token i at i, memory token i at (i + 1) * (l // m).

    l 8, m 2 ->  0 1 2 3 4 5 6 7 | 4 8
    """
    tokens = torch.arange(chunk_size, device=device)
    slots = (torch.arange(num_memory, device=device) + 1) * (chunk_size // num_memory)
    return torch.cat([tokens, slots])[None]


@lru_cache(maxsize=16)
def encoder_mask(chunk_size: int, num_memory: int, device: torch.device) -> Tensor:
    """[1, 1, l + m, l + m] bool: tokens are causal among themselves; slot i sees tokens 0 ..
    (i+1)*(l//m)-1 and itself.

    l 4, m 2 ->  token 0   1 0 0 0 | 0 0
                 token 1   1 1 0 0 | 0 0
                 token 2   1 1 1 0 | 0 0
                 token 3   1 1 1 1 | 0 0
                 slot 0    1 1 0 0 | 1 0
                 slot 1    1 1 1 1 | 0 1
    """
    positions = torch.arange(chunk_size, device=device)
    last_seen = encoder_positions(chunk_size, num_memory, device)[0].clone()
    last_seen[chunk_size:] -= 1  # a slot at position p has read the tokens before p
    sees_tokens = positions[None, :] <= last_seen[:, None]
    sees_slots = torch.eye(chunk_size + num_memory, dtype=torch.bool, device=device)[:, chunk_size:]
    return torch.cat([sees_tokens, sees_slots], dim=1)[None, None]


@lru_cache(maxsize=16)
def slot_mask(chunk_size: int, num_memory: int, device: torch.device) -> Tensor:
    """[1, 1, m, l + m] bool: the slots' rows of `encoder_mask`, built without the others."""
    after_last_seen = encoder_positions(chunk_size, num_memory, device)[0, chunk_size:]
    sees_tokens = torch.arange(chunk_size, device=device) < after_last_seen[:, None]
    return torch.cat([sees_tokens, torch.eye(num_memory, dtype=torch.bool, device=device)], dim=1)[
        None, None
    ]


def decoder_positions(num_slots: Sequence[int], length: int, device: torch.device) -> Tensor:
    """[B, T] int64: the tokens of row b follow its `num_slots[b]` memory slots."""
    return to_device(torch.tensor(num_slots), device)[:, None] + torch.arange(length, device=device)


def decoder_mask(
    num_slots: Sequence[int],
    local_past: int,
    length: int,
    device: torch.device,
    window: int | None = None,
    first_slots: Sequence[int] | None = None,
) -> Tensor | None:
    """[B or 1, 1, T, M + past + T] bool: row b sees `num_slots[b]` slots from number
    `first_slots[b]` on (by default 0), the `local_past` tokens of its chunk that came in earlier
    calls, and is causal among its T new tokens; M slots are in front, the last that any row sees
    is the last. In a layer with a sliding window a token sees only the last `window` tokens,
    itself included, and all slots: memory is not behind the window.

    num_slots [1, 2], past 0, T 2 ->  row 0   1 0 | 1 0    row 1   1 1 | 1 0
                                              1 0 | 1 1            1 1 | 1 1
    """
    first_slots = first_slots or [0] * len(num_slots)
    widest = max(map(sum, zip(first_slots, num_slots, strict=True)))
    window = window if window is not None and window < local_past + length else None
    if len({*num_slots, widest}) == 1:  # nothing to hide in front
        if window is None and (widest + local_past == 0 or length == 1):
            return None
        front = torch.ones(1, 1, length, widest, dtype=torch.bool, device=device)
    else:
        first, count = to_device(torch.tensor([first_slots, num_slots]), device)[..., None]
        place = torch.arange(widest, device=device) - first  # [B, M]
        front = ((place >= 0) & (place < count))[:, None, None].expand(-1, -1, length, -1)
    local = torch.ones(length, local_past + length, dtype=torch.bool, device=device).tril(
        local_past
    )
    if window is not None:
        local = local.triu(local_past - window + 1)
    return torch.cat([front, local.expand(front.shape[0], 1, -1, -1)], dim=-1)


# ---- handed to the library -----------------------------------------------------------------------

NAME = "uiollms"  # the attention function that the layers of a skeleton are told to use


class AttentionPattern(Protocol):
    """Who sees whom in a call, instead of a mask; it travels with the hidden states."""

    def to(self, device: torch.device) -> AttentionPattern: ...

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Queries [B, heads, T, K], keys and values [B, key/value heads, ?, K] -> [B, T, heads,
        K]."""
        ...


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    scaling: float,
    pattern: AttentionPattern,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function of a skeleton's layers, which are called with `seen=` and no mask.
    What else the library hands over has no use: the base stays in evaluation mode (no dropout),
    memory is not behind a sliding window, and `pattern` knows that of the tokens."""
    return pattern.attend(module, query, key, value, scaling), None


AttentionInterface.register(NAME, attend)


def sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """[B, heads, T, K], twice [B, key/value heads, S, K] -> [B, T, heads, K]; no mask: causal,
    as many keys as queries."""
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0]


@dataclass(frozen=True, eq=False)
class MaskPattern:
    """Everybody sees what `mask` says, broadcastable to [B, heads, T, S]; None: causal (a
    `AttentionPattern`)."""

    mask: Tensor | None

    def to(self, device: torch.device) -> MaskPattern:
        return self if self.mask is None else MaskPattern(to_device(self.mask, device))

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """[B, heads, T, K], twice [B, key/value heads, S, K] -> [B, T, heads, K]"""
        return sdpa(module, query, key, value, self.mask, scaling)
