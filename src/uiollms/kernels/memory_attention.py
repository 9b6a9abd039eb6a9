"""Attention to a document's memory where it lies: not copied for every row that reads it, nor
joined to the rows' own keys.

The memory of a document is one set of keys and values for all rows of a batch. On a CPU each row
attends to its own tokens, causal, and to the slots that it sees, all of them, by calls of
torch's flash kernel of their own. Their results are joined by their log-sum-exp, and the
kernel's backward, given the joined result, yields each part's gradients. No pair that a mask
would hide is computed, and no graph holds a copy of the memory. Slots that all rows see are read
by all queries in one call, as if the rows stood behind each other: of more queries the kernel
takes larger blocks.

Shapes: B rows, T tokens of a row, M slots of the document, n of them that a row sees, N
attention heads, H key/value heads, K head size. Source of the joining: Dao et al. 2022
(FlashAttention, arXiv 2205.14135), section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

TOGETHER = 128  # slots seen by all rows that are worth a call of their own
_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class GradientSink(Protocol):
    """Takes the gradients of a layer's shared keys and values, in place of autograd."""

    def add_rows(self, slots: slice, keys: Tensor, values: Tensor) -> None:
        """What some rows add to all rows' gradients of some slots, [1, H, n, K] each."""

    def slots_wanted(self, row: int) -> Tensor | None:
        """The slots whose gradients from this row alone are wanted as well, [s] int64."""

    def add_row(self, row: int, keys: Tensor, values: Tensor) -> None:
        """The gradients of one row at the slots of `slots_wanted`, [1, H, s, K] each."""


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
    """Queries [B, N, T, K] on their own keys and values [B, H, T, K], causal, and on
    `num_slots[b]` of the memory's [1, H, M, K] from number `first_slots[b]` on (by default 0) ->
    [B, N, T, K]. With a `sink` the memory's gradients go to it, and nowhere else."""
    parts = list(kernel_calls(num_slots, first_slots or [0] * len(num_slots)))
    return _MemoryAttention.apply(query, key, value, memory_key, memory_value, parts, scaling, sink)


class _MemoryAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, query, key, value, memory_key, memory_value, parts, scaling, sink
    ):
        out, lse = _kernel(query, key, value, 0.0, True, scale=scaling)
        for rows, slots in parts:
            read = _kernel(
                fold_rows(query[rows]),
                memory_key[:, :, slots],
                memory_value[:, :, slots],
                scale=scaling,
            )
            count = rows.stop - rows.start
            read_out, read_lse = (
                unfold_rows(read[0], count),
                unfold_rows(read[1][..., None], count)[..., 0],
            )
            share = torch.sigmoid(
                read_lse - lse[rows]
            )  # of the softmax so far that falls to these slots
            out[rows].lerp_(read_out, share[..., None].to(out.dtype))
            torch.logaddexp(lse[rows], read_lse, out=lse[rows])
        ctx.save_for_backward(query, key, value, memory_key, memory_value, out, lse)
        ctx.rest = parts, scaling, sink
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value, memory_key, memory_value, out, lse = ctx.saved_tensors
        parts, scaling, sink = ctx.rest

        def read(rows: slice, slots: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
            queries = (fold_rows(x[rows]) for x in (grad, query))
            seen = memory_key[:, :, slots], memory_value[:, :, slots]
            result = fold_rows(out[rows]), fold_rows(lse[rows][..., None])[..., 0]
            return _kernel_backward(*queries, *seen, *result, 0.0, False, scale=scaling)

        own: list[Tensor | None] = [None, None, None]
        if any(ctx.needs_input_grad[:3]):  # not in a layer below which nothing is trained
            own = list(
                _kernel_backward(grad, query, key, value, out, lse, 0.0, True, scale=scaling)
            )
        wanted = [sink and sink.slots_wanted(row) for row in range(len(query))]
        total = [] if sink else [torch.zeros_like(memory_key), torch.zeros_like(memory_value)]
        for rows, slots in parts:
            queries, *grads = read(rows, slots)
            if own[0] is not None:
                own[0][rows] += unfold_rows(queries, rows.stop - rows.start)
            if sink:
                sink.add_rows(slots, *grads)
            for sum_of_rows, arrived in zip(total, grads, strict=False):
                sum_of_rows[:, :, slots] += arrived
            few = wanted[rows.start] if rows.stop - rows.start == 1 else None
            if few is not None and few[0] >= slots.start:  # this row reads all that it sees alone
                sink.add_row(rows.start, *(grad[:, :, few - slots.start] for grad in grads))
                wanted[rows.start] = None
        for row, few in enumerate(wanted):
            if few is not None:
                sink.add_row(row, *read(slice(row, row + 1), few)[1:])
        return *own, *(total or (None, None)), None, None, None


def kernel_calls(
    num_slots: Sequence[int], first_slots: Sequence[int]
) -> Iterator[tuple[slice, slice]]:
    """Which rows read which slots in one call of the kernel: neighbours that begin at the same
    slot, as the rows of a document do, together those that they all see, if these are many, and
    each row the others that it sees.

    num_slots 128 136 8, first_slots 0 0 136 -> rows 0, 1 slots 0 .. 127 | row 1 slots 128 .. 135
    | row 2 slots 136 .. 143
    """
    start = 0
    for first, group in groupby(first_slots):
        rows = range(start, start := start + len(list(group)))
        fewest = min(num_slots[row] for row in rows)
        together = fewest if len(rows) > 1 and fewest >= TOGETHER else 0
        if together:
            yield slice(rows.start, rows.stop), slice(first, first + together)
        for row in rows:
            if num_slots[row] > together:
                yield slice(row, row + 1), slice(first + together, first + num_slots[row])


def fold_rows(rows: Tensor) -> Tensor:
    """[B, N, T, K] -> [1, N, B * T, K], a view where a token's heads lie beside each other, as
    projections leave them."""
    B, N, T, K = rows.shape
    return rows.transpose(1, 2).reshape(1, B * T, N, K).transpose(1, 2)


def unfold_rows(together: Tensor, count: int) -> Tensor:
    """The way back."""
    _, N, queries, K = together.shape
    return together.transpose(1, 2).reshape(count, queries // count, N, K).transpose(1, 2)
