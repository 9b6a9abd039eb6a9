"""Attention to a document's memory that is stored once, not copied for every row that reads it.

The memory of a document is one set of keys and values for all rows of a batch. On a CPU torch's
flash kernel is called separately for a row's own tokens, which are causal, and for the slots
that the row sees, which it sees in full. The results are joined by their log-sum-exp. Given the
joined result, the kernel's backward yields the gradients of each part. No pair that a mask would
hide is computed, and no graph holds a copy of the memory. Slots that all rows see are read by
the queries of all rows in one call, because the kernel takes larger blocks of more queries.

Shapes: B rows, T tokens of a row, M slots of the document, n of them that one call reads, s of
those whose gradients a row reports separately, N attention heads, H key/value heads, K head
size. Source of the joining: Dao et al. 2022 (FlashAttention, arXiv 2205.14135), section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

MIN_COMMON_SLOTS = 128  # fewer slots that all rows see are not worth a call of their own
_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class GradientSink(Protocol):
    """Receives the gradients of a layer's shared keys and values, in the place of autograd."""

    def add_rows(self, slots: slice, d_keys: Tensor, d_values: Tensor) -> None:
        """Adds the gradients of some rows, [B, H, n, K] each, at `slots`. Every pair of a row and
        a slot that it reads arrives here once, alone or summed over rows (B = 1)."""

    def slots_wanted(self, row: int) -> Tensor | None:
        """Returns the slots [s] int64, ascending, whose gradients from this row must arrive at
        `add_row` as well, or None if there are none."""

    def add_row(self, row: int, d_keys: Tensor, d_values: Tensor) -> None:
        """Adds the gradients of one row, [H, s, K] each, at the slots of `slots_wanted`."""


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    num_slots: Sequence[int],
    scaling: float,
    sink: GradientSink | None = None,
    first_slots: Sequence[int] | None = None,
) -> Tensor:
    """Attends from queries [B, N, T, K] to the rows' own keys and values [B, H, T, K], which are
    causal, and to `num_slots[b]` slots of the memory [1, H, M, K], from slot `first_slots[b]` on
    (by default 0). Returns [B, N, T, K]. The gradients of the memory go to `sink` if there is
    one, and else to autograd."""
    calls = list(kernel_calls(num_slots, first_slots or [0] * len(num_slots)))
    return _MemoryAttention.apply(query, key, value, memory_key, memory_value, calls, scaling, sink)


