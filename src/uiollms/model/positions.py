"""The position of every token and memory slot, for RoPE.

    encoder   token i of a chunk is at i, slot j after the tokens of its span
    decoder   slot j of chunk c is at c * m + j; the tokens of a row follow the slots that it reads

model/rope.py turns positions into cosines and sines.

Shapes: B rows, T tokens of a row, C chunks, l chunk_size, m num_memory. Source: UIO-LLMs section
3.1 (encoder), 3.2 (decoder).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from uiollms.kernels.devices import to_device


@lru_cache(maxsize=16)
def encoder_positions(chunk_size: int, num_memory: int, device: torch.device) -> Tensor:
    """Returns the positions [1, l + m] int64 of a chunk's tokens and slots: token i is at i, slot
    j at (j + 1) * (l // m).

    l 8, m 2 ->  0 1 2 3 4 5 6 7 | 4 8
    """
    tokens = torch.arange(chunk_size, device=device)
    slots = (torch.arange(num_memory, device=device) + 1) * (chunk_size // num_memory)
    return torch.cat([tokens, slots])[None]


def slot_positions(chunks: Sequence[int], num_memory: int, device: torch.device) -> Tensor:
    """Returns the positions [C, m] int64 of the slots of the chunks with these numbers, as the
    decoder reads them: slot j of chunk c is at c * m + j, in every later row.

    chunks 0 1, m 2 ->  0 1
                        2 3
    """
    first = torch.tensor(chunks)[:, None] * num_memory
    return to_device(first + torch.arange(num_memory), device)


def decoder_positions(
    num_slots: Sequence[int], local_past: int, length: int, device: torch.device
) -> Tensor:
    """Returns the positions [B, T] int64 of the next `length` tokens of every row. They follow the
    row's `num_slots[b]` slots and the `local_past` tokens of its chunk from earlier calls.

    num_slots 0 4, local_past 1, T 3 ->  1 2 3
                                         5 6 7
    """
    first = to_device(torch.tensor(num_slots), device)[:, None] + local_past
    return first + torch.arange(length, device=device)
