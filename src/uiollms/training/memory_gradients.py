"""Where the decoder pass of a training step ends: gradients summed at the keys and values of a
document's memories.

Shapes: N rows, C chunks, B rows of a batch, n chunks of this process, m num_memory, M = C * m
slots, M' of them that a batch reads, s of those that one row reads with a weight, L layers, H
key/value heads, K head size. Source: UIO-LLMs section 3.3; the two passes: GradCache (Gao et al.
2021, arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from uiollms.data.sample import Row, Sample
from uiollms.distributed.division import Division
from uiollms.kernels.devices import to_device
from uiollms.kernels.indexing import batched, select_seeds, take_rows, write_rows
from uiollms.kernels.memory_attention import GradientSink
from uiollms.model.memory_lm import LayerMemory, MemoryLM
from uiollms.model.passes import projection_batch
from uiollms.model.state import SharedPrefix


class MemoryGradients:
    """The leaves of the decoder pass, and the gradients that arrive there: of every loss alike
    (`total`) and of loss t times W[t, s] at memory s, of the chunks `needed` alone (`weighted`;
    the same tensors as `total` where W is all ones). Sums are kept in float32 or wider.

    needed: the chunks, ascending, at which some weight is not zero.
    """

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        weights: Tensor,
        sample: Sample,
        num_memory: int,
        needed: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self.leaves = [kv.requires_grad_() for kv in (*keys, *values)]  # 2L x [1, H, M, K]
        self.dtype = dtype  # of the sums
        self.num_memory = num_memory
        self.weights = weights  # [N, at least C]
        self.needed = list(needed)
        self.chunk_numbers = sample.chunk_numbers
        all_ones = all(
            bool((weights[t, row.memories.start : row.memories.stop] == 1).all())
            for t, row in enumerate(sample.rows)
        )
        self.total = [
            torch.zeros_like(kv, dtype=self.dtype, requires_grad=False) for kv in self.leaves
        ]
        self.weighted = self.total
        if not all_ones:
            slots = len(self.needed) * num_memory
            self.weighted = [kv.new_zeros(1, kv.shape[1], slots, kv.shape[3]) for kv in self.total]

    def prefix(self, batch: Sequence[int], rows: Sequence[Row], in_place: bool) -> MemoryLeaves:
        """What a batch of rows reads: the slots that any of them sees, one set for all (who sees
        which is said elsewhere)."""
        return MemoryLeaves(self, batch, [row.memories for row in rows], in_place)

    def backward_projection(
        self,
        model: MemoryLM,
        memory: LayerMemory,
        division: Division,
        wanted: Sequence[int],
        seeds: Sequence[int] | None,
    ) -> LayerMemory:
        """Step 3: `total` to the decoder's LoRA, `weighted` to the memories. wanted: which of
        this process's chunks are needed here; the gradients of their memories are returned, L x
        [len(wanted), m, D]."""
        if not memory:
            return []
        lora = [p for name, p in model.decoder.named_parameters() if "lora" in name]
        total = [
            division.reduce_scatter(self._by_chunk(g)) for g in self.total
        ]  # 2L x [n, H, m, K]
        for batch in batched(
            range(len(division.local_chunks) if lora else 0), projection_batch(model)
        ):
            part = slice(batch[0], batch[-1] + 1)
            outputs = self._projected(
                model, [layer[part] for layer in memory], division, batch, seeds
            )
            arrived = [g[part].to(out) for g, out in zip(total, outputs, strict=True)]
            torch.autograd.backward(outputs, arrived, inputs=lora)
        if self.weighted is self.total:
            weighted = [take_rows(g, wanted) for g in total]
        else:
            del total
            weighted = [self._to_owner(self._by_chunk(g), division, wanted) for g in self.weighted]
        grads = [layer.new_empty(len(wanted), *layer.shape[1:]) for layer in memory]
        for places in batched(range(len(wanted)), projection_batch(model)):
            part, batch = slice(places[0], places[-1] + 1), [wanted[j] for j in places]
            leaves = [take_rows(layer, batch).requires_grad_() for layer in memory]
            outputs = self._projected(model, leaves, division, batch, seeds)
            arrived = [g[part].to(out) for g, out in zip(weighted, outputs, strict=True)]
            torch.autograd.backward(outputs, arrived, inputs=leaves)
            for layer, leaf in zip(grads, leaves, strict=True):
                layer[part] = leaf.grad  # type: ignore[assignment]
        return grads

    def _projected(
        self,
        model: MemoryLM,
        memory: LayerMemory,
        division: Division,
        batch: Sequence[int],
        seeds: Sequence[int] | None,
    ) -> list[Tensor]:
        """The keys, then the values, of some of this process's chunks, with their graph."""
        with torch.enable_grad():
            numbers = [self.chunk_numbers[division.local_chunks[i]] for i in batch]
            keys, values = model.project(memory, numbers, select_seeds(seeds, batch))
        return [*keys, *values]

    def _to_owner(self, grad: Tensor, division: Division, wanted: Sequence[int]) -> Tensor:
        """A sum at all needed chunks, [len(needed), H, m, K] -> over the group, at those of this
        process."""
        if division.group.size == 1:
            return grad
        whole = grad.new_zeros(len(division.gathered_index), *grad.shape[1:])
        write_rows([whole], self.needed, [grad])
        return take_rows(division.reduce_scatter(whole), wanted)

    def _by_chunk(self, grad: Tensor) -> Tensor:
        """[1, H, M, K] -> [C, H, m, K]"""
        _, heads, _, size = grad.shape
        return grad.view(heads, -1, self.num_memory, size).transpose(0, 1)