class _MemoryAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, query, key, value, memory_key, memory_value, calls, scaling, sink
    ):
        out, lse = _kernel(query, key, value, 0.0, True, scale=scaling)
        for rows, slots in calls:
            num_rows = rows.stop - rows.start
            memory_out, memory_lse = _kernel(
                fold_rows(query[rows]),
                memory_key[:, :, slots],
                memory_value[:, :, slots],
                scale=scaling,
            )
            memory_out = unfold_rows(memory_out, num_rows)
            memory_lse = unfold_rows(memory_lse[..., None], num_rows)[..., 0]
            # The part of the softmax, over all keys so far, that falls to these slots.
            weight = torch.sigmoid(memory_lse - lse[rows])
            out[rows].lerp_(memory_out, weight[..., None].to(out.dtype))
            torch.logaddexp(lse[rows], memory_lse, out=lse[rows])
        ctx.save_for_backward(query, key, value, memory_key, memory_value, out, lse)
        ctx.rest = calls, scaling, sink
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value, memory_key, memory_value, out, lse = ctx.saved_tensors
        calls, scaling, sink = ctx.rest

        def backward_call(rows: slice, slots: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Gradients of the queries [1, N, B * T, K], keys and values [1, H, n, K]."""
            return _kernel_backward(
                fold_rows(grad[rows]),
                fold_rows(query[rows]),
                memory_key[:, :, slots],
                memory_value[:, :, slots],
                fold_rows(out[rows]),
                fold_rows(lse[rows][..., None])[..., 0],
                0.0,
                False,
                scale=scaling,
            )

        d_query = d_key = d_value = None
        d_memory_key: Any = None
        d_memory_value: Any = None
        if any(ctx.needs_input_grad[:3]):  # False in the lowest layer with anything trained
            d_query, d_key, d_value = _kernel_backward(
                grad, query, key, value, out, lse, 0.0, True, scale=scaling
            )
        if sink is None:
            d_memory_key, d_memory_value = map(torch.zeros_like, (memory_key, memory_value))
        wanted = [sink and sink.slots_wanted(row) for row in range(len(query))]
        for rows, slots in calls:
            d_memory_query, d_keys, d_values = backward_call(rows, slots)
            if d_query is not None:
                d_query[rows] += unfold_rows(d_memory_query, rows.stop - rows.start)
            if sink is None:
                d_memory_key[:, :, slots] += d_keys
                d_memory_value[:, :, slots] += d_values
                continue
            sink.add_rows(slots, d_keys, d_values)
            row = rows.start
            if rows.stop - row == 1 and wanted[row] is not None and wanted[row][0] >= slots.start:
                places = wanted[row] - slots.start  # this call has all slots wanted of this row
                sink.add_row(row, d_keys[0, :, places], d_values[0, :, places])
                wanted[row] = None
        for row, slots in enumerate(wanted):
            if slots is not None:
                _, d_keys, d_values = backward_call(slice(row, row + 1), slots)
                sink.add_row(row, d_keys[0], d_values[0])
        return d_query, d_key, d_value, d_memory_key, d_memory_value, None, None, None


def kernel_calls(
    num_slots: Sequence[int], first_slots: Sequence[int]
) -> Iterator[tuple[slice, slice]]:
    """Yields which rows read which slots in one call of the kernel. Neighbouring rows that begin
    at the same slot, as the rows of one document do, read the slots that they have in common in
    one call, if these are at least MIN_COMMON_SLOTS. Every row reads its other slots in a call of
    its own.

    num_slots 128 136 8, first_slots 0 0 136 -> rows 0, 1 slots 0 .. 127 | row 1 slots 128 .. 135
    | row 2 slots 136 .. 143
    """
    start = 0
    for first, group in groupby(first_slots):
        rows = range(start, start := start + len(list(group)))
        fewest = min(num_slots[row] for row in rows)
        common = fewest if len(rows) > 1 and fewest >= MIN_COMMON_SLOTS else 0
        if common:
            yield slice(rows.start, rows.stop), slice(first, first + common)
        for row in rows:
            if num_slots[row] > common:
                yield slice(row, row + 1), slice(first + common, first + num_slots[row])


def fold_rows(rows: Tensor) -> Tensor:
    """Joins rows [B, N, T, K] to one row [1, N, B * T, K]. The result is a view where the heads
    of a token are contiguous, as projections leave them."""
    B, N, T, K = rows.shape
    return rows.transpose(1, 2).reshape(1, B * T, N, K).transpose(1, 2)


def unfold_rows(folded: Tensor, num_rows: int) -> Tensor:
    """Inverts `fold_rows`: [1, N, B * T, K] -> [B, N, T, K]."""
    _, N, queries, K = folded.shape
    return folded.transpose(1, 2).reshape(num_rows, queries // num_rows, N, K).transpose(1, 2)


def expand_rows(
    keys: Tensor, values: Tensor, num_rows: int, num_slots: int, sink: GradientSink | None = None
) -> tuple[Tensor, Tensor]:
    """Expands the first slots of the memory's keys and values, [1, H, M, K] each, to B rows:
    [B, H, num_slots, K] each, for layers that attend to memory and own tokens in one call. The
    gradients go to `sink` if there is one, and else to autograd."""
    if sink is None:
        keys, values = keys[:, :, :num_slots], values[:, :, :num_slots]
        return keys.expand(num_rows, -1, -1, -1), values.expand(num_rows, -1, -1, -1)
    return _ExpandRows.apply(keys, values, num_rows, num_slots, sink)


class _ExpandRows(torch.autograd.Function):
    """The backward pass hands the rows' gradients to the sink and returns none, so that they are
    freed with their layer."""

    @staticmethod
    def forward(ctx, keys, values, num_rows, num_slots, sink):  # type: ignore[no-untyped-def]
        ctx.sink = sink
        return expand_rows(keys, values, num_rows, num_slots)

    @staticmethod
    def backward(ctx, d_keys, d_values):  # type: ignore[no-untyped-def]
        sink = ctx.sink
        sink.add_rows(slice(0, d_keys.shape[2]), d_keys, d_values)
        for row in range(len(d_keys)):
            slots = sink.slots_wanted(row)
            if slots is not None:
                sink.add_row(row, d_keys[row][:, slots], d_values[row][:, slots])
        return None, None, None, None, None
