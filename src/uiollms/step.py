"""One training step for every estimator, at a memory cost that does not depend on S.

    1  encode all chunks without a graph; turn their memories into keys and values
    2  decode the rows in batches; each backward ends at the keys and values, where two sums are kept: all gradients (for
       the decoder's LoRA) and the W-weighted ones (for the encoder)
    3  one backward through the projections: the first sum to the decoder's LoRA, the second to the memories
    4  encode again, with a graph, only the chunks whose weighted gradient is not zero, and go backward from their memories

Shapes: N rows, C chunks, B rows of a batch, T tokens, m num_memory, M = C * m slots, L layers, H key/value heads,
K head size, D hidden size.
Source: UIO-LLMs section 3.3; the two passes: GradCache (Gao et al. 2021, arXiv 2101.06983).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from uiollms.estimators import Estimator, make_estimator
from uiollms.loss import linear_nll
from uiollms.memory import Prefix
from uiollms.model import LayerMemory, MemoryLM, join_slots
from uiollms.tasks import Row, Sample


class StepResult(NamedTuple):
    """losses [N]: every row's share of the sample's loss; scored [N] int64: its scored tokens; reencoded: the chunks
    that went through the encoder with a graph; nll: the sum of the scored tokens' NLL, in nats, unweighted (a tensor:
    reading it waits for the device)."""

    losses: Tensor
    scored: Tensor
    reencoded: tuple[int, ...]
    nll: Tensor


def gradient_step(
    model: MemoryLM,
    sample: Sample,
    weights: Tensor | None = None,
    *,
    estimator: Estimator | str | None = None,
    rng: random.Random | int | None = None,
    scale: float = 1.0,
    **settings: int | bool,
) -> StepResult:
    """Run the two-pass step on one sample and ADD the gradients of `scale` * loss into `.grad` of the trained
    parameters. The decoder's gradient is exact; the encoder's is weighted by `weights` [N, N] if given, else by a draw
    of `estimator` (an object, or a name with settings `S` and `compensate`; by default the exact gradient) with `rng`."""
    rng = rng if isinstance(rng, random.Random) else random.Random(rng)
    if isinstance(estimator, str):
        estimator = make_estimator(estimator, **settings)  # type: ignore[arg-type]
    estimator = estimator or make_estimator("exact")
    if weights is None:
        weights = estimator.window(len(sample.rows), rng)
    seeds = [rng.getrandbits(62) for _ in sample.chunks] if model.training and model.memory_config.lora_dropout else None

    memory, keys, values = remember(model, sample.chunks, seeds)
    sums = KVGradients(keys, values, weights, model.memory_config.num_memory)
    losses = torch.zeros(len(sample.rows), dtype=sums.dtype, device=keys[-1].device if keys else model.device)
    nll_sum = losses.new_zeros(())

    def weighted_loss(batch: Sequence[int], nll: Tensor, row_of: Tensor) -> Tensor:
        """Book a batch's losses; return their sum."""
        nonlocal nll_sum
        rows = [sample.rows[t] for t in batch]
        per_token = torch.cat([row.token_weights[row.scored] for row in rows]).to(nll)
        losses.index_add_(0, torch.tensor(batch)[row_of].to(nll.device), (nll * per_token).detach().to(losses))
        nll_sum = nll_sum + nll.detach().sum()
        return (nll * per_token).sum()

    for batch in row_batches(sample, model.chunk_batch):
        rows = [sample.rows[t] for t in batch]
        if rows[0].num_memories == 0:  # nothing trainable in sight
            with torch.no_grad():
                weighted_loss(batch, *decode_rows(model, rows, Prefix([[] for _ in keys], [[] for _ in keys])))
        else:
            with torch.enable_grad():
                loss = weighted_loss(batch, *decode_rows(model, rows, sums.prefix(batch, rows)))
                (scale * loss).backward()

    memory_grads = sums.backward_projection(model, memory, seeds)
    columns = None
    if estimator.reads_norms and memory_grads:
        columns = estimator.columns(chunk_norms(memory_grads), rng)
    reencoded = reencode(model, sample, memory_grads, weights, columns, seeds)
    scored = torch.tensor([len(row.scored) for row in sample.rows])
    return StepResult(losses, scored, reencoded, nll_sum)