class RowWeights(NamedTuple):
    """The slots that one row reads with a weight that is not zero: where they stand among all
    slots and among the weighted sums, [s] int64 each, and their weights, [s, 1]."""

    slots: Tensor
    places: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> RowWeights:
        return RowWeights(
            to_device(self.slots, device),
            to_device(self.places, device),
            to_device(self.weights, device),
        )


class MemoryLeaves(SharedPrefix):
    """The leaves in front of a batch of rows whose gradients go to the sums. memories: which
    chunks' each row reads."""

    def __init__(
        self, sums: MemoryGradients, batch: Sequence[int], memories: Sequence[range], in_place: bool
    ) -> None:
        half = len(sums.leaves) // 2
        super().__init__(sums.leaves[:half], sums.leaves[half:], in_place)
        self.sums, self.rows, self.slots = (
            sums,
            len(batch),
            max(read.stop for read in memories) * sums.num_memory,
        )
        self.shares: dict[torch.device, list[RowWeights | None]] = {}
        if sums.weighted is not sums.total:
            shares = [self._share(row, read) for row, read in zip(batch, memories, strict=True)]
            for device in {leaf.device for leaf in sums.leaves}:
                self.shares[device] = [share and share.to(device) for share in shares]

    def _share(self, row: int, memories: range) -> RowWeights | None:
        """Of the sample's row number `row`, which reads these chunks' memories."""
        m, weights = self.sums.num_memory, self.sums.weights[row].tolist()
        read = [
            (place, chunk)
            for place, chunk in enumerate(self.sums.needed)
            if chunk in memories and weights[chunk]
        ]
        if not read:
            return None
        places, chunks = torch.tensor(read).T
        each = torch.tensor(
            [weights[chunk] for _, chunk in read], dtype=self.sums.dtype
        ).repeat_interleave(m)
        at_slots, at_places = (
            (numbers[:, None] * m + torch.arange(m)).flatten() for numbers in (chunks, places)
        )
        return RowWeights(at_slots, at_places, each[:, None])

    def places(self, layer: int) -> tuple[int, int]:
        """Where a layer's keys and values stand among the leaves and the sums."""
        return layer, layer + len(self.keys)

    def expand_rows(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        keys, values = (_FanOut.apply(self.sums.leaves[i], self, i) for i in self.places(layer))
        return keys, values

    def sink(self, layer: int) -> GradientSink:
        return _Layer(self, layer)

    def add(self, i: int, slots: slice, grad: Tensor) -> None:
        """Gradients [B', H, n, K] of some rows to sum number i."""
        total, grad = self.sums.total[i], grad.to(self.sums.dtype)
        total[0, :, slots] += grad[0] if len(grad) == 1 else grad.sum(0)

    def share(self, i: int, row: int) -> RowWeights | None:
        """What row number `row` of the batch adds to weighted sum number i."""
        return self.shares[self.sums.weighted[i].device][row] if self.shares else None

    def add_weighted(self, i: int, share: RowWeights, grad: Tensor) -> None:
        """A row's gradients [H, s, K] at its share's slots to weighted sum number i."""
        self.sums.weighted[i][0, :, share.places] += share.weights * grad.to(self.sums.dtype)


@dataclass(frozen=True)
class _Layer:
    """One layer's leaves, as the `GradientSink` of an attention to them where they lie."""

    leaves: MemoryLeaves
    layer: int

    def add_rows(self, slots: slice, *grads: Tensor) -> None:
        for i, grad in zip(self.leaves.places(self.layer), grads, strict=True):
            self.leaves.add(i, slots, grad)

    def slots_wanted(self, row: int) -> Tensor | None:
        share = self.leaves.share(self.layer, row)
        return None if share is None else share.slots

    def add_row(self, row: int, *grads: Tensor) -> None:
        for i, grad in zip(self.leaves.places(self.layer), grads, strict=True):
            share = self.leaves.share(i, row)
            assert share is not None
            self.leaves.add_weighted(i, share, grad[0])


class _FanOut(torch.autograd.Function):
    """Leaf number i, [1, H, M, K], handed to B rows, [B, H, M', K] with M' <= M; backward adds
    the rows' gradients to the sums and returns nothing, so that no row's gradient outlives the
    layer."""

    @staticmethod
    def forward(ctx, leaf, leaves, i):  # type: ignore[no-untyped-def]
        ctx.leaves, ctx.i = leaves, i
        return leaf[:, :, : leaves.slots].expand(leaves.rows, -1, -1, -1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        leaves, i = ctx.leaves, ctx.i
        leaves.add(i, slice(0, grad.shape[2]), grad)
        for row, part in enumerate(grad):
            share = leaves.share(i, row)
            if share is not None:
                leaves.add_weighted(i, share, part[:, share.slots])
        return None, None, None
