"""Attention to a document's memory that is stored once, not copied for every row that reads it.

The memory of a document is one set of keys and values for all rows of a batch. A layer makes two
calls of a flash kernel for any number of rows, and joins their results by their log-sum-exp:

    common   the queries of all rows attend to the slots that all rows of their document see,
             where they are; more queries in one call let the kernel take larger blocks
    own      each row attends to its further slots, which are packed before its own tokens, and
             causally to its own tokens

Given the joined result, the backward kernels yield the gradients of each part. No pair that a
mask would hide is computed, and no graph holds a copy of the memory.

Shapes: B rows, T tokens of a row, M slots of the document, n of them that one call reads, s of
those whose gradients a row reports separately, N attention heads, H key/value heads, K head
size. Source of the joining: Dao et al. 2022 (FlashAttention, arXiv 2205.14135), section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from uiollms.kernels.flash_calls import (
    Packing,
    flash_backward,
    flash_forward,
    join_,
    slices_of,
)

# Fewer slots that all rows see are not worth a call of their own.
MIN_COMMON_SLOTS = {"cpu": 128, "cuda": 1}


class WantedSlots(NamedTuple):
    """Slots [s] int64, ascending, and the first of them as a number."""

    slots: Tensor
    first: int


class GradientSink(Protocol):
    """Receives the gradients of a layer's shared keys and values, in the place of autograd."""

    def add_rows(self, slots: slice, d_keys: Tensor, d_values: Tensor) -> None:
        """Adds the gradients of some rows, [B, H, n, K] each, at `slots`. Every pair of a row and
        a slot that it reads arrives here once, alone or summed over rows (B = 1)."""

    def slots_wanted(self, row: int) -> WantedSlots | None:
        """Returns the slots whose gradients from this row must arrive at `add_row` as well, or
        None if there are none."""

    def add_row(self, row: int, d_keys: Tensor, d_values: Tensor) -> None:
        """Adds the gradients of one row, [H, s, K] each, at the slots of `slots_wanted`."""


