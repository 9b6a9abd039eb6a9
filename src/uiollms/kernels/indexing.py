"""Batches of indices, and rows of tensors read and written without waiting for a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from uiollms.kernels.devices import to_device


def batched(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yields the items in batches of `size`; the last batch may be smaller."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def take_rows(tensors: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    """Returns the entries `rows` of each tensor's first dimension, in that order; views of the
    tensors where the rows are consecutive."""
    if (part := as_slice(rows)) is not None:
        return [tensor[part] for tensor in tensors]
    index = _RowIndex(rows)
    return [tensor[index.on(tensor.device)] for tensor in tensors]


def write_rows(tensors: Sequence[Tensor], rows: Sequence[int], parts: Sequence[Tensor]) -> None:
    """Writes each part [n, ...] to the n entries `rows` of its tensor's first dimension."""
    if (part := as_slice(rows)) is not None:
        for tensor, values in zip(tensors, parts, strict=True):
            tensor[part] = values
        return
    index = _RowIndex(rows)
    for tensor, values in zip(tensors, parts, strict=True):
        tensor.index_copy_(0, index.on(tensor.device), values)


def as_slice(rows: Sequence[int]) -> slice | None:
    """Returns the rows as a slice where they are consecutive and ascending, else None. A slice
    needs no copy of an index to a device."""
    first = rows[0] if rows else 0
    stop = first + len(rows)
    return slice(first, stop) if list(rows) == list(range(first, stop)) else None


class _RowIndex:
    """The numbers of rows as an index tensor, copied to every device once."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.index = torch.tensor(rows, dtype=torch.int64)
        self.copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        if device not in self.copies:
            self.copies[device] = to_device(self.index, device)
        return self.copies[device]


def select_seeds(seeds: Sequence[int] | None, chunks: Sequence[int]) -> list[int] | None:
    """Returns the dropout seeds of some chunks, or None where there is no dropout."""
    return None if seeds is None else [seeds[c] for c in chunks]
