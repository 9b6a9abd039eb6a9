"""Parts of tensors and lists, taken and written without waiting for a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from uiollms.kernels.devices import to_device


def batched(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def take_rows(tensor: Tensor, places: Sequence[int]) -> Tensor:
    """Some entries of the first dimension, without waiting for the device."""
    return tensor[to_device(torch.tensor(places, dtype=torch.int64), tensor.device)]


def write_rows(whole: Sequence[Tensor], places: Sequence[int], parts: Sequence[Tensor]) -> None:
    """Write parts [n, ...] at n places of the first dimension, tensor by tensor."""
    numbers = torch.tensor(places, dtype=torch.int64)
    for tensor, part in zip(whole, parts, strict=True):
        tensor.index_copy_(0, to_device(numbers, tensor.device), part)


def select_seeds(seeds: Sequence[int] | None, chunks: Sequence[int]) -> list[int] | None:
    return None if seeds is None else [seeds[c] for c in chunks]
