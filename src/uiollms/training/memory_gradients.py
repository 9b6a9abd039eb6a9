"""The sums of gradients at a document's memories, where the decoder pass of a training step ends.

Shapes: N rows, C chunks, B rows of a batch, n chunks of this process, m num_memory, M = C * m
slots, s slots at which one row's weights are not zero, L layers, H key/value heads, K head size,
D hidden size. Source: UIO-LLMs section 3.3; the two passes: GradCache (Gao et al.
2021, arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from uiollms.data.sample import Sample
from uiollms.distributed.division import Division
from uiollms.kernels.devices import upload
from uiollms.kernels.indexing import batched, select_seeds, take_rows, write_rows
from uiollms.kernels.memory_attention import WantedSlots
from uiollms.model.memory_lm import LayerMemory, MemoryLM
from uiollms.model.passes import projection_batch
from uiollms.model.state import SharedPrefix


class MemoryGradients:
    """The keys and values of a sample's memories as leaves of the decoder's graphs, and two sums
    of the gradients that arrive there.

    total: the gradients of all losses, for the decoder's LoRA, 2L x [1, H, M, K], keys before
    values. weighted: the gradients of loss t times W[t, c] at the memory of chunk c, for the
    encoder, 2L x [1, H, len(with_gradient) * m, K]; if W is all ones, the same tensors as
    `total`. Both are in `dtype`, float32 or wider.

    with_gradient: the chunks, ascending, at which some weight is not zero.
    """

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        weights: Tensor,
        sample: Sample,
        num_memory: int,
        with_gradient: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self.leaves = [kv.requires_grad_() for kv in (*keys, *values)]  # 2L x [1, H, M, K]
        self.sample, self.num_memory, self.dtype = sample, num_memory, dtype
        self.weights = weights  # [N, C]
        self.with_gradient = list(with_gradient)
        self.total = [torch.zeros_like(kv, dtype=dtype, requires_grad=False) for kv in self.leaves]
        self.weighted = self.total
        all_ones = all(
            bool((weights[t, row.memories.start : row.memories.stop] == 1).all())
            for t, row in enumerate(sample.rows)
        )
        if not all_ones:
            slots = len(self.with_gradient) * num_memory
            self.weighted = [kv.new_zeros(1, kv.shape[1], slots, kv.shape[3]) for kv in self.total]

    def prefix(self, batch: Sequence[int], in_place: bool) -> SharedPrefix:
        """Returns the memory that the sample's rows `batch` read, whose gradients go to the sums.
        in_place: see `SharedPrefix`."""
        rows = [self.sample.rows[t] for t in batch]
        num_layers = len(self.leaves) // 2
        keys, values = self.leaves[:num_layers], self.leaves[num_layers:]
        found = [self._row_weights(t) for t in batch]
        devices = {leaf.device for leaf in self.leaves}
        weights = {device: upload_weights(found, device) for device in devices}
        sinks = [
            LayerSink(
                (self.total[i], self.total[num_layers + i]),
                (self.weighted[i], self.weighted[num_layers + i]),
                weights[keys[i].device],
            )
            for i in range(num_layers)
        ]
        num_slots = max(row.memories.stop for row in rows) * self.num_memory
        return SharedPrefix(keys, values, in_place, num_slots, sinks)

    def _row_weights(self, t: int) -> RowWeights | None:
        """The weights of row t that are not zero, on the CPU. None if there are none, and where W
        is all ones, because `total` is the only sum then."""
        if self.weighted is self.total:
            return None
        m, weights, memories = (
            self.num_memory,
            self.weights[t].tolist(),
            self.sample.rows[t].memories,
        )
        read = [
            (position, chunk)
            for position, chunk in enumerate(self.with_gradient)
            if chunk in memories and weights[chunk]
        ]
        if not read:
            return None
        positions, chunks = torch.tensor(read).T

        def slots_of(numbers: Tensor) -> Tensor:
            return (numbers[:, None] * m + torch.arange(m)).flatten()

        per_chunk = torch.tensor([weights[chunk] for _, chunk in read], dtype=self.dtype)
        return RowWeights(
            WantedSlots(slots_of(chunks), read[0][1] * m),
            slots_of(positions),
            per_chunk.repeat_interleave(m)[:, None],
        )

    def backward_projection(
        self,
        model: MemoryLM,
        memory: LayerMemory,
        division: Division,
        local_with_gradient: Sequence[int],
        seeds: Sequence[int] | None,
    ) -> LayerMemory:
        """Stage 3 of the training step: backpropagates `total` to the decoder's LoRA and `weighted`
        to the memories.

        memory: of this process's chunks, L x [n, m, D]; local_with_gradient: which of them are in
        `with_gradient`. Returns the gradients of the memories of these, L x
        [len(local_with_gradient), m, D].
        """
        if not memory:
            return []
        lora = [p for name, p in model.decoder.named_parameters() if "lora" in name]
        total = [division.reduce_scatter(self._by_chunk(g)) for g in self.total]  # [n, H, m, K]
        for batch in batched(
            range(len(division.local_chunks) if lora else 0), projection_batch(model)
        ):
            part = slice(batch[0], batch[-1] + 1)
            outputs = self._project(
                model, [layer[part] for layer in memory], division, batch, seeds
            )
            arrived = [g[part].to(out) for g, out in zip(total, outputs, strict=True)]
            torch.autograd.backward(outputs, arrived, inputs=lora)
        if self.weighted is self.total:
            weighted = take_rows(total, local_with_gradient)
        else:
            del total
            weighted = [
                self._to_owners(self._by_chunk(g), division, local_with_gradient)
                for g in self.weighted
            ]
        grads = [layer.new_empty(len(local_with_gradient), *layer.shape[1:]) for layer in memory]
        for positions in batched(range(len(local_with_gradient)), projection_batch(model)):
            part = slice(positions[0], positions[-1] + 1)
            batch = [local_with_gradient[j] for j in positions]
            leaves = [rows.requires_grad_() for rows in take_rows(memory, batch)]
            outputs = self._project(model, leaves, division, batch, seeds)
            arrived = [g[part].to(out) for g, out in zip(weighted, outputs, strict=True)]
            torch.autograd.backward(outputs, arrived, inputs=leaves)
            for layer, leaf in zip(grads, leaves, strict=True):
                layer[part] = leaf.grad  # type: ignore[assignment]
        return grads

    def _project(
        self,
        model: MemoryLM,
        memory: LayerMemory,
        division: Division,
        batch: Sequence[int],
        seeds: Sequence[int] | None,
    ) -> list[Tensor]:
        """Projects the memories of some of this process's chunks with a graph: the keys, then the
        values."""
        with torch.enable_grad():
            numbers = [self.sample.chunk_numbers[division.local_chunks[i]] for i in batch]
            keys, values = model.project(memory, numbers, select_seeds(seeds, batch))
        return [*keys, *values]

    def _to_owners(
        self, grad: Tensor, division: Division, local_with_gradient: Sequence[int]
    ) -> Tensor:
        """Sums [len(with_gradient), H, m, K] over the group. Returns the sums at this process's
        chunks, [len(local_with_gradient), H, m, K]."""
        if division.group.size == 1:
            return grad
        whole = grad.new_zeros(len(division.gathered_index), *grad.shape[1:])
        write_rows([whole], self.with_gradient, [grad])
        return take_rows([division.reduce_scatter(whole)], local_with_gradient)[0]

    def _by_chunk(self, grad: Tensor) -> Tensor:
        """[1, H, M, K] -> [C, H, m, K]"""
        _, heads, _, size = grad.shape
        return grad.view(heads, -1, self.num_memory, size).transpose(0, 1)


class RowWeights(NamedTuple):
    """The slots that one row reads with a weight that is not zero: their indices in `total` and
    in `weighted`, [s] int64 each, and their weights [s, 1]."""

    slots: WantedSlots
    weighted_slots: Tensor
    weights: Tensor


def upload_weights(
    rows: Sequence[RowWeights | None], device: torch.device
) -> list[RowWeights | None]:
    """Returns the weights of rows on `device`, copied together (see `upload`)."""
    tensors = [t for row in rows if row for t in (row.slots.slots, *row[1:])]
    copies = iter(upload(tensors, device))
    return [
        row and RowWeights(WantedSlots(next(copies), row.slots.first), next(copies), next(copies))
        for row in rows
    ]


class LayerSink(NamedTuple):
    """Receives the gradients of one layer's keys and values, as a `GradientSink`, and adds them
    to the layer's two sums.

    total, weighted: of the keys and of the values, see `MemoryGradients`; rows: the weights of
    every row of the batch, None where its gradients do not reach `weighted`.
    """

    total: tuple[Tensor, Tensor]
    weighted: tuple[Tensor, Tensor]
    rows: list[RowWeights | None]

    def add_rows(self, slots: slice, d_keys: Tensor, d_values: Tensor) -> None:
        for total, grad in zip(self.total, (d_keys, d_values), strict=True):
            # The sum is in the dtype of `total`. `+=` would then copy the slots to themselves.
            total[0, :, slots].add_(grad[0] if len(grad) == 1 else grad.sum(0, dtype=total.dtype))

    def slots_wanted(self, row: int) -> WantedSlots | None:
        weights = self.rows[row]
        return None if weights is None else weights.slots

    def add_row(self, row: int, d_keys: Tensor, d_values: Tensor) -> None:
        weights = self.rows[row]
        assert weights is not None
        for weighted, grad in zip(self.weighted, (d_keys, d_values), strict=True):
            weighted[0].index_add_(1, weights.weighted_slots, weights.weights * grad)
