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


def take_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Returns the entries `rows` of the first dimension, in that order."""
    return tensor[to_device(torch.tensor(rows, dtype=torch.int64), tensor.device)]


def write_rows(tensors: Sequence[Tensor], rows: Sequence[int], parts: Sequence[Tensor]) -> None:
    """Writes each part [n, ...] to the n entries `rows` of its tensor's first dimension."""
    index = torch.tensor(rows, dtype=torch.int64)
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.index_copy_(0, to_device(index, tensor.device), part)


def select_seeds(seeds: Sequence[int] | None, chunks: Sequence[int]) -> list[int] | None:
    """Returns the dropout seeds of some chunks, or None where there is no dropout."""
    return None if seeds is None else [seeds[c] for c in chunks]
