"""Where the decoder pass of a training step ends: gradients summed at the keys and values of a document's memories.

Shapes: N rows, C chunks, B rows of a batch, n chunks of this process, m num_memory, M = C * m slots, M' of them that a batch
reads, L layers, H key/value heads, K head size.
Source: UIO-LLMs section 3.3; the two passes: GradCache (Gao et al. 2021, arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from uiollms.distributed import Division
from uiollms.memory import Prefix
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

    def prefix(self, batch: Sequence[int], rows: Sequence[Row]) -> Prefix:
        """What a batch of rows reads: the slots that any of them sees, handed to all (masks hide the rest)."""
        widest = max(row.num_memories for row in rows)
        slot_weights = self.weights[list(batch), :widest].repeat_interleave(self.num_memory, dim=1)  # [B, M']
        on = {device: slot_weights.to(device, self.dtype, non_blocking=True) for device in {leaf.device for leaf in self.leaves}}
        fanned = [
            [_FanOut.apply(leaf, total, weighted, on[leaf.device])]
            for leaf, total, weighted in zip(self.leaves, self.total, self.weighted, strict=True)
        ]
        half = len(fanned) // 2
        return Prefix(fanned[:half], fanned[half:])

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
        grads: list[LayerMemory] = []
        for batch in batched(range(len(division.own)), model.chunk_batch):
            part = slice(batch[0], batch[-1] + 1)
            leaves = [layer[part].detach().requires_grad_() for layer in memory]
            with torch.enable_grad():
                keys, values = model.project(leaves, [division.own[i] for i in batch], pick(seeds, batch))
            outputs = [*keys, *values]
            arrived = [g[part].to(out) for g, out in zip(total, outputs, strict=True)]
            if weighted is total:
                torch.autograd.backward(outputs, arrived, inputs=[*lora, *leaves])
                grads.append([leaf.grad for leaf in leaves])  # type: ignore[misc]
            else:
                torch.autograd.backward(outputs, arrived, inputs=lora, retain_graph=True)
                arrived = [g[part].to(out) for g, out in zip(weighted, outputs, strict=True)]
                grads.append(list(torch.autograd.grad(outputs, leaves, arrived)))
        return [torch.cat(parts) for parts in zip(*grads, strict=True)]

    def _by_chunk(self, grad: Tensor) -> Tensor:
        """[1, H, M, K] -> [C, H, m, K]"""
        _, heads, _, size = grad.shape
        return grad.view(heads, -1, self.num_memory, size).transpose(0, 1)


class _FanOut(torch.autograd.Function):
    """One leaf [1, H, M, K] handed to B rows, [B, H, M', K] with M' <= M; backward adds the plain and the weighted sum
    of the rows' gradients to their accumulators and returns nothing, so that no row's gradient outlives the layer."""

    @staticmethod
    def forward(ctx, leaf, total, weighted, slot_weights):  # type: ignore[no-untyped-def]
        ctx.sums = total, weighted
        ctx.slot_weights = slot_weights
        rows, slots = slot_weights.shape
        return leaf[:, :, :slots].expand(rows, -1, -1, -1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        total, weighted = ctx.sums
        slots = grad.shape[2]
        grad = grad.to(total.dtype)
        total[0, :, :slots] += grad.sum(0)
        if weighted is not total:
            weighted[0, :, :slots] += torch.einsum("bs,bhsk->hsk", ctx.slot_weights, grad)
        return None, None, None, None


def batched(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def pick(seeds: Sequence[int] | None, chunks: Sequence[int]) -> list[int] | None:
    return None if seeds is None else [seeds[c] for c in chunks]
