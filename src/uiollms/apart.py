"""Attention to a document's memory where it lies: not copied for every row that reads it, nor joined to the rows' own keys.

The memory of a document is one set of keys and values for all rows of a batch. On a CPU each row attends to its own tokens,
causal, and to the slots that it sees, all of them, by two calls of torch's flash kernel. Their results are joined by their
log-sum-exp, and the kernel's backward, given the joined result, yields each part's gradients. No pair that a mask would hide is
computed, and no graph holds a copy of the memory. Other devices, and other attention functions than SDPA, get the joined keys
and a dense mask.

Shapes: B rows, T tokens of a row, M slots of the document, n of them that a row sees, N attention heads, H key/value heads,
K head size.
Source of the joining: Dao et al. 2022 (FlashAttention, arXiv 2205.14135), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from uiollms.attention import decoder_mask, sdpa

Receiver = Callable[[int, Tensor, Tensor], None]  # number of a row, gradients of the keys and values it saw [1, H, n, K]
_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SharedPrefix:
    """A document's memory in front of B rows, handed to the layers as their `past_key_values`. keys, values: L x [1, H, M, K].
    apart: whether the layers attend to it where it lies, if they are on a CPU; see `attends_apart`."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], apart: bool) -> None:
        self.keys, self.values, self.apart = keys, values, apart

    def lies_apart(self, device: torch.device) -> bool:
        return self.apart and device.type == "cpu"

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: object) -> tuple[Tensor, Tensor]:
        """The rows' own keys and values [B, H, T, K] -> what the layer's attention function gets."""
        if self.lies_apart(keys.device):
            return keys, values
        before = self.handed_out(layer, len(keys))
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)

    def handed_out(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values for each of B rows, [B, H, M, K]."""
        return self.keys[layer].expand(rows, -1, -1, -1), self.values[layer].expand(rows, -1, -1, -1)

    def receiver(self, layer: int) -> Receiver | None:
        """Who takes the gradients of a layer's keys and values, row by row; None: autograd."""
        return None


def attends_apart(base: Any) -> bool:
    return base.config._attn_implementation == "sdpa"


@dataclass(frozen=True, eq=False)
class Apart:
    """Row b sees its first `num_slots[b]` slots of `prefix`, causal among its `length` own tokens (an `attention.Seen`)."""

    prefix: SharedPrefix
    num_slots: tuple[int, ...]
    length: int
    device: torch.device

    def to(self, device: torch.device) -> Apart:
        return self if device == self.device else replace(self, device=device)  # itself keeps the mask it may have built

    @cached_property
    def mask(self) -> Tensor | None:
        return decoder_mask(self.num_slots, 0, self.length, self.device)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """[B, N, T, K], twice [B, H, T, K] (where the memory does not lie apart [B, H, M + T, K]) -> [B, T, N, K]"""
        if not self.prefix.lies_apart(query.device):
            return sdpa(module, query, key, value, self.mask, scaling)
        layer = module.layer_idx
        memory = self.prefix.keys[layer], self.prefix.values[layer]
        return behind(query, key, value, *memory, self.num_slots, scaling, self.prefix.receiver(layer)).transpose(1, 2)


def behind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    num_slots: Sequence[int],
    scaling: float,
    receiver: Receiver | None = None,
) -> Tensor:
    """Queries [B, N, T, K] on their own keys and values [B, H, T, K], causal, and on the first `num_slots[b]` of the memory's
    [1, H, M, K] -> [B, N, T, K]. With a `receiver` the memory's gradients go to it, row by row, and nowhere else."""
    return _Behind.apply(query, key, value, memory_key, memory_value, num_slots, scaling, receiver)


class _Behind(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, memory_key, memory_value, num_slots, scaling, receiver):  # type: ignore[no-untyped-def]
        out, lse = _kernel(query, key, value, 0.0, True, scale=scaling)
        for b, n in enumerate(num_slots):
            if n:
                row = slice(b, b + 1)
                read, read_lse = _kernel(query[row], memory_key[:, :, :n], memory_value[:, :, :n], scale=scaling)
                share = torch.sigmoid(read_lse - lse[row])  # of the softmax that falls to the memory
                out[row].lerp_(read, share[..., None].to(out.dtype))
                torch.logaddexp(lse[row], read_lse, out=lse[row])
        ctx.save_for_backward(query, key, value, memory_key, memory_value, out, lse)
        ctx.rest = num_slots, scaling, receiver
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value, memory_key, memory_value, out, lse = ctx.saved_tensors
        num_slots, scaling, receiver = ctx.rest
        own: list[Tensor | None] = [None, None, None]
        if any(ctx.needs_input_grad[:3]):  # not in a layer below which nothing is trained
            own = list(_kernel_backward(grad, query, key, value, out, lse, 0.0, True, scale=scaling))
        read = [] if receiver else [torch.zeros_like(memory_key), torch.zeros_like(memory_value)]
        for b, n in enumerate(num_slots):
            if n:
                row = slice(b, b + 1)
                seen = memory_key[:, :, :n], memory_value[:, :, :n]
                grads = _kernel_backward(grad[row], query[row], *seen, out[row], lse[row], 0.0, False, scale=scaling)
                if own[0] is not None:
                    own[0][row] += grads[0]
                if receiver:
                    receiver(b, grads[1], grads[2])
                else:
                    for total, arrived in zip(read, grads[1:], strict=True):
                        total[:, :, :n] += arrived
        return *own, *(read or (None, None)), None, None, None