def batched(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def row_batches(sample: Sample, size: int) -> Iterator[Sequence[int]]:
    """Numbers of the rows that score anything, in batches; rows without memory apart, as they need no graph."""
    scoring = [t for t, row in enumerate(sample.rows) if len(row.scored)]
    yield from batched([t for t in scoring if sample.rows[t].num_memories == 0], size)
    yield from batched([t for t in scoring if sample.rows[t].num_memories > 0], size)


@torch.no_grad()
def remember(
    model: MemoryLM, chunks: Tensor, seeds: Sequence[int] | None = None
) -> tuple[LayerMemory, list[Tensor], list[Tensor]]:
    """All chunks [C, l] of a document, encoded and projected in batches, without a graph: per layer memories [C, m, D],
    keys and values [1, H, M, K]. Three empty lists for a document without complete chunks."""
    memories, all_keys, all_values = [], [], []
    for batch in batched(range(len(chunks)), model.chunk_batch):
        picked = None if seeds is None else [seeds[c] for c in batch]
        memory = model.encode_layers(chunks[list(batch)], picked)
        keys, values = model.project(memory, batch, picked)
        memories.append(memory)
        all_keys.append([join_slots(k, 1) for k in keys])
        all_values.append([join_slots(v, 1) for v in values])
    if not memories:
        return [], [], []
    return (
        [torch.cat(parts) for parts in zip(*memories, strict=True)],
        [torch.cat(parts, dim=2) for parts in zip(*all_keys, strict=True)],
        [torch.cat(parts, dim=2) for parts in zip(*all_values, strict=True)],
    )


def decode_rows(model: MemoryLM, rows: Sequence[Row], prefix: Prefix) -> tuple[Tensor, Tensor]:
    """A batch of rows behind `prefix` -> NLL of their scored tokens [N'], row after row, and the number within the batch
    of the row that each belongs to [N']. Shorter rows are padded at their end, where causality hides it."""
    ids = pad_sequence([row.input_ids for row in rows], batch_first=True)
    targets = pad_sequence([row.targets for row in rows], batch_first=True, padding_value=-100)
    num_slots = [row.num_memories * model.memory_config.num_memory for row in rows]
    repeat = torch.tensor([row.repeat for row in rows]) if any(row.repeat for row in rows) else None
    hidden = model.decode(ids, prefix, num_slots, repeat=repeat)
    row_of, place = (targets != -100).nonzero(as_tuple=True)
    picked = hidden[row_of.to(hidden.device), place.to(hidden.device)]
    head = model.base.lm_head
    device = head.weight.device
    return linear_nll(picked.to(device), head, targets[row_of, place].to(device)), row_of


class KVGradients:
    """The leaves of the decoder pass, and the gradients that arrive there: of every loss alike (`total`) and of loss t
    times W[t, s] at memory s (`weighted`; the same tensors where W is all ones). Sums are kept in float32 or wider."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], weights: Tensor, num_memory: int) -> None:
        self.leaves = [kv.requires_grad_() for kv in (*keys, *values)]  # 2L x [1, H, M, K]
        self.dtype = torch.promote_types(keys[0].dtype, torch.float32) if keys else torch.float32
        self.num_memory = num_memory
        self.weights = weights  # [N, N]
        lower = torch.ones_like(weights).tril(-1)
        self.total = [torch.zeros_like(kv, dtype=self.dtype, requires_grad=False) for kv in self.leaves]
        self.weighted = self.total
        if not torch.equal(weights.tril(-1), lower):
            self.weighted = [torch.zeros_like(kv) for kv in self.total]

    def prefix(self, batch: Sequence[int], rows: Sequence[Row]) -> Prefix:
        """What a batch of rows reads: the slots that any of them sees, handed to all (masks hide the rest)."""
        widest = max(row.num_memories for row in rows)
        slot_weights = self.weights[list(batch), :widest].repeat_interleave(self.num_memory, dim=1)  # [B, M']
        fanned = [
            [_FanOut.apply(leaf, total, weighted, slot_weights)]
            for leaf, total, weighted in zip(self.leaves, self.total, self.weighted, strict=True)
        ]
        half = len(fanned) // 2
        return Prefix(fanned[:half], fanned[half:])

    def backward_projection(
        self, model: MemoryLM, memory: LayerMemory, seeds: Sequence[int] | None
    ) -> LayerMemory:
        """Step 3: `total` to the decoder's LoRA, `weighted` to the memories, whose gradients are returned."""
        if not memory:
            return []
        lora = [p for name, p in model.decoder.named_parameters() if "lora" in name]
        grads: list[LayerMemory] = []
        for batch in batched(range(len(memory[0])), model.chunk_batch):
            leaves = [layer[list(batch)].requires_grad_() for layer in memory]
            picked = None if seeds is None else [seeds[c] for c in batch]
            with torch.enable_grad():
                keys, values = model.project(leaves, batch, picked)
            outputs = [*keys, *values]
            total = [self._of_chunks(g, batch).to(out) for g, out in zip(self.total, outputs, strict=True)]
            if self.weighted is self.total:
                torch.autograd.backward(outputs, total, inputs=[*lora, *leaves])
                grads.append([leaf.grad for leaf in leaves])  # type: ignore[misc]
            else:
                weighted = [self._of_chunks(g, batch).to(out) for g, out in zip(self.weighted, outputs, strict=True)]
                torch.autograd.backward(outputs, total, inputs=lora, retain_graph=True)
                grads.append(list(torch.autograd.grad(outputs, leaves, weighted)))
        return [torch.cat(parts) for parts in zip(*grads, strict=True)]

    def _of_chunks(self, grad: Tensor, chunks: Sequence[int]) -> Tensor:
        """[1, H, M, K] -> the slots of `chunks`, [C', H, m, K]"""
        _, heads, _, size = grad.shape
        return grad.view(heads, -1, self.num_memory, size)[:, chunks[0] : chunks[-1] + 1].transpose(0, 1)


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
            weights = ctx.slot_weights.to(grad)
            weighted[0, :, :slots] += torch.einsum("bs,bhsk->hsk", weights, grad)
        return None, None, None, None


def chunk_norms(memory_grads: LayerMemory) -> list[float]:
    """The Euclidean norm of every chunk's memory gradient over all layers, [C]."""
    squares = [layer.double().pow(2).sum((1, 2)).cpu() for layer in memory_grads]
    return torch.stack(squares).sum(0).sqrt().tolist()


def reencode(
    model: MemoryLM,
    sample: Sample,
    memory_grads: LayerMemory,
    weights: Tensor,
    columns: Sequence[float] | None,
    seeds: Sequence[int] | None,
) -> tuple[int, ...]:
    """Step 4: a forward with a graph and a backward for every chunk that some loss sends gradient to; their numbers."""
    readers = [t for t, row in enumerate(sample.rows) if len(row.scored)]
    needed = []
    for s in range(len(sample.chunks)):
        read = any(weights[t, s] != 0 for t in readers if sample.rows[t].num_memories > s)
        if read and (columns is None or columns[s] != 0):
            needed.append(s)
    for batch in batched(needed, model.chunk_batch):
        picked = None if seeds is None else [seeds[c] for c in batch]
        with torch.enable_grad():
            memory = model.encode_layers(sample.chunks[list(batch)], picked)
        grads = [layer[list(batch)] for layer in memory_grads]
        if columns is not None:
            factors = torch.tensor([columns[c] for c in batch], dtype=torch.float64)[:, None, None]
            grads = [g * factors.to(g) for g in grads]
        torch.autograd.backward(memory, grads)
    return tuple(needed)
