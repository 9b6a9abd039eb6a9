"""Attention to a document's memory where it lies: not copied for every row that reads it, nor joined to the rows' own keys.

The memory of a document is one set of keys and values for all rows of a batch. On a CPU each row attends to its own tokens,
causal, and to the slots that it sees, all of them, by calls of torch's flash kernel of their own. Their results are joined by
their log-sum-exp, and the kernel's backward, given the joined result, yields each part's gradients. No pair that a mask would
hide is computed, and no graph holds a copy of the memory. Slots that all rows see are read by all queries in one call, as if the
rows stood behind each other: of more queries the kernel takes larger blocks. Other devices, and other attention functions than
SDPA, get the joined keys and a dense mask.

Shapes: B rows, T tokens of a row, M slots of the document, n of them that a row sees, N attention heads, H key/value heads,
K head size.
Source of the joining: Dao et al. 2022 (FlashAttention, arXiv 2205.14135), section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from uiollms.attention import decoder_mask, sdpa
from uiollms.flash import asked

TOGETHER = 128  # slots seen by all rows that are worth a call of their own
_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Receiver(Protocol):
    """Takes the gradients of a layer's shared keys and values, in place of autograd."""

    def of_all(self, slots: slice, keys: Tensor, values: Tensor) -> None:
        """What some rows add to all rows' gradients of some slots, [1, H, n, K] each."""

    def singled_out(self, row: int) -> Tensor | None:
        """The slots whose gradients from this row alone are wanted as well, [s] int64."""

    def of_one(self, row: int, keys: Tensor, values: Tensor) -> None:
        """The gradients of one row at the slots of `singled_out`, [1, H, s, K] each."""