class MemoryLayout:
    """Which rows read which slots, and how a layer's two calls pack them.

    common: the rows and slots of each document whose rows have slots in common, at least
    MIN_COMMON_SLOTS. A row that is alone has all its slots in common. further: the other slots of
    every row.

    num_slots 128 136 8, first_slots 0 0 136 -> common: rows 0, 1 slots 0 .. 127 | row 2 slots
    136 .. 143; further: none | slots 128 .. 135 | none
    """

    def __init__(
        self,
        num_slots: Sequence[int],
        first_slots: Sequence[int],
        length: int,
        device: torch.device,
    ) -> None:
        self.length = length
        self.wanted_calls: dict[tuple[int, ...], Packing] = {}
        self.common: list[tuple[slice, slice]] = []
        self.further: list[slice] = []
        start = 0
        for first, group in groupby(first_slots):
            rows = range(start, start := start + len(list(group)))
            count = min(num_slots[row] for row in rows)
            if len(rows) > 1 and count < MIN_COMMON_SLOTS[device.type]:
                count = 0
            if count:
                self.common.append((slice(rows.start, rows.stop), slice(first, first + count)))
            self.further += [slice(first + count, first + num_slots[row]) for row in rows]
        num_further = [slots.stop - slots.start for slots in self.further]
        queries = [length] * len(num_slots)
        self.own = Packing.of(queries, [n + length for n in num_further], device)
        self.has_further = any(num_further)
        # Of each document in the common call: its queries among those of all rows, and its keys.
        self.common_queries = [
            slice(rows.start * length, rows.stop * length) for rows, _ in self.common
        ]
        self.common_call = Packing.of(
            [queries.stop - queries.start for queries in self.common_queries],
            [slots.stop - slots.start for _, slots in self.common],
            device,
        )

    def wanted_call(self, num_wanted: Sequence[int], device: torch.device) -> Packing:
        """The call of rows that read so many slots each. It is the same in all layers, so its
        numbers are copied to the device once."""
        key = tuple(num_wanted)
        if key not in self.wanted_calls:
            self.wanted_calls[key] = Packing.of([self.length] * len(key), key, device)
        return self.wanted_calls[key]

    def pack_own(self, own: Tensor, memory: Tensor) -> Tensor:
        """Packs the further slots of each row, of [1, H, M, K], before its own keys or values [B,
        H, T, K]. Returns [S, H, K]."""
        rows = own.transpose(1, 2)  # [B, T, H, K]
        if not self.has_further:
            return rows.flatten(0, 1)
        slots = memory[0].transpose(0, 1)  # [M, H, K]
        parts = [
            part
            for row, further in zip(rows.unbind(), self.further, strict=True)
            for part in (slots[further], row)
        ]
        return torch.cat(parts)

    def unpack_own(self, packed: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Inverts `pack_own`: the gradients [B, H, T, K] of the rows' own keys or values, and those
        of every row's further slots, [n, H, K] each."""
        if not self.has_further:
            rows = packed.unflatten(0, (-1, self.length)).transpose(1, 2)
            return rows, [packed[:0]] * len(self.further)
        parts = [packed[keys] for _, keys in self.own.rows()]
        rows = torch.stack([part[len(part) - self.length :] for part in parts]).transpose(1, 2)
        return rows, [part[: len(part) - self.length] for part in parts]

    def take_common(self, packed: Tensor) -> Tensor:
        """The queries of the common call, of [Q, N, K]."""
        return _join([packed[queries] for queries in self.common_queries])

    def common_keys(self, memory: Tensor) -> Tensor:
        """The keys or values of the common call, of [1, H, M, K]: a view for one document."""
        slots = memory[0].transpose(0, 1)
        return _join([slots[common] for _, common in self.common])


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    layout: MemoryLayout,
    scaling: float,
    sink: GradientSink | None = None,
) -> Tensor:
    """Attends from queries [B, N, T, K] to the rows' own keys and values [B, H, T, K], which are
    causal, and to the slots of the memory [1, H, M, K] that `layout` gives each row. Returns [B,
    T, N, K]. The gradients of the memory go to `sink` if there is one, and else to autograd."""
    return _MemoryAttention.apply(
        query, key, value, memory_key, memory_value, layout, scaling, sink
    )


