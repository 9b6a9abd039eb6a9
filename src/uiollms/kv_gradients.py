"""Where the decoder pass of a training step ends: gradients summed at the keys and values of a document's memories.

Shapes: N rows, C chunks, B rows of a batch, n chunks of this process, m num_memory, M = C * m slots, M' of them that a batch
reads, L layers, H key/value heads, K head size.
Source: UIO-LLMs section 3.3; the two passes: GradCache (Gao et al. 2021, arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from uiollms.apart import Receiver, SharedPrefix
from uiollms.distributed import Division
from uiollms.model import LayerMemory, MemoryLM
from uiollms.tasks import Row, Sample


class KVGradients:
    """The leaves of the decoder pass, and the gradients that arrive there: of every loss alike (`total`) and of loss t
    times W[t, s] at memory s (`weighted`; the same tensors where W is all ones). Sums are kept in float32 or wider."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], weights: Tensor, sample: Sample, num_memory: int) -> None:
        self.leaves = [kv.requires_grad_() for kv in (*keys, *values)]  # 2L x [1, H, M, K]
        self.dtype = torch.promote_types(keys[0].dtype, torch.float32) if keys else torch.float32
        self.num_memory = num_memory
        self.weights = weights  # [N, at least C]
        all_ones = all(bool((weights[t, : row.num_memories] == 1).all()) for t, row in enumerate(sample.rows))
        self.total = [torch.zeros_like(kv, dtype=self.dtype, requires_grad=False) for kv in self.leaves]
        self.weighted = self.total
        if not all_ones:
            self.weighted = [torch.zeros_like(kv) for kv in self.total]

    def prefix(self, batch: Sequence[int], rows: Sequence[Row], apart: bool) -> Leaves:
        """What a batch of rows reads: the slots that any of them sees, one set for all (who sees which is said elsewhere)."""
        widest = max(row.num_memories for row in rows)
        slot_weights = self.weights[list(batch), :widest].repeat_interleave(self.num_memory, dim=1)  # [B, M']
        on = {device: slot_weights.to(device, self.dtype, non_blocking=True) for device in {leaf.device for leaf in self.leaves}}
        return Leaves(self, on, apart)

    def backward_projection(
        self, model: MemoryLM, memory: LayerMemory, division: Division, seeds: Sequence[int] | None
    ) -> LayerMemory:
        """Step 3: `total` to the decoder's LoRA, `weighted` to the memories, whose gradients are returned."""
        if not memory:
            return []
        lora = [p for name, p in model.decoder.named_parameters() if "lora" in name]
        total = [division.scatter_sum(self._by_chunk(g)) for g in self.total]  # 2L x [n, H, m, K]
        weighted = total
        if self.weighted is not self.total:
            weighted = [division.scatter_sum(self._by_chunk(g)) for g in self.weighted]
        grads = [torch.empty_like(layer) for layer in memory]
        for batch in batched(range(len(division.own)), model.chunk_batch):
            part = slice(batch[0], batch[-1] + 1)
            leaves = [layer[part].detach().requires_grad_() for layer in memory]
            with torch.enable_grad():
                keys, values = model.project(leaves, [division.own[i] for i in batch], pick(seeds, batch))
            outputs = [*keys, *values]
            arrived = [g[part].to(out) for g, out in zip(total, outputs, strict=True)]
            if weighted is total:
                torch.autograd.backward(outputs, arrived, inputs=[*lora, *leaves])
                arrived = [leaf.grad for leaf in leaves]  # type: ignore[misc]
            else:
                torch.autograd.backward(outputs, arrived, inputs=lora, retain_graph=True)
                arrived = [g[part].to(out) for g, out in zip(weighted, outputs, strict=True)]
                arrived = list(torch.autograd.grad(outputs, leaves, arrived))
            for layer, grad in zip(grads, arrived, strict=True):
                layer[part] = grad
        return grads

    def _by_chunk(self, grad: Tensor) -> Tensor:
        """[1, H, M, K] -> [C, H, m, K]"""
        _, heads, _, size = grad.shape
        return grad.view(heads, -1, self.num_memory, size).transpose(0, 1)


class Leaves(SharedPrefix):
    """The leaves in front of a batch of rows whose gradients go to the sums. slot_weights: [B, M'] on every device."""

    def __init__(self, sums: KVGradients, slot_weights: dict[torch.device, Tensor], apart: bool) -> None:
        half = len(sums.leaves) // 2
        super().__init__(sums.leaves[:half], sums.leaves[half:], apart)
        self.sums, self.slot_weights = sums, slot_weights

    def places(self, layer: int) -> tuple[int, int]:
        """Where a layer's keys and values stand among the leaves and the sums."""
        return layer, layer + len(self.keys)

    def handed_out(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        keys, values = (_FanOut.apply(self.sums.leaves[i], self, i) for i in self.places(layer))
        return keys, values

    def receiver(self, layer: int) -> Receiver:
        def receive(row: int, *grads: Tensor) -> None:
            for i, grad in zip(self.places(layer), grads, strict=True):
                self.arrive(i, slice(row, row + 1), grad)

        return receive

    def arrive(self, i: int, rows: slice, grad: Tensor) -> None:
        """Add the gradients [B', H, n, K] of some rows to sum number i, and to the weighted one."""
        total, weighted, slots = self.sums.total[i], self.sums.weighted[i], grad.shape[2]
        grad = grad.to(total.dtype)
        total[0, :, :slots] += grad.sum(0)
        if weighted is not total:
            weights = self.slot_weights[total.device][rows, :slots]
            weighted[0, :, :slots] += torch.einsum("bs,bhsk->hsk", weights, grad)


class _FanOut(torch.autograd.Function):
    """Leaf number i, [1, H, M, K], handed to B rows, [B, H, M', K] with M' <= M; backward adds the rows' gradients to the sums
    and returns nothing, so that no row's gradient outlives the layer."""

    @staticmethod
    def forward(ctx, leaf, leaves, i):  # type: ignore[no-untyped-def]
        ctx.arrive = partial(leaves.arrive, i, slice(None))
        rows, slots = leaves.slot_weights[leaf.device].shape
        return leaf[:, :, :slots].expand(rows, -1, -1, -1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        ctx.arrive(grad)
        return None, None, None


def batched(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def pick(seeds: Sequence[int] | None, chunks: Sequence[int]) -> list[int] | None:
    return None if seeds is None else [seeds[c] for c in chunks]
