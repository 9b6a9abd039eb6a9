"""The chunks of one document, divided over the processes of a group.

Shapes: C chunks of the document, W processes, n = ceil(C / W) chunks of one process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uiollms.distributed.groups import Group
from uiollms.kernels.devices import to_device


class Division:
    """One document, divided over a group. Every process encodes n chunks, `local_chunks`.

    Chunks whose gradients the encoder needs (`with_gradient`) are dealt out first, so that their
    work too is divided evenly. If the group does not divide C, two processes encode some of the
    chunks. Only the first of the two owns such a chunk and contributes to its gradient; the other
    process would otherwise be idle.

    local_chunks: the chunks that this process encodes, ascending; owned_chunks: those of them that
    it owns; gathered_index [C]: the row of chunk s in the concatenation of all processes' chunks.
    """

    def __init__(self, group: Group, num_chunks: int, with_gradient: Sequence[int]) -> None:
        self.group = group
        first = set(with_gradient)
        order = [*with_gradient, *(s for s in range(num_chunks) if s not in first)]
        each = -(-num_chunks // group.size)
        chunks_of_rank = [
            sorted(order[i % num_chunks] for i in range(rank, each * group.size, group.size))
            for rank in range(group.size)
        ]
        owner = {s: i % group.size for i, s in enumerate(order)}
        self.local_chunks = chunks_of_rank[group.rank]
        self.owned_chunks = {s for s in self.local_chunks if owner[s] == group.rank}
        self.gathered_index = torch.tensor(
            [owner[s] * each + chunks_of_rank[owner[s]].index(s) for s in range(num_chunks)],
            dtype=torch.int64,
        )

    def gather(self, local: Tensor) -> Tensor:
        """Gathers one entry for each chunk: [n, ...] in the order of `local_chunks` -> [C, ...]."""
        if self.group.size == 1:
            return local
        return self.group.gather(local)[to_device(self.gathered_index, local.device)]

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """Sums [C, ...] over the group and returns the sums of `local_chunks`, [n, ...]. Chunks
        that another process owns get zeros."""
        if self.group.size == 1:
            return whole
        dealt = whole.new_zeros(self.group.size * len(self.local_chunks), *whole.shape[1:])
        dealt[to_device(self.gathered_index, whole.device)] = whole
        return self.group.reduce_scatter(dealt)