class SharedPrefix:
    """A document's memory in front of B rows, handed to the layers as their `past_key_values`. keys, values: L x [1, H, M, K].
    apart: whether the layers attend to it where it lies, if they are on a CPU; see `attends_apart`."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], apart: bool) -> None:
        self.keys, self.values, self.apart = keys, values, apart

    def lies_apart(self, device: torch.device) -> bool:
        return self.apart and device.type == "cpu"

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: object) -> tuple[Tensor, Tensor]:
        """The rows' own keys and values [B, H, T, K] -> what the layer's attention function gets."""
        return (keys, values) if self.lies_apart(keys.device) else self.joined(keys, values, layer)

    def joined(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The rows' own keys and values [B, H, T, K] behind the memory's, [B, H, M + T, K]."""
        before = self.handed_out(layer, len(keys))
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)

    def handed_out(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values for each of B rows, [B, H, M, K]."""
        return self.keys[layer].expand(rows, -1, -1, -1), self.values[layer].expand(rows, -1, -1, -1)

    def receiver(self, layer: int) -> Receiver | None:
        """Who takes the gradients of a layer's keys and values; None: autograd."""
        return None


def attends_apart(base: Any) -> bool:
    """Whether the attention function that the base was loaded with leaves a document's memory where it lies."""
    return not asked(base)


@dataclass(frozen=True, eq=False)
class Apart:
    """Row b sees its first `num_slots[b]` slots of `prefix`, causal among its `length` own tokens;
    with a `window` it sees only so many tokens, the last (an `attention.Seen`)."""

    prefix: SharedPrefix
    num_slots: tuple[int, ...]
    length: int
    device: torch.device
    window: int | None = None

    def to(self, device: torch.device) -> Apart:
        return self if device == self.device else replace(self, device=device)  # itself keeps the mask it may have built

    @cached_property
    def mask(self) -> Tensor | None:
        return decoder_mask(self.num_slots, 0, self.length, self.device, self.window)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """[B, N, T, K], twice [B, H, T, K] (where the memory does not lie apart [B, H, M + T, K]) -> [B, T, N, K]"""
        layer, apart = module.layer_idx, self.prefix.lies_apart(query.device)
        if apart and self.window is not None:  # which the kernel does not know
            key, value = self.prefix.joined(key, value, layer)
        if not apart or self.window is not None:
            return sdpa(module, query, key, value, self.mask, scaling)
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
    [1, H, M, K] -> [B, N, T, K]. With a `receiver` the memory's gradients go to it, and nowhere else."""
    return _Behind.apply(query, key, value, memory_key, memory_value, num_slots, scaling, receiver)


class _Behind(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, memory_key, memory_value, num_slots, scaling, receiver):  # type: ignore[no-untyped-def]
        out, lse = _kernel(query, key, value, 0.0, True, scale=scaling)
        for rows, slots in calls(num_slots):
            read = _kernel(stacked(query[rows]), memory_key[:, :, slots], memory_value[:, :, slots], scale=scaling)
            count = rows.stop - rows.start
            read_out, read_lse = unstacked(read[0], count), unstacked(read[1][..., None], count)[..., 0]
            share = torch.sigmoid(read_lse - lse[rows])  # of the softmax so far that falls to these slots
            out[rows].lerp_(read_out, share[..., None].to(out.dtype))
            torch.logaddexp(lse[rows], read_lse, out=lse[rows])
        ctx.save_for_backward(query, key, value, memory_key, memory_value, out, lse)
        ctx.rest = num_slots, scaling, receiver
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value, memory_key, memory_value, out, lse = ctx.saved_tensors
        num_slots, scaling, receiver = ctx.rest

        def read(rows: slice, slots: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
            queries = (stacked(x[rows]) for x in (grad, query))
            seen = memory_key[:, :, slots], memory_value[:, :, slots]
            result = stacked(out[rows]), stacked(lse[rows][..., None])[..., 0]
            return _kernel_backward(*queries, *seen, *result, 0.0, False, scale=scaling)

        own: list[Tensor | None] = [None, None, None]
        if any(ctx.needs_input_grad[:3]):  # not in a layer below which nothing is trained
            own = list(_kernel_backward(grad, query, key, value, out, lse, 0.0, True, scale=scaling))
        wanted = [receiver and receiver.singled_out(row) for row in range(len(num_slots))]
        total = [] if receiver else [torch.zeros_like(memory_key), torch.zeros_like(memory_value)]
        for rows, slots in calls(num_slots):
            queries, *grads = read(rows, slots)
            if own[0] is not None:
                own[0][rows] += unstacked(queries, rows.stop - rows.start)
            if receiver:
                receiver.of_all(slots, *grads)
            for sum_of_rows, arrived in zip(total, grads, strict=False):
                sum_of_rows[:, :, slots] += arrived
            if rows.stop - rows.start == 1 and slots.start == 0 and wanted[rows.start] is not None:  # this row reads alone
                receiver.of_one(rows.start, *(grad[:, :, wanted[rows.start]] for grad in grads))
                wanted[rows.start] = None
        for row, few in enumerate(wanted):
            if few is not None:
                receiver.of_one(row, *read(slice(row, row + 1), few)[1:])
        return *own, *(total or (None, None)), None, None, None


def calls(num_slots: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Which rows read which slots in one call of the kernel: all together those that all see, if these are many, and each row the
    others that it sees.

    128, 136 -> rows 0, 1 slots 0 .. 127 | row 1 slots 128 .. 135
    """
    together = min(num_slots) if len(num_slots) > 1 and min(num_slots) >= TOGETHER else 0
    if together:
        yield slice(0, len(num_slots)), slice(0, together)
    for row, count in enumerate(num_slots):
        if count > together:
            yield slice(row, row + 1), slice(together, count)


def stacked(rows: Tensor) -> Tensor:
    """[B, N, T, K] -> [1, N, B * T, K], a view where a token's heads lie beside each other, as projections leave them."""
    B, N, T, K = rows.shape
    return rows.transpose(1, 2).reshape(1, B * T, N, K).transpose(1, 2)


def unstacked(together: Tensor, count: int) -> Tensor:
    """The way back."""
    _, N, queries, K = together.shape
    return together.transpose(1, 2).reshape(count, queries // count, N, K).transpose(1, 2)
