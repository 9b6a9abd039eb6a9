"""The masks of encoder and decoder, and the attention function through which the library's layers
use them.

Shapes: B rows, T tokens of a row, M memory slots that are read before them, l chunk_size, m
num_memory. Masks are boolean and broadcastable to [B, heads, queries, keys]; True marks what may
be seen. `None` means plain causal attention, the kernels' fast path. The base model uses it too,
so without memory the decoder computes exactly what the base computes. A call with fewer queries
than keys always has an explicit mask, because SDPA aligns `is_causal=True` at the top left and
FlashAttention at the bottom right. Source: UIO-LLMs section 3.1 (encoder), 3.2 (decoder).
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
from uiollms.model.positions import encoder_positions


@lru_cache(maxsize=16)
def encoder_mask(chunk_size: int, num_memory: int, device: torch.device) -> Tensor:
    """Returns the mask [1, 1, l + m, l + m] bool. Tokens are causal among themselves; slot i sees
    the tokens 0 .. (i+1)*(l//m)-1 and itself.

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
    """Returns the rows of the slots in `encoder_mask`, [1, 1, m, l + m] bool, without building
    the others."""
    after_last_seen = encoder_positions(chunk_size, num_memory, device)[0, chunk_size:]
    sees_tokens = torch.arange(chunk_size, device=device) < after_last_seen[:, None]
    return torch.cat([sees_tokens, torch.eye(num_memory, dtype=torch.bool, device=device)], dim=1)[
        None, None
    ]


def decoder_mask(
    num_slots: Sequence[int],
    local_past: int,
    length: int,
    device: torch.device,
    sliding_window: int | None = None,
    first_slots: Sequence[int] | None = None,
) -> Tensor | None:
    """Returns the mask [B or 1, 1, T, M + past + T] bool. Row b sees `num_slots[b]` of the M slots
    from slot `first_slots[b]` on (by default 0) and the `local_past` tokens of its chunk from
    earlier calls. Its T new tokens are causal. M is the number of slots up to the last one that
    any row sees. In a layer with a sliding window a token sees the last `sliding_window` tokens,
    itself included, and all its slots: the window does not apply to memory.

    num_slots [1, 2], past 0, T 2 ->  row 0   1 0 | 1 0    row 1   1 1 | 1 0
                                              1 0 | 1 1            1 1 | 1 1
    """
    first_slots = first_slots or [0] * len(num_slots)
    num_keys = max(map(sum, zip(first_slots, num_slots, strict=True)))  # of slots, M
    if sliding_window is not None and sliding_window >= local_past + length:
        sliding_window = None
    if len({*num_slots, num_keys}) == 1:  # every row sees all M slots
        if sliding_window is None and (num_keys + local_past == 0 or length == 1):
            return None
        slots = torch.ones(1, 1, length, num_keys, dtype=torch.bool, device=device)
    else:
        first, count = to_device(torch.tensor([first_slots, num_slots]), device)[..., None]
        number = torch.arange(num_keys, device=device) - first  # [B, M], from a row's first slot on
        slots = ((number >= 0) & (number < count))[:, None, None].expand(-1, -1, length, -1)
    local = torch.ones(length, local_past + length, dtype=torch.bool, device=device).tril(
        local_past
    )
    if sliding_window is not None:
        local = local.triu(local_past - sliding_window + 1)
    return torch.cat([slots, local.expand(slots.shape[0], 1, -1, -1)], dim=-1)


# ---- the library's layers ------------------------------------------------------------------------

NAME = "uiollms"  # of our attention function in the library's register


class AttentionPattern(Protocol):
    """What the tokens of a call attend to. It takes the place of a mask, and travels with the
    hidden states from device to device."""

    def to(self, device: torch.device) -> AttentionPattern: ...

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Attends from queries [B, heads, T, K] to keys and values [B, key/value heads, ?, K].
        Returns [B, T, heads, K]."""
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
    """The attention function that the layers of a skeleton call, with `pattern` and no mask.

    The library's other arguments are not needed: the base stays in evaluation mode, so there is
    no dropout, and the pattern contains the layer's sliding window.
    """
    return pattern.attend(module, query, key, value, scaling), None


AttentionInterface.register(NAME, attend)


def sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Attends from queries [B, heads, T, K] to keys and values [B, key/value heads, S, K] with
    SDPA; without a mask causally, for S = T. Returns [B, T, heads, K]."""
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0]


@dataclass(frozen=True, eq=False)
class MaskPattern:
    """An `AttentionPattern` given by a mask broadcastable to [B, heads, T, S]; None is causal."""

    mask: Tensor | None

    def to(self, device: torch.device) -> MaskPattern:
        return self if self.mask is None else MaskPattern(to_device(self.mask, device))

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """See `AttentionPattern.attend`; here keys and values are [B, key/value heads, S, K]."""
        return sdpa(module, query, key, value, self.mask, scaling)