class _MemoryAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, query, key, value, memory_key, memory_value, layout, scaling, sink
    ):
        queries = query.transpose(1, 2).flatten(0, 1)  # [B * T, N, K]
        own_keys = layout.pack_own(key, memory_key), layout.pack_own(value, memory_value)
        out, lse = flash_forward(queries, *own_keys, layout.own, True, scaling)
        if layout.common:
            common_out, common_lse = flash_forward(
                layout.take_common(queries),
                layout.common_keys(memory_key),
                layout.common_keys(memory_value),
                layout.common_call,
                False,
                scaling,
            )
            parts = slices_of(layout.common_call.num_queries)
            for part, rows in zip(parts, layout.common_queries, strict=True):
                join_(out[rows], lse[:, rows], common_out[part], common_lse[:, part])
        ctx.save_for_backward(query, key, value, memory_key, memory_value, out, lse)
        ctx.rest = layout, scaling, sink
        return out.unflatten(0, (len(query), -1))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value, memory_key, memory_value, out, lse = ctx.saved_tensors
        layout, scaling, sink = ctx.rest
        queries, grad = query.transpose(1, 2).flatten(0, 1), grad.flatten(0, 1)
        totals: Any = _Totals(memory_key, memory_value) if sink is None else None
        sink = sink or totals
        wanted: dict[int, WantedSlots] = {
            row: slots for row in range(len(query)) if (slots := sink.slots_wanted(row)) is not None
        }
        d_query = d_key = d_value = None
        # Without further slots the own call has no gradients for the memory, and in the lowest
        # layer with anything trained nothing else has gradients.
        if layout.has_further or any(ctx.needs_input_grad[:3]):
            own_keys = layout.pack_own(key, memory_key), layout.pack_own(value, memory_value)
            d_query, *packed = flash_backward(
                grad, queries, *own_keys, out, lse, layout.own, True, scaling
            )
            d_key, further_keys = layout.unpack_own(packed[0])
            d_value, further_values = layout.unpack_own(packed[1])
            for row, slots in enumerate(layout.further):
                if slots.stop > slots.start:
                    d_further = further_keys[row], further_values[row]
                    _add(sink, slots, *d_further)
                    _add_wanted(sink, wanted, row, slots, *d_further)
        if layout.common:
            take = layout.take_common
            d_common, d_common_keys, d_common_values = flash_backward(
                take(grad),
                take(queries),
                layout.common_keys(memory_key),
                layout.common_keys(memory_value),
                take(out),
                _join([lse[:, rows] for rows in layout.common_queries], dim=1),
                layout.common_call,
                False,
                scaling,
            )
            for (rows, slots), (part, keys), target in zip(
                layout.common, layout.common_call.rows(), layout.common_queries, strict=True
            ):
                if d_query is not None:
                    d_query[target].add_(d_common[part])
                d_keys, d_values = d_common_keys[keys], d_common_values[keys]
                _add(sink, slots, d_keys, d_values)
                if rows.stop - rows.start == 1:
                    _add_wanted(sink, wanted, rows.start, slots, d_keys, d_values)
        if wanted:  # slots that several rows have in common, row by row
            num_wanted = [len(slots.slots) for slots in wanted.values()]
            call = layout.wanted_call(num_wanted, query.device)
            parts = [slice(row * layout.length, (row + 1) * layout.length) for row in wanted]
            index = torch.cat([slots.slots for slots in wanted.values()])
            _, d_keys, d_values = flash_backward(
                _join([grad[part] for part in parts]),
                _join([queries[part] for part in parts]),
                memory_key[0].transpose(0, 1)[index],
                memory_value[0].transpose(0, 1)[index],
                _join([out[part] for part in parts]),
                _join([lse[:, part] for part in parts], dim=1),
                call,
                False,
                scaling,
            )
            for row, (_, keys) in zip(wanted, call.rows(), strict=True):
                sink.add_row(row, d_keys[keys].transpose(0, 1), d_values[keys].transpose(0, 1))
        if d_query is not None:
            d_query = d_query.unflatten(0, (len(query), -1)).transpose(1, 2)
        d_memory = (None, None) if totals is None else totals.sums
        return d_query, d_key, d_value, *d_memory, None, None, None


class _Totals:
    """The sink of a call without one: the gradients of the memory for autograd."""

    def __init__(self, *memory: Tensor) -> None:
        self.sums = tuple(torch.zeros_like(kv) for kv in memory)

    def add_rows(self, slots: slice, *grads: Tensor) -> None:
        for total, grad in zip(self.sums, grads, strict=True):
            total[:, :, slots].add_(grad)

    def slots_wanted(self, row: int) -> None:
        return None


def _add(sink: Any, slots: slice, d_keys: Tensor, d_values: Tensor) -> None:
    """Adds gradients [n, H, K] at some slots to the sink."""
    sink.add_rows(slots, d_keys.transpose(0, 1)[None], d_values.transpose(0, 1)[None])


def _add_wanted(
    sink: Any,
    wanted: dict[int, WantedSlots],
    row: int,
    slots: slice,
    d_keys: Tensor,
    d_values: Tensor,
) -> None:
    """Hands the row's gradients [n, H, K] at `slots` to the sink, if all its wanted slots are
    among them, and removes the row from `wanted`."""
    if row in wanted and wanted[row].first >= slots.start:
        index = wanted.pop(row).slots - slots.start
        sink.add_row(row, d_keys[index].transpose(0, 1), d_values[index].transpose(0, 1))


def _join(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenates the parts; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


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
            wanted = sink.slots_wanted(row)
            if wanted is not None:
                slots = wanted.slots
                sink.add_row(row, d_keys[row][:, slots], d_values[row][:, slots])
        return None, None, None, None, None
